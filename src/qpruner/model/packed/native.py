"""Work on codes, compiled for this machine where it has AVX-512 and a C compiler.

Products of few tokens with any 4-bit code book: torch has none for code books whose values are not evenly spaced, and
none of 4 bits for float32 inputs. Codes stay in their order, and results are as exact as float32 sums.

Weights from codes for products of many tokens in bfloat16: the very numbers that torch's operations give, which go over
a tile four times in float32.

Without a compiler nothing is lost but speed.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from qpruner.math.books import book
from qpruner.model.packed.storage import code_width, signed_bytes
from qpruner.plan import QuantSpec

SOURCE = Path(__file__).with_suffix(".c")
BLOCK = 32  # codes looked up together; groups are whole blocks
DECODED = 16  # codes turned into weights together; the same
FLAGS = ("-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mf16c", "-mfma", "-fopenmp", "-shared", "-fPIC")
SMALLEST = 2**20  # weights for which a process runs the compiler, for a second, once
SWITCH = "QPRUNER_NATIVE"  # "0" in the environment: no compiler is run
_without_contents = False


@contextmanager
def without_contents() -> Iterator[None]:
    """Within, tensors have shapes alone: what is compiled gives one of the right shape and reads nothing."""
    global _without_contents
    before, _without_contents = _without_contents, True
    try:
        yield
    finally:
        _without_contents = before


def reads_contents() -> bool:
    return not _without_contents


@cache
def library() -> ctypes.CDLL | None:
    """The compiled products, made once per process."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.environ.get(SWITCH) == "0" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    with tempfile.TemporaryDirectory(prefix="qpruner-") as folder:
        built = Path(folder) / "products.so"
        command = [compiler, *FLAGS, "-o", str(built), str(SOURCE)]
        try:
            if subprocess.run(command, capture_output=True, timeout=60).returncode:
                return None
            # torch's own threads: the name of its OpenMP library is the one that this asks for.
            found = ctypes.CDLL(str(built))
        except (subprocess.TimeoutExpired, OSError):  # a folder that nothing may be run from, for instance
            return None
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    found.product.argtypes = [size, *[pointer] * 7, *[size] * 4]
    found.product.restype = None
    found.decode.argtypes = [*[pointer] * 5, *[size] * 6]
    found.decode.restype = None
    return found


def at_hand(device: torch.device, n_weights: int) -> bool:
    """Whether there is what is compiled, looked for only where a matrix has many weights."""
    return device.type == "cpu" and n_weights >= SMALLEST and library() is not None


def fits(spec: QuantSpec) -> bool:
    whole_blocks = spec.group_size is None or spec.group_size % BLOCK == 0
    return spec.bits == 4 and spec.scale_bits == 16 and whole_blocks


def decodes(spec: QuantSpec) -> bool:
    """Whether `decode` knows the codes: those of up to 4 bits, and signed bytes."""
    whole_blocks = spec.group_size is None or spec.group_size % DECODED == 0
    return whole_blocks and (signed_bytes(spec) or code_width(spec) in (1, 2, 3, 4))


@cache
def values(spec: QuantSpec) -> Tensor:
    """Of the 16 words of 4 bits, whatever lies above the code."""
    return torch.zeros(16) if signed_bytes(spec) else book(spec).float().repeat(16 >> spec.bits)


def product(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec) -> Tensor:
    """x @ W.T in float32 for x of (tokens, d_in).

    Args:
        codes: as they are packed. zeros: one to a byte.
    """
    n, d_in = x.shape
    group = spec.group_size or -(-d_in // BLOCK) * BLOCK
    columns = -(-d_in // group) * group
    wide = pad(x.float(), (0, columns - d_in))
    sums = wide.view(n, -1, group).sum(-1)
    apart = wide.view(n, -1, BLOCK // 2, 2).transpose(2, 3).contiguous()
    y = torch.empty(n, len(codes))
    if _without_contents:
        return y
    parts = [apart, sums, codes, scales, zeros, values(spec), y]
    parts = [None if part is None else part.contiguous() for part in parts]  # kept until the call is over
    pointers = [None if part is None else part.data_ptr() for part in parts]
    library().product(n, *pointers, columns, codes.shape[1], group, len(codes))
    return y


def decode(codes: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec, d_in: int) -> Tensor:
    """The weight of (d_out, d_in), bfloat16.

    Args:
        codes: as they are packed. scales: (d_out, groups), float32. zeros: one to a byte.
    """
    W = torch.empty(len(codes), d_in, dtype=torch.bfloat16)
    if _without_contents:
        return W
    parts = [codes, scales, zeros, values(spec), W]
    parts = [None if part is None else part.contiguous() for part in parts]
    pointers = [None if part is None else part.data_ptr() for part in parts]
    sizes = int(code_width(spec)), d_in, codes.shape[1], spec.group_size or d_in, scales.shape[1], len(codes)
    library().decode(*pointers, *sizes)
    return W
