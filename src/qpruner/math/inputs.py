"""What a linear map has of each of its inputs, judged by the inputs themselves: no gradient, no output.

Notation
    X   inputs seen in calibration, one row per token   (tokens, d_in)
    W   weight, y = x @ W.T                             (d_out, d_in)

Both methods multiply what the weights make of column j by what the texts make of it:

    Wanda   sum_i |W_ij|  *  |X_j|_2
    FLAP    sum_i W_ij^2  *  Var(X_j)

Sums over tokens are in float64, so that batches of any size add up to the same.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from qpruner.math.grids import tiles


class Norms:
    """|X_j|_2 over all tokens that were added. Source: arXiv:2306.11695."""

    def __init__(self) -> None:
        self._squares: Tensor | None = None

    def add(self, X: Float[Tensor, "tokens d_in"]) -> None:
        squares = X.double().square().sum(0)
        self._squares = squares if self._squares is None else self._squares + squares

    def factors(self) -> Float[Tensor, " d_in"] | None:
        """None where no token was added."""
        return None if self._squares is None else self._squares.sqrt()

    @staticmethod
    def of_weights(W: Float[Tensor, "d_out d_in"]) -> Float[Tensor, " d_in"]:
        """sum_i |W_ij|."""
        return sum(W[rows].double().abs().sum(0) for rows in tiles(*W.shape))


class Variances:
    """Var(X_j) over all tokens that were added, as the second moment about the mean. Source: arXiv:2312.11983.

    Everything is counted from the first token: an input that never changes has no variance at all, and the digits of
    a large mean are not lost.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None
        self._n, self._sums, self._squares = 0, 0.0, 0.0

    def add(self, X: Float[Tensor, "tokens d_in"]) -> None:
        X = X.double()
        if not len(X):
            return
        if self._first is None:
            self._first = X[0].clone()
        X = X - self._first
        self._n += len(X)
        self._sums, self._squares = self._sums + X.sum(0), self._squares + X.square().sum(0)

    def factors(self) -> Float[Tensor, " d_in"] | None:
        """None where no token was added."""
        if not self._n:
            return None
        return (self._squares / self._n - (self._sums / self._n).square()).clamp(min=0)

    @staticmethod
    def of_weights(W: Float[Tensor, "d_out d_in"]) -> Float[Tensor, " d_in"]:
        """sum_i W_ij^2."""
        return sum(W[rows].double().square().sum(0) for rows in tiles(*W.shape))


def standardised(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """How many standard deviations above the mean each value is; nothing where all are equal."""
    spread = x.std() if len(x) > 1 else torch.zeros((), dtype=x.dtype, device=x.device)
    return (x - x.mean()) / spread if spread > 0 else torch.zeros_like(x)
