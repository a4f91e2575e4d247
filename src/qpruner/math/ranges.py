"""Scales and zero points of a grid, fitted to groups of weights.

Notation
    w       weights of the groups                                  (out, m, g)
    s       scale of each group                                     (out, m)
    z       zero point of each group, a code                        (out, m)
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from qpruner.math.books import reach
from qpruner.plan import QuantSpec

Ranges = Callable[[Tensor, QuantSpec, Tensor | None], tuple[Tensor, Tensor | None]]


def absmax(
    w: Float[Tensor, "out m g"], spec: QuantSpec, weight: Float[Tensor, "_ m g"] | None = None
) -> tuple[Float[Tensor, "out m"], UInt8[Tensor, "out m"] | None]:
    """The narrowest range that clips nothing; `weight` does not matter. Of two values: their least-squares scale."""
    if spec.grid == "binary":
        return w.abs().mean(-1), None
    if spec.symmetric:
        return w.abs().amax(-1) / reach(spec), None
    low, high = w.amin(-1).clamp_(max=0), w.amax(-1).clamp_(min=0)
    return with_zero(low, high, spec)


def with_zero(
    low: Float[Tensor, "out m"], high: Float[Tensor, "out m"], spec: QuantSpec
) -> tuple[Float[Tensor, "out m"], UInt8[Tensor, "out m"]]:
    """Scale and zero point of the range from `low` <= 0 to `high` >= 0."""
    s = (high - low) / reach(spec)
    z = (-low / torch.where(s == 0, 1, s)).round_().clamp_(0, reach(spec))
    return s, z.nan_to_num_().to(torch.uint8)


RANGES: dict[str, Ranges] = {"absmax": absmax}
