"""transformers, asked in a process of its own what it computes from an exported folder.

As a program this file imports nothing of qpruner, and nothing else can there.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SECONDS = 1800


@dataclass(frozen=True)
class Answer:
    """What a folder is and computes there.

    model_class: that transformers made of it. logits: of each dtype that was asked for, (tokens, vocabulary), float32.

    corrected: compressed-tensors would not take zero points as it stores them itself, so that was put right there.
    versions: of the packages that loaded it.
    """

    model_class: str
    logits: dict[str, np.ndarray]
    corrected: bool
    versions: dict[str, str]


class Refused(Exception):
    """transformers does not take the folder; the message is what it said."""


def ask(
    folder: Path,
    tokens: Sequence[int],
    *,
    dtypes: Sequence[str] = ("float32",),
    adapter: Path | None = None,
    code: bool = False,
) -> Answer:
    """Logits after each token, by transformers in a fresh process.

    Args:
        dtypes: in which the model is loaded, one after the other. adapter: a PEFT folder to put on it.
        code: Python files in the folder may run; they are ours.
    Raises:
        Refused: the folder does not load, or does not run.
    """
    import torch

    request = dict(folder=str(folder), tokens=list(tokens), dtypes=list(dtypes), code=code)
    request |= {"adapter": adapter and str(adapter), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as place:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{place}/modules"}
        done = subprocess.run(
            [sys.executable, "-I", __file__], input=json.dumps(request).encode(), capture_output=True,
            timeout=SECONDS, check=False, env=environment,
        )  # fmt: skip
    if done.returncode:
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        raise Refused(said[-1].strip() if said else f"the process ended with status {done.returncode}")
    head, _, data = done.stdout.partition(b"\n")
    found = json.loads(head)
    arrays = np.frombuffer(data, np.float32).reshape(len(dtypes), *found["shape"])
    logits = dict(zip(dtypes, arrays, strict=True))
    return Answer(found["class"], logits, found["corrected"], found["versions"])


# --- in the other process --------------------------------------------------------------------------------------------


def main() -> None:
    request = json.load(sys.stdin)
    sys.modules["qpruner"] = None  # from here on its import is an error
    import torch

    torch.set_num_threads(request["threads"])

    found, corrected = [], False
    for name in request["dtypes"]:
        model, now = loaded(request["folder"], getattr(torch, name), code=request["code"])
        corrected |= now
        ids = torch.tensor([request["tokens"]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            if request["adapter"]:
                from peft import PeftModel  # after a pass: compressed-tensors makes plain linears in the first one

                logits = PeftModel.from_pretrained(model, request["adapter"])(input_ids=ids, use_cache=False).logits
        found.append(logits[0].float().numpy())
        model_class = type(model).__name__
        del model
    names = [name for name in ("transformers", "compressed_tensors") if name in sys.modules]
    versions = {name: sys.modules[name].__version__ for name in names}
    head = {"class": model_class, "shape": found[0].shape, "corrected": corrected, "versions": versions}
    sys.stdout.buffer.write(json.dumps(head).encode() + b"\n" + b"".join(array.tobytes() for array in found))


def loaded(folder: str, dtype, *, code: bool = False):
    """The model, and whether compressed-tensors had to be corrected for it."""
    from transformers import AutoModelForCausalLM

    how = dict(dtype=dtype, local_files_only=True, trust_remote_code=code)
    load = lambda: AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    try:
        return load(), False
    except RuntimeError:
        if not zero_points_in(folder) or not importlib.util.find_spec("compressed_tensors"):
            raise
    expect_packed_zeros()
    return load(), True


def zero_points_in(folder: str) -> bool:
    config = json.loads((Path(folder) / "config.json").read_text()).get("quantization_config", {})
    return not all(group["weights"]["symmetric"] for group in config.get("config_groups", {}).values())


def expect_packed_zeros() -> None:
    """Of a model without weights compressed-tensors 0.18 to 0.20 packs the codes and not the zero points, so that it
    does not take the zero points that it packs itself."""
    import torch
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    packed = compressor.compress

    def compress(state, scheme):
        found = packed(state, scheme)
        zeros = found.get("weight_zero_point")
        if zeros is not None and zeros.dtype != torch.int32:
            shape = math.ceil(zeros.shape[0] * scheme.weights.num_bits / 32), zeros.shape[1]
            found["weight_zero_point"] = torch.empty(shape, dtype=torch.int32, device=zeros.device)
        return found

    compressor.compress = staticmethod(compress)


if __name__ == "__main__":
    main()
