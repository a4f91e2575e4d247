"""Scales and zero points of a grid, fitted to groups of weights.

Notation
    w       weights of the groups                            (out, m, g); inside (g, N), a group to a column
    h       how much each squared error counts               as w, or None for equally
    s       scale of each group                              (out, m); (N,)
    z       zero point of each group, a code                 (out, m); (N,)
    q       values of the codes of w / s, zero subtracted    (g, N)

For given codes the best scale is s = sum h w q / sum h q^2, and it leaves sum h w^2 - (sum h w q)^2 / sum h q^2: the
searches below judge codes by the second term and end with that s. Where scales are stored in float16, results are what
float16 holds, and are judged as such.
A scale may come out negative where the book has more values on one side of zero than on the other: the group is then
better served by the book turned round. Scales of few bits have no sign.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from qpruner.math.books import book, index_, reach, round_
from qpruner.math.halves import half_at_least
from qpruner.plan import QuantSpec

Ranges = Callable[[Tensor, QuantSpec, Tensor | None], tuple[Tensor, Tensor | None]]
Columns = Float[Tensor, "g N"]

NARROWEST = {2: 0.15, 3: 0.3, 4: 0.4, 5: 0.5, 6: 0.6, 8: 0.8}  # range that is tried, a fraction of absmax
FACTORS = 16  # ranges tried; 80 leave an error 0.1% smaller
STEPS = 3  # of codes and scale in turn, at the end
TINY = 1e-30  # a sum of squares below it is none
PART_WEIGHTS = 2**16  # worked on at a time: they and their temporaries stay in a core's cache
POWER, STIFFNESS, GROWTH, ITERATIONS = 0.7, 10.0, 1.01, 20  # of half-quadratic splitting, as its authors have them


def absmax(
    w: Float[Tensor, "out m g"], spec: QuantSpec, weight: Float[Tensor, "_ m g"] | None = None
) -> tuple[Float[Tensor, "out m"], UInt8[Tensor, "out m"] | None]:
    """The narrowest range that clips nothing; `weight` does not matter. Of two values: their least-squares scale."""
    if spec.grid == "binary":
        return w.abs().mean(-1), None
    if spec.symmetric:
        return w.abs().amax(-1) / reach(spec), None
    low, high = w.amin(-1).clamp_(max=0), w.amax(-1).clamp_(min=0)
    s = (high - low) / reach(spec)
    z = (-low / torch.where(s == 0, 1, s)).round_().clamp_(0, reach(spec))
    return s, z.nan_to_num_().to(torch.uint8)


def mse(
    w: Float[Tensor, "out m g"], spec: QuantSpec, weight: Float[Tensor, "_ m g"] | None = None
) -> tuple[Float[Tensor, "out m"], UInt8[Tensor, "out m"] | None]:
    """The range that leaves the least weighted squared error, among narrower ones of both signs or shifted zeros."""
    return by_part(least_error, w, spec, weight)


def half_quadratic(
    w: Float[Tensor, "out m g"], spec: QuantSpec, weight: Float[Tensor, "_ m g"] | None = None
) -> tuple[Float[Tensor, "out m"], UInt8[Tensor, "out m"] | None]:
    """The range that leaves the least sum of |error|^p, p < 1: few large errors may stay. `weight` does not matter.

    Source: Badri and Shaji 2023, "Half-quadratic quantization of large machine learning models". There the weight is
    in its own unit, here in that of its group's root mean square, so that scaling it changes nothing; and besides the
    zero point, which is rounded to a code in the end, the scale moves.
    """
    return by_part(proximal, w, spec, None)


RANGES: dict[str, Ranges] = {"absmax": absmax, "mse": mse, "half-quadratic": half_quadratic}


def by_part(fit, w: Tensor, spec: QuantSpec, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`fit` of a few rows at a time, with the groups as columns."""
    out, m, g = w.shape
    rows = max(1, PART_WEIGHTS // (m * g))
    scales, zeros = [], []
    for start in range(0, out, rows):
        part = w[start : start + rows].reshape(-1, g).T.contiguous()
        h = None
        if weight is not None:
            chosen = weight if len(weight) == 1 else weight[start : start + rows]
            h = chosen.expand(part.shape[1] // m, m, g).reshape(-1, g).T.contiguous()
        s, z = fit(part, spec, h)
        scales.append(s.view(-1, m))
        zeros.append(None if z is None else z.view(-1, m))
    return torch.cat(scales), None if spec.symmetric else torch.cat(zeros)


def start_of(w: Columns, spec: QuantSpec) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"] | None]:
    """absmax, as it would be stored. ValueError for weights that are not finite."""
    s, z = absmax(w.T[None], spec)
    s = half_at_least(s[0]).to(w.dtype) if spec.scale_bits == 16 else s[0]
    return s, None if z is None else z[0].to(w.dtype)


def values(w: Columns, s: Float[Tensor, " N"], z: Float[Tensor, " N"] | None, spec: QuantSpec) -> Columns:
    ratios = w * torch.where(s == 0, 1, s).reciprocal()
    if spec.grid not in ("integer", "ternary"):
        return book(spec).to(w)[index_(ratios, spec).int()]
    if z is not None:
        return round_(ratios, spec, z).sub_(z)
    lowest = book(spec)[0].item()
    return ratios.round_().clamp_(lowest, book(spec)[-1].item())


def least_error(w: Columns, spec: QuantSpec, h: Columns | None) -> tuple[Tensor, Tensor | None]:
    if spec.grid == "binary":
        return (w.abs().mean(0) if h is None else (h * w.abs()).sum(0) / h.sum(0).clamp_(min=TINY)), None
    widest, first = start_of(w, spec)
    hw = w if h is None else h * w
    signs, shifts = (1,), (0,)
    if first is not None:
        shifts = (0, -1, 1)
    elif spec.grid != "ternary" and spec.scale_bits == 16:
        signs = (1, -1)
    most, s, z = torch.full_like(widest, -1), widest, first
    for factor in torch.linspace(1, NARROWEST[spec.bits], FACTORS).tolist():
        for sign in signs:
            for shift in shifts:
                shifted = None if first is None else (first + shift).clamp_(0, reach(spec))
                gained, best = explained(values(w, widest * (sign * factor), shifted, spec), hw, h)
                better = gained > most
                most, s = torch.where(better, gained, most), torch.where(better, best, s)
                z = None if z is None else torch.where(better, shifted, z)
    for _ in range(STEPS):
        s = explained(values(w, s, z, spec), hw, h)[1]
    squares = lambda error: error.square_() if h is None else error.square_().mul_(h)
    return better_of((s, z), (widest, first), w, spec, squares)


def better_of(found, start, w: Columns, spec: QuantSpec, measure) -> tuple[Tensor, Tensor | None]:
    """The (s, z) of two whose errors sum up to less in every group."""
    if spec.scale_bits == 16:
        found = (found[0].half().to(w.dtype), found[1])
    left = [measure(w - s * values(w, s, z, spec)).sum(0) for s, z in (found, start)]
    better = left[0] < left[1]
    s = torch.where(better, found[0], start[0])
    return s, None if start[1] is None else torch.where(better, found[1], start[1]).to(torch.uint8)


def explained(q: Columns, hw: Columns, h: Columns | None) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """How much of the weighted square of w the values q can stand for, and with which scale; 1 if they are all zero."""
    along = (hw * q).sum(0)
    square = (q.square() if h is None else (h * q).mul_(q)).sum(0)
    s = torch.where(square > TINY, along / square.clamp(min=TINY), 1)
    return along * s, torch.where(s == 0, 1, s)


def proximal(w: Columns, spec: QuantSpec, _: None) -> tuple[Tensor, Tensor | None]:
    """Alternates w ~ s q + e with e = argmin |e|^p + beta/2 (w - s q - e)^2, and s, z = least squares for w - e."""
    if spec.grid == "binary":
        return w.abs().mean(0), None
    start, beta = start_of(w, spec), STIFFNESS
    unit = w.square().mean(0).sqrt_()
    unit, original = torch.where(unit == 0, 1, unit), w
    w, s, z = w / unit, start[0] / unit, start[1]
    for i in range(ITERATIONS):
        q = values(w, s, z, spec)
        target = w - shrunk(w - s * q, beta)
        if z is None or i >= ITERATIONS // 2:
            s = explained(q, target, None)[1]
        else:
            s, z = line(q.add_(z), target, s, z)
            z = z.clamp_(0, reach(spec))
        if z is not None and i == ITERATIONS // 2 - 1:
            z = z.round_()  # from here on only the scale follows
        beta *= GROWTH
    return better_of((s * unit, z), start, original, spec, lambda error: error.abs_().pow_(POWER))


def shrunk(e: Columns, beta: float) -> Columns:
    """The generalised soft threshold."""
    size = e.abs()
    return (size - size.pow(POWER - 1) / beta).clamp_(min=0).copysign_(e)


def line(codes: Columns, target: Columns, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero of the straight line through target over codes; s and z where it does not ascend."""
    middle = codes.mean(0)
    apart = codes - middle
    slope = (apart * target).sum(0) / apart.square().sum(0).clamp(min=TINY)
    ascends = slope > 0
    slope = torch.where(ascends, slope, s)
    return slope, torch.where(ascends, middle - target.mean(0) / slope, z)
