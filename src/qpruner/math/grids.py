"""Rounding a weight to a small code book, one scale per group of inputs.

Notation
    W       weight, y = x @ W.T                                   (d_out, d_in)
    n       groups of a row, the last of them possibly shorter    ceil(d_in / group_size)
    scales  step of the grid in each group, float16               (d_out, n)
    codes   which value of the code book                          (d_out, d_in)
    q       the rounded weight: book[codes] * scale               (d_out, d_in)

Two grids. `integer`: the code is the value, 8 bits in -127..127, 4 bits in -7..7 stored with 8 added. `normal-float`:
16 values that split a standard normal into slices of equal probability, with an exact zero.
Scales are rounded up to float16 before any code is chosen: no weight is clipped, and the codes are nearest for the
scale that is stored.
"""

import math
from functools import cache

import torch
from jaxtyping import Float, Float16, Int8, Shaped, UInt8
from torch import Tensor

# Source: QLoRA, arXiv:2305.14314, appendix E.
NORMAL_FLOAT_4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
INTEGER_4 = tuple(float(i - 8) for i in range(16))
BOOKS = {(4, "normal-float"): NORMAL_FLOAT_4, (4, "integer"): INTEGER_4}
LARGEST = {(4, "normal-float"): 1.0, (4, "integer"): 7.0, (8, "integer"): 127.0}  # of the values that are used
TILE_WEIGHTS = 2**22  # weights worked on at a time: bounds the temporaries, not the result


@cache
def book(bits: int, grid: str) -> Float[Tensor, " values"]:
    """The values of a 4-bit code book, ascending, float64: a code is an index into it."""
    return torch.tensor(BOOKS[bits, grid], dtype=torch.float64)


def group_count(d_in: int, group_size: int | None) -> int:
    """Scales of one row."""
    return 1 if group_size is None else -(-d_in // group_size)


def tiles(d_out: int, d_in: int) -> list[slice]:
    """Rows to work on together."""
    rows = max(1, TILE_WEIGHTS // max(d_in, 1))
    return [slice(start, start + rows) for start in range(0, d_out, rows)]


def quantize(
    W: Float[Tensor, "out d"], *, bits: int, grid: str, group_size: int | None = None
) -> tuple[UInt8[Tensor, "out d"] | Int8[Tensor, "out d"], Float16[Tensor, "out n"]]:
    """Codes and scales of the grid point nearest to each weight: uint8 codes for 4 bits, int8 for 8.

    Ties go to the even integer, and to the lower of two values of the normal-float book.

    Raises:
        ValueError: no such grid; a weight is not finite; a group needs a scale beyond float16's largest.
    """
    if (bits, grid) not in LARGEST:
        raise ValueError(f"there is no {bits}-bit {grid} grid; there are {sorted(LARGEST)}")
    if group_size is not None and group_size < 1:
        raise ValueError(f"group_size is {group_size}; it counts the weights that share a scale, 1 or more")
    parts = [quantize_rows(W[rows], bits, grid, group_size) for rows in tiles(*W.shape)]
    codes, scales = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(scales)


def quantize_rows(
    W: Float[Tensor, "out d"], bits: int, grid: str, group_size: int | None
) -> tuple[UInt8[Tensor, "out d"] | Int8[Tensor, "out d"], Float16[Tensor, "out n"]]:
    """`quantize` of a few rows at once."""
    if W.dtype != torch.float64:
        W = W.float()
    absmax = torch.cat([group.abs().amax(-1) for group, _ in by_group(W, group_size)], dim=1)
    scales = half_at_least(absmax / LARGEST[bits, grid])
    ratios = W.clone(memory_format=torch.contiguous_format)  # W may be a transpose
    for group, n in by_group(ratios, group_size):
        steps = scales[:, n, None].to(W.dtype)
        group.div_(torch.where(steps == 0, 1, steps))  # a scale of 0: the whole group is zero, and so are its ratios
    if grid == "normal-float":
        values = book(bits, grid)
        middles = ((values[1:] + values[:-1]) / 2).to(W)
        return torch.bucketize(ratios, middles, out_int32=True).to(torch.uint8), scales
    codes = ratios.round_()
    return (codes.to(torch.int8) if bits == 8 else codes.add_(8).to(torch.uint8)), scales


def half_at_least(x: Float[Tensor, "out n"]) -> Float16[Tensor, "out n"]:
    """The smallest float16 that is not below x >= 0."""
    near = x.half()
    # Bits of floats >= 0 ascend with their value. Not torch.nextafter: not every device has it for float16.
    above = (near.view(torch.int16) + 1).view(torch.float16)
    scales = torch.where(near.to(x.dtype) < x, above, near)
    if not torch.isfinite(scales).all():
        largest = x.max().item()
        raise ValueError(
            f"a group of weights needs a scale of {largest:g}, beyond the largest float16, 65504; keep it in 16 bits"
            if math.isfinite(largest)
            else "the weight has values that are not finite"
        )
    return scales


def by_group(values: Shaped[Tensor, "out d"], group_size: int | None) -> list[tuple[Shaped[Tensor, "out m g"], slice]]:
    """Views of `values` with its groups as the second dimension, and which groups those are; the ragged one apart."""
    d = values.shape[1]
    g = d if group_size is None else min(group_size, d)
    whole = d // g if g else 0
    views = [(values[:, : whole * g].unflatten(1, (whole, g)), slice(0, whole))] if whole else []
    if whole * g < d:
        views.append((values[:, whole * g :].unsqueeze(1), slice(whole, whole + 1)))
    return views


def scale_(values: Float[Tensor, "out d"], scales: Float16[Tensor, "out n"], *, group_size: int | None) -> None:
    """Multiply every value by the scale of its group, in place."""
    for group, n in by_group(values, group_size):
        group.mul_(scales[:, n, None].to(values.dtype))


def dequantize(
    codes: UInt8[Tensor, "out d"] | Int8[Tensor, "out d"],
    scales: Float16[Tensor, "out n"],
    *,
    bits: int,
    grid: str,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "out d"]:
    """The weight that codes and scales stand for, computed in float32 or float64 and rounded once to dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = codes.to(wide) if bits == 8 else book(bits, grid).to(codes.device, wide)[codes.int()]
    scale_(values, scales, group_size=group_size)
    return values.to(dtype)
