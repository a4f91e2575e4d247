"""The main job: a prepared request in, an artifact and a report out, through the stages of a run folder.

prune -> measure what is left -> choose bits -> quantize -> recover -> save -> judge what was saved. Each stage names
the digest of all that it depends on, so an interrupted run continues at the stage where it stopped.

Everything goes through a `Stream`, layer by layer, whether all layers fit in memory or one does: the results are the
same. Only the Bayesian search, sensitivities and training need the whole pruned model in memory.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qpruner import __version__
from qpruner.artifact import save
from qpruner.artifact.opened import open_stream
from qpruner.decide import search as bayesian
from qpruner.decide import widths
from qpruner.decide.allocate import ALLOCATORS, Choices
from qpruner.decide.information import BitUnit, bit_units, measure_information
from qpruner.decide.scores import SCORERS
from qpruner.decide.sensitivity import measure_sensitivity
from qpruner.do.quantize import Candidates
from qpruner.do.recover import train_adapters_
from qpruner.do.streamed import LayerByLayer
from qpruner.files import write_text
from qpruner.judge import loss as judge
from qpruner.judge.speed import measure_in_fresh_process
from qpruner.model import adapters, checkpoint, cost, depth, load, memory
from qpruner.model.scratch import Scratch
from qpruner.model.skeleton import build_skeleton
from qpruner.model.stream import Pace
from qpruner.model.surgery import narrow_
from qpruner.model.tensors import Cut, Named, Renamed, Stored
from qpruner.model.whole import Streamable, opened
from qpruner.plan import SPECS, Plan
from qpruner.prepare import Prepared, without_layers
from qpruner.progress import OnProgress
from qpruner.run import Journal, Run, digest_of
from qpruner.shape import EVALUATION_BATCH, evaluation_batch, stored_sizes

INFORMATION_WINDOWS = 32
HEADER_SLACK = 4  # bytes per linear
SENSITIVITY_PART = 2  # one in so many windows of the search text: there are as many passes as candidates
LOSS_CURVE = "loss_curve"  # beside the adapters in their stage's file


@dataclass(frozen=True)
class Decided:
    """The plan, and the numbers that it was decided on, for the report."""

    plan: Plan
    scores: dict[str, Tensor]
    units: tuple[BitUnit, ...]
    information: list[dict]
    sensitivity: list[list[float]] | None
    trials: list[bayesian.Trial]
    chosen: bayesian.Trial | None


@dataclass(frozen=True)
class Measured:
    """What was measured of the original and of the saved artifact, as stored by the run."""

    original: dict
    artifact: dict
    loss_curve: list[tuple[int, float]]
    search_loss: dict[str, float]
    loftq_errors: dict[str, tuple[float, float]]
    size: cost.StoredSize
    on_disk: int


class Compression:
    """One run of the main job on an open run folder."""

    def __init__(self, prepared: Prepared, run: Run, on_progress: OnProgress, *, measure_speed: bool):
        self.run, self._on_progress, self._measure_speed = run, on_progress, measure_speed
        self._take(prepared)

    def _take(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.recipe, self.shape, self.graph = prepared.recipe, prepared.shape, prepared.shape.graph
        units = bit_units(self.graph, self.recipe.bit_unit)
        self.units = units if len(self.recipe.bits) > 1 else ()

    def __call__(self) -> tuple[Decided, Measured]:
        original = self._judge_original()
        prepared, scores = without_layers(self.prepared, self._scores())
        self._take(prepared)  # from here on it is about the model of the layers that stay
        kept = widths.choose(
            self.graph, self.recipe, scores, self.prepared.counts, stored_sizes(self.shape, self.recipe),
            self.prepared.limit_bytes,
        )  # fmt: skip
        information = self._information(kept)
        if self.prepared.in_memory:
            decided, done = self._in_memory(scores, kept, information)
        else:
            decided, done = self._layer_by_layer(scores, kept, information)
        folder, size = partial(self.prepared.output), self.shape.size(decided.plan)
        on_disk = save.weight_bytes(folder)
        assert on_disk == size.total, f"{on_disk} bytes on disk, {size.total} predicted"
        artifact = self._judge_artifact(folder)
        shutil.rmtree(self._passes, ignore_errors=True)  # with what earlier requests may have left unfinished
        return decided, Measured(original, artifact, done.loss_curve, done.search_loss, done.errors, size, on_disk)

    def _in_memory(self, scores, kept: dict, information: list[dict]) -> tuple[Decided, "Done"]:
        model = self._pruned(kept).loaded()
        candidates = Candidates(model, self.graph, self._plan(kept, 16), adapter_dtype=self._stored_dtype)
        decided = self._choose_bits(scores, kept, information, (model, candidates))
        candidates.put_(decided.plan.specs)
        errors, before = candidates.errors(), self._search_loss(model)
        candidates.forget()
        curve = self._recover(model, decided.plan)
        after = self._search_loss(model) if curve else before
        if decided.plan.adapters == "merged" and decided.plan.adapter_ranks:
            adapters.merge_adapters_(model)
        save.save_artifact(self._cleared(), model, self.graph, decided.plan, **self._saved_as(decided.plan))
        return decided, Done(curve, {"before": before, "after": after}, errors)

    def _layer_by_layer(self, scores, kept: dict, information: list[dict]) -> tuple[Decided, "Done"]:
        decided = self._choose_bits(scores, kept, information, None)
        pruned, plan = self._pruned(kept), decided.plan
        with self._scratch("writing", self._inputs(plan=plan.model_dump(mode="json"))) as scratch:
            doing = LayerByLayer(pruned, self.graph, plan, self.shape.stored(plan), scratch)
            tensors = doing.tensors(self._stored_dtype, self._progress("writing"))
            save.write_artifact(
                self._cleared(), tensors, lambda: doing.adapter_state, self.graph, plan,
                architecture=type(pruned.model).__name__, **self._saved_as(plan),
            )  # fmt: skip
        return decided, Done([], {}, doing.errors)

    # --- models ------------------------------------------------------------------------------------------------------

    def _original(self) -> Streamable:
        graph = self.graph if self.shape.layers is None else None
        return open_stream(self.shape.source, graph=graph, dtype=self._precision, **self._where())

    def _pruned(self, kept: dict, dtype: torch.dtype = torch.float32) -> Streamable:
        source, layers = self.shape.source, self.shape.layers
        trust = {"trust_remote_code": source.trust_remote_code}
        model = build_skeleton(depth.shortened_config(source.config, layers), **trust)
        original = model if layers is None else build_skeleton(source.config, **trust)
        whole = Renamed(
            Named(original, Stored.of(source.folder)), depth.original_names(self.graph, layers, model.state_dict())
        )
        narrow_(model, self.graph, kept)
        return opened(model, Cut(whole, self.graph, kept), self.graph, dtype=dtype, **self._where())

    def _where(self) -> dict:
        device = "cuda" if torch.cuda.is_available() and not self.prepared.in_memory else "cpu"
        return {"resident": self.prepared.forecast.resident, "device": device}

    @property
    def _precision(self) -> torch.dtype:
        return getattr(torch, self.recipe.precision)

    @property
    def _stored_dtype(self) -> torch.dtype:
        return load.stored_dtype(self.shape.source)

    @property
    def _passes(self) -> Path:
        return self.run.folder / "passes"

    @contextmanager
    def _scratch(self, stage: str, inputs: dict) -> Iterator[Scratch]:
        """For one stage with these inputs; what an interrupted run left of it is found there again."""
        if self.prepared.forecast.resident:
            yield Scratch()
            return
        scratch = Scratch(self._passes / f"{stage}-{digest_of(inputs)[:16]}")
        yield scratch
        scratch.clear()

    # --- what the stages depend on -----------------------------------------------------------------------------------

    def _inputs(self, **facts) -> dict:
        return {
            "qpruner": __version__,
            "model": self.prepared.weights_digest,
            "architecture": self.shape.source.digest,
            "seed": self.prepared.seed,
            **facts,
        }

    def _progress(self, stage: str) -> Callable[..., None]:
        return lambda done, total, detail="", *rest: self._on_progress(stage, done, total, _shown(detail))

    def _plan(self, kept: dict, bits: int | dict[str, int]) -> Plan:
        return self.shape.plan(self.recipe, kept, bits, self.prepared.seed)

    # --- deciding ----------------------------------------------------------------------------------------------------

    def _choose_bits(
        self, scores, kept: dict, information: list[dict], loaded: tuple[nn.Module, Candidates] | None
    ) -> Decided:
        """The plan. loaded: the pruned model, measured with candidates in place and left with the last of them."""
        if not self.units:
            plan, sensitivity, trials, chosen = self._plan(kept, self.recipe.bits[0]), None, [], None
        else:
            sensitivity, trials, chosen = None, [], None
            if self.recipe.allocation in ("sensitivity", "bayesian"):
                sensitivity = self._sensitivity(*loaded, kept)
            choices = self._choices(kept, information, sensitivity)
            if self.recipe.allocation == "bayesian":
                trials = self._search(*loaded, choices, kept)
                chosen = bayesian.best(trials)
            levels = chosen.levels if chosen else ALLOCATORS[self.recipe.allocation](choices)
            plan = self._plan(kept, self._bits_of(levels))
        size = self.shape.size(plan).total
        assert size <= self.prepared.limit_bytes, f"{size} bytes planned, {self.prepared.limit_bytes} allowed"
        write_text(self.run.folder / "plan.json", plan.to_json())
        return Decided(plan, scores, self.units, information, sensitivity, trials, chosen)

    def _scores(self) -> dict[str, Tensor]:
        windows = self.prepared.calibration.ids
        inputs = self._inputs(score=self.recipe.score, windows=digest_of(windows.tolist()))
        scorer, generator = SCORERS[self.recipe.score], torch.Generator().manual_seed(self.prepared.seed)
        with self._scratch("importance", inputs) as scratch:
            return self.run.tensors(
                "importance",
                inputs,
                lambda: scorer(self._original(), self.graph, windows, generator, scratch, self._progress("importance")),
            )

    def _information(self, kept: dict) -> list[dict]:
        if not self.units:
            return []
        windows, estimator = self.prepared.calibration.ids[:INFORMATION_WINDOWS], self.recipe.information
        inputs = self._inputs(
            kept=kept,
            layers=self.shape.layers,
            windows=digest_of(windows.tolist()),
            estimator=estimator,
            unit=self.recipe.bit_unit,
        )
        with self._scratch("information", inputs) as scratch:
            return self.run.values(
                "information",
                inputs,
                lambda: measure_information(
                    self._pruned(kept, self._precision), self.units, windows, estimator=estimator,
                    seed=self.prepared.seed, scratch=scratch, on_layer=self._progress("mutual information"),
                ),
            )  # fmt: skip

    def _quantized_inputs(self, kept: dict, **facts) -> dict:
        plan = self._plan(kept, 16)
        return self._inputs(
            kept=kept, layers=self.shape.layers, bits=self.recipe.bits, unit=self.recipe.bit_unit,
            ranks=plan.adapter_ranks, loftq=[plan.recovery.loftq_iterations, plan.recovery.adapter_alpha],
            windows=digest_of(self.prepared.search.ids.tolist()), **facts,
        )  # fmt: skip

    def _sensitivity(self, model, candidates, kept) -> list[list[float]]:
        windows = self.prepared.search.first(max(1, len(self.prepared.search.ids) // SENSITIVITY_PART))

        def compute() -> list[list[float]]:
            reference = judge.reference_logprobs(model, windows)

            def divergence(bits: dict[str, int]) -> float:
                candidates.put_({name: SPECS[bits.get(name, 16)] for name in self.graph.linears})
                return judge.kl_from_logprobs(model, windows, reference).kl

            return measure_sensitivity(self.units, self.recipe.bits, divergence, self._progress("sensitivity"))

        return self.run.values("sensitivity", self._quantized_inputs(kept), compute)

    def _bits_of(self, levels: tuple[int, ...]) -> dict[str, int]:
        return {n: self.recipe.bits[level] for u, level in zip(self.units, levels, strict=True) for n in u.linears}

    def _choices(self, kept, information, sensitivity) -> Choices:
        """What each unit weighs at each level, and what is left of the budget for all of them."""

        dims = cost.kept_shapes(self.graph, kept)
        sizes = np.array(
            [
                [sum(cost.linear_bytes(*dims[n], SPECS[b]) for n in u.linears) for b in self.recipe.bits]
                for u in self.units
            ]
        )
        stored = [self.shape.size(self._plan(kept, b)) for b in self.recipe.bits]
        # The header names shapes and offsets, whose digits depend on the mixture: a few bytes a linear at the most.
        headers = max(size.headers for size in stored) + HEADER_SLACK * len(self.graph.linears)
        elsewhere = stored[0].total - stored[0].linears - stored[0].headers + headers
        return Choices(
            units=tuple(u.name for u in self.units),
            bits=self.recipe.bits,
            sizes_bytes=sizes,
            limit_bytes=self.prepared.limit_bytes - elsewhere,
            information=np.array([row["nats"] for row in information]),
            sensitivity=None if sensitivity is None else np.array(sensitivity),
            seed=self.prepared.seed,
        )

    def _search(self, model, candidates, choices: Choices, kept) -> list[bayesian.Trial]:
        journal = Journal(
            self.run.folder / "trials.jsonl",
            self._quantized_inputs(kept, limit=choices.limit_bytes, information=choices.information.tolist()),
        )
        starts = {name: allocate(choices) for name, allocate in ALLOCATORS.items() if name != "random"}

        def evaluate(levels: tuple[int, ...]) -> float:
            candidates.put_({n: SPECS[b] for n, b in self._bits_of(levels).items()})
            return self._search_loss(model)

        def on_trial(trial: bayesian.Trial) -> None:
            journal.append(json.loads(trial.to_json()))
            self._on_progress("search", trial.number + 1, self.recipe.trials)

        past = [bayesian.Trial.from_json(json.dumps(line)) for line in journal.lines][: self.recipe.trials]
        return bayesian.search(
            choices, evaluate, starts=starts, n_trials=self.recipe.trials, seed=self.prepared.seed,
            journal=past, on_trial=on_trial,
        )  # fmt: skip

    def _search_loss(self, model: nn.Module) -> float:
        return judge.evaluate_loss(model, self.prepared.search, batch_size=EVALUATION_BATCH).loss

    # --- doing -------------------------------------------------------------------------------------------------------

    def _recover(self, model: nn.Module, plan: Plan) -> list[tuple[int, float]]:
        """Trains the adapters, or reads them back; returns the loss curve."""
        if not plan.adapter_ranks or not plan.recovery.steps:
            return []
        windows = self.prepared.training.ids

        def compute() -> dict[str, Tensor]:
            curve = train_adapters_(
                model, plan.recovery, windows, seed=self.prepared.seed, on_step=self._progress("recovery")
            )
            state = adapters.adapter_state(model, load.stored_dtype(self.shape.source))
            return {**state, LOSS_CURVE: torch.tensor(curve, dtype=torch.float64)}

        inputs = self._inputs(plan=plan.model_dump(mode="json"), windows=digest_of(windows.tolist()))
        state = self.run.tensors("adapters", inputs, compute)
        curve = state.pop(LOSS_CURVE)
        names = {linear: adapters.tensor_names(linear) for linear in plan.adapter_ranks}
        adapters.set_adapter_weights_(model, {linear: (state[a], state[b]) for linear, (a, b) in names.items()})
        return [(int(step), float(value)) for step, value in curve]

    def _cleared(self) -> Path:
        """Where the artifact is written, beside its final place; what an interrupted run left there is removed."""
        folder = partial(self.prepared.output)
        if folder.exists():
            shutil.rmtree(folder)
        return folder

    def _saved_as(self, plan: Plan) -> dict:
        return {"expected": self.shape.stored(plan), "dtype": self._stored_dtype, "source": self.shape.source}

    # --- judging -----------------------------------------------------------------------------------------------------

    def _judged(self, stream: Streamable, scratch: Scratch, which: str) -> judge.Streamed:
        return judge.Streamed(stream, scratch, self._progress(f"judging the {which}"))

    @property
    def _batch(self) -> int:
        return evaluation_batch(self.prepared.evaluation.ids.shape[1], self.shape.vocabulary)

    def _judge_original(self) -> dict:
        windows = self.prepared.evaluation
        inputs = self._inputs(windows=digest_of(windows.ids.tolist()))
        with self._scratch("original", inputs) as scratch:

            def compute() -> dict:
                judged = self._judged(self._original(), scratch, "original")
                return {"loss": loss_values(judge.evaluate_loss(judged, windows, batch_size=self._batch))}

            judged = self.run.values("original", inputs, compute)
        return judged | self._speed("original", self.shape.source.folder, self.prepared.weights_digest)

    def _judge_artifact(self, folder: Path) -> dict:
        """Of what was written, loaded anew: the numbers are those of the files."""
        windows = self.prepared.evaluation
        weights = checkpoint.weights_digest(folder)
        inputs = self._inputs(windows=digest_of(windows.ids.tolist()), artifact=weights)
        with self._scratch("artifact", inputs) as ours, self._scratch("reference", inputs) as theirs:

            def compute() -> dict:
                trusted = self.shape.source.trust_remote_code
                written = load.inspect_source(str(folder), trust_remote_code=trusted)
                artifact = open_stream(written, dtype=self._precision, **self._where())
                judged = self._judged(artifact, ours, "artifact")
                report = judge.evaluate_loss(judged, windows, batch_size=self._batch)
                original = self._judged(self._original(), theirs, "original")
                divergence = judge.kl_to(judged, original, windows, batch_size=self._batch)
                return {"loss": loss_values(report), "kl": divergence.to_dict()}

            judged = self.run.values("artifact", inputs, compute)
        return judged | self._speed("artifact", folder, weights)

    def _speed(self, which: str, folder: Path, weights: str) -> dict:
        """Memory and tokens per second, in a process of its own; nothing if not asked for, or where it does not fit."""
        tensors = load.inspect_source(str(folder), trust_remote_code=self.shape.source.trust_remote_code).tensors
        if not self._measure_speed or not memory.fits(tensors, self.prepared.forecast.limit):
            return {}
        self._on_progress(f"speed of the {which}", 0, 1)
        measured = self.run.values(
            f"{which}-speed",
            {"weights": weights},
            lambda: measure_in_fresh_process(folder, trust_remote_code=self.shape.source.trust_remote_code).to_dict(),
        )
        self._on_progress(f"speed of the {which}", 1, 1)
        return {"speed": measured}


@dataclass(frozen=True)
class Done:
    """What was seen while the plan was carried out."""

    loss_curve: list[tuple[int, float]]
    search_loss: dict[str, float]
    errors: dict[str, tuple[float, float]]


def _shown(detail: object) -> str:
    """A pace is shown; the loss of a training step is not."""
    return str(detail) if isinstance(detail, Pace) else ""


def loss_values(report: judge.LossReport) -> dict:
    return {
        **report.to_dict(),
        "perplexity_standard_error": report.perplexity * report.standard_error,
        "protocol": str(report.protocol),
        "window_losses": report.window_losses,
    }


def partial(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")
