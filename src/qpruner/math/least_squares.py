"""Least-squares repair of a linear map that lost some of its inputs.

Notation
    X        inputs that are left, one row per token                  (tokens, k)
    Y        what the whole map gave for the same tokens              (tokens, d_out)
    W        the map sliced to the inputs that are left               (d_out, k)
    V, b     the repaired map, y = x V^T + b                          (d_out, k), (d_out)
    A, P     X^T X and X^T Y; with a bias, of X and Y less their means (k, k), (k, d_out), float64
    m        mean diagonal of A
    damping  ridge strength as a fraction of m

Minimised is |X V^T + b - Y|^2 + damping m |V - W|^2: damping pulls towards plain slicing, not towards zero, and a bias
is free. Infinite damping is slicing; with a bias it is FLAP's bias compensation (arXiv 2312.11983). All rows of V share
one Cholesky factor. Source: normal equations; as a step after structured pruning, HyWIA (arXiv 2403.10799).
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qpruner.math.gram import add_gram_

SMALLEST, LARGEST = 1e-8, 1e4  # dampings that are tried where the one asked for leaves the matrix indefinite
STEPS = 40  # of power and inverse iteration


class Moments:
    """Sums over tokens from which a repair is found and judged. No token is kept. Final."""

    def __init__(self, k: int, d_out: int, device: torch.device | str = "cpu"):
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=device)
        self.XX, self.XY = zeros(k, k), zeros(k, d_out)
        self.x, self.y, self.yy = zeros(k), zeros(d_out), zeros(())
        self.n = 0

    def add_(self, X: Float[Tensor, "tokens k"], Y: Float[Tensor, "tokens d_out"]) -> None:
        """Another batch. Products are taken in float32 at least, and summed in float64."""
        X, Y = (part if part.dtype == torch.float64 else part.float() for part in (X, Y))
        add_gram_(self.XX, X)
        self.XY += X.T @ Y
        self.x += X.sum(0, dtype=torch.float64)
        self.y += Y.sum(0, dtype=torch.float64)
        self.yy += torch.linalg.vector_norm(Y, dtype=torch.float64).square()
        self.n += len(X)

    def join_(self, other: "Moments") -> None:
        """Take the tokens of `other` in."""
        for own, more in zip(self._sums, other._sums, strict=True):
            own += more
        self.n += other.n

    def products(self, *, centred: bool) -> tuple[Float[Tensor, "k k"], Float[Tensor, "k d_out"]]:
        """A and P."""
        if not centred:
            return self.XX, self.XY
        return self.XX - torch.outer(self.x, self.x) / self.n, self.XY - torch.outer(self.x, self.y) / self.n

    @property
    def _sums(self) -> tuple[Tensor, ...]:
        return self.XX, self.XY, self.x, self.y, self.yy


class Pairs:
    """The same from inputs alone, where Y is a linear map of inputs Z of its own: cheaper where it has many outputs.
    Final."""

    def __init__(self, k: int, k_other: int, device: torch.device | str = "cpu"):
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=device)
        self.XX, self.XZ, self.ZZ = zeros(k, k), zeros(k, k_other), zeros(k_other, k_other)
        self.x, self.z, self.n = zeros(k), zeros(k_other), 0

    def add_(self, X: Float[Tensor, "tokens k"], Z: Float[Tensor, "tokens k_other"]) -> None:
        X, Z = (part if part.dtype == torch.float64 else part.float() for part in (X, Z))
        add_gram_(self.XX, X)
        add_gram_(self.ZZ, Z)
        self.XZ += X.T @ Z
        self.x += X.sum(0, dtype=torch.float64)
        self.z += Z.sum(0, dtype=torch.float64)
        self.n += len(X)

    def moments(self, W: Float[Tensor, "d_out k_other"], b: Float[Tensor, " d_out"] | None) -> Moments:
        """Of X and Y = Z W^T + b."""
        W = W.double()
        found = Moments(len(self.x), 0, self.XX.device)
        found.XX, found.x, found.n = self.XX, self.x, self.n
        found.XY, found.y, found.yy = self.XZ @ W.T, W @ self.z, ((W @ self.ZZ) * W).sum()
        if b is not None:
            b = b.double()
            found.yy = found.yy + 2 * b.dot(found.y) + self.n * b.dot(b)
            found.XY, found.y = found.XY + torch.outer(self.x, b), found.y + self.n * b
        return found


@dataclass(frozen=True)
class Repair:
    """A repaired map. damping: that it took, infinite for slicing. condition: of what was solved, if asked for."""

    V: Tensor
    b: Tensor | None
    damping: float
    condition: float | None = None


def repair(W: Float[Tensor, "d_out k"], moments: Moments, damping: float, *, bias: bool) -> Repair:
    """The map on the inputs that are left that best imitates the whole one, in float64.

    Where the damped A is not positive definite in float64, as with a dead or a duplicated input and no damping, the
    damping grows tenfold until it is.

    Args:
        bias: whether the map has a bias; it is then part of Y, and moves.
    """
    return next(repairs(W, moments, [damping], bias=bias, conditions=True))


def repairs(
    W: Float[Tensor, "d_out k"],
    moments: Moments,
    dampings: Iterable[float],
    *,
    bias: bool,
    conditions: bool = False,
) -> Iterator[Repair]:
    """`repair` for one damping after the other. conditions: whether to find condition numbers, which takes a while."""
    W = W.double()
    if not moments.n:
        yield from (sliced(W, moments, bias=bias) for _ in dampings)
        return
    A, P = moments.products(centred=bias)
    missing = P - A @ W.T  # X^T of what slicing leaves undone
    m = A.diagonal().mean()
    for damping in dampings:
        found = factor(A, m, damping)
        if found is None:
            yield sliced(W, moments, bias=bias)
            continue
        B, L, enough = found
        V = W + torch.cholesky_solve(missing, L).T
        condition = condition_number(B, L) if conditions else None
        yield Repair(V, mean_bias(V, moments) if bias else None, enough, condition)


def factor(A: Float[Tensor, "k k"], m: Tensor, damping: float) -> tuple[Tensor, Tensor, float] | None:
    """A + damping m I, its Cholesky factor, and the damping that it took; None where slicing is all that is left."""
    while damping <= LARGEST:
        B = A.clone()
        B.diagonal().add_(damping * m)
        L, failed = torch.linalg.cholesky_ex(B)
        if not failed and torch.isfinite(L.diagonal()).all():
            return B, L, damping
        damping = max(10 * damping, SMALLEST)
    return None  # asked for, or no token that says anything, or overflown inputs


def sliced(W: Float[Tensor, "d_out k"], moments: Moments, *, bias: bool) -> Repair:
    """The limit of infinite damping: the weight as it is, and the bias that makes up for the mean of what is gone."""
    return Repair(W, mean_bias(W, moments) if bias and moments.n else None, math.inf)


def mean_bias(V: Float[Tensor, "d_out k"], moments: Moments) -> Float[Tensor, " d_out"]:
    return (moments.y - V.double() @ moments.x) / moments.n


def squared_error(V: Float[Tensor, "d_out k"], b: Float[Tensor, " d_out"] | None, moments: Moments) -> float:
    """|X V^T + b - Y|^2 over all tokens, from their moments alone."""
    V = V.double()
    error = moments.yy + ((V @ moments.XX - 2 * moments.XY.T) * V).sum()
    if b is not None:
        b = b.double()
        error = error + moments.n * b.dot(b) + 2 * b.dot(V @ moments.x - moments.y)
    return max(0.0, float(error))


def condition_number(B: Float[Tensor, "k k"], L: Float[Tensor, "k k"]) -> float:
    """Largest by smallest eigenvalue of B = L L^T, by so many steps of power and of inverse iteration.

    Both start where no eigenvector of a model does, and approach from below: what is found is a lower bound, within a
    factor of two unless eigenvalues by the thousand crowd just below the extreme one.
    """
    start = torch.arange(1, len(B) + 1, dtype=B.dtype, device=B.device) * ((math.sqrt(5) - 1) / 2) % 1 - 0.5
    found = 1.0
    for step in (lambda v: B @ v, lambda v: torch.cholesky_solve(v[:, None], L)[:, 0]):
        v = start / start.norm()
        for _ in range(STEPS):
            v = step(v)
            length = v.norm()
            v = v / length
        found *= float(length)
    return found
