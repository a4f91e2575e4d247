"""How much the output of a layer says about the prediction of the model: mutual information, in nats.

Notation
    X      outputs of a layer, one row per token              (T, d), or (T, r) after a projection
    Y      the prediction: classes (T,), or features (T, q)
    r      coordinates kept by a projection
    p, q   ranks of the centred X and Y
    rho    canonical correlations of X and Y                  (min(p, q),)

Both estimators return the bias-corrected estimate, which is around zero for independent data and may fall below it. The
correction does not depend on how the rows are paired, so it cancels out of a comparison with shuffled pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Information:
    """nats: the estimate, at least 0. null_mean, null_std: of the same estimate over shuffled pairs, not clamped.

    z: standard deviations between the estimate and the null; below 2 there is no evidence of any information.
    """

    nats: float
    null_mean: float
    null_std: float
    z: float


def binned(X: Float[Tensor, "T r"], y_classes: Int[Tensor, " T"], *, n_bins: int = 16) -> float:
    """Plug-in information between each coordinate of X in quantile bins and the class, averaged over coordinates.

    Bin edges are order statistics, so only the order of the values matters, and equal values share a bin. The bias of
    the plug-in estimate, (Bx - 1)(By - 1) / 2T over the occupied bins and classes, is taken off (Miller-Madow).

    Args:
        X: a few coordinates, as from `principal_projection`.
    """
    T = len(X)
    y, By = _relabelled(y_classes)
    estimates = []
    for x in X.T.contiguous():
        ranked = x.sort().values
        edges = ranked[(torch.arange(1, n_bins) * T) // n_bins].unique()
        bins, Bx = _relabelled(torch.searchsorted(edges, x, right=True))
        joint = torch.bincount(bins * By + y, minlength=Bx * By).view(Bx, By).double() / T
        independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        seen = joint > 0
        plug_in = (joint[seen] * (joint[seen] / independent[seen]).log()).sum().item()
        estimates.append(plug_in - (Bx - 1) * (By - 1) / (2 * T))
    return math.fsum(estimates) / len(estimates)


def gaussian(X: Float[Tensor, "T d"], Y: Float[Tensor, "T q"], *, shrinkage: float = 1e-4) -> float:
    """-1/2 log det(I - Cxx^-1 Cxy Cyy^-1 Cyx) = -1/2 sum log(1 - rho^2), the information if all were Gaussian.

    X and Y are whitened by thin singular value decompositions that drop null directions, so the result is the same for
    any invertible linear map of either. Shrinkage acts between the whitened sides, rho -> (1 - shrinkage) rho, for the
    same reason, and bounds what one direction can tell, to 4.3 nats by default.

    The bias of independent data, pq / 2T to first order, is taken off with Bartlett's factor: pq / (2T - p - q - 3).

    Raises:
        ValueError: too few rows for the ranks of X and Y.
    """
    return canonical(whitened(X), whitened(Y), shrinkage=shrinkage)


def canonical(U: Float[Tensor, "T p"], V: Float[Tensor, "T q"], *, shrinkage: float = 1e-4) -> float:
    """`gaussian` of sides that are whitened already. Whitening commutes with the order of the rows: for a null of many
    shuffles it is done once.
    """
    (T, p), q = U.shape, V.shape[1]
    if T <= p + q + 2:
        raise ValueError(f"{T} rows are too few for {p} and {q} independent columns; project X, or take more rows")
    rho = torch.linalg.svdvals(U.T @ V).clamp(max=1) * (1 - shrinkage)
    return -0.5 * torch.log1p(-rho.square()).sum().item() - p * q / (2 * T - p - q - 3)


def with_null(
    estimator: Callable[[Tensor, Tensor], float],
    X: Float[Tensor, "T d"],
    Y: Tensor,
    *,
    n_permutations: int = 20,
    generator: torch.Generator,
) -> Information:
    """The estimate beside what it gives for the rows of Y in random order, where there is nothing to find.

    Args:
        estimator: `binned`, `gaussian`, `canonical`, or a function of their signature.
    """
    estimate = estimator(X, Y)
    null = torch.tensor(
        [estimator(X, Y[torch.randperm(len(Y), generator=generator)]) for _ in range(n_permutations)],
        dtype=torch.float64,
    )
    mean, std = null.mean().item(), null.std().item()
    excess = estimate - mean
    # A constant X or Y gives the same estimate for every order: no spread, and no evidence either.
    z = excess / std if std > 1e-12 else 0.0 if abs(excess) < 1e-12 else math.copysign(math.inf, excess)
    return Information(nats=max(0.0, estimate), null_mean=mean, null_std=std, z=z)


def prediction_classes(argmax_ids: Int[Tensor, " T"], n_classes: int = 32) -> Int[Tensor, " T"]:
    """The predicted tokens as few classes: the most frequent ids, and class n_classes - 1 for all others.

    Classes are numbered by falling frequency; of equally frequent ids the lower comes first.
    """
    ids, inverse, counts = argmax_ids.unique(return_inverse=True, return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(ids), device=ids.device)
    return rank.clamp(max=n_classes - 1)[inverse]


def one_hot(y_classes: Int[Tensor, " T"]) -> Float[Tensor, "T q"]:
    """Indicators of every class that occurs but the last, which the others determine: Y for `gaussian`."""
    y, By = _relabelled(y_classes)
    return torch.nn.functional.one_hot(y, By)[:, :-1].double()


def principal_projection(X: Float[Tensor, "T d"], r: int) -> Float[Tensor, "d r"]:
    """Orthonormal columns that span the r directions of largest variance, each with its largest entry positive.

    Raises:
        ValueError: X has fewer than r columns, or not more than r rows.
    """
    T, d = X.shape
    if r > d or r >= T:
        raise ValueError(f"{r} principal directions cannot be read from {T} rows of {d} columns")
    centred = X.double() - X.double().mean(0)
    # The smaller Gram matrix has the same leading directions; QR restores orthonormality, and completes a deficient X.
    if T < d:
        vectors = centred.T @ torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -r:].flip(1)
    else:
        vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -r:].flip(1)
    basis = torch.linalg.qr(vectors).Q
    peaks = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return (basis * torch.where(peaks < 0, -1.0, 1.0)).to(X.dtype)


def _relabelled(labels: Tensor) -> tuple[Tensor, int]:
    """Labels as 0, 1, ... over those that occur, and how many there are."""
    occupied, inverse = labels.unique(return_inverse=True)
    return inverse, len(occupied)


def whitened(X: Float[Tensor, "T d"]) -> Float[Tensor, "T p"]:
    """An orthonormal basis (T, p) of the centred columns."""
    X = X.double()
    centred = X - X.mean(0)
    # Columns of unit length first: a rank test must not depend on the units of a column. What is left of a constant
    # column after centring is rounding of its mean, and stays out.
    length, size = centred.norm(dim=0), X.norm(dim=0)
    kept = length > 1e-12 * size
    scaled = centred[:, kept] / length[kept]
    if not scaled.shape[1]:
        return scaled
    U, S, _ = torch.linalg.svd(scaled, full_matrices=False)
    return U[:, S > 1e-10 * S[0]]
