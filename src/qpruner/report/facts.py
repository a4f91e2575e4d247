"""What a report says, as plain values: no torch, no pictures, and a round trip through JSON.

Sizes are in bytes, losses and information in nats, times in seconds. Names of groups, linears and projections are
module paths, as in the graph.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from qpruner.errors import OutputError
from qpruner.recipe import Units
from qpruner.report.damage import Damage, sentences
from qpruner.report.values import Value

MAX_POINTS = 100  # of one curve of sorted scores


class Saved(Value):
    """Facts that are kept in a file of their own."""

    def to_json(self) -> str:
        return json.dumps(json.loads(self.model_dump_json()), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, *, origin: str = "the text") -> Self:
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise OutputError(
                f"{origin} does not hold the facts of a run: {first['msg']} at {place!r} "
                f"({error.error_count()} in all). Delete it and run the same command again."
            ) from None

    @classmethod
    def read(cls, path: Path) -> Self:
        if not path.is_file():
            raise OutputError(f"there are no facts of a run at {path}")
        return cls.from_json(path.read_text(encoding="utf-8"), origin=str(path))


class Memory(Value):
    """Of the process, in bytes. predicted: of each stage, before it ran. measured: the peak, over the process's life.

    layer_by_layer: only one decoder layer at a time was in memory, as all of them would not have fitted.
    """

    limit: int
    predicted: dict[str, int]
    measured: int
    layer_by_layer: bool

    def __str__(self) -> str:
        gib = lambda size: f"{size / 2**30:.2f} GiB"
        stage, most = max(self.predicted.items(), key=lambda item: item[1])
        how = "one layer at a time" if self.layer_by_layer else "all layers in memory"
        return (
            f"Memory: {gib(most)} predicted ({stage}), {gib(self.measured)} measured, {gib(self.limit)} allowed; {how}."
        )


class Sizes(Value):
    """Stored sizes, in bytes.

    asked: the budget. predicted: from the plan, before any file was written. on_disk: all weight files, measured.
    original_16bit: the model before, at 16 bits per parameter, tied tensors once. The parts add up to on_disk:
    linears (codes and scales of the decoder layers), embeddings, other (norms, biases), adapters, headers of the files.
    """

    asked: int
    predicted: int
    on_disk: int
    original_16bit: int
    linears: int
    embeddings: int
    other: int
    adapters: int = 0
    headers: int = 0

    def parts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("linears", "embeddings", "other", "adapters", "headers")}


class Metric(Value):
    """One row of the before/after table. before, after, standard errors: in `unit`, None where there is no such number.

    Units with a spelling of their own: `bytes`, `fraction` (shown as a percentage), `tokens/s`, `s`. Any other is shown
    as it is; an empty unit is a pure number. higher_is_better: None where neither is.
    """

    name: str
    unit: str = ""
    before: float | None = None
    after: float | None = None
    standard_error_before: float | None = None
    standard_error_after: float | None = None
    higher_is_better: bool | None = None


class Layer(Value):
    """What is left of one decoder layer: units kept of all, counted over its groups of that kind."""

    index: int
    kv_groups_kept: int
    kv_groups_total: int
    channels_kept: int
    channels_total: int
    protected: bool = False


class ProjectionBits(Value):
    """How one projection is stored. parameters: weights after the cuts. size_bytes: codes, scales and biases.

    layer: -1 for the embedding and the head.
    """

    name: str
    layer: int
    bits: int
    parameters: int
    size_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size_bytes / self.parameters if self.parameters else 0.0


class Information(Value):
    """Mutual information of a layer or projection, nats, beside that of shuffled pairs (mean and std over shuffles)."""

    unit: str
    layer: int
    nats: float
    null_mean: float
    null_std: float
    z: float


class Sensitivity(Value):
    """KL divergence in nats per token that one unit (projection or layer) at `bits` causes, all else unquantized."""

    unit: str
    layer: int
    bits: int
    nats: float


class ScoreCurve(Value):
    """Scores of a group's units in ascending order, thinned to at most about a hundred of them.

    position: rank of each point among all units, 0 the lowest. kept: whether that unit stays. The lowest, the highest,
    the highest removed and the lowest kept unit are always among the points.
    """

    n_units: int
    n_kept: int
    position: tuple[int, ...]
    score: tuple[float, ...]
    kept: tuple[bool, ...]


def summarise_scores(scores: Iterable[float], kept: Iterable[int], *, max_points: int = MAX_POINTS) -> ScoreCurve:
    """The sorted scores of a group with the cut, small enough to draw.

    Args:
        scores: one per unit, in the group's order; higher means keep.
        kept: indices of the units that stay.
        max_points: units above this many are thinned at even ranks; the four units that bound the cut are added.
    Raises:
        ValueError: kept names a unit that has no score.
    """
    scores, kept = [float(s) for s in scores], {int(k) for k in kept}
    n = len(scores)
    if not kept <= set(range(n)):
        raise ValueError(f"kept names unit {max(kept, key=lambda k: abs(k - n / 2))} of a group of {n} units")
    order = sorted(range(n), key=scores.__getitem__)
    stays = [u in kept for u in order]
    chosen = set(range(n))
    if n > max_points:
        chosen = {round(i * (n - 1) / (max_points - 1)) for i in range(max_points)}
        chosen |= {stays.index(True)} if kept else set()
        chosen |= {n - 1 - stays[::-1].index(False)} if len(kept) < n else set()
    at = sorted(chosen)
    return ScoreCurve(
        n_units=n,
        n_kept=len(kept),
        position=tuple(at),
        score=tuple(scores[order[i]] for i in at),
        kept=tuple(stays[i] for i in at),
    )


class Importance(Value):
    """Unit scores of one group, and which units stay. layer: -1 for a group of the whole model."""

    group: str
    layer: int
    kind: Units
    curve: ScoreCurve


class Blend(Value):
    """How far a way of fusing trusts the fine score of a group, 0 to 1, on the mean of its units."""

    group: str
    layer: int
    kind: Units
    way: str
    fine: float


class Fusion(Value):
    """How a fine and a coarse score became one.

    way: that was taken. losses: of every way that was tried, on the search text.
    curve: the loss of the gated model while the attention was trained.
    """

    way: str
    losses: dict[str, float] = {}
    blend: tuple[Blend, ...] = ()
    curve: tuple[float, ...] = ()


class LossPoint(Value):
    """Training loss, nats per token, of one step's batch."""

    step: int
    loss: float


class RoundedLinear(Value):
    """A linear whose codes were found with text. Errors are squared, of its output, over that of the target.

    spec: how it is stored. damping: of the least squares that moved its weight before; None where it stayed.
    error_nearest: rounded to nearest on the same grid. error: as it ships, before anything was learned.
    tokens: that it was rounded for.
    """

    linear: str
    layer: int
    spec: str
    damping: float | None
    condition: float
    error_nearest: float
    error: float
    tokens: int


class Tuning(Value):
    """Codes learned from predictions: divergence from the original in nats per token, held out and learned from.

    Where `after` is not below `before`, the codes stayed as they were.
    """

    before: float
    after: float
    curve: tuple[LossPoint, ...]


class Refitted(Value):
    """A linear that lost inputs. Errors are squared, over that of the target, on held-out calibration tokens.

    choice: `least-squares`, `bias`, or `sliced` where that did best. damping: taken. condition: of what was solved.
    error_sliced: of the weights as they were. error: of those that ship.
    experts: of a stack of them, how many were refitted: the damping is their median, the condition the largest.
    """

    linear: str
    layer: int
    choice: str
    damping: float | None
    condition: float | None
    error_sliced: float | None
    error: float | None
    tokens: int
    experts: int | None = None


class Trial(Value):
    """One evaluated plan. origin: who proposed it. loss: nats per token on the search text."""

    number: int
    origin: str
    size_bytes: int
    loss: float


class Search(Value):
    """All trials in the order in which they ended; front and chosen are trial numbers."""

    trials: tuple[Trial, ...] = Field(min_length=1)
    front: tuple[int, ...] = ()
    chosen: int | None = None

    @model_validator(mode="after")
    def _numbers_exist(self):
        known = [t.number for t in self.trials]
        if len(set(known)) < len(known):
            raise ValueError("two trials have the same number")
        if unknown := {*self.front, *([] if self.chosen is None else [self.chosen])} - set(known):
            raise ValueError(f"front and chosen name trials that were not run: {sorted(unknown)}")
        return self

    def best_so_far(self) -> tuple[float, ...]:
        """The lowest loss up to each trial; a loss that is not a number improves nothing."""
        best, lowest = [], math.inf
        for trial in self.trials:
            lowest = trial.loss if trial.loss < lowest else lowest
            best.append(lowest)
        return tuple(best)


class AdapterStart(Value):
    """Distance of a stored linear from its weight before rounding, |W - stored| / |W|: in the Frobenius norm, or, where
    adapters start so, in that of what comes out.

    plain: rounding alone. loftq: rounding plus the adapter that LoftQ starts from.
    """

    linear: str
    layer: int
    plain: float
    loftq: float


class Recovered(Value):
    """Training of the adapters.


    loss: what was made smaller. curve, validation: of that loss, on text that was trained on and on the search text.
    best_step: whose adapters stayed; None for the last. loss_before, loss_after: of the next token, on the search text,
        with the adapters beside their linears. loss_merged: once they were merged and their linears rounded again, if
        that was tried. ships: which of the two.
    """

    loss: Literal["distillation", "next-token"] = "next-token"
    curve: tuple[LossPoint, ...] = ()
    validation: tuple[LossPoint, ...] = ()
    best_step: int | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    loss_merged: float | None = None
    ships: Literal["beside", "merged"] | None = None
    starts: tuple[AdapterStart, ...] = ()


class Stage(Value):
    name: str
    seconds: float


class Place(Value):
    """Where the artifact may be loaded: whether it is as it stands, why or why not, and the command that does it."""

    target: str
    loads: bool
    sentence: str
    command: str = ""


class Facts(Saved):
    """Everything in a report.

    budget: as the user wrote it. versions: of Python and packages. machine: processor, memory, accelerator, in words.
    command: repeats the run. protocol: one sentence on how before and after were measured. warnings: sentences shown at
    the top. loads_in: one sentence. snippet: Python that loads the artifact and generates.
    """

    format_version: Literal[1] = 1
    model_name: str
    recipe: str
    budget: str
    seed: int
    versions: dict[str, str]
    machine: str
    command: str
    sizes: Sizes
    parameters_before: int
    parameters_after: int
    metrics: tuple[Metric, ...]
    protocol: str
    damage: Damage | None = None
    layers: tuple[Layer, ...]
    projections: tuple[ProjectionBits, ...]
    embeddings: tuple[ProjectionBits, ...] = ()
    importance: tuple[Importance, ...] = ()
    fusion: Fusion | None = None
    reconstruction: tuple[Refitted, ...] = ()
    rounding: tuple[RoundedLinear, ...] = ()
    tuning: Tuning | None = None
    information: tuple[Information, ...] = ()
    sensitivities: tuple[Sensitivity, ...] = ()
    search: Search | None = None
    recovery: Recovered | None = None
    memory: Memory | None = None
    stages: tuple[Stage, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    loads_in: str
    snippet: str
    places: tuple[Place, ...] = ()

    def metric(self, name: str) -> Metric | None:
        return next((m for m in self.metrics if m.name.lower() == name.lower()), None)

    def bits_per_weight(self, layer: int) -> float | None:
        """Stored bits, scales included, over the number of weights in the layer's linears."""
        here = [p for p in self.projections if p.layer == layer]
        parameters = sum(p.parameters for p in here)
        return 8 * sum(p.size_bytes for p in here) / parameters if parameters else None


def all_warnings(facts: Facts) -> tuple[str, ...]:
    """What was done to the loss, the run's warnings, and what the sizes themselves show to be wrong."""
    sizes, found = facts.sizes, [*_of_damage(facts), *facts.warnings]
    if sizes.on_disk > sizes.asked:
        found.append(f"The files hold {sizes.on_disk - sizes.asked:,} bytes more than was asked for.")
    if sizes.on_disk != sizes.predicted:
        found.append(f"The files hold {sizes.on_disk:,} bytes and the plan predicted {sizes.predicted:,}.")
    if (total := sum(sizes.parts().values())) != sizes.on_disk:
        found.append(f"The parts of the stored size add up to {total:,} bytes and the files hold {sizes.on_disk:,}.")
    return tuple(found)


def _of_damage(facts: Facts) -> tuple[str, ...]:
    loss, sizes = facts.metric("loss"), facts.sizes
    if facts.damage is None or loss is None or loss.before is None or loss.after is None:
        return ()
    return sentences(
        facts.damage, loss.before, loss.after, parameters=facts.parameters_before, size_bytes=sizes.on_disk
    )


def label(name: str) -> str:
    """What a module is within its layer: 'model.layers.3.mlp.up_proj' -> 'mlp.up_proj'; a whole layer is 'layer'."""
    head, index, rest = re.match(r"(.*?)(?:(?:^|\.)(\d+)(?:\.|$)(.*))?$", name, re.DOTALL).groups()
    return head if index is None else rest or "layer"


def bytes_text(size: float) -> str:
    """5246208 -> '5.25 MB', decimal units, three significant digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size) >= 0.9995 * scale:
            return f"{_significant(size / scale, 3)} {unit}"
    return f"{size:,.0f} bytes"


def _significant(value: float, digits: int) -> str:
    return f"{value:,.{_decimals(value, digits)}f}"


def _decimals(value: float, digits: int) -> int:
    """Decimals that show so many significant digits of value."""
    if value == 0 or not math.isfinite(value):
        return digits - 1
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    return min(8, max(0, digits - 1 - exponent))


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def before_after(facts: Facts) -> list[tuple[str, str, str, str]]:
    """(name with unit, before, after, change) of every metric, as text. A standard error shows two digits, and the
    value as many decimals as its error."""
    return [_row(m) for m in facts.metrics]


NONE = "\N{EN DASH}"


def _row(m: Metric) -> tuple[str, str, str, str]:
    scale, name = (100, f"{m.name} (%)") if m.unit == "fraction" else (1, f"{m.name} ({m.unit})" if m.unit else m.name)
    values = [None if v is None else scale * v for v in (m.before, m.after)]
    errors = [None if e is None else scale * e for e in (m.standard_error_before, m.standard_error_after)]
    if m.unit == "bytes":
        return m.name, *(NONE if v is None else bytes_text(v) for v in values), _change(m, values, None)
    if known := [e for e in errors if e and math.isfinite(e)]:
        decimals = _decimals(max(known), 2)
    else:
        decimals = _decimals(max((abs(v) for v in values if v is not None and math.isfinite(v)), default=0.0), 4)
    texts = [_with_error(v, e, decimals) for v, e in zip(values, errors, strict=True)]
    return name, *texts, _change(m, values, decimals)


def _with_error(value: float | None, error: float | None, decimals: int) -> str:
    if value is None:
        return NONE
    text = _minus(f"{value:,.{decimals}f}") if math.isfinite(value) else "not finite"
    return text if error is None or not math.isfinite(value) else f"{text} ± {error:,.{decimals}f}"


def measured_text(value: float, error: float | None = None) -> str:
    """0.04123, 0.0012 -> '0.0412 ± 0.0012': two digits of the error, of the value as many decimals or three digits."""
    if not error or not math.isfinite(error):
        return _with_error(value, None, _decimals(value, 3))
    return _with_error(value, error, _decimals(error, 2))


def _change(m: Metric, values: Sequence[float | None], decimals: int | None) -> str:
    before, after = values
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return NONE
    if m.unit in ("bytes", "tokens/s", "s"):
        text = f"{100 * (after - before) / before:+,.1f} %" if before else NONE
    else:
        text = f"{after - before:+,.{decimals}f}"
    if m.higher_is_better is None or after == before:
        return _minus(text)
    return f"{_minus(text)}, {'better' if (after > before) == m.higher_is_better else 'worse'}"


def title(facts: Facts) -> str:
    """'pystdlib-5M, 50 % budget: 10.5 MB → 5.25 MB, loss 2.31 → 2.38 nats/token'"""
    budget = re.sub(r"(?<=\d)(?=[A-Za-z%])", " ", facts.budget.strip())
    sizes = f"{bytes_text(facts.sizes.original_16bit)} → {bytes_text(facts.sizes.on_disk)}"
    loss = facts.metric("loss")
    if loss is None or loss.before is None or loss.after is None:
        return f"{facts.model_name}, {budget} budget: {sizes}"
    return (
        f"{facts.model_name}, {budget} budget: {sizes}, loss {loss.before:.2f} → {loss.after:.2f} {loss.unit}".rstrip()
    )
