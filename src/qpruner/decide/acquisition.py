"""How much a point is expected to improve a front of sizes and losses, in logarithms.

Notation
    m, s    mean and deviation of the log loss of a point, normal                     (p,)
    f       least log loss known on each stretch of sizes, falling                    (k,)
    w       length of a stretch, or weight of a limit                                 (k,) or (p, k)

The size of a point is known before it is tried, so only its loss is uncertain. On a stretch of log sizes that begins
at or above its own, a point of log loss y takes away (f - y)+ from the area above the front. So the expected
improvement of the hypervolume is the sum of w E[(f - y)+] = w s h((f - m) / s) with h(u) = phi(u) + u Phi(u): closed,
and exact. Where only some limits count, a point counts at all that its size meets, each weighing the same.

Source: log h as in LogEI, arXiv:2310.20708, appendix A.1.
"""

import math

import numpy as np

LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)


def log_improvement(mean: np.ndarray, deviation: np.ndarray, front: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(p,) log of the sum over k of weight times expected improvement on it; front (k,), or (p, k)."""
    deviation = np.maximum(deviation, 1e-12)[:, None]
    terms = np.log(deviation) + log_h((front - mean[:, None]) / deviation)
    with np.errstate(divide="ignore"):
        terms = terms + np.log(weight)
    most = terms.max(axis=1)
    safe = np.where(np.isfinite(most), most, 0.0)
    with np.errstate(divide="ignore"):
        return np.where(np.isfinite(most), safe + np.log(np.exp(terms - safe[:, None]).sum(axis=1)), -np.inf)


def log_h(u: np.ndarray) -> np.ndarray:
    """log(phi(u) + u Phi(u)), also where both terms nearly cancel."""
    import torch

    u = np.asarray(u, dtype=np.float64)
    result = np.empty_like(u)
    high = u > -1
    x = u[high]
    tail = 0.5 * torch.special.erfc(torch.from_numpy(-x / math.sqrt(2))).numpy()
    result[high] = np.log(np.exp(-(x**2) / 2 - LOG_ROOT_2PI) + x * tail)
    x = u[~high]
    # h = phi (1 - |u| R), R the Mills ratio; far out 1 - |u| R is 1 / u^2 to all digits that can be had.
    mills = math.sqrt(math.pi / 2) * torch.special.erfcx(torch.from_numpy(-x / math.sqrt(2))).numpy()
    with np.errstate(divide="ignore"):
        near = np.log(np.maximum(1 + x * mills, 0.0))
    far = -2 * np.log(-x) + np.log1p(-3 / np.maximum(x**2, 3.1))
    result[~high] = -(x**2) / 2 - LOG_ROOT_2PI + np.where(x > -1e3, near, far)
    return result


def at_limits(sizes: np.ndarray, losses: np.ndarray, limits: np.ndarray, worst: float) -> np.ndarray:
    """(k,) the least log loss known within each limit; `worst` where nothing is."""
    inside = sizes[:, None] <= limits
    return np.where(inside, losses[:, None], worst).min(axis=0, initial=worst)


def stretches(sizes: np.ndarray, losses: np.ndarray, low: float, high: float, worst: float) -> tuple[np.ndarray, ...]:
    """Where the log sizes between two ends begin to have another least log loss: their begins, ends, losses."""
    begins = np.concatenate(([low], np.unique(sizes[(sizes > low) & (sizes < high)])))
    ends = np.concatenate((begins[1:], [high]))
    return begins, ends, at_limits(sizes, losses, begins, worst)


def lengths(sizes: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(p, k) how much of each stretch lies at or above a point's log size."""
    return np.clip(ends - np.maximum(begins, sizes[:, None]), 0.0, None)
