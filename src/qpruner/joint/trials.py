"""What a point of a joint search loses: the original with candidates in the place of its weights, layer by layer.

The loss is KL(original || compressed) in nats per token. A trial is a pass over windows of the search text, and what it
has in common with trials before it is not computed again: hidden states are known by all choices that they depend on.
A first quarter of the windows shows whether the rest is worth the time.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from qpruner.do.candidates import CandidateStore
from qpruner.errors import RecipeError
from qpruner.judge.loss import mean_difference
from qpruner.model.graph import Graph
from qpruner.model.prefixes import Batch, Prefixes
from qpruner.model.reference import Reference
from qpruner.model.stage import Arguments, shared
from qpruner.model.stream import Stream
from qpruner.model.swap import swapped
from qpruner.plan import DENSE, QuantSpec, Selection

FIRST_PART = 4  # one in so many windows is looked at before the rest
HOPELESS = 3  # standard errors above what has to be beaten


@dataclass(frozen=True)
class Observed:
    """kl: in nats per token. standard_error: with windows as clusters. n_windows: that were looked at, fewer than asked
    for if it was hopeless. window_losses: of each, for paired differences."""

    kl: float
    standard_error: float
    n_windows: int
    window_losses: tuple[float, ...]

    @classmethod
    def of(cls, losses: Sequence[float]) -> "Observed":
        return cls(*mean_difference(losses, [0.0] * len(losses)), len(losses), tuple(losses))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Observed":
        content = json.loads(text)
        return cls(**content | {"window_losses": tuple(content["window_losses"])})


@dataclass
class Cost:
    """What trials took. passes: of all windows through all layers. seconds: of the clock."""

    passes: float = 0.0
    seconds: float = 0.0


class TrialRunner:
    """Final. The result of a trial depends on nothing that was tried before, to the last bit."""

    def __init__(
        self,
        stream: Stream,
        graph: Graph,
        store: CandidateStore,
        windows: Tensor,
        reference: Reference,
        *,
        batch_size: int = 4,
        memory_bytes: int = 2**30,
    ):
        """
        Args:
            stream: the original.
            windows: (n, length) token ids of the search text. reference: what the original predicts for them.
            memory_bytes: of hidden states that are kept for later trials; 0 for none.
        """
        self._stream, self._graph, self._store = stream, graph, store
        self._windows, self._reference, self._batch_size = windows, reference, batch_size
        self._prefixes = Prefixes(memory_bytes, stream.n_layers)
        self._begun: dict[Batch, tuple[Tensor, list[Arguments]]] = {}
        self._fused = {p.name for p in graph.projections}
        embedding = stream.model.get_input_embeddings()._parameters["weight"]
        named = stream.model.named_modules(remove_duplicate=False)
        self._entrances = {name for name, module in named if module._parameters.get("weight") is embedding}
        self.cost = Cost()  # of all trials so far

    @property
    def n_windows(self) -> int:
        return len(self._windows)

    @property
    def stream(self) -> Stream:
        return self._stream

    @property
    def store(self) -> CandidateStore:
        return self._store

    def evaluate(
        self,
        selection: Selection,
        n_windows: int | None = None,
        bar: float | Sequence[float] | None = None,
        *,
        remember: int | None = None,
    ) -> Observed:
        """
        Args:
            n_windows: the first so many; all of them by default.
            bar: a loss that is to be beaten, or those of its windows. Where the first quarter of the windows says that
                it will not be, they are all that is looked at.
            remember: that later trials may have so many layers in common with this one; all of them by default.
        """
        start = time.monotonic()
        if any(spec.activation_bits < 16 for spec in selection.specs.values()):
            raise RecipeError("trials of a joint search leave inputs as they are. Set activation_bits to 16.")
        n = min(n_windows or len(self._windows), len(self._windows))
        changed = self._changed(selection)
        entered = {name: spec for name, spec in changed[-1].items() if name in self._entrances}
        trial = _Trial(selection, changed, entered, self._stream.n_layers if remember is None else remember)
        losses = self._losses(trial, 0, min(n, self._first_part))
        if len(losses) < n and not hopeless(losses, bar):
            losses += self._losses(trial, len(losses), n)
        self.cost.seconds += time.monotonic() - start
        return Observed.of(losses)

    @property
    def _first_part(self) -> int:
        return math.ceil(len(self._windows) / FIRST_PART)

    # --- what is other than in the original ---------------------------------------------------------------------------

    def _changed(self, selection: Selection) -> dict[int, dict[str, QuantSpec]]:
        """Layer -> the linears of it that are not the original's; -1 for embeddings and head."""
        found: dict[int, dict[str, QuantSpec]] = {-1: {}}
        for projection in self._graph.projections:
            if projection.layer in selection.layers:
                spec = selection.specs.get(projection.name, DENSE)
                found.setdefault(projection.layer, {}).update(
                    {n: spec for n in projection.linears if not self._store.is_original(n, spec, selection.kept)}
                )
        found[-1] = {n: s for n, s in selection.specs.items() if n not in self._fused and s != DENSE}
        return found

    def _weights(self, trial: "_Trial", layer: int) -> dict[str, Tensor]:
        kept = trial.selection.kept
        return {name: self._store.weight(name, spec, kept) for name, spec in trial.changed.get(layer, {}).items()}

    # --- a pass -------------------------------------------------------------------------------------------------------

    def _losses(self, trial: "_Trial", begin: int, end: int) -> list[float]:
        """Of the windows from number `begin` to before `end`."""
        stream, batches = self._stream, list(self._batches(begin, end))
        keys = trial.keys(self._graph, stream.n_layers)
        at = self._prefixes.deepest(keys, batches)
        if at is None:
            at, hidden = 0, self._entered(trial, batches)
            self._keep(trial, 0, keys, batches, hidden)
        else:
            hidden = [self._prefixes.get(keys[at], batch) for batch in batches]
        order = [layer for layer in range(at, stream.n_layers) if layer in trial.selection.layers]
        for layer, _ in stream.layers(order):
            with swapped(stream.model, self._weights(trial, layer)), torch.no_grad():
                # On a copy: a layer may add to what it is given.
                arguments = [self._begin(batch)[1][layer] for batch in batches]
                hidden = [stream.run(layer, h.clone(), a) for h, a in zip(hidden, arguments, strict=True)]
            self._keep(trial, layer + 1, keys, batches, hidden)
        self.cost.passes += len(order) * (end - begin) / (stream.n_layers * len(self._windows))
        losses: list[float] = []
        with stream.ends("after"), swapped(stream.model, self._weights(trial, -1)), torch.no_grad():
            for (first, n), h in zip(batches, hidden, strict=True):
                logits = stream.after(self._windows[first : first + n], h.clone())
                losses += self._reference.kl(first, logits).tolist()
        return losses

    def _keep(self, trial: "_Trial", layer: int, keys: Sequence[str], batches: list[Batch], hidden: list[Tensor]):
        if layer <= trial.remember:
            self._prefixes.put(layer, keys[layer], batches, hidden)

    def _batches(self, begin: int, end: int) -> Iterator[Batch]:
        """No batch reaches over the border of the first part: a window is always computed with the same others."""
        for first in range(begin, end, self._batch_size):
            yield first, min(self._batch_size, end - first)

    def _begin(self, batch: Batch) -> tuple[Tensor, list[Arguments]]:
        """What reaches the first layer of the original, and the other arguments of every layer."""
        if batch not in self._begun:
            with self._stream.ends("before"):
                hidden, arguments = self._stream.before(self._windows[batch[0] : sum(batch)])
            known = next(iter(self._begun.values()))[1] if self._begun else arguments
            arguments = [shared(found, old) for found, old in zip(arguments, known, strict=True)]
            self._begun[batch] = hidden, arguments
        return self._begun[batch]

    def _entered(self, trial: "_Trial", batches: list[Batch]) -> list[Tensor]:
        if not trial.entered:
            return [self._begin(batch)[0] for batch in batches]
        stream = self._stream
        # Both ends, so that what is tied is there to be changed.
        with stream.ends("both"), swapped(stream.model, self._weights(trial, -1)):
            return [stream.before(self._windows[first : first + n])[0] for first, n in batches]


@dataclass(frozen=True)
class _Trial:
    """changed: layer -> linears that are not the original's, and their specs; -1 for what is outside the layers.
    entered: those outside that hidden states begin with. remember: layers that later trials may have in common."""

    selection: Selection
    changed: Mapping[int, Mapping[str, QuantSpec]]
    entered: Mapping[str, QuantSpec]
    remember: int

    def keys(self, graph: Graph, n_layers: int) -> list[str]:
        """For what reaches every layer, and the end: a digest of all that it depends on."""
        said = lambda layer: {name: spec.model_dump(mode="json") for name, spec in self.changed.get(layer, {}).items()}
        keys = [_digest({name: spec.model_dump(mode="json") for name, spec in self.entered.items()})]
        for layer in range(n_layers):
            if layer not in self.selection.layers:
                keys.append(keys[-1])
                continue
            kept = {n: k for n, k in self.selection.kept.items() if graph.groups[n].layer == layer}
            kept = {n: k for n, k in kept.items() if k < graph.groups[n].n_units}
            keys.append(_digest([keys[-1], layer, said(layer), kept]))
        return keys


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hopeless(losses: Sequence[float], bar: float | Sequence[float] | None) -> bool:
    """Whether a loss will not be beaten, as far as these windows say; `bar` may have one for each of them."""
    if not all(map(math.isfinite, losses)):
        return True
    if bar is None:
        return False
    bars = [float(bar)] * len(losses) if isinstance(bar, int | float) else list(bar)[: len(losses)]
    difference, error = mean_difference(losses[: len(bars)], bars)
    return difference > HOPELESS * error  # of a single window the error is NaN, and nothing is hopeless
