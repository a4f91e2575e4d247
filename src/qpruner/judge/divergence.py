"""How far a model's predictions are from another's: KL, how often both put the same token first, and flips.

Perplexity hides damage: a compressed model may be right as often as the original, but elsewhere. Flips count the tokens
on which it is no longer right, or only now (Dutta et al., Accuracy is Not All You Need, arXiv 2407.09141).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qpruner.judge.loss import as_json, margin
from qpruner.judge.predictions import (
    Judged,
    Progress,
    Tally,
    Totals,
    chunks,
    evaluating,
    log_probabilities,
    predictions,
    ratios,
)
from qpruner.judge.sequences import Protocol, Sequences, Text
from qpruner.math.divergence import divergence


@dataclass(frozen=True)
class KLReport:
    """Mean KL(reference || model) in nats per token, and how the tokens that both put first differ.

    top1_agreement: fraction of tokens for which both put the same one first.
    right_to_wrong: of the tokens that the reference predicted right, the fraction that the model does not.
    wrong_to_right: the reverse, of those that the reference predicted wrong.
    flips: both together, of all tokens.
    """

    kl: float
    standard_error: float
    top1_agreement: float
    n_tokens: int
    protocol: Protocol
    window_losses: tuple[float, ...]
    totals: Totals
    top1_agreement_standard_error: float
    right_to_wrong: float
    right_to_wrong_standard_error: float
    wrong_to_right: float
    wrong_to_right_standard_error: float
    flips: float
    flips_standard_error: float
    standard_error_by: str

    def to_dict(self) -> dict:
        return as_json(self)

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.4f} {margin(self)} nats/token, same first choice {self.top1_agreement:.1%}, "
            f"{self.right_to_wrong:.1%} of right tokens now wrong, {self.wrong_to_right:.1%} of wrong ones now right "
            f"[{self.protocol}]"
        )


def kl_to(
    model: Judged, reference: Judged, text: Text, *, batch_size: int = 8, on_batch: Progress | None = None
) -> KLReport:
    """KL from a reference model, both run batch by batch; nothing of either is kept. Neither model is changed."""
    sequences = Sequences.of(text)
    with evaluating(reference):
        expected = (logits for _, logits in predictions(reference, sequences, batch_size))
        return _compared(model, expected, sequences, batch_size, on_batch)


def reference_logprobs(
    model: nn.Module, text: Text, *, dtype: torch.dtype = torch.float16, batch_size: int = 8
) -> Tensor:
    """Log-probabilities (sequences, length - 1, vocabulary) on the CPU, for small sets that are compared many times.

    Those of tokens that are not predicted are zero.
    """
    sequences, kept = Sequences.of(text), None
    with evaluating(model):
        for first, logits in predictions(model, sequences, batch_size):
            if kept is None:
                n, length = sequences.ids.shape
                kept = torch.zeros(n, length - 1, logits.shape[-1], dtype=dtype)
            for row, positions, z in chunks(sequences, first, logits):
                kept[row, positions - 1] = log_probabilities(z).to("cpu", dtype)
    return kept


def kl_from_logprobs(
    model: nn.Module, text: Text, cached: Tensor, *, batch_size: int = 8, on_batch: Progress | None = None
) -> KLReport:
    """`kl_to` a model whose `reference_logprobs` on the same text were kept.

    They are normalised again, so that rounding them to 16 bits leaves no bias.
    """
    sequences = Sequences.of(text)
    n, length = sequences.ids.shape
    if cached.shape[:2] != (n, length - 1):
        raise ValueError(f"log-probabilities of shape {tuple(cached.shape)} are not of these {n} windows of {length}")
    return _compared(model, iter(cached.split(batch_size)), sequences, batch_size, on_batch)


def _compared(
    model: Judged,
    reference: Iterator[Tensor],
    sequences: Sequences,
    batch_size: int,
    on_batch: Progress | None,
) -> KLReport:
    tally = Tally(sequences, 5)
    with evaluating(model):
        for (first, logits), expected in zip(predictions(model, sequences, batch_size), reference, strict=True):
            expected = expected.to(logits.device)
            both = zip(chunks(sequences, first, logits), chunks(sequences, first, expected), strict=True)
            for (row, positions, z), (_, _, truth) in both:
                kl = divergence(truth, z)
                ours, theirs = z.argmax(-1), truth.argmax(-1)
                targets = sequences.ids[row, positions].to(z.device)
                now, before = ours == targets, theirs == targets
                tally.add(row, positions, torch.stack([kl, ours == theirs, before, before & ~now, now & ~before]))
            if on_batch is not None:
                on_batch(first + len(logits), len(sequences.ids))
    kl, agreed, right, lost, gained = tally.by_cluster
    tokens = torch.tensor(sequences.tokens, dtype=torch.float64)
    found = ratios([kl, agreed, lost, gained, lost + gained], [tokens, tokens, right, tokens - right, tokens])
    (kl, error), (same, same_error), (lost, lost_error), (gained, gained_error), (flips, flips_error) = found
    return KLReport(
        kl=kl,
        standard_error=error,
        top1_agreement=same,
        n_tokens=sequences.n_tokens_predicted,
        protocol=sequences.protocol,
        window_losses=tally.means(),
        totals=tally.totals(),
        top1_agreement_standard_error=same_error,
        right_to_wrong=lost,
        right_to_wrong_standard_error=lost_error,
        wrong_to_right=gained,
        wrong_to_right_standard_error=gained_error,
        flips=flips,
        flips_standard_error=flips_error,
        standard_error_by=sequences.standard_error_by,
    )
