"""An orthogonal change of basis that spreads single large channels over all of them, at a cost of little more than d.

Notation
    d       channels
    signs   plus or minus one for each channel                          (d,)
    F_i     small orthogonal matrices whose sizes multiply to d: Hadamard for the powers of two, random for the rest
    w       unit vector of a reflection                                 (d,)
    Q       diag(signs) (F_1 x F_2 x ...) (I - 2 w w^T), x the Kronecker product     (d, d)

The reflection makes Q leave the vector of ones where it is, 1 Q = 1. Means are then untouched by it, so that not only
the norms that divide by a root mean square commute with Q but also those that subtract the mean first.
Source: QuaRot, arXiv 2404.00456, and SliceGPT, arXiv 2401.15024, which centres writers instead.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

LARGEST = 64  # rows of a Hadamard factor: two small products are faster than one large
TILE = 2**18  # elements that are turned at a time: more fall out of the cache


@dataclass(frozen=True)
class Rotation:
    """Rows times Q. Final. Everything is float64."""

    signs: Float[Tensor, " d"]
    factors: tuple[Tensor, ...]
    mirror: Float[Tensor, " d"]

    @classmethod
    def of(cls, d: int, seed: int) -> "Rotation":
        generator = torch.Generator().manual_seed(seed)
        signs = 1 - 2 * torch.randint(2, (d,), generator=generator).double()
        odd = d // (even := d & -d)
        factors = [random_orthogonal(odd, generator)] if odd > 1 else []
        while even > 1:
            size = min(even, LARGEST)
            factors.append(hadamard(size))
            even //= size
        turned = _times_factors(signs[None], tuple(factors))[0]  # what becomes of the vector of ones
        w = turned - 1
        return cls(signs, tuple(factors), w / w.norm() if w.norm() > 1e-6 else torch.zeros_like(w))

    def __call__(self, X: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """X Q, in the dtype of X."""
        rows = X.reshape(-1, X.shape[-1])
        n = max(1, TILE // X.shape[-1])
        found = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for start in range(0, len(rows), n):
            tile = rows[start : start + n].double() * self.signs.to(X.device)
            tile = _times_factors(tile, self.factors)
            w = self.mirror.to(X.device)
            found[start : start + n] = tile - 2 * (tile @ w)[:, None] * w
        return found.view(X.shape)


def along(X: Tensor, rotation: Rotation, dim: int) -> Tensor:
    """X with its dimension `dim` turned."""
    return rotation(X.movedim(dim, -1)).movedim(-1, dim).contiguous()


def hadamard(n: int) -> Float[Tensor, "n n"]:
    """Of a power of two, orthogonal."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)]) / 2**0.5
    return H


def random_orthogonal(n: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    """Uniform among all: the signs of R's diagonal make QR unique."""
    Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return Q * R.diagonal().sign()


def _times_factors(rows: Float[Tensor, "rows d"], factors: tuple[Tensor, ...]) -> Float[Tensor, "rows d"]:
    shape = rows.shape
    for F in factors:  # each turns the last part of the index and puts it first, so that after all the order is back
        n = len(F)
        rows = (rows.view(len(rows), -1, n) @ F.to(rows.device)).transpose(1, 2).reshape(shape)
    return rows
