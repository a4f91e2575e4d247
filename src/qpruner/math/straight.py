"""Rounding that gradients pass through, so that codes and scales can be learned.

Notation
    u       latents: weights in units of their scale, zero point added     (d_out, d_in)
    book    values that codes stand for, ascending                         (values,)
    S, z    scale and zero point of every weight                           (d_out, d_in)
    q       the weight that is stored, (book[nearest(u)] - z) S            (d_out, d_in)

Backward, rounding counts as the identity (straight-through, arXiv:1308.3432) where a latent lies on the grid, and as a
constant beyond its ends, as clamping would have it.
"""

import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor

from qpruner.math.books import book, index_
from qpruner.plan import QuantSpec


def on_grid(u: Float[Tensor, "out d"], spec: QuantSpec) -> Bool[Tensor, "out d"]:
    """Whether a latent rounds to its nearest value, and is not cut off at an end of the grid."""
    values = book(spec)
    gaps = values.diff()
    low, high = (values[0] - gaps[0] / 2).item(), (values[-1] + gaps[-1] / 2).item()
    return (u >= low) & (u <= high)


def mean_gap(spec: QuantSpec) -> float:
    """Between neighbouring values of the book, in units of the scale."""
    return book(spec).diff().mean().item()


class Snap(torch.autograd.Function):
    """The nearest value of the book."""

    @staticmethod
    def forward(ctx, u: Tensor, spec: QuantSpec) -> Tensor:
        ctx.save_for_backward(on_grid(u, spec))
        return nearest_values(u, spec)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (passes,) = ctx.saved_tensors
        return gradient * passes, None


def nearest_values(u: Float[Tensor, "out d"], spec: QuantSpec) -> Float[Tensor, "out d"]:
    if spec.grid in ("integer", "ternary"):  # evenly spaced: no look-up
        values = book(spec)
        return u.round().clamp_(values[0].item(), values[-1].item())
    return book(spec).to(u)[index_(u.clone(), spec).int()]


class Nudge(torch.autograd.Function):
    """`stored` forward, as if it were `x` backward: for what is rounded in a way that autograd does not see."""

    @staticmethod
    def forward(ctx, x: Tensor, stored: Tensor) -> Tensor:
        return stored.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def spread(values: Shaped[Tensor, "out n"], group_size: int | None, d: int) -> Shaped[Tensor, "out d"]:
    """One value per group, repeated for every weight of it."""
    return values.repeat_interleave(group_size or d, dim=1)[:, :d]


def latents_near(
    W: Float[Tensor, "out d"],
    codes: UInt8[Tensor, "out d"],
    scales: Float[Tensor, "out n"],
    zeros: UInt8[Tensor, "out n"] | None,
    spec: QuantSpec,
) -> Float[Tensor, "out d"]:
    """Where learning begins: every latent rounds to its code; if the weight itself does, it is the weight."""
    d = W.shape[1]
    S = spread(scales, spec.group_size, d).to(W.dtype)
    u = W / torch.where(S == 0, 1, S)
    if zeros is not None:
        u = u + spread(zeros, spec.group_size, d)
    values = book(spec).to(W)[codes.int()]
    return torch.where((nearest_values(u, spec) == values) & on_grid(u, spec), u, values)
