"""Factors for the inputs of linear maps that are to be rounded, taken back where the inputs come from.

Notation
    X        inputs as they come                                                    (tokens, d)
    W        the map, y = x W^T                                                     (d_out, d)
    G        Gram matrix X^T X                                                      (d, d), float64
    classes  which factor each input shares; -1 for an input that has none           (d,)
    s        factors, one for each class; W diag(s) is rounded, and x / s comes in    (m,)
    Q(.)     rounding
    D        what the map loses, Q(W diag(s)) diag(s)^-1 - W                        (d_out, d)
    x, w     root mean square of the inputs, and of the columns, of each class       (m,)

The error of the output, tr(D G D^T), is tried for s = x^a and s = x^a / w^(1 - a), a on a grid; s = 1 is tried as well.
Source: AWQ, arXiv 2306.00978, with the Gram matrix for its passes over text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

POINTS = 20  # of the grid for a, as AWQ's authors have
LARGEST = 64.0  # factor: biases and norms that are divided by one have to stay what 16 bits can hold

# A weight, rounded and back; and how much the squared error of each of its inputs counts.
Round = Callable[[Float[Tensor, "out d"], Float[Tensor, " d"]], Float[Tensor, "out d"]]


@dataclass(frozen=True)
class Chosen:
    """Factors, and the squared error of the output with and without them."""

    s: Float[Tensor, " m"]
    error: float
    error_before: float


def choose(
    maps: Sequence[tuple[Float[Tensor, "out d"], Round]], G: Float[Tensor, "d d"], classes: Int[Tensor, " d"], m: int
) -> Chosen:
    """The factors that lose least, over all maps that read these inputs."""
    G32, best = G.to(maps[0][0]), None
    for s in candidates(maps, G, classes, m):
        factors = spread(s, classes).to(maps[0][0])
        error = sum(output_error(W, round_, G32, factors) for W, round_ in maps)
        if best is None:
            best = Chosen(s, error, error)
        elif error < best.error:
            best = Chosen(s, error, best.error_before)
    return best


def output_error(
    W: Float[Tensor, "out d"], round_: Round, G: Float[Tensor, "d d"], factors: Float[Tensor, " d"]
) -> float:
    """tr(D G D^T)."""
    D = round_(W * factors, G.diagonal() / factors.square()) / factors - W
    return float(((D @ G) * D).sum(dtype=torch.float64))


def candidates(
    maps: Sequence[tuple[Float[Tensor, "out d"], Round]], G: Float[Tensor, "d d"], classes: Int[Tensor, " d"], m: int
) -> Iterator[Float[Tensor, " m"]]:
    """Ones first."""
    x = _class_sizes(G.diagonal(), classes, m)
    w = _class_sizes(sum(W.double().square().sum(0) for W, _ in maps), classes, m)
    yield torch.ones_like(x)
    for point in range(POINTS + 1):
        a = point / POINTS
        if a:
            yield _bounded(a * x.log())
        if a < 1:
            yield _bounded(a * x.log() - (1 - a) * w.log())


def spread(s: Float[Tensor, " m"], classes: Int[Tensor, " d"]) -> Float[Tensor, " d"]:
    """The factor of every input."""
    return torch.where(classes < 0, 1, s[classes.clamp(min=0)])


def _class_sizes(squares: Float[Tensor, " d"], classes: Int[Tensor, " d"], m: int) -> Float[Tensor, " m"]:
    """Roots of the means of each class; of what is zero, far below the others, something small."""
    there = classes >= 0
    sums = squares.new_zeros(m).index_add_(0, classes[there], squares[there])
    counts = squares.new_zeros(m).index_add_(0, classes[there], torch.ones_like(squares[there]))
    means = sums / counts.clamp(min=1)
    return means.clamp(min=float(means.mean()) * 1e-8 + 1e-300).sqrt()


def _bounded(logs: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """About one in the middle."""
    return (logs - logs.mean()).exp().clamp(1 / LARGEST, LARGEST)
