"""Which of ggml's types a weight gets, and its bytes in that type.

A type that holds the codes of an artifact as they are is taken where there is one; otherwise the K-type of as many
bits, which rounds the decoded weights once more.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from qpruner.artifact.gguf.codes import SMALL_BLOCK, exact_type
from qpruner.errors import ModelError
from qpruner.math import kquants
from qpruner.plan import QuantSpec

OF_BITS = {1: "Q2_K", 2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0", 16: "F16"}
# Where a row is no multiple of 256; where it is none of 32 either, F16. As llama.cpp's own quantizer does.
INSTEAD = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Type:
    """name: ggml's. wanted: what the spec asks for, if rows of this length have no place in that. exact: codes as they
    are."""

    name: str
    wanted: str | None = None
    exact: bool = False


def type_of(spec: QuantSpec, d_in: int, *, as_coded: bool = False) -> Type:
    """Of a weight with rows of d_in.

    Args:
        as_coded: whether the weight is nothing but its codes.
    """
    if as_coded and (name := exact_type(spec, d_in)):
        return Type(name, exact=True)
    wanted = OF_BITS[spec.bits]
    if wanted == "F16":
        return Type(wanted)
    if d_in % SMALL_BLOCK:
        return Type("F16", wanted)
    if wanted in INSTEAD and d_in % kquants.BLOCK:
        return Type(INSTEAD[wanted], wanted)
    return Type(wanted)


def bytes_in(W: Tensor, name: str, importance: Tensor | None = None) -> np.ndarray:
    """(rows, bytes) of a matrix in any type; (rows, columns) of F16 and F32."""
    import gguf

    if name == "F32":
        return W.float().numpy()
    if name == "F16":
        half = W.half()
        if not half.isfinite().all():
            raise ModelError(f"a weight of {W.abs().max():g} is beyond float16, and GGUF files hold those")
        return half.numpy()
    if name in kquants.KINDS:
        return kquants.encode(W, name, importance).numpy()
    return gguf.quantize(W.float().numpy(), gguf.GGMLQuantizationType[name])


def shape_in(name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], np.dtype]:
    """Of the array that `bytes_in` gives."""
    import gguf

    if name in ("F32", "F16"):
        return shape, np.dtype({"F32": np.float32, "F16": np.float16}[name])
    return gguf.quant_shape_to_byte_shape(shape, gguf.GGMLQuantizationType[name]), np.dtype(np.uint8)
