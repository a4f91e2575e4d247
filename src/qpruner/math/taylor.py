"""What the loss would lose with a unit, by its Taylor expansion in the weights (LLM-Pruner).

Notation
    W      weight of a linear map, y = x @ W.T                       (d_out, d_in)
    G      gradient of the mean loss with respect to W               (d_out, d_in)
    g      gradient of the loss of one sample, G = mean of g         (d_out, d_in)
    F      empirical Fisher diagonal, mean over samples of g * g     (d_out, d_in)
    dim    the dimension summed over: 1 leaves one number per row (an output that may go), 0 one per column
    n      what is left: d_out for dim 1, d_in for dim 0

What has to be kept while samples stream by, for one matrix:

    vector           `first_order(W, g)` of each sample, n numbers: linear in g, the modulus comes last; or
                     `first_order_of_activations`, the same numbers without g
    element-second   `second_order(W, g)` of each sample, n numbers: linear in F
    element-first    G whole: the modulus is taken weight by weight, after the mean
    element-mixed    G and F whole, for the same reason
    coarse           `first_order(W, g)` of every sample, n numbers each: the square of a unit's sum comes after it

so the first two never need a tensor of the size of the weight beyond the gradient of the sample at hand. Everything is
computed in float32 at least: in half precision g * g underflows to zero and the second order silently vanishes.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor


def first_order(
    W: Float[Tensor, "d_out d_in"], g: Float[Tensor, "d_out d_in"], *, dim: Literal[0, 1]
) -> Float[Tensor, " n"]:
    """sum w g, signed: linear in g, so the mean over samples of this is this of the mean gradient."""
    return (_wide(W) * _wide(g)).sum(dim)


def first_order_of_activations(a: Float[Tensor, "tokens n"], da: Float[Tensor, "tokens n"]) -> Float[Tensor, " n"]:
    """`first_order` without the gradient of the weight, which costs a third of a backward pass.

    With y = x W^T and g = dy^T x: the sum of w g over row i is sum_t y_ti dy_ti, and over column j sum_t x_tj dx_tj.

    Args:
        a: outputs of the linear map without its bias, for rows; its inputs, for columns.
        da: the gradient of the loss of one sample with respect to `a`; of inputs, what comes through this map alone.
    """
    return (_wide(a) * _wide(da)).sum(0)


def second_order(
    W: Float[Tensor, "d_out d_in"], g: Float[Tensor, "d_out d_in"], *, dim: Literal[0, 1]
) -> Float[Tensor, " n"]:
    """sum w^2 g^2 of one sample: its mean over samples is `element_second` of F, which need not be stored.

    The gradient has to be that of one sample: the square of a batch's mean gradient is another, smaller quantity.
    """
    return (_wide(W) * _wide(g)).square().sum(dim)


def vector(
    W: Float[Tensor, "d_out d_in"],
    G: Float[Tensor, "d_out d_in"],
    F: Float[Tensor, "d_out d_in"] | None = None,
    *,
    dim: Literal[0, 1],
) -> Float[Tensor, " n"]:
    """|sum w g|: the first-order change when the whole row or column goes at once. F is not used.

    The same as the modulus of the mean over samples of `first_order`.

    Source: arXiv:2305.11627, "Vector".
    """
    return first_order(W, G, dim=dim).abs()


def element_first(
    W: Float[Tensor, "d_out d_in"],
    G: Float[Tensor, "d_out d_in"],
    F: Float[Tensor, "d_out d_in"] | None = None,
    *,
    dim: Literal[0, 1],
) -> Float[Tensor, " n"]:
    """sum |w g|. Needs G, the mean over all samples, weight by weight; F is not used.

    Source: arXiv:2305.11627, "Element^1".
    """
    return (_wide(W) * _wide(G)).abs().sum(dim)


def element_second(
    W: Float[Tensor, "d_out d_in"],
    G: Float[Tensor, "d_out d_in"] | None,
    F: Float[Tensor, "d_out d_in"],
    *,
    dim: Literal[0, 1],
) -> Float[Tensor, " n"]:
    """sum w^2 F. Linear in F: the same as the mean over samples of `second_order`; G is not used."""
    return (_wide(W).square() * _wide(F)).sum(dim)


def element_mixed(
    W: Float[Tensor, "d_out d_in"],
    G: Float[Tensor, "d_out d_in"],
    F: Float[Tensor, "d_out d_in"],
    *,
    dim: Literal[0, 1],
) -> Float[Tensor, " n"]:
    """sum |w g - 1/2 w^2 F|. Needs G and F weight by weight.

    The loss without a weight is L(w) - g w + 1/2 h w^2, with h read off F; hence the minus between the two terms.

    Source: arXiv:2305.11627, "Element^2".
    """
    first, W = _wide(W) * _wide(G), _wide(W)
    return (first - 0.5 * W.square() * _wide(F)).abs().sum(dim)


def coarse(u: Float[Tensor, "samples units"], *, fisher: float = 1.0) -> Float[Tensor, " units"]:
    """|mean u - 1/2 mean u^2|: the change of the loss when a unit goes as one, not weight by weight.

    The square is of a whole unit's sum for one sample, so it knows that the weights of a unit go together; a diagonal F
    cannot say that.

    Args:
        u: for every sample, sum of w g over all weights of the unit (`first_order` over its rows and columns).
        fisher: factor of the quadratic term; see `fisher_factor`.
    Source: arXiv:2403.10799, coarse-grained importance; the quadratic term as a Fisher matrix of rank one per sample.
    """
    u = u.double()
    return (u.mean(0) - 0.5 * fisher * u.square().mean(0)).abs()


def fisher_factor(tokens: int) -> float:
    """What turns F of windows into F of tokens.

    The loss of a window is the mean over its n tokens. If their gradients were independent, the mean square of the
    window's gradient would be 1/n of that of a token, and the curvature of the mean loss is the token's. With n = 512
    the quadratic term is lost beside the first order if this is left out.
    """
    return float(tokens)


SALIENCES: dict[str, Callable[..., Tensor]] = {
    "vector": vector,
    "element-first": element_first,
    "element-second": element_second,
    "element-mixed": element_mixed,
}


def unit_scores(
    vectors: Sequence[Float[Tensor, "*several _n"]], tables: Sequence[Int[Tensor, "units _k"]]
) -> Float[Tensor, "*several units"]:
    """One score per unit: over the matrices of a group, the sum of the entries that belong to the unit.

    With the tables of a `Group` every query head is credited to the key/value head that it shares, wherever it lies.

    Args:
        vectors: per-row saliences of the producers and per-column saliences of the consumers; of several kinds at once,
            if wanted.
        tables: row u holds the indices of unit u into the vector of the same position.
    Raises:
        ValueError: not one table for each vector, or none.
    """
    if len(vectors) != len(tables) or not vectors:
        raise ValueError(f"{len(vectors)} vectors and {len(tables)} index tables: one of each per matrix, at least one")
    return torch.stack([v[..., table].sum(-1) for v, table in zip(vectors, tables, strict=True)]).sum(0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
