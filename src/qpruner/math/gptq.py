"""Rounding one input after the other, each error made up for by the inputs that are still to come.

Notation
    W       weight, y = x @ W.T; rows of several linears that see the same inputs may be stacked    (d_out, d)
    X       inputs seen in calibration                              (tokens, d)
    G       Gram matrix X^T X                                       (d, d), float64
    order   inputs as they are visited; groups stay where they are   (d,)
    U       upper factor, U^T U = (G[order][:, order] + damping m I)^-1, m the mean diagonal of G
    R       U with every row divided by its diagonal                (d, d)
    w, q    column of W at work, and the grid point nearest to it    (d_out,)

Once input k is rounded, the later inputs make up for most of it if they lose (w - q) R[k, later].
Source: GPTQ, arXiv 2210.17323, equations 2 to 5; the descending order is the "act-order" of its code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from qpruner.math import grids
from qpruner.math.books import book
from qpruner.math.groups import group_count
from qpruner.math.ranges import RANGES, absmax
from qpruner.plan import QuantSpec

DAMPING = 0.01  # of GPTQ's authors, a fraction of the mean diagonal
LARGEST = 1e4  # damping that is tried where the one asked for leaves the matrix indefinite
LEAF = 16  # inputs that are corrected one by one; what lies further ahead gets whole products
TILE_WEIGHTS = 2**21  # rows of so many weights are worked on at a time: bounds the temporaries


@dataclass(frozen=True)
class Feedback:
    """How the errors of one set of inputs are passed on: all that the rounding of any weight on them needs. Final."""

    order: Int[Tensor, " d"]
    R: Float[Tensor, "d d"]

    @classmethod
    def of(
        cls, G: Float[Tensor, "d d"], damping: float = DAMPING, *, first: Sequence[int] = (), by_size: bool = True
    ) -> "Feedback":
        """By descending diagonal of G, or as they come.

        Args:
            first: inputs that are visited before all others.
        """
        size = G.diagonal().clone() if by_size else torch.zeros_like(G.diagonal())
        size[list(first)] = torch.inf
        order = torch.argsort(size, descending=True, stable=True)
        U = hessian_factor(G[order][:, order], damping)
        return cls(order, U / U.diagonal()[:, None])

    def of_first(self, n: int) -> "Feedback":
        """Of the inputs that are visited first, numbered by themselves as they were."""
        return Feedback(_ranks(self.order[:n]), self.R[:n, :n])

    def of_rest(self, n: int) -> "Feedback":
        """Of all other inputs."""
        return Feedback(_ranks(self.order[n:]), self.R[n:, n:])

    def made_up(self, W: Float[Tensor, "out d"], q: Float[Tensor, "out n"]) -> Float[Tensor, "out m"]:
        """The weight of the rest, inputs ascending, once the n first inputs have the weights q."""
        n, R = q.shape[1], self.R.to(W)
        errors = torch.linalg.solve_triangular(R[:n, :n], W[:, self.order[:n]] - q, upper=True, left=False)
        made_up = torch.empty_like(W[:, n:])
        made_up[:, _ranks(self.order[n:])] = W[:, self.order[n:]] - errors @ R[:n, n:]
        return made_up


def _ranks(places: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Which of the places comes how far in ascending order."""
    return torch.argsort(torch.argsort(places))


def hessian_factor(G: Float[Tensor, "d d"], damping: float) -> Float[Tensor, "d d"]:
    """U, in float64. An input that is always zero loses nothing; damping grows tenfold until the matrix is definite."""
    G = G.double()
    m = G.diagonal().mean()
    if not m > 0:
        return torch.eye(len(G), dtype=G.dtype, device=G.device)  # no token, or none that says anything
    while True:
        H = G.clone()
        H.diagonal().add_(damping * m)
        H.diagonal()[H.diagonal() == 0] = m
        # Backwards, H = K K^T with K upper, and U is the inverse of K: a third of the work of inverting H first.
        L, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
        if not failed:
            U = torch.linalg.solve_triangular(L, torch.eye(len(L)).to(L), upper=False).flip(0, 1)
            if torch.isfinite(U).all():
                return U
        damping = max(10 * damping, 1e-8)
        assert damping <= LARGEST, "the Gram matrix is not finite"


def quantize(
    W: Float[Tensor, "out d"],
    G: Float[Tensor, "d d"],
    feedback: Feedback,
    spec: QuantSpec,
    ranges: str = "absmax",
) -> grids.Rounded:
    """Ranges for squared errors that count by the diagonal of G, then codes for the scales that are stored."""
    wide = W if W.dtype == torch.float64 else W.float()
    fit = RANGES[ranges]
    wanted, zeros = grids.fit_ranges(wide, spec, fit, G.diagonal()[None].to(wide))
    scales, steps = grids.stored_scales(wanted, spec, up=fit is absmax and spec.grid != "binary")
    return grids.Rounded(gptq(wide, feedback, grids.decode(scales, steps), zeros, spec), scales, steps, zeros)


def gptq(
    W: Float[Tensor, "out d"],
    feedback: Feedback,
    scales: Float[Tensor, "out n"],
    zeros: UInt8[Tensor, "out n"] | None,
    spec: QuantSpec,
) -> UInt8[Tensor, "out d"]:
    """Codes for scales as they are decoded."""
    out, d = W.shape
    codes = torch.empty(out, d, dtype=torch.uint8, device=W.device)
    R, order = feedback.R.to(W), feedback.order.to(W.device)
    size = spec.group_size or max(d, 1)
    groups = (order // size).tolist()
    assert scales.shape[1] == group_count(d, spec.group_size)
    rows = max(1, TILE_WEIGHTS // max(d, 1))
    for start in range(0, out, rows):
        tile = slice(start, start + rows)
        s, z = scales[tile].T.to(W.dtype).contiguous(), None if zeros is None else zeros[tile].T.to(W.dtype)
        values = _values(W[tile].T[order], R, _rounders(s, z, spec), groups)
        codes[tile, order] = _codes(values, None if z is None else z[groups], spec).T
    return codes


def _values(w: Float[Tensor, "d rows"], R: Float[Tensor, "d d"], rounders: Sequence, groups: list[int]) -> Tensor:
    """Values before the scale, (d, rows), in the order of the visits. w is spent: errors take the place of weights."""
    found = torch.empty_like(w)
    columns, into = w.unbind(), found.unbind()

    def round_between(start: int, end: int) -> None:
        if end - start > LEAF:
            middle = (start + end) // 2
            round_between(start, middle)
            w[middle:end].addmm_(R[start:middle, middle:end].T, w[start:middle], alpha=-1)
            round_between(middle, end)
            return
        for k in range(start, end):
            nearest_, scale = rounders[groups[k]]
            column, value = columns[k], into[k]
            column.addcmul_(nearest_(column, value), scale, value=-1)
            if k + 1 < end:
                w[k + 1 : end].addr_(R[k, k + 1 : end], column, alpha=-1)

    round_between(0, len(w))
    return found


def _rounders(
    s: Float[Tensor, "n rows"], z: Float[Tensor, "n rows"] | None, spec: QuantSpec
) -> list[tuple[Callable[[Tensor, Tensor], Tensor], Tensor]]:
    """For each group a function (weights, out) that puts the nearest values before the scale there, and the scale."""
    divisors = torch.where(s == 0, 1, s)
    values = book(spec).to(s)
    if spec.grid not in ("integer", "ternary"):
        middles = ((values[1:] + values[:-1]) / 2).to(s)

        def look_up(divisor: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
            def nearest_(w: Tensor, out: Tensor) -> Tensor:
                return torch.index_select(values, 0, torch.bucketize(w / divisor, middles, out_int32=True), out=out)

            return nearest_

        return [(look_up(divisor), scale) for divisor, scale in zip(divisors, s, strict=True)]
    low, high = values[0].item(), values[-1].item()
    lows, highs = ([low] * len(s), [high] * len(s)) if z is None else ((low - z).unbind(), (high - z).unbind())

    def clamped(divisor: Tensor, low: Tensor | float, high: Tensor | float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda w, out: torch.div(w, divisor, out=out).round_().clamp_(low, high)

    return [(clamped(*each), scale) for *each, scale in zip(divisors, lows, highs, s, strict=True)]


def _codes(values: Float[Tensor, "d rows"], z: Tensor | None, spec: QuantSpec) -> UInt8[Tensor, "d rows"]:
    known = book(spec)
    if spec.grid in ("integer", "ternary"):
        return values.add_(-known[0].item() if z is None else z).to(torch.uint8)
    return torch.bucketize(values, ((known[1:] + known[:-1]) / 2).to(values), out_int32=True).to(torch.uint8)
