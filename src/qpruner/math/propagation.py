"""Rounding a linear map so that its output is what another model gives, from the inputs that reach this one.

Notation
    X, Y      inputs as they come in the model that is rounded, what they should give (tokens, d), (tokens, d_out)
    W, b      the map as it is, y = x W^T + b                                         (d_out, d), (d_out)
    V         W moved towards Y by least squares, as far as the damping lets it       (d_out, d)
    Q         the rounded map, codes chosen for the Gram matrix of X                  (d_out, d)
    damping   as in `least_squares`; infinite leaves V = W, which is GPTQ

How far to go is decided by the error of Q on tokens that nothing was fitted to. With a bias, errors of the mean are its
to make up for: the Gram matrix is then that of inputs less their mean.
Source: GPTAQ, arXiv 2504.02692, and QEP, arXiv 2504.09629, which move weights in closed form by a strength that is set
beforehand.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qpruner.math.least_squares import Moments, mean_bias, repair, repairs, squared_error
from qpruner.math.salient import Parts, Rounding
from qpruner.plan import QuantSpec

STACKED_WEIGHTS = 2**22  # of candidates that are rounded together: bounds the temporaries, as `Rounds` foresees


@dataclass(frozen=True)
class Found:
    """The rounded map. Errors are squared, relative to the size of what should come out.

    b: that it should have, None for the one it has. damping: that was taken; infinite for none.
    condition: of the matrix that was solved; 1 where none was.
    error, error_nearest: of it, and of W rounded to nearest with the same scales as W has with feedback.
    V, rounding: what was rounded, and how: for whoever stores a correction beside the codes. mean: of the inputs, where
        the bias makes up for errors of the mean.
    """

    parts: Parts
    b: Tensor | None
    damping: float
    condition: float
    error: float
    error_nearest: float
    V: Tensor
    rounding: Rounding
    mean: Tensor | None = None

    def bias(self, rows: slice, Q: Float[Tensor, "some d"]) -> Float[Tensor, " some"] | None:
        """That a few outputs should have if Q takes the place of their codes; None for the one they have."""
        if self.b is None:
            return None
        plain = self.parts.rows(rows).dequantize(self.rounding.spec, torch.float64)
        return self.b[rows] + (plain - Q.double()) @ self.mean


def gptq(
    W: Float[Tensor, "out d"], G: Float[Tensor, "d d"], spec: QuantSpec, ranges: str, salient: Tensor | None = None
) -> Found:
    """W for its own inputs; errors are on the same tokens.

    salient: as in `Rounding.of`.
    """
    rounding = Rounding.of(W, G, spec, ranges, salient)
    parts = rounding(W)
    size = max(_square(W.double(), G), 1e-300)
    error = lambda Q: _square(Q.dequantize(spec, W.dtype).double() - W.double(), G) / size
    return Found(parts, None, math.inf, 1.0, error(parts), error(rounding.nearest(W, parts)), W, rounding)


def propagated(
    W: Float[Tensor, "out d"],
    b: Float[Tensor, " out"] | None,
    fitted: Moments,
    held_out: Moments,
    spec: QuantSpec,
    ranges: str,
    dampings: Sequence[float],
) -> Found:
    """The strength that does best on what is held out, fitted to all. Takes the moments.

    b: moves, and is part of Y; None where there is none.
    """
    bias = b is not None
    rounding = Rounding.of(W, fitted.products(centred=bias)[0], spec, ranges)
    candidates = {found.damping: found.V.to(W.dtype) for found in repairs(W, fitted, dampings, bias=bias)}
    candidates = {math.inf: W} | {damping: V for damping, V in candidates.items() if math.isfinite(damping)}
    size = max(float(held_out.yy), 1e-300)

    def error(Q: Tensor) -> float:
        return squared_error(Q, mean_bias(Q, fitted) if bias else None, held_out) / size

    errors = {}
    for some in _in_parts(list(candidates), max(1, STACKED_WEIGHTS // max(W.numel(), 1))):
        parts = rounding(torch.cat([candidates[damping] for damping in some]))
        for i, damping in enumerate(some):
            own = parts.rows(slice(i * len(W), (i + 1) * len(W)))
            errors[damping] = error(own.dequantize(spec, W.dtype))
            if damping == math.inf:
                nearest = error(rounding.nearest(W, own).dequantize(spec, W.dtype))
    best = min(errors, key=errors.__getitem__)
    fitted.join_(held_out)
    found = repair(W, fitted, best, bias=bias) if math.isfinite(best) else None
    V = W if found is None else found.V.to(W.dtype)
    rounding = Rounding.of(W, fitted.products(centred=bias)[0], spec, ranges)
    parts = rounding(V)
    new = mean_bias(parts.dequantize(spec, W.dtype), fitted) if bias else None
    mean = fitted.x / fitted.n if bias else None
    return Found(parts, new, best, (found and found.condition) or 1.0, errors[best], nearest, V, rounding, mean)


def _square(D: Float[Tensor, "out d"], G: Float[Tensor, "d d"]) -> float:
    """tr(D G D^T)."""
    return max(0.0, float(((D @ G) * D).sum()))


def _in_parts(items: list, n: int) -> list[list]:
    return [items[i : i + n] for i in range(0, len(items), n)]
