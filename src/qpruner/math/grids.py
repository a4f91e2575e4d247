"""Rounding a weight to a small code book, one scale per group of inputs.

Notation
    W       weight, y = x @ W.T                                   (d_out, d_in)
    n       groups of a row, the last of them possibly shorter    ceil(d_in / group_size)
    scales  step of the grid in each group                         (d_out, n)
    zeros   the code that stands for zero in each group            (d_out, n)
    codes   which value of the code book                          (d_out, d_in)
    q       the rounded weight: book[codes] * scale, or (codes - zero) * scale      (d_out, d_in)

Ranges (scales and zeros) come first, then what is stored of them, then codes: these are nearest for the scales that
are stored. Scales that must not clip are rounded up to what can be stored.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float16, Shaped, UInt8
from torch import Tensor

from qpruner.math.books import book, index_
from qpruner.math.groups import by_group, group_count
from qpruner.math.halves import finite_half, half_at_least
from qpruner.math.ranges import RANGES, Ranges, absmax
from qpruner.plan import QuantSpec

TILE_WEIGHTS = 2**22  # weights worked on at a time: bounds the temporaries, not the result


@dataclass(frozen=True)
class Rounded:
    """A weight as it is stored, one code per element: not packed yet.

    scales: float16, or codes of `scale_bits` bits times the row's step. steps, zeros: only where the spec has them.
    """

    codes: UInt8[Tensor, "out d"]
    scales: Float16[Tensor, "out n"] | UInt8[Tensor, "out n"]
    steps: Float16[Tensor, "out 1"] | None = None
    zeros: UInt8[Tensor, "out n"] | None = None

    def rows(self, some: slice) -> "Rounded":
        """Of a few outputs, in memory of their own."""
        parts = (self.codes, self.scales, self.steps, self.zeros)
        return Rounded(*(None if part is None else part[some].clone() for part in parts))

    def nearest(self, W: Float[Tensor, "out d"], spec: QuantSpec) -> "Rounded":
        """Another weight on the same grid points."""
        wide = W if W.dtype == torch.float64 else W.float()
        return replace(self, codes=nearest(wide, decoded_scales(self, spec), self.zeros, spec))


def tiles(d_out: int, d_in: int) -> list[slice]:
    """Rows to work on together."""
    rows = max(1, TILE_WEIGHTS // max(d_in, 1))
    return [slice(start, start + rows) for start in range(0, d_out, rows)]


def quantize(
    W: Float[Tensor, "out d"],
    spec: QuantSpec,
    ranges: str | Ranges = "absmax",
    weight: Float[Tensor, "1 d"] | Float[Tensor, "out d"] | None = None,
) -> Rounded:
    """The grid point nearest to each weight.

    Args:
        ranges: how scales and zeros are fitted, a name in `RANGES` or a function like those.
        weight: how much the squared error of each element counts, for ranges that minimise it.
    Raises:
        ValueError: a weight is not finite; a group needs a scale beyond float16's largest.
    """
    fit = RANGES[ranges] if isinstance(ranges, str) else ranges
    parts = []
    for rows in tiles(*W.shape):
        counts = weight if weight is None or len(weight) == 1 else weight[rows]
        tile = W[rows] if W.dtype == torch.float64 else W[rows].float()
        wanted, zeros = fit_ranges(tile, spec, fit, counts)
        scales, steps = stored_scales(wanted, spec, up=fit is absmax and spec.grid != "binary")
        decoded = decode(scales, steps)
        parts.append((nearest(tile, decoded, zeros, spec), scales, steps, zeros))
    if not parts:
        return empty(0, W.shape[1], spec, W.device)
    return Rounded(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))


def empty(d_out: int, d_in: int, spec: QuantSpec, device: torch.device) -> Rounded:
    n = group_count(d_in, spec.group_size)
    codes = lambda columns: torch.empty(d_out, columns, dtype=torch.uint8, device=device)
    halves = lambda columns: torch.empty(d_out, columns, dtype=torch.float16, device=device)
    double = spec.scale_bits < 16
    return Rounded(
        codes(d_in), codes(n) if double else halves(n), halves(1) if double else None,
        None if spec.symmetric else codes(n),
    )  # fmt: skip


def fit_ranges(
    W: Float[Tensor, "out d"], spec: QuantSpec, fit: Callable, weight: Float[Tensor, "_ d"] | None = None
) -> tuple[Float[Tensor, "out n"], UInt8[Tensor, "out n"] | None]:
    """Scales and zeros of every group, as they would best be, in the dtype of W."""
    counts = [None, None] if weight is None else [group for group, _ in by_group(weight.to(W), spec.group_size)]
    found = [fit(group, spec, c) for (group, _), c in zip(by_group(W, spec.group_size), counts, strict=False)]
    scales = torch.cat([s for s, _ in found], dim=1)
    return scales, None if spec.symmetric else torch.cat([z for _, z in found], dim=1)


def nearest(
    W: Float[Tensor, "out d"],
    scales: Float[Tensor, "out n"],
    zeros: UInt8[Tensor, "out n"] | None,
    spec: QuantSpec,
) -> UInt8[Tensor, "out d"]:
    """Codes of the values nearest to W, for scales as they are decoded."""
    ratios = W.clone(memory_format=torch.contiguous_format)  # W may be a transpose
    spread = None
    if zeros is not None:
        spread = zeros.repeat_interleave(spec.group_size or W.shape[1], dim=1)[:, : W.shape[1]]
    for group, n in by_group(ratios, spec.group_size):
        steps = scales[:, n, None].to(W.dtype)
        group.div_(torch.where(steps == 0, 1, steps))  # a scale of 0: the whole group is zero, and so are its ratios
    return index_(ratios, spec, spread)


def stored_scales(
    scales: Float[Tensor, "out n"], spec: QuantSpec, *, up: bool
) -> tuple[Shaped[Tensor, "out n"], Float16[Tensor, "out 1"] | None]:
    """What is stored for wanted scales: float16, or codes and each row's step.

    Args:
        up: no scale becomes smaller than wanted, so that nothing is clipped; otherwise the nearest.
    Raises:
        ValueError: a scale is not finite or beyond float16's largest.
    """
    if spec.scale_bits == 16:
        return (half_at_least(scales) if up else finite_half(scales)), None
    top = 2**spec.scale_bits - 1
    wanted = scales.double()
    largest = wanted.amax(1, keepdim=True) if wanted.shape[1] else wanted.new_zeros(len(wanted), 1)
    steps = half_at_least(largest / top)
    counts = wanted / torch.where(steps == 0, 1, steps.double())
    return (counts.ceil_() if up else counts.round_()).to(torch.uint8), steps


def decode(
    scales: Float16[Tensor, "out n"] | UInt8[Tensor, "out n"], steps: Float16[Tensor, "out 1"] | None
) -> Float[Tensor, "out n"]:
    """Scales as numbers, float32, in which every product of a code and a step is exact."""
    return scales.float() if steps is None else scales.float() * steps.float()


def decoded_scales(rounded: Rounded, spec: QuantSpec) -> Float[Tensor, "out n"]:
    return decode(rounded.scales, rounded.steps)


def scale_(
    values: Float[Tensor, "out d"],
    scales: Float[Tensor, "out n"],
    zeros: UInt8[Tensor, "out n"] | None,
    *,
    group_size: int | None,
) -> None:
    """Subtract the zero of its group from every value and multiply it by the scale, in place."""
    for group, n in by_group(values, group_size):
        if zeros is not None:
            group.sub_(zeros[:, n, None])
        group.mul_(scales[:, n, None].to(values.dtype))


def dequantize(rounded: Rounded, spec: QuantSpec, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out d"]:
    """The weight that codes and scales stand for, computed in float32 or float64 and rounded once to dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = book(spec).to(rounded.codes.device, wide)[rounded.codes.int()]
    scale_(values, decoded_scales(rounded, spec), rounded.zeros, group_size=spec.group_size)
    return values.to(dtype)
