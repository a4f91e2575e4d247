"""How much loss is too much: arithmetic on numbers that were measured, no model and no text.

Losses are in nats per token.
"""

import math
from collections.abc import Iterable, Sequence

# L(N, D) = E + A / N^alpha + B / D^beta, fitted to 400 dense models: arXiv:2203.15556, approach 3
HOFFMANN_A, HOFFMANN_ALPHA = 406.4, 0.34
DENSE_BYTES = 2  # a parameter at 16 bits
TOLERANCE = 0.5  # nats per token: a perplexity that is 1.65 times as high


def rises(losses: Sequence[float]) -> tuple[float, ...]:
    """By how much the loss rose with each stage but the first; negative where it fell."""
    return tuple(after - before for before, after in zip(losses, losses[1:], strict=False))


def dense_parameters(size_bytes: int) -> int:
    """Of a dense model that takes so many bytes at 16 bits."""
    return size_bytes // DENSE_BYTES


def rise_when_smaller(parameters: int, fewer: int) -> float:
    """How much more a dense model of `fewer` parameters loses than one of `parameters`, both trained on as much text.

    The text's own entropy and what the training data lacks cancel.

    Raises:
        ValueError: a model without parameters.
    """
    if min(parameters, fewer) < 1:
        raise ValueError(f"no law for models of {parameters} and {fewer} parameters")
    return HOFFMANN_A * (fewer**-HOFFMANN_ALPHA - parameters**-HOFFMANN_ALPHA)


def unigram_loss(counts: Iterable[int]) -> float:
    """Of predicting every token of a text by its frequency in that very text: the entropy of its frequencies.

    No model that looks at nothing before a token does better on this text.

    Args:
        counts: how often each token occurs.
    """
    counts = [n for n in counts if n]
    total = sum(counts)
    return -sum(n / total * math.log(n / total) for n in counts)
