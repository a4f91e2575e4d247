"""The code books of the grids, and the nearest value of one.

Notation
    ratios  weights divided by the scale of their group           any shape
    z       zero points: the code that stands for zero            broadcast to the ratios
    codes   which value of the book, an index                     as the ratios
"""

from functools import cache

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from qpruner.plan import QuantSpec

# Quantiles of a standard normal between 1 - offset and a half, 2^(b-1) above zero and one less below, and zero; offset
# is the mean of 1 - 2^-(b+1) and 1 - 1 / (2^(b+1) - 2). Source: QLoRA, arXiv:2305.14314, appendix E (4 bits).
NORMAL_FLOAT = {
    2: (-1.0, 0.0, 0.4358181645831157, 1.0),
    3: (
        -1.0, -0.5350227084855379, -0.24693143181157526, 0.0, 0.18333748033548752, 0.3819939543209139,
        0.6229857417143423, 1.0,
    ),
    4: (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
}  # fmt: skip


@cache
def book(spec: QuantSpec) -> Float[Tensor, " values"]:
    """The values that codes stand for before the scale, ascending, float64; with zero points: before those, too."""
    if spec.grid == "normal-float":
        values = NORMAL_FLOAT[spec.bits]
    elif spec.grid == "integer":
        values = range(lowest(spec), lowest(spec) + 2**spec.bits)
    else:
        values = {"ternary": (-1, 0, 1), "binary": (-1, 1)}[spec.grid]
    return torch.tensor(values, dtype=torch.float64)


def lowest(spec: QuantSpec) -> int:
    """The value of code 0 on the integer grid."""
    return -(2 ** (spec.bits - 1)) if spec.symmetric else 0


def reach(spec: QuantSpec) -> int:
    """How many scales wide the range is: up from zero, or from end to end where there are zero points.

    The lowest value of symmetric integers, -2^(b-1), lies outside: only ranges that clip make use of it.
    """
    if spec.grid == "integer":
        return 2 ** (spec.bits - 1) - 1 if spec.symmetric else 2**spec.bits - 1
    return 1


def index_(
    ratios: Float[Tensor, "*shape"], spec: QuantSpec, z: Shaped[Tensor, "*broadcast"] | None = None
) -> UInt8[Tensor, "*shape"]:
    """The code of the nearest value; ratios are spent. Ties go to the even integer, else to the lower value."""
    if spec.grid in ("integer", "ternary"):
        return round_(ratios, spec, z).to(torch.uint8)
    values = book(spec)
    middles = ((values[1:] + values[:-1]) / 2).to(ratios)
    return torch.bucketize(ratios, middles, out_int32=True).to(torch.uint8)


def round_(
    ratios: Float[Tensor, "*shape"], spec: QuantSpec, z: Shaped[Tensor, "*broadcast"] | None = None
) -> Float[Tensor, "*shape"]:
    """`index_` on the evenly spaced grids, as floating-point numbers."""
    values = book(spec)
    ratios.round_().add_(-values[0].item() if z is None else z)
    return ratios.clamp_(0, len(values) - 1)
