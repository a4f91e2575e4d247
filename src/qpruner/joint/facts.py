"""From a finished joint search to the facts of its page."""

import math
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version

from qpruner import __version__
from qpruner.decide import joint
from qpruner.decide.space import Point, Variable, narrowed
from qpruner.decide.widths import LAYER_KINDS
from qpruner.drafting import of_selection
from qpruner.facts import machine
from qpruner.job import Job
from qpruner.joint.stages import Searched
from qpruner.judge.loss import Protocol
from qpruner.model import cost
from qpruner.plan import QuantSpec, Selection
from qpruner.report import joint as report
from qpruner.report.facts import Stage


def joint_facts(
    job: Job, found: Searched, budgets: Sequence[str], *, command: str, folder: str | None
) -> report.JointFacts:
    """budgets: as they were written, in the order of the search's limits.

    folder: of the search, for the commands that take plans from it; None where `command` itself makes the only one.
    """
    source, space, trials = job.shape.source, found.space, found.trials
    whole = max((t.n_windows for t in trials), default=0)
    full = [t for t in trials if t.counts and t.n_windows == whole]
    picture = _Picture(job, found)
    return report.JointFacts(
        model_name=source.name,
        dense_bytes=source.bytes_16bit,
        bytes_16bit=source.bytes_16bit,
        n_layers=len(space.layer_names),
        protocol=f"KL to the original on search text: {Protocol.of(job.prepared.search)}.",
        limits=tuple(
            _limit(picture, found, text, limit, command if folder is None else _command(source.name, text, folder))
            for text, limit in zip(budgets, found.limits, strict=True)
        ),
        trials=tuple(picture.trial(t) for t in trials),
        front=tuple(t.number for t in joint.pareto(full)),
        controls={
            name: tuple(report.Point(size_bytes=t.size_bytes, loss=t.loss) for t in some if t.loss is not None)
            for name, some in found.controls.items()
        },
        random_plans=tuple(
            report.Prediction(predicted=row["predicted"], measured=row["measured"]) for row in found.checked
        ),
        surrogate=tuple(
            report.Prediction(trial=t.number, predicted=t.expected, measured=t.loss)
            for t in trials
            if t.expected is not None
        ),
        sensitivities=_sensitivities(found),
        gates=_gates(picture, found, budgets),
        passes_per_trial=_passes(found),
        command=command,
        machine=machine(),
        seed=job.prepared.seed,
        versions={
            "qpruner": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "botorch")},
        },
        stages=tuple(Stage(name=name, seconds=seconds) for name, seconds in _seconds(job, found).items()),
    )


def _command(model: str, budget: str, folder: str) -> str:
    output = f"{folder}-{budget.replace('%', 'pct')}"
    return shlex.join(["qpruner", "compress", model, "--budget", budget, "--from", folder, "-o", output])


class _Picture:
    """Points of the space as plans, and what the page says of them."""

    def __init__(self, job: Job, found: Searched):
        self._job, self._found, self._graph = job, found, job.graph
        self._totals = {kind: sum(g.n_units for g in self._of(kind)) for kind in LAYER_KINDS}

    def _of(self, kind: str) -> list:
        return [group for group in self._graph.groups.values() if group.kind == kind]

    def selection(self, point: Point) -> Selection:
        return self._found.space.selection(point)

    def trial(self, t: joint.Trial) -> report.Trial:
        selection = self.selection(t.point)
        kept = {kind: sum(n for _, n, _ in self._counts(selection, kind)) for kind in LAYER_KINDS}
        sized = [row for layer in self.layers(selection) for row in layer.projections]
        weights = sum(row.parameters for row in sized)
        return report.Trial(
            number=t.number,
            origin=t.origin,
            size_bytes=t.size_bytes,
            loss=t.loss,
            standard_error=t.standard_error,
            n_windows=t.n_windows,
            n_layers=len(selection.layers),
            kv_groups_kept=kept["kv_group"] / max(1, self._totals["kv_group"]),
            channels_kept=kept["channel"] / max(1, self._totals["channel"]),
            bits_per_weight=8 * sum(row.size_bytes for row in sized) / weights if weights else 0.0,
        )

    def _counts(self, selection: Selection, kind: str) -> list[tuple[int, int, int]]:
        """Layer, units that stay, and all of them, of every group of a kind."""
        return [
            (g.layer, selection.kept.get(g.name, g.n_units) if g.layer in selection.layers else 0, g.n_units)
            for g in self._of(kind)
        ]

    def layers(self, selection: Selection) -> tuple[report.Layer, ...]:
        counts = {kind: self._counts(selection, kind) for kind in LAYER_KINDS}
        inside = lambda kind, layer, which: sum(row[which] for row in counts[kind] if row[0] == layer)
        return tuple(
            report.Layer(
                index=layer,
                stays=layer in selection.layers,
                kv_groups_kept=inside("kv_group", layer, 1),
                kv_groups_total=inside("kv_group", layer, 2),
                channels_kept=inside("channel", layer, 1),
                channels_total=inside("channel", layer, 2),
                projections=self._projections(selection, layer) if layer in selection.layers else (),
            )
            for layer in range(len(self._graph.layers))
        )

    def _projections(self, selection: Selection, layer: int) -> tuple[report.Stored, ...]:
        rows = []
        for projection in self._graph.projections:
            if projection.layer == layer:
                dims = [narrowed(self._graph, name, selection.kept) for name in projection.linears]
                rows.append(
                    self._stored(projection.name, selection.specs[projection.name], dims, self._units(projection))
                )
        return tuple(rows)

    def embeddings(self, selection: Selection) -> tuple[report.Stored, ...]:
        sites = [site for name, site in self._graph.embeddings.items() if name in selection.specs]
        return tuple(self._stored(s.name, selection.specs[s.name], [(s.n_rows, s.width)], None) for s in sites)

    @staticmethod
    def _stored(name: str, spec: QuantSpec, dims: Sequence[tuple[int, int]], units: str | None) -> report.Stored:
        return report.Stored(
            name=name, spec=str(spec), bits=spec.bits, units=units,
            parameters=sum(d_out * d_in for d_out, d_in in dims),
            size_bytes=sum(cost.linear_bytes(*each, spec) for each in dims),
        )  # fmt: skip

    def _units(self, projection) -> str | None:
        some = set(projection.linears)
        kinds = [
            kind for kind in LAYER_KINDS for g in self._of(kind) if some & (g.producers.keys() | g.consumers.keys())
        ]
        return kinds[0] if kinds else None

    def parts(self, selection: Selection) -> dict[str, int]:
        """Bytes by what they are for."""
        draft = of_selection(self._job.prepared, self._found.scores, selection)
        shape = draft.prepared.shape
        how = dict(seed=self._job.prepared.seed, embeddings=draft.embeddings)
        plan = shape.plan(self._job.recipe, draft.kept, draft.specs, **how)
        return shape.size(plan).parts()


def _limit(picture: _Picture, found: Searched, text: str, limit: int, command: str) -> report.Limit:
    """What `compress --from` makes for a limit."""
    point = found.point_for(limit)
    selection = picture.selection(point)
    tried = next((t for t in found.trials if t.point == point and t.counts), None)
    return report.Limit(
        text=text, size_bytes=limit, stored_bytes=int(found.space.size_bytes([point])[0]), command=command,
        trial=tried and tried.number, loss=tried.loss if tried else float(found.estimate.predict([point])[0]),
        layers=picture.layers(selection), embeddings=picture.embeddings(selection), parts=picture.parts(selection),
    )  # fmt: skip


def _sensitivities(found: Searched) -> tuple[report.Sensitivity, ...]:
    rows = zip(found.space.variables, found.sensitivities.estimated, found.sensitivities.measured, strict=True)
    return tuple(
        report.Sensitivity(
            name=v.name, kind=v.kind, layer=v.layer,
            options=tuple(
                report.Option(words=_words(v, o), estimated=float(guess), measured=_known(seen))
                for o, guess, seen in zip(v.options, estimated, measured, strict=True)
            ),
        )
        for v, estimated, measured in rows
    )  # fmt: skip


def _gates(picture: _Picture, found: Searched, budgets: Sequence[str]) -> report.Gates | None:
    if found.gates is None:
        return None
    curve = [
        report.GateStep(step=step + 1, loss=loss, size_bytes=size)
        for step, (size, loss) in enumerate(found.gates.curve.tolist())
    ]
    points = {text: found.starts[f"gates at {limit}"] for text, limit in zip(budgets, found.limits, strict=True)}
    at = {text: tuple(map(_left, picture.layers(picture.selection(point)))) for text, point in points.items()}
    return report.Gates(curve=tuple(curve), at=at)


def _left(layer: report.Layer) -> report.GateLayer:
    weights = sum(row.parameters for row in layer.projections)
    whole = sum(row.parameters / max(layer.kept(row.units), 1e-9) for row in layer.projections)
    bits = sum(row.bits * row.parameters for row in layer.projections) / weights if weights else None
    return report.GateLayer(layer=layer.index, kept=weights / whole if whole else 0.0, bits=bits)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _words(variable: Variable, option) -> str:
    if variable.kind == "layer":
        return "stays" if option else "goes"
    return f"{option} of {variable.options[-1]} units" if variable.kind == "width" else str(option)


def _passes(found: Searched) -> float | None:
    cost_of = found.costs.get("trials")
    return cost_of["passes"] / cost_of["n"] if cost_of and cost_of["n"] else None


def _seconds(job: Job, found: Searched) -> dict[str, float]:
    return job.run.seconds() | {
        name: round(spent["seconds"], 3) for name, spent in found.costs.items() if name not in job.run.seconds()
    }
