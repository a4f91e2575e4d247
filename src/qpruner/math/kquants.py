"""Rounding a weight to llama.cpp's K-types: blocks of 256 weights, in parts that have scales of few bits.

Notation
    W           weight, y = x @ W.T                                     (rows, cols)
    h           importance of each weight, its column's                 (p, l, B)
    x, t        weights and their codes, blocks in columns              (p, l, B); p parts of l weights
    s, m        scale and minimum of a part: x is about s t - m         (p, B)
    d, dmin     float16 units of a block's scales and minima            (1, B)
    A, U, C     sums over a part of h x t, h t, h t^2                   (p, B)
    P, S        sums over a part of h x, h                              (p, B)

What is made small is the sum of h (x - q)^2, q the rounded weight; with h the diagonal of the Gram matrix of the inputs
that is about the squared error of y. A part's error is a quadratic form of s and m once its codes are chosen, so a step
of the search is codes, three sums, and the best s and m for them. First ranges of several widths are tried for each
part, then d and dmin follow, then for each part several of the scales that can be stored, each with its best minimum.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from qpruner.math.halves import half_at_least
from qpruner.math.kblocks import Blocks, laid_out

BLOCK = 256
BLOCKS_AT_A_TIME = 512  # what is worked on stays in the cache, and still is long enough for vector instructions
LANES = 64  # as many blocks fill vector registers; torch adds up what is left over in another order
LEAST_IMPORTANCE = 1e-6  # of the mean: a column that no text has reached is rounded, not left to chance
SAME = 1e-6  # codes of a part whose spread is a smaller fraction of their size say nothing about its minimum


@dataclass(frozen=True)
class Kind:
    """parts: of a block. bits: of a code. top: of a scale, and of a minimum if there are minima.

    widths: how many steps more than the codes have the range of a part is divided into.
    """

    parts: int
    bits: int
    top: int
    minima: bool
    widths: tuple[float, ...]


KINDS = {
    "Q2_K": Kind(16, 2, 15, True, (-0.6, -0.3, 0.0, 0.3, 0.6, 0.9, 1.2)),
    "Q3_K": Kind(16, 3, 32, False, (-1.2, -0.8, -0.4, 0.0, 0.4, 0.8, 1.2, 1.6, 2.0)),
    "Q4_K": Kind(8, 4, 63, True, (-1.0, -0.67, -0.33, 0.0, 0.33, 0.67, 1.0, 1.5, 2.0)),
    "Q5_K": Kind(8, 5, 63, True, (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)),
    "Q6_K": Kind(16, 6, 128, False, (-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)),
}
NEIGHBOURS = (-1, 0, 1)  # scales tried around the nearest one


def encode(
    W: Float[Tensor, "rows cols"], kind: str, importance: Float[Tensor, " cols"] | None = None
) -> UInt8[Tensor, "rows bytes"]:
    """The weight as a GGUF file has it.

    Args:
        kind: Q2_K, Q3_K, Q4_K, Q5_K or Q6_K.
        importance: of each input, 0 or more, in any unit; by default all count the same.
    Raises:
        ValueError: rows are no multiples of 256; a weight is not finite, or beyond float16.
    """
    rows, cols = W.shape
    if cols % BLOCK:
        raise ValueError(f"a row of {kind} is a multiple of {BLOCK} weights, not {cols}")
    per_row = cols // BLOCK
    at_a_time = max(BLOCKS_AT_A_TIME // per_row, 1)
    h = None if importance is None else spread(importance.to(W.device), at_a_time)
    parts = []
    for some in W.split(at_a_time):
        x = in_columns(some)
        if not (x.abs() <= 65504).all():  # NaN is not either
            raise ValueError("a weight is not finite, or beyond the largest float16, 65504")
        coded = laid_out(rounded(x, None if h is None else h[:, : x.shape[1]], KINDS[kind]), kind)
        parts.append(coded[: len(some) * per_row].view(len(some), -1))
    return torch.cat(parts)


def in_columns(W: Float[Tensor, "rows cols"]) -> Float[Tensor, "256 B"]:
    """Blocks in columns, and empty ones up to a multiple of LANES."""
    blocks = W.float().reshape(-1, BLOCK)
    x = blocks.new_zeros(BLOCK, -(-len(blocks) // LANES) * LANES)
    x[:, : len(blocks)] = blocks.T
    return x


def spread(importance: Tensor, rows: int) -> Float[Tensor, "256 B"]:
    """The importance of every weight of so many rows."""
    mean = importance.double().mean()
    h = (importance.double() / torch.where(mean > 0, mean, 1)).clamp(min=LEAST_IMPORTANCE).float()
    columns = in_columns(h.expand(rows, -1))
    columns[:, rows * len(h) // BLOCK :] = 1
    return columns


def rounded(x: Float[Tensor, "256 B"], h: Float[Tensor, "256 B"] | None, kind: Kind) -> Blocks:
    x = x.view(kind.parts, -1, x.shape[1])
    part = Parts(x, None if h is None else h.reshape(x.shape), kind)
    return with_minima(part) if kind.minima else without_minima(part)


class Parts:
    """Weights, the codes that were tried last, and the sums that say how good they are."""

    def __init__(self, x: Tensor, h: Tensor | None, kind: Kind) -> None:
        """h: None where all count the same, which saves a tenth of the time."""
        self.x, self.h, self.kind = x, h, kind
        self.lowest = 0 if kind.minima else -(2 ** (kind.bits - 1))
        self.highest = self.lowest + 2**kind.bits - 1
        self.t, self.scratch = torch.empty_like(x), torch.empty_like(x)
        self.hx = x if h is None else h * x
        self.P = self.hx.sum(1)
        self.S = torch.full_like(self.P, x.shape[1]) if h is None else h.sum(1)

    def choose(self, inverse: Tensor, start: Tensor | None = None) -> None:
        """Codes nearest to x inverse + start."""
        if start is None:
            torch.mul(self.x, inverse.unsqueeze(1), out=self.t)
        else:
            torch.addcmul(start.unsqueeze(1), self.x, inverse.unsqueeze(1), out=self.t)
        self.t.round_().clamp_(self.lowest, self.highest)

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, U, C; without minima nobody asks for U."""
        t, scratch = self.t, self.scratch
        A = torch.mul(t, self.hx, out=scratch).sum(1)
        ht = t if self.h is None else torch.mul(t, self.h, out=scratch)
        U = ht.sum(1) if self.kind.minima else A
        return A, U, torch.mul(ht, t, out=scratch).sum(1)

    def codes(self) -> UInt8[Tensor, "256 B"]:
        return (self.t - self.lowest).to(torch.uint8).view(BLOCK, -1)


def inverse(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0, 1 / x)


def half(x: Tensor) -> Tensor:
    """What float16 makes of it, no larger than its largest."""
    return x.clamp(-65504, 65504).half().float()


def unit(largest: Tensor, top: int) -> Tensor:
    """Of scales or minima; no smaller than asked, since in the smallest numbers of float16 much is rounded away."""
    return half_at_least(largest.clamp(min=0) / top).float()


# --- with minima: Q2_K, Q4_K, Q5_K -----------------------------------------------------------------------------------


def with_minima(part: Parts) -> Blocks:
    top = part.kind.top
    s, m = widest_gain(part)
    d, dmin = unit(s.amax(0, keepdim=True), top), unit(m.amax(0, keepdim=True), top)
    scales, minima = stored_nearby(part, s, m, d, dmin)
    choose_stored(part, scales * d, minima * dmin)
    d, dmin = refitted(part, scales, minima, d, dmin)
    choose_stored(part, scales * d, minima * dmin)
    as_int = lambda x: x.to(torch.int8)
    return Blocks(part.codes(), as_int(scales), d.half(), as_int(minima), dmin.half())


def choose_stored(part: Parts, s: Tensor, m: Tensor) -> None:
    r = inverse(s)
    part.choose(r, m * r)


def widest_gain(part: Parts) -> tuple[Tensor, Tensor]:
    """s and m of each part, after the best of several ranges and one step from there."""
    x, P, S, highest = part.x, part.P, part.S, part.highest
    low = x.amin(1).clamp_(max=0)
    span = inverse(x.amax(1).clamp_(min=0) - low)
    mean, one_over_S = P / S, 1 / S
    most, best = None, None
    for width in part.kind.widths:
        r = span * (highest + width)
        part.choose(r, -low * r)
        A, U, C = part.sums()
        spread = torch.addcmul(C, U * U, one_over_S, value=-1).add_(C, alpha=SAME)
        gain = torch.addcmul(A, mean, U, value=-1).square_().div_(spread)  # 0/0 where a part is 0, and so is r
        if best is None:
            most, best = gain, r
        else:
            best = torch.where(gain > most, r, best)
            most = torch.maximum(gain, most)
    part.choose(best, -low * best)
    s, m = fitted(*part.sums(), P, S)
    choose_stored(part, s, m)
    return fitted(*part.sums(), P, S)


def fitted(A: Tensor, U: Tensor, C: Tensor, P: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """The s and m that are best for the codes, neither below 0."""
    D = S * C - U * U
    told = D > SAME * S * C
    D = torch.where(told, D, 1)
    m = torch.where(told, (U * A - C * P) / D, 0)
    alone = A * inverse(C)  # the best s where m is 0
    s = torch.where(told & (m > 0), (S * A - P * U) / D, alone).clamp_(min=0)
    # Codes that are all the same: 0, of a part whose weights are all one negative number or 0, leave it to m.
    m = torch.where(C == 0, -P / S, m)
    return s, m.clamp_(min=0)


def error(s: Tensor, m: Tensor, A: Tensor, U: Tensor, C: Tensor, P: Tensor, S: Tensor) -> Tensor:
    """Of each part, less the sum of h x^2."""
    return s * (s * C - 2 * (A + m * U)) + m * (m * S + 2 * P)


def stored_nearby(part: Parts, s: Tensor, m: Tensor, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
    """Of the scales that can be stored near s the best of each part, with the minimum that goes with it."""
    P, S, top = part.P, part.S, part.kind.top
    nearest, one_over_S, per_minimum = (s * inverse(d)).round_(), 1 / S, inverse(dmin)
    least = None
    for step in NEIGHBOURS:
        scale = (nearest + step).clamp_(0, top)
        stored = scale * d
        choose_stored(part, stored, m)
        A, U, C = part.sums()
        minimum = ((stored * U - P) * one_over_S * per_minimum).round_().clamp_(0, top)
        errors = error(stored, minimum * dmin, A, U, C, P, S)
        if least is None:
            least, scales, minima = errors, scale, minimum
        else:
            less = errors < least
            scales, minima = torch.where(less, scale, scales), torch.where(less, minimum, minima)
            least = torch.minimum(least, errors)
    return scales, minima


def refitted(part: Parts, scales: Tensor, minima: Tensor, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
    """The d and dmin that are best for the codes, where float16 has something better than what there was."""
    (A, U, C), P, S = part.sums(), part.P, part.S
    over = lambda x: x.sum(0, keepdim=True)
    sums = over(scales * A), over(scales * minima * U), over(scales * scales * C), over(minima * P), over(minima**2 * S)
    A, U, C, P, S = sums
    D = S * C - U * U
    told = D > SAME * S * C
    D = torch.where(told, D, 1)
    new = half(torch.where(told, (S * A - P * U) / D, A * inverse(C)).clamp_(min=0))
    newmin = half(torch.where(told, (U * A - C * P) / D, 0).clamp_(min=0))
    better = error(new, newmin, *sums) < error(d, dmin, *sums)
    return torch.where(better, new, d), torch.where(better, newmin, dmin)


# --- without minima: Q3_K, Q6_K --------------------------------------------------------------------------------------


def without_minima(part: Parts) -> Blocks:
    top = part.kind.top
    s = largest_gain(part)
    low, high = s.amin(0, keepdim=True), s.amax(0, keepdim=True)
    # There is one more negative scale than positive ones.
    d = torch.where(high > -low, -unit(high, top), unit(-low, top))
    inverse_d, least = inverse(d), None
    nearest = (s * inverse_d).round_()
    for step in NEIGHBOURS:
        scale = (nearest + step).clamp_(-top, top - 1)
        stored = scale * d
        part.choose(inverse(stored))
        A, _, C = part.sums()
        errors = stored * (stored * C - 2 * A)
        if least is None:
            least, scales = errors, scale
        else:
            scales = torch.where(errors < least, scale, scales)
            least = torch.minimum(least, errors)
    part.choose(inverse(scales * d))
    A, _, C = part.sums()
    A, C = (scales * A).sum(0, keepdim=True), (scales * scales * C).sum(0, keepdim=True)
    new = half(A * inverse(C))
    d = torch.where(new * (new * C - 2 * A) < d * (d * C - 2 * A), new, d)
    part.choose(inverse(scales * d))
    return Blocks(part.codes(), scales.to(torch.int8), d.half())


def largest_gain(part: Parts) -> Tensor:
    """s of each part: the lowest code stands for the weight farthest from 0, or nearly."""
    low, high = part.x.amin(1), part.x.amax(1)
    span = inverse(torch.where(high > -low, high, low))
    most, best = None, None
    for width in part.kind.widths:
        r = span * (part.lowest - width)
        part.choose(r)
        A, _, C = part.sums()
        s = A * inverse(C)
        gain = A * s
        if best is None:
            most, best = gain, s
        else:
            best = torch.where(gain > most, s, best)
            most = torch.maximum(gain, most)
    part.choose(inverse(best))
    A, _, C = part.sums()
    return A * inverse(C)
