"""How well a model predicts a text: loss, perplexity, bits per byte.

Every number comes with the protocol it was measured under and a standard error that draws whole documents (or windows,
where documents are unknown or few): tokens of one document depend on each other, and counting them as independent
would make the error too small.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from qpruner.judge.predictions import (
    Judged,
    Progress,
    Streamed,
    Tally,
    Totals,
    chunks,
    evaluating,
    log_probabilities,
    predictions,
    ratios,
)
from qpruner.judge.sequences import Protocol, Sequences, Text
from qpruner.math.bootstrap import linear_error

__all__ = [
    "Judged", "LossReport", "Protocol", "Sequences", "Streamed", "Text", "as_json", "evaluate_loss", "mean_difference",
    "paired_difference",
]  # fmt: skip

NOT_SHOWN = ("window_losses", "totals")


@dataclass(frozen=True)
class LossReport:
    """Mean loss in nats per predicted token; a standard error is NaN where there is a single document or window.

    window_losses: the mean of each window or row. totals: of each document, for paired differences.
    standard_error_by: what was drawn, and how many of them there are.
    """

    loss: float
    standard_error: float
    bits_per_byte: float
    n_tokens: int
    protocol: Protocol
    window_losses: tuple[float, ...]
    totals: Totals
    bits_per_byte_standard_error: float
    standard_error_by: str

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def perplexity_standard_error(self) -> float:
        """To first order in the loss's."""
        return self.perplexity * self.standard_error

    def to_dict(self) -> dict:
        """As JSON: what is not a finite number becomes null; windows and documents are left out."""
        more = dict(perplexity=self.perplexity, perplexity_standard_error=self.perplexity_standard_error)
        return as_json(self, **more)

    def __str__(self) -> str:
        return f"{self.loss:.4f} {margin(self)} nats/token, perplexity {self.perplexity:.2f} [{self.protocol}]"


def evaluate_loss(model: Judged, text: Text, *, batch_size: int = 8, on_batch: Progress | None = None) -> LossReport:
    """The model's loss on every predicted token of the text. The model is not changed."""
    sequences = Sequences.of(text)
    tally = Tally(sequences, 1)
    with evaluating(model):
        for first, logits in predictions(model, sequences, batch_size):
            for row, positions, z in chunks(sequences, first, logits):
                targets = sequences.ids[row, positions].to(z.device)
                tally.add(row, positions, -log_probabilities(z).gather(-1, targets[:, None]).T)
            if on_batch is not None:
                on_batch(first + len(logits), len(sequences.ids))
    nats, covered = tally.by_cluster[0], torch.tensor(sequences.covered_bytes, dtype=torch.float64)
    tokens = torch.tensor(sequences.tokens)
    (loss, error), (bits, bits_error) = ratios([nats, nats / math.log(2)], [tokens, covered])
    return LossReport(
        loss=loss,
        standard_error=error,
        bits_per_byte=bits,
        n_tokens=sequences.n_tokens_predicted,
        protocol=sequences.protocol,
        window_losses=tally.means(),
        totals=tally.totals(),
        bits_per_byte_standard_error=bits_error,
        standard_error_by=sequences.standard_error_by,
    )


def paired_difference(a, b) -> tuple[float, float]:
    """Mean of a - b per token and its standard error, document by document: what both find hard cancels.

    Args:
        a, b: two reports of one kind, with `protocol` and `totals`.
    Raises:
        ValueError: the reports are not of the same text.
    """
    if a.protocol != b.protocol:
        raise ValueError(f"no paired difference between '{a.protocol}' and '{b.protocol}'")
    apart = torch.tensor(a.totals.sums, dtype=torch.float64) - torch.tensor(b.totals.sums, dtype=torch.float64)
    tokens = torch.tensor(a.totals.tokens, dtype=torch.float64)
    return (apart.sum() / tokens.sum()).item(), linear_error(apart, tokens)


def mean_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of a - b over the same windows, and its standard error."""
    values = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    n = len(values)
    return values.mean().item(), values.std(correction=1).item() / math.sqrt(n) if n > 1 else math.nan


def margin(report) -> str:
    one = f"(one {report.standard_error_by.split()[-1]})"
    return f"± {report.standard_error:.4f}" if math.isfinite(report.standard_error) else one


def as_json(report, **more: float) -> dict:
    """The fields of a report that are shown, with null for what is not a finite number."""
    content = {k: v for k, v in asdict(report).items() if k not in NOT_SHOWN} | more
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
