"""Claim: one core encodes 20 million weights a second as Q4_K, with no more error than llama.cpp's own encoder leaves.

    python benchmarks/gguf_encoding.py [--rows 4096] [--cols 4096] [--seed 0]

Needs `qpruner[gguf]`; llama.cpp's encoders take part where `xllamacpp` is installed, called through its C interface.
Normal weights; once all columns count the same, once they count as differently as activations often do (the fourth
power of a uniform number). Errors are weighted root mean squares over those of the weights, rates are of processor time
of one thread, the best of three.
"""

import argparse
import ctypes
import importlib
import json
import time

import gguf
import numpy as np
import torch

from qpruner.math.kquants import KINDS, encode

ROUNDS = 3


def ours(W: torch.Tensor, kind: str, importance: torch.Tensor | None) -> np.ndarray:
    return encode(W, kind, importance).numpy()


def llama_cpp():
    """A function like `ours`, or None."""
    try:
        library = ctypes.CDLL(importlib.import_module("xllamacpp.xllamacpp").__file__)
    except ImportError:
        return None
    call, pointer, count = library.ggml_quantize_chunk, ctypes.c_void_p, ctypes.c_int64
    call.restype, call.argtypes = ctypes.c_size_t, [ctypes.c_int, pointer, pointer, count, count, count, pointer]

    def theirs(W: torch.Tensor, kind: str, importance: torch.Tensor | None) -> np.ndarray:
        qtype = gguf.GGMLQuantizationType[kind]
        out = np.empty(gguf.quant_shape_to_byte_shape(tuple(W.shape), qtype), np.uint8)
        counts = torch.ones(W.shape[1]) if importance is None else importance  # ones do better than none
        call(qtype, W.data_ptr(), out.ctypes.data, 0, *W.shape, counts.data_ptr())
        return out

    return theirs


def measured(encoder, W: torch.Tensor, kind: str, importance: torch.Tensor | None) -> dict:
    encoder(W[:256], kind, importance)
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        coded = encoder(W, kind, importance)
        seconds.append(time.process_time() - start)
    off = torch.from_numpy(gguf.dequantize(coded, gguf.GGMLQuantizationType[kind])) - W
    h = torch.ones(W.shape[1]) if importance is None else importance
    relative = float((h * off**2).sum() / (h * W**2).sum()) ** 0.5
    return {"error": round(relative, 5), "million_weights_per_second": round(W.numel() / min(seconds) / 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(args.seed)
    W = torch.randn(args.rows, args.cols, generator=generator)
    uneven = torch.rand(args.cols, generator=generator) ** 4 + 0.001
    encoders = {"qpruner": ours} | ({"llama.cpp": theirs} if (theirs := llama_cpp()) else {})
    for kind in KINDS:
        for counts, importance in (("all the same", None), ("uneven", uneven)):
            for name, encoder in encoders.items():
                row = {"kind": kind, "columns count": counts, "encoder": name}
                print(json.dumps(row | measured(encoder, W, kind, importance)), flush=True)


if __name__ == "__main__":
    main()
