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

The error of the output, tr(D G D^T), is tried for s = x^a / w^b, first with b = 0 and with b = 1 - a; s = 1 is tried as
well. Source: AWQ, arXiv 2306.00978, with the Gram matrix for its passes over text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

STEPS = (0.25, 0.125)  # of the exponents
LARGEST = 64.0  # factor: biases and norms that are divided by one have to stay what 16 bits can hold

# A weight, rounded and back; and how much the squared error of each of its inputs counts.
Round = Callable[[Float[Tensor, "_ d"], Float[Tensor, " d"]], Float[Tensor, "_ d"]]


@dataclass(frozen=True)
class Chosen:
    """Factors, and the squared error of the output with and without them."""

    s: Float[Tensor, " m"]
    error: float
    error_before: float


def choose(
    maps: Sequence[tuple[Float[Tensor, "_ d"], Round]], G: Float[Tensor, "d d"], classes: Int[Tensor, " d"], m: int
) -> Chosen:
    """The factors that lose least, over all maps that read these inputs: a coarse look, then a closer one."""
    x = class_sizes(G.diagonal(), classes, m).log()
    w = class_sizes(sum(W.double().square().sum(0) for W, _ in maps), classes, m).log()
    G32 = G.to(maps[0][0])

    def error(s: Float[Tensor, " m"]) -> float:
        factors = spread(s, classes).to(G32)
        return sum(output_error(W, round_, G32, factors) for W, round_ in maps)

    one = torch.ones_like(x)
    best = first = error(one), one
    where = 0.0, 0.0
    tried = {where}
    for step in STEPS:
        for a, b in neighbours(*where, step):
            if (a, b) not in tried:
                tried.add((a, b))
                s = bounded(a * x - b * w)
                if (found := error(s)) < best[0]:
                    best, where = (found, s), (a, b)
    return Chosen(best[1], best[0], first[0])


def neighbours(a: float, b: float, step: float) -> list[tuple[float, float]]:
    """Exponents to try. At first all along both lines; then beside the best."""
    if step == STEPS[0]:
        return [(step * i, b) for i in range(1, int(1 / step) + 1) for b in (0.0, 1 - step * i)] + [(0.0, 1.0)]
    near = [(a + step, b), (a - step, b), (a, b + step), (a, b - step)]
    return [(a, b) for a, b in near if 0 <= a <= 1 and 0 <= b <= 1]


def output_error(
    W: Float[Tensor, "out d"], round_: Round, G: Float[Tensor, "d d"], factors: Float[Tensor, " d"]
) -> float:
    """tr(D G D^T)."""
    D = round_(W * factors, G.diagonal() / factors.square()) / factors - W
    return float(((D @ G) * D).sum(dtype=torch.float64))


def spread(s: Float[Tensor, " m"], classes: Int[Tensor, " d"]) -> Float[Tensor, " d"]:
    """The factor of every input."""
    return torch.where(classes < 0, 1, s[classes.clamp(min=0)])


def class_sizes(squares: Float[Tensor, " d"], classes: Int[Tensor, " d"], m: int) -> Float[Tensor, " m"]:
    """Roots of the means of each class; of what is zero, far below the others, something small."""
    there = classes >= 0
    sums = squares.new_zeros(m).index_add_(0, classes[there], squares[there])
    counts = squares.new_zeros(m).index_add_(0, classes[there], torch.ones_like(squares[there]))
    means = sums / counts.clamp(min=1)
    return means.clamp(min=float(means.mean()) * 1e-8 + 1e-300).sqrt()


def bounded(logs: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """About one in the middle."""
    return (logs - logs.mean()).exp().clamp(1 / LARGEST, LARGEST)
