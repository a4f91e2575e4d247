"""How well a model predicts a text: loss, perplexity, bits per byte, and its distance (KL) from another model.

Every number comes with the protocol it was measured under and a standard error that treats each window as one draw:
tokens of one window depend on each other, and counting them as independent would make the error too small.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from qpruner.errors import CorpusError
from qpruner.model.corpus import Windows
from qpruner.model.scratch import Scratch
from qpruner.model.stream import OnLayer, batches
from qpruner.model.whole import Streamable

CHUNK_ELEMENTS = 1 << 24  # float32 logits that are turned into probabilities at a time

Progress = Callable[[int, int], None]  # windows done, windows in all


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
class Protocol:
    """What has to be the same before two numbers may be compared.

    window: tokens that the model sees at once. stride: tokens of text between the starts of two windows.
    first_token: what stands first in a window and is not predicted: `bos`, put there, or a token of the `text`.
    windows_digest: of the token ids, in order.
    """

    name: str
    window: int
    stride: int
    first_token: Literal["bos", "text"]
    n_windows: int
    text: str
    windows_digest: str

    @classmethod
    def of(cls, windows: Windows) -> "Protocol":
        n, length = windows.ids.shape
        stride = length - 1 if windows.first_token == "bos" else length
        digest = hashlib.sha256(windows.ids.numpy().tobytes()).hexdigest()
        order = "in order" if windows.seed is None else f"chosen with seed {windows.seed}"
        return cls(f"windows, {order}", length, stride, windows.first_token, n, windows.corpus_name, digest)

    def __str__(self) -> str:
        first = "<s> in front" if self.first_token == "bos" else "first token not predicted"
        return (
            f"{self.text}: {self.n_windows} {self.name}, of {self.window} tokens, stride {self.stride}, {first}, "
            "no overlap"
        )


@dataclass(frozen=True)
class LossReport:
    """Mean loss in nats per predicted token; `standard_error` is NaN for a single window.

    window_losses: the mean of each window, for paired differences.
    """

    loss: float
    standard_error: float
    bits_per_byte: float
    n_tokens: int
    protocol: Protocol
    window_losses: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def to_dict(self) -> dict:
        """As JSON: what is not a finite number becomes null; windows are left out."""
        return _as_json(self, perplexity=self.perplexity)

    def __str__(self) -> str:
        error = f"± {self.standard_error:.4f}" if math.isfinite(self.standard_error) else "(one window)"
        return f"{self.loss:.4f} {error} nats/token, perplexity {self.perplexity:.2f} [{self.protocol}]"


@dataclass(frozen=True)
class KLReport:
    """Mean KL(reference || model) in nats per token, and how often both put the same token first."""

    kl: float
    standard_error: float
    top1_agreement: float
    n_tokens: int
    protocol: Protocol
    window_losses: tuple[float, ...]

    def to_dict(self) -> dict:
        return _as_json(self)

    def __str__(self) -> str:
        error = f"± {self.standard_error:.4f}" if math.isfinite(self.standard_error) else "(one window)"
        return f"KL {self.kl:.4f} {error} nats/token, same first choice {self.top1_agreement:.1%} [{self.protocol}]"


def _as_json(report: LossReport | KLReport, **more: float) -> dict:
    content = {k: v for k, v in asdict(report).items() if k != "window_losses"} | more
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}


def evaluate_loss(
    model: Judged, windows: Windows, *, batch_size: int = 8, on_batch: Progress | None = None
) -> LossReport:
    """The model's loss on every predicted token of the windows. The model is not changed."""
    totals: list[float] = []
    with _evaluating(model):
        for ids, predicted in _predictions(model, windows, batch_size):
            total = torch.zeros(len(ids), dtype=torch.float64)
            for row, target, logits in _chunks(ids, predicted):
                total[row] -= _log_probabilities(logits).gather(-1, target[:, None]).double().sum().cpu()
            totals.extend(total.tolist())
            _report(on_batch, totals, windows)
    loss, error, means = _clustered(totals, windows)
    return LossReport(
        loss=loss,
        standard_error=error,
        bits_per_byte=sum(totals) / math.log(2) / max(1, sum(windows.covered_bytes)),
        n_tokens=windows.n_tokens_predicted,
        protocol=Protocol.of(windows),
        window_losses=means,
    )


def kl_to(
    model: Judged,
    reference: Judged,
    windows: Windows,
    *,
    batch_size: int = 8,
    on_batch: Progress | None = None,
) -> KLReport:
    """KL from a reference model, both run batch by batch; nothing of either is kept. Neither model is changed."""
    with _evaluating(reference):
        expected = (logits for _, logits in _predictions(reference, windows, batch_size))
        return _kl(model, expected, windows, batch_size, on_batch)


def reference_logprobs(
    model: nn.Module, windows: Windows, *, dtype: torch.dtype = torch.float16, batch_size: int = 8
) -> Tensor:
    """Log-probabilities (windows, length - 1, vocabulary) on the CPU, for small sets that are compared many times."""
    kept: Tensor | None = None
    start = 0
    with _evaluating(model):
        for ids, logits in _predictions(model, windows, batch_size):
            if kept is None:
                n, length = windows.ids.shape
                kept = torch.empty(n, length - 1, logits.shape[-1], dtype=dtype)
            for row in range(len(ids)):
                kept[start + row] = _log_probabilities(logits[row]).to("cpu", dtype)
            start += len(ids)
    return kept


def kl_from_logprobs(
    model: nn.Module,
    windows: Windows,
    cached: Tensor,
    *,
    batch_size: int = 8,
    on_batch: Progress | None = None,
) -> KLReport:
    """`kl_to` a model whose `reference_logprobs` on the same windows were kept.

    They are normalised again, so that rounding them to 16 bits leaves no bias.
    """
    n, length = windows.ids.shape
    if cached.shape[:2] != (n, length - 1):
        raise ValueError(f"log-probabilities of shape {tuple(cached.shape)} are not of these {n} windows of {length}")
    return _kl(model, iter(cached.split(batch_size)), windows, batch_size, on_batch)


def paired_difference(a: LossReport | KLReport, b: LossReport | KLReport) -> tuple[float, float]:
    """Mean of a - b and its standard error, window by window: what both find hard cancels.

    Raises:
        ValueError: the reports are not of the same windows.
    """
    if a.protocol != b.protocol:
        raise ValueError(f"no paired difference between '{a.protocol}' and '{b.protocol}'")
    return mean_difference(a.window_losses, b.window_losses)


def mean_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of a - b over the same windows, and its standard error."""
    return _mean_and_error(torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64))


def _kl(
    model: Judged,
    reference: Iterator[Tensor],
    windows: Windows,
    batch_size: int,
    on_batch: Progress | None,
) -> KLReport:
    totals: list[float] = []
    agreed = 0
    with _evaluating(model):
        for (ids, predicted), expected in zip(_predictions(model, windows, batch_size), reference, strict=True):
            total = torch.zeros(len(ids), dtype=torch.float64)
            for (row, _, logits), (_, _, truth) in zip(
                _chunks(ids, predicted), _chunks(ids, expected.to(predicted.device)), strict=True
            ):
                q, p = _log_probabilities(logits), _log_probabilities(truth)
                # Where p underflows to zero its term is zero, whatever q is.
                terms = torch.where(p.exp() > 0, p.exp() * (p - q), 0.0)
                total[row] += terms.sum(-1, dtype=torch.float64).sum().cpu()
                agreed += int((logits.argmax(-1) == truth.argmax(-1)).sum())
            totals.extend(total.tolist())
            _report(on_batch, totals, windows)
    kl, error, means = _clustered(totals, windows)
    return KLReport(
        kl=kl,
        standard_error=error,
        top1_agreement=agreed / windows.n_tokens_predicted,
        n_tokens=windows.n_tokens_predicted,
        protocol=Protocol.of(windows),
        window_losses=means,
    )


def _predictions(model: Judged, windows: Windows, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch by batch the token ids, and the logits of every predicted token: (batch, length - 1, vocabulary)."""
    module = model.model if isinstance(model, Streamed) else model
    known, largest = module.get_input_embeddings().num_embeddings, int(windows.ids.max())
    if largest >= known:
        raise CorpusError(
            f"token id {largest} in {windows.corpus_name!r} is beyond the model's {known:,} embeddings. "
            "Use the tokenizer that the model was trained with."
        )
    if isinstance(model, Streamed):
        how = dict(batch_size=batch_size)
        model.stream.forward(windows.ids, model.scratch, on_layer=model.on_layer, **how)
        all_logits = model.stream.logits(windows.ids, model.scratch, **how)
    else:
        all_logits = (
            model(input_ids=ids.to(model.device), use_cache=False).logits for _, ids in batches(windows.ids, batch_size)
        )
    for (_, ids), logits in zip(batches(windows.ids, batch_size), all_logits, strict=True):
        yield ids.to(logits.device), logits[:, :-1]


def _chunks(ids: Tensor, logits: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Window by window, and piece by piece where the vocabulary is large: row, targets, logits."""
    step = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    for row in range(len(ids)):
        for start in range(0, logits.shape[1], step):
            yield row, ids[row, 1 + start : 1 + start + step], logits[row, start : start + step]


def _log_probabilities(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def _clustered(totals: list[float], windows: Windows) -> tuple[float, float, tuple[float, ...]]:
    """Mean per token, its standard error with windows as clusters, and the mean of every window.

    All windows predict equally many tokens, so the ratio estimator is the plain mean of the windows' means.
    """
    means = torch.tensor(totals, dtype=torch.float64) / (windows.ids.shape[1] - 1)
    return *_mean_and_error(means), tuple(means.tolist())


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    n = len(values)
    return values.mean().item(), values.std(correction=1).item() / math.sqrt(n) if n > 1 else math.nan


def _report(on_batch: Progress | None, totals: list[float], windows: Windows) -> None:
    if on_batch is not None:
        on_batch(len(totals), len(windows.ids))


@contextmanager
def _evaluating(model: Judged):
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
