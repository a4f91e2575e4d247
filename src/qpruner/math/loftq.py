"""A rounded weight and the low-rank correction that an adapter starts from.

Notation
    W     weight, y = x @ W.T                      (d_out, d_in)
    Q     W on the grid                            (d_out, d_in)
    A, B  the adapter's two factors                (r, d_in), (d_out, r)
    s     scaling of the adapter, alpha / r: a LoRA layer computes x @ (Q + s B A).T
    E     what is lost, W - Q                      (d_out, d_in)
    G     damped Gram matrix of the inputs         (d_in, d_in), float64
    L     lower factor of G, L L^T = G; the identity where errors count by themselves

LoftQ alternates Q = grid(W - s B A) and s B A = the best rank-r approximation of W - Q. Unlike the reference code,
which solves for Q + B A and then runs Q + s B A, the factors are divided by sqrt(s). Source: arXiv:2310.08659,
algorithm 1.

Counted are errors of what comes out: |X E^T|^2 = tr(E G E^T) = |E L|^2. L is invertible, so M = s B A runs through the
matrices of rank r when M L does, and |E L - M L| is least for the truncated singular value decomposition of E L,
U S V^T: s B A = U S V^T L^-1, solved for, not inverted. Source: the closed form of QERA, arXiv:2410.06040, there with
the symmetric root of G, which gives the same product; CALDERA, arXiv:2405.18886, alternates such a step with rounding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qpruner.math.gptq import DAMPING
from qpruner.math.least_squares import factor

EXACT_SVD_BELOW = 1025  # smaller dimension; a full SVD of 4096 x 4096 takes minutes on one core
OVERSAMPLING, POWER_STEPS = 24, 12  # rounding errors have a flat spectrum: fewer lose over 2% of what r directions hold


@dataclass(frozen=True)
class LoftQSplit:
    """`stored` is what the rounding gave beside Q. Norms of (W - what stands for it) L: error of Q + s B A, plain_error
    of grid(W), size of nothing."""

    stored: Any
    A: Float[Tensor, "r d"]
    B: Float[Tensor, "out r"]
    error: float
    plain_error: float
    size: float

    @property
    def relative(self) -> tuple[float, float]:
        """plain_error and error as fractions of `size`."""
        return self.plain_error / max(self.size, 1e-30), self.error / max(self.size, 1e-30)


def split(
    W: Float[Tensor, "out d"],
    rounding: Callable[[Tensor], tuple[Any, Tensor]],
    *,
    rank: int,
    scaling: float,
    iterations: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    L: Float[Tensor, "d d"] | None = None,
) -> LoftQSplit:
    """The best of `iterations` alternations, judged with the factors as they will be stored, in `dtype`.

    With no iterations, no rank, or nothing to correct: plain rounding, A random and B zero as LoRA starts.

    Args:
        rounding: weight -> (whatever stands for it in storage, its dense value Q).
        scaling: s, above zero.
        generator: draws A where B is zero, and the directions that large matrices are first projected on.
        L: as `weighting` finds it; without it all errors count the same.
    Raises:
        ValueError: rank is above both dimensions of W, or negative; scaling is not positive.
    """
    if not 0 <= rank <= min(W.shape):
        raise ValueError(f"rank is {rank}; for a weight of {tuple(W.shape)} it is at most {min(W.shape)}")
    if not scaling > 0:
        raise ValueError(f"scaling is {scaling}; it is alpha / rank, above zero")
    wide = W if W.dtype == torch.float64 else W.float()
    size = weighted_norm(wide, L)
    stored, Q = rounding(wide)
    E = wide - Q.to(wide.dtype)
    plain_error = weighted_norm(E, L)
    A, B = fresh_adapter(*W.shape, rank, dtype, generator, W.device)
    best = LoftQSplit(stored, A, B, plain_error, plain_error, size)
    if rank == 0 or plain_error == 0:
        return best
    for i in range(iterations):
        A, B = factors(E, rank, scaling, dtype, generator, L)
        correction = scaling * (B.to(wide.dtype) @ A.to(wide.dtype))
        error = weighted_norm(E - correction, L)
        if error < best.error:
            best = LoftQSplit(stored, A, B, error, plain_error, size)
        if i + 1 < iterations:
            stored, Q = rounding(wide - correction)
            E = wide - Q.to(wide.dtype)
    # Weights so small that their factors vanish in `dtype` cannot be corrected; everything else must gain.
    underflow = iterations > 0 and min(A.abs().max(), B.abs().max()) < torch.finfo(dtype).smallest_normal
    assert iterations == 0 or underflow or best.error < plain_error, (best.error, plain_error)
    return best


def norm(E: Float[Tensor, "out d"]) -> float:
    return torch.linalg.vector_norm(E, dtype=torch.float64).item()


def fresh_adapter(
    d_out: int, d_in: int, rank: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> tuple[Float[Tensor, "r d"], Float[Tensor, "out r"]]:
    """A uniform in +-1/sqrt(d_in), B zero: the start of LoRA, arXiv:2106.09685."""
    A = torch.rand(rank, d_in, generator=generator, device=generator.device).mul_(2).sub_(1).div_(math.sqrt(d_in))
    return A.to(device, dtype), torch.zeros(d_out, rank, device=device, dtype=dtype)


def weighting(G: Float[Tensor, "d d"], damping: float = DAMPING) -> Float[Tensor, "d d"] | None:
    """L for the Gram matrix of inputs, over its mean diagonal m, with damping m added to the diagonal of G; None where
    the inputs say nothing. Damping grows tenfold until the matrix is definite."""
    G = G.double()
    m = G.diagonal().mean()
    found = factor(G / m, torch.ones((), dtype=G.dtype, device=G.device), damping) if m > 0 else None
    return None if found is None else found[1]


def weighted(E: Float[Tensor, "out d"], L: Float[Tensor, "d d"] | None) -> Float[Tensor, "out d"]:
    """E L, in float64 as L is: directions that hardly any input has are small differences of large numbers."""
    return E if L is None else E.double() @ L


def weighted_norm(E: Float[Tensor, "out d"], L: Float[Tensor, "d d"] | None) -> float:
    return norm(weighted(E, L))


def factors(
    E: Float[Tensor, "out d"],
    rank: int,
    scaling: float,
    dtype: torch.dtype,
    generator: torch.Generator,
    L: Float[Tensor, "d d"] | None = None,
) -> tuple[Float[Tensor, "r d"], Float[Tensor, "out r"]]:
    """A and B, stored in `dtype`, with s B A L close to the best approximation of E L of that rank.

    A column of B and its row of A are of one length, so that both fit the range of `dtype`.
    """
    U, S, Vh = leading_svd(weighted(E, L), rank, generator)
    if L is None:
        root = (S / scaling).sqrt()
        return (root[:, None] * Vh).to(dtype), (U * root).to(dtype)
    rows = torch.linalg.solve_triangular(L, Vh, upper=False, left=False)
    lengths = torch.linalg.vector_norm(rows, dim=1)
    root = (S * lengths / scaling).sqrt()
    return (root[:, None] * rows / lengths[:, None]).to(dtype), (U * root).to(dtype)


def leading_svd(
    E: Float[Tensor, "out d"], rank: int, generator: torch.Generator
) -> tuple[Float[Tensor, "out r"], Float[Tensor, " r"], Float[Tensor, "r d"]]:
    """The leading singular triplets: exact for small matrices, by subspace iteration for large ones.

    Not torch.svd_lowrank, which draws from the global generator.
    """
    if min(E.shape) < EXACT_SVD_BELOW:
        U, S, Vh = torch.linalg.svd(E, full_matrices=False)
    else:
        columns = min(rank + OVERSAMPLING, *E.shape)
        start = torch.randn(E.shape[1], columns, generator=generator, device=generator.device).to(E)
        basis = torch.linalg.qr(E @ start).Q
        for _ in range(POWER_STEPS):
            basis = torch.linalg.qr(E @ torch.linalg.qr(E.T @ basis).Q).Q
        U, S, Vh = torch.linalg.svd(basis.T @ E, full_matrices=False)
        U = basis @ U
    return U[:, :rank], S[:rank], Vh[:rank]
