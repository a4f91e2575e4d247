"""The standard error of a ratio of sums over a text, by drawing its documents anew.

Tokens of one document depend on each other, so the document is what is drawn; how many tokens it has is
then chance too.

Notation
    A, B  sums over each document: nats and tokens, say   (documents,), float64
    r     sum A / sum B, what is reported
    n     documents
    r*    the same of n documents drawn with replacement   (resamples,)

Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 6 and 10 (ratio of sums).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

RESAMPLES = 1000  # the error of the standard error is then 2 %
CHUNK_ELEMENTS = 1 << 22  # documents times resamples that are drawn at a time


def resampled(
    S: Float[Tensor, "n k"], *, generator: torch.Generator, resamples: int = RESAMPLES
) -> Float[Tensor, "resamples k"]:
    """Sums over n documents drawn with replacement, for several quantities with the same draws."""
    n, found = len(S), []
    step = max(1, CHUNK_ELEMENTS // n)
    for start in range(0, resamples, step):
        drawn = torch.randint(n, (min(step, resamples - start), n), generator=generator)
        times = torch.zeros(drawn.shape, dtype=S.dtype).scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=S.dtype))
        found.append(times @ S)
    return torch.cat(found)


def bootstrap_errors(
    A: Float[Tensor, "n k"],
    B: Float[Tensor, "n k"],
    *,
    generator: torch.Generator,
    resamples: int = RESAMPLES,
) -> Float[Tensor, " k"]:
    """Standard error of each sum A / sum B; NaN for a single document, and where B is never above zero.

    The spread over resamples is that of a population of n; the factor sqrt(n / (n - 1)) makes it that of a sample, so
    that with documents of equal size it is the standard error of a mean, which then needs no draws.
    """
    n, k = A.shape
    if n < 2:
        return torch.full((k,), math.nan, dtype=A.dtype)
    equal = [bool((each == each[0]).all()) for each in B.unbind(1)]
    drawn = None if all(equal) else resampled(torch.cat([A, B], dim=1), generator=generator, resamples=resamples)
    errors = []
    for i in range(k):
        if equal[i]:
            errors.append(linear_error(A[:, i], B[:, i]))
            continue
        ratios = drawn[:, i] / drawn[:, k + i]
        ratios = ratios[ratios.isfinite()]
        errors.append(ratios.std(correction=0).item() * math.sqrt(n / (n - 1)) if len(ratios) > 1 else math.nan)
    return torch.tensor(errors, dtype=A.dtype)


def linear_error(A: Float[Tensor, " n"], B: Float[Tensor, " n"]) -> float:
    """Standard error of sum A / sum B without draws, for many comparisons: that of its linear part in the documents.

    sqrt(n / (n - 1) sum (A_i - r B_i)^2) / sum B; with documents of equal size the standard error of a mean.
    """
    n = len(A)
    if n < 2:
        return math.nan
    left = A - A.sum() / B.sum() * B
    return (left.square().sum() * n / (n - 1)).sqrt().div(B.sum()).item()
