"""What a model predicts for the tokens of a text, in memory or layer by layer, and sums of it by document."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qpruner.errors import CorpusError
from qpruner.judge.sequences import Sequences
from qpruner.math.bootstrap import bootstrap_errors
from qpruner.math.divergence import wide
from qpruner.model.scratch import Scratch
from qpruner.model.stream import OnLayer, batches
from qpruner.model.whole import Streamable

CHUNK_ELEMENTS = 1 << 24  # float32 logits that are turned into probabilities at a time

Progress = Callable[[int, int], None]  # sequences done, sequences in all


@dataclass(frozen=True)
class Streamed:
    """A model that is judged layer by layer, and where its hidden states may lie meanwhile."""

    stream: Streamable
    scratch: Scratch
    on_layer: OnLayer | None = None

    @property
    def model(self) -> nn.Module:
        return self.stream.model


Judged = nn.Module | Streamed


@dataclass(frozen=True)
class Totals:
    """Sums over each document (or window): what was measured, and the tokens it was measured on."""

    sums: tuple[float, ...]
    tokens: tuple[int, ...]


class Tally:
    """Sums of several values, over each sequence and over each cluster of its tokens. Final."""

    def __init__(self, sequences: Sequences, n_values: int):
        self.sequences = sequences
        self.by_sequence = torch.zeros(n_values, len(sequences.ids), dtype=torch.float64)
        self.by_cluster = torch.zeros(n_values, len(sequences.covered_bytes), dtype=torch.float64)

    def add(self, sequence: int, positions: Tensor, values: Tensor) -> None:
        """values: (values, positions), one for each predicted token."""
        values = values.double().cpu()
        self.by_sequence[:, sequence] += values.sum(1)
        self.by_cluster.index_add_(1, self.sequences.clusters[sequence, positions], values)

    def means(self) -> tuple[float, ...]:
        """Of the first value, per predicted token of each sequence."""
        return tuple((self.by_sequence[0] / self.sequences.predicted.sum(1)).tolist())

    def totals(self) -> Totals:
        return Totals(tuple(self.by_cluster[0].tolist()), self.sequences.tokens)


def ratios(above: list[Tensor], below: list[Tensor]) -> list[tuple[float, float]]:
    """Of sums over clusters: each quotient, and its standard error by the bootstrap, always with the same draws."""
    A, B = (torch.stack(each, dim=1).double() for each in (above, below))
    errors = bootstrap_errors(A, B, generator=torch.Generator().manual_seed(0))
    return list(zip((A.sum(0) / B.sum(0)).tolist(), errors.tolist(), strict=True))


def predictions(model: Judged, sequences: Sequences, batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """Batch by batch the number of its first sequence, and logits of what follows each token but the last:
    (batch, length - 1, vocabulary)."""
    module = model.model if isinstance(model, Streamed) else model
    known, largest = module.get_input_embeddings().num_embeddings, int(sequences.ids.max())
    if largest >= known:
        raise CorpusError(
            f"token id {largest} in {sequences.protocol.text!r} is beyond the model's {known:,} embeddings. "
            "Use the tokenizer that the model was trained with."
        )
    if isinstance(model, Streamed):
        how = dict(batch_size=batch_size)
        model.stream.forward(sequences.ids, model.scratch, on_layer=model.on_layer, **how)
        all_logits = model.stream.logits(sequences.ids, model.scratch, **how)
    else:
        all_logits = (
            model(input_ids=ids.to(model.device), use_cache=False).logits
            for _, ids in batches(sequences.ids, batch_size)
        )
    for (first, _), logits in zip(batches(sequences.ids, batch_size), all_logits, strict=True):
        yield first, logits[:, :-1]


def chunks(sequences: Sequences, first: int, logits: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Sequence by sequence, and piece by piece where the vocabulary is large: its number, the positions of predicted
    tokens on the CPU, and their logits (positions, vocabulary)."""
    step = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    for row in range(len(logits)):
        places = sequences.predicted[first + row].nonzero()[:, 0]
        for positions in places.split(step):
            yield first + row, positions, logits[row, positions.to(logits.device) - 1]


def log_probabilities(logits: Tensor) -> Tensor:
    return torch.log_softmax(wide(logits), dim=-1)


@contextmanager
def evaluating(model: Judged):
    """Evaluation mode and no gradients; every module's own mode is put back afterwards."""
    if isinstance(model, Streamed):  # which is so already
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training
