"""What a finished joint search knows, as plain values: no torch, no pictures, and a round trip through JSON.

Sizes are in bytes, losses are KL(original || compressed) in nats per token on the search text, times in seconds. A
fraction is of what the original has. Names are module paths of the original, layers are counted as in it.
"""

import math
from collections.abc import Sequence
from statistics import correlation
from typing import Literal

from pydantic import Field, model_validator

from qpruner.report.facts import NONE, Saved, Stage, Value, bytes_text, measured_text

NO_PLAN = "no plan fits"


class Trial(Value):
    """One evaluated plan.

    origin: who proposed it; what differs only after ` at ` is shown as one kind. loss: None where it was lost with its
    worker. standard_error: None of a loss that is as good as exact.
    n_windows: of the search text that it was judged on; fewer than others have where it was given up early.
    n_layers: that stay. kv_groups_kept, channels_kept: fractions over the whole model, nothing of layers that go.
    bits_per_weight: stored bits of the decoder layers' linears, scales included, over the weights that stay.
    """

    number: int
    origin: str
    size_bytes: int
    loss: float | None
    standard_error: float | None = None
    n_windows: int
    n_layers: int
    kv_groups_kept: float
    channels_kept: float
    bits_per_weight: float

    @property
    def measured(self) -> bool:
        """Whether its loss is a number."""
        return self.loss is not None and math.isfinite(self.loss)

    @property
    def proposer(self) -> str:
        return self.origin.partition(" at ")[0]

    def left_text(self, n_layers: int) -> str:
        return _left_text(self.n_layers, n_layers, self.kv_groups_kept, self.channels_kept, self.bits_per_weight)


def _left_text(stay: int, n_layers: int, kv_groups: float, channels: float, bits: float) -> str:
    return (
        f"{stay} of {n_layers} layers, {kv_groups:.0%} of kv groups, {channels:.0%} of channels, "
        f"{bits:.2f} bits per weight"
    )


class Stored(Value):
    """How fused linears, or an embedding, are stored.

    spec: in words. units: what their rows or columns are units of, None where nothing in them can go.
    parameters: weights after the cuts. size_bytes: all that is stored for them.
    """

    name: str
    spec: str
    bits: int
    units: Literal["kv_group", "channel"] | None = None
    parameters: int
    size_bytes: int


class Layer(Value):
    """What is left of a decoder layer. Of one that goes, the totals are all that means something."""

    index: int
    stays: bool
    kv_groups_kept: int
    kv_groups_total: int
    channels_kept: int
    channels_total: int
    projections: tuple[Stored, ...] = ()

    def kept(self, units: str | None) -> float:
        """Fraction of a kind of units that stays; 1 of what the layer has none of."""
        if not self.stays:
            return 0.0
        kept, total = {
            "kv_group": (self.kv_groups_kept, self.kv_groups_total),
            "channel": (self.channels_kept, self.channels_total),
        }.get(units, (1, 1))
        return kept / total if total else 1.0


class Limit(Value):
    """A size that was asked for, and the plan chosen for it.

    text: as the user wrote it. size_bytes: that are allowed. stored_bytes: of the plan; None where there is none that
    fits, and then the rest is empty. trial: its number, None of a plan that was not tried itself.
    loss: measured, or predicted where the plan is no trial. command: makes the plan an artifact. layers: all of the
    original's, in order. parts: bytes by what they are for: linears, embeddings, other, headers.
    """

    text: str
    size_bytes: int
    stored_bytes: int | None = None
    trial: int | None = None
    loss: float | None = None
    standard_error: float | None = None
    command: str = ""
    layers: tuple[Layer, ...] = ()
    embeddings: tuple[Stored, ...] = ()
    parts: dict[str, int] = {}

    @property
    def measured(self) -> bool:
        """Whether the loss is one that was measured."""
        return self.trial is not None and self.loss is not None and math.isfinite(self.loss)

    def left_text(self) -> str:
        """What the layers keep over the whole model; empty where they are not given."""
        if not self.layers:
            return ""
        stay = [layer for layer in self.layers if layer.stays]
        inside = [p for layer in stay for p in layer.projections]
        share = lambda kept, total: sum(kept) / (sum(total) or 1)
        return _left_text(
            len(stay),
            len(self.layers),
            share((la.kv_groups_kept for la in stay), (la.kv_groups_total for la in self.layers)),
            share((la.channels_kept for la in stay), (la.channels_total for la in self.layers)),
            share((8 * p.size_bytes for p in inside), (p.parameters for p in inside)),
        )


class Point(Value):
    size_bytes: int
    loss: float


class Prediction(Value):
    """The loss that was foretold of a plan, and the one measured; None where it was lost. trial: if it was one."""

    predicted: float
    measured: float | None
    trial: int | None = None

    @property
    def name(self) -> str:
        return "a random plan" if self.trial is None else f"trial {self.trial}"


class Option(Value):
    """What a variable may be, in words ('int4 g16', '3 of 4 units', 'goes'), and what that costs, all else as it was.

    estimated: from gradients. measured: by evaluating. None where there is no such number.
    """

    words: str
    estimated: float | None = None
    measured: float | None = None

    @property
    def best(self) -> float | None:
        """Measured where it was, otherwise estimated."""
        return self.estimated if self.measured is None else self.measured


class Sensitivity(Value):
    """Of one variable of the search. layer: -1 for an embedding."""

    name: str
    kind: Literal["layer", "width", "bits"]
    layer: int
    options: tuple[Option, ...] = Field(min_length=1)


class GateStep(Value):
    """Of the training of the gates: the loss, and the expected size."""

    step: int
    loss: float
    size_bytes: float


class GateLayer(Value):
    """What the gates leave of a layer. kept: fraction of its weights. bits: mean of those, per weight; None of none."""

    layer: int
    kept: float
    bits: float | None


class Gates(Value):
    """Learned gates. at: the text of a limit -> what the gates leave of every layer at that size."""

    curve: tuple[GateStep, ...]
    at: dict[str, tuple[GateLayer, ...]] = {}


class JointFacts(Saved):
    """Everything on the page of a joint search.

    dense_bytes: of the original as it is stored. bytes_16bit: of the same at 16 bits per parameter, tied tensors once.
    protocol: one sentence on the search text and how losses were measured. trials: in the order in which they ended.
    front: numbers of the trials that no other beats in both size and loss.
    controls: name -> plans that another way of searching measured on the same data, all or the best of them.
    random_plans: foretold by sensitivities and measured. surrogate: foretold by the surrogate and observed.
    passes_per_trial: what a trial cost on the mean, in passes over all windows of the search text.
    command: repeats the search. machine: processor, memory, accelerator, in words.
    """

    format_version: Literal[1] = 1
    model_name: str
    dense_bytes: int
    bytes_16bit: int
    n_layers: int
    protocol: str
    limits: tuple[Limit, ...]
    trials: tuple[Trial, ...] = Field(min_length=1)
    front: tuple[int, ...] = ()
    controls: dict[str, tuple[Point, ...]] = {}
    random_plans: tuple[Prediction, ...] = ()
    surrogate: tuple[Prediction, ...] = ()
    sensitivities: tuple[Sensitivity, ...] = ()
    gates: Gates | None = None
    passes_per_trial: float | None = None
    command: str
    machine: str
    seed: int
    versions: dict[str, str]
    stages: tuple[Stage, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _names_exist(self):
        known = {t.number for t in self.trials}
        if len(known) < len(self.trials):
            raise ValueError("two trials have the same number")
        named = {*self.front, *(x.trial for x in (*self.limits, *self.surrogate) if x.trial is not None)}
        if unknown := named - known:
            raise ValueError(f"trials are named that were not run: {sorted(unknown)}")
        texts = [limit.text for limit in self.limits]
        if len(set(texts)) < len(texts):
            raise ValueError(f"a limit stands twice among {texts}")
        if self.gates and (unknown := set(self.gates.at) - set(texts)):
            raise ValueError(f"gates are given at limits that were not asked for: {sorted(unknown)}")
        return self

    def trial(self, number: int) -> Trial:
        return next(t for t in self.trials if t.number == number)

    @property
    def n_windows(self) -> int:
        """Of a trial that was not given up early."""
        return max(t.n_windows for t in self.trials)

    def best_so_far(self, size_bytes: int) -> tuple[float, ...]:
        """The lowest loss within a size up to each trial; what was lost or given up early improves nothing."""
        best, lowest, whole = [], math.inf, self.n_windows
        for t in self.trials:
            if t.size_bytes <= size_bytes and t.measured and t.n_windows == whole:
                lowest = min(lowest, t.loss)
            best.append(lowest)
        return tuple(best)

    def best_control(self, size_bytes: int) -> tuple[str, float] | None:
        """Name and loss of the control that does best within a size."""
        found = [
            (p.loss, name)
            for name, points in self.controls.items()
            for p in points
            if p.size_bytes <= size_bytes and math.isfinite(p.loss)
        ]
        return min(found)[::-1] if found else None


class Agreement(Value):
    """Of predicted and measured losses. spearman: of the losses. pearson: of their logarithms. pairs: of numbers."""

    pairs: int
    spearman: float
    pearson: float


def agreement(predictions: Sequence[Prediction]) -> Agreement | None:
    """None for fewer than three pairs of positive numbers, or where either side is all the same."""
    pairs = [
        (p.predicted, p.measured)
        for p in predictions
        if p.measured is not None and 0 < p.predicted < math.inf and 0 < p.measured < math.inf
    ]
    predicted, measured = zip(*pairs, strict=True) if pairs else ((), ())
    if len(pairs) < 3 or len(set(predicted)) < 2 or len(set(measured)) < 2:
        return None
    logs = lambda values: [math.log(v) for v in values]
    return Agreement(
        pairs=len(pairs),
        spearman=correlation(_ranks(predicted), _ranks(measured)),
        pearson=correlation(logs(predicted), logs(measured)),
    )


def _ranks(values: Sequence[float]) -> list[float]:
    """Equal values share the mean of their ranks."""
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]


LIMITS_HEAD = ("limit", "size", "loss, nats/token", "best control", "chosen")


def limit_rows(facts: JointFacts) -> list[tuple[str, str, str, str, str]]:
    """For every limit, as text: the limit, size and what is allowed, loss, best control, what was chosen."""
    rows = []
    for limit in facts.limits:
        asked = bytes_text(limit.size_bytes)
        control = facts.best_control(limit.size_bytes)
        beside = "" if control is None else f"{measured_text(control[1])} ({control[0]})"
        if limit.stored_bytes is None:
            rows.append((limit.text, f"{NONE} of {asked}", NONE, beside, NO_PLAN))
            continue
        loss = "not known" if limit.loss is None else measured_text(limit.loss, limit.standard_error)
        if limit.trial is None:
            loss, found = f"≈ {loss}", "not tried itself, its loss is predicted"
        else:
            found = f"trial {limit.trial}, {facts.trial(limit.trial).origin}"
        said = "; ".join(filter(None, (limit.left_text(), found)))
        rows.append((limit.text, f"{bytes_text(limit.stored_bytes)} of {asked}", loss, beside, said))
    return rows


def joint_title(facts: JointFacts) -> str:
    """'pystdlib-5M: widths and bits searched together, 6 limits, 60 trials'"""
    limits = "1 limit" if len(facts.limits) == 1 else f"{len(facts.limits)} limits"
    trials = "1 trial" if len(facts.trials) == 1 else f"{len(facts.trials)} trials"
    return f"{facts.model_name}: widths and bits searched together, {limits}, {trials}"
