"""The stages of a joint search: what is measured, learned and tried, before a plan for any budget is chosen.

    scores -> candidates -> sensitivities -> predicted losses, checked on random plans -> gates -> trials -> a point

Every stage is one of a run folder, so that the same request goes on where it stopped and a finished search is read back
in seconds. Points to try are chosen here, in batches of a fixed size; where they are evaluated (`job.places`) changes
nothing.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qpruner.decide import controls, joint
from qpruner.decide.estimate import Estimate, by_information
from qpruner.decide.gates import Gates, Network, train_gates
from qpruner.decide.information import bit_units, measure_information
from qpruner.decide.projection import projected, projections
from qpruner.decide.space import Point, Space
from qpruner.deciding import INFORMATION_WINDOWS, measure_scores
from qpruner.errors import WorkersError
from qpruner.job import Job
from qpruner.joint.bench import Bench
from qpruner.joint.points import check_reach, rules_for, space_for
from qpruner.joint.runner import item_of
from qpruner.joint.sensitivities import Sensitivities, combined, estimate, measure, wanted
from qpruner.joint.trials import Observed
from qpruner.model.scratch import Scratch
from qpruner.run import Journal, digest_of
from qpruner.workers import Lost

RANDOM_PLANS = 20  # on which predicted losses are compared with measured ones
FISHER_WINDOWS = 32
MEASURED = 600  # single choices that are measured at most
PATIENCE = 4  # batches without anything that is expected to improve by more than noise
CONTROLS: Mapping[str, Callable[..., list[joint.Trial]]] = {
    "random": controls.random_search,
    "greedy": controls.greedy,
    "nsga-ii": controls.genetic,
    "bits-only": controls.bits_only,
    "prune-first": controls.prune_then_allocate,
}


@dataclass(frozen=True)
class Searched:
    """All that a joint search knows in the end.

    checked: predicted and measured loss of random plans. uniform_widths: the target takes one width for all layers.
    trials: of the search, and by name of other ways to search.
    costs: of every stage: evaluations, seconds of workers, passes over all windows.
    """

    space: Space
    scores: dict[str, Tensor]
    limits: tuple[int, ...]
    sensitivities: Sensitivities
    checked: list[dict]
    uniform_widths: bool
    gates: Gates | None
    starts: dict[str, Point]
    trials: list[joint.Trial]
    controls: dict[str, list[joint.Trial]]
    costs: dict[str, dict[str, float]]

    @cached_property
    def estimate(self) -> Estimate:
        return Estimate(self.space, self.sensitivities.single, self.sensitivities.interaction)

    def point_for(self, limit_bytes: int) -> Point:
        """The best point for any budget by all that was tried; nothing is evaluated."""
        check_reach(self.space, limit_bytes, "the search")
        if self.uniform_widths:
            tried = joint.best(self.trials, limit_bytes)
            found = tried.point if tried else None
            return found or projected(self.space, self.estimate, limit_bytes, uniform_widths=True)
        return joint.point_for(self.space, self.estimate, self.trials, limit_bytes)

    def finalists(self, limit_bytes: int, n: int) -> list[Point]:
        """That point, and the best others that were tried; n of them at most."""
        inside = [t for t in self.trials if t.counts and t.size_bytes <= limit_bytes and not t.standard_error]
        ranked = [t.point for t in sorted(inside, key=lambda t: (t.loss, t.number))]
        return list(dict.fromkeys([self.point_for(limit_bytes), *ranked]))[:n]


def searched(job: Job, limits: Sequence[int], others: Sequence[str] = ()) -> Searched:
    """The whole search, or what of it is not done yet.

    Args:
        limits: in bytes, those that trials are to meet.
        others: names of controls, which get as many trials.
    """
    limits = tuple(sorted(set(limits)))
    space = space_for(job.shape, job.recipe)
    check_reach(space, limits[0], job.recipe.name)
    scores, _ = measure_scores(job)
    with Bench.opened(job, space, scores) as bench:
        sensitivities = _sensitivities(job, bench, limits)
        predicted = Estimate(space, sensitivities.single, sensitivities.interaction)
        checked = _checked(job, bench, predicted, limits)
        gates = _gates(job, bench, sensitivities, limits)
        informed = by_information(space, _information(job))
        starts = _starts(space, {"sensitivity": predicted, "mutual information": informed}, gates, limits)
        uniform = rules_for(job.shape, job.recipe).uniform_widths
        search = controls.uniform_widths if uniform else joint.search
        trials = _trials(job, bench, predicted, limits, "trials", search, starts, patience=PATIENCE)
        rest = {name: _control(job, bench, predicted, limits, name) for name in others}
        return Searched(
            space, scores, limits, sensitivities, checked, uniform, gates, starts, trials, rest, bench.costs()
        )


def _sensitivities(job: Job, bench: Bench, limits: Sequence[int]) -> Sensitivities:
    """Of all options by estimate; measured are all of them, or those that matter at the limits."""
    space, recipe = bench.space, job.recipe
    inputs = bench.inputs | dict(measured=recipe.sensitivity_windows, limits=limits, seed=job.prepared.seed)

    def compute() -> dict[str, Tensor]:
        trials = bench.trials
        with job.scratch("estimates", inputs) as scratch:
            both = estimate(
                trials.stream, job.graph, trials.store, space, job.prepared.search.ids[:FISHER_WINDOWS], scratch,
                generator=torch.Generator().manual_seed(job.prepared.seed), on_layer=job.progress("estimates"),
            )  # fmt: skip
        rough = combined(space, both, 0.0, {})
        found = projections(space, Estimate(space, rough.single, rough.interaction), sorted(limits))
        used = {(v, o) for point in found for v, o in enumerate(point)}
        options = wanted(space, used, rough.single, MEASURED)

        def seen(selections, common) -> list[Observed]:
            how = dict(n_windows=recipe.sensitivity_windows)
            items = [item_of(s, remember=n, **how) for s, n in zip(selections, common, strict=True)]
            found = bench.observed(items, "sensitivities")
            if lost := next((each for each in found if isinstance(each, Lost)), None):
                raise WorkersError(f"a sensitivity could not be measured: {lost.reason}")
            return found

        base, measured = measure(space, options, seen)
        return combined(space, both, base, measured).to_tensors()

    return Sensitivities.from_tensors(job.run.tensors("sensitivities", inputs, compute))


def _checked(job: Job, bench: Bench, predicted: Estimate, limits: Sequence[int]) -> list[dict]:
    """Predicted and measured loss of random points, so that one sees what predictions are worth."""
    inputs = bench.inputs | dict(limits=limits, measured=job.recipe.sensitivity_windows, seed=job.prepared.seed)

    def compute() -> list[dict]:
        found = controls.random_search(
            bench.space, bench.evaluate("random plans", RANDOM_PLANS), limits=limits, n_trials=RANDOM_PLANS,
            at_once=RANDOM_PLANS, estimate=predicted, seed=job.prepared.seed + 1,
        )  # fmt: skip
        guesses = predicted.predict([trial.point for trial in found])
        return [
            {"size_bytes": trial.size_bytes, "predicted": float(guess), "measured": trial.loss}
            for trial, guess in zip(found, guesses, strict=True)
        ]

    return job.run.values("random-plans", inputs, compute)


def _gates(job: Job, bench: Bench, sensitivities: Sensitivities, limits: Sequence[int]) -> Gates | None:
    """Learned on the calibration text, from what was measured; the model has to fit in memory."""
    recipe, windows = job.recipe, job.prepared.calibration.ids
    if not recipe.gate_steps:
        return None
    inputs = bench.inputs | dict(
        steps=recipe.gate_steps, way=recipe.gates, batch=recipe.tuning_batch, limits=limits,
        measured=recipe.sensitivity_windows, seed=job.prepared.seed,
    )  # fmt: skip

    def compute() -> dict[str, Tensor]:
        original, scratch = job.original(), Scratch()
        kept = Scratch(job.passes / f"gates-{digest_of(inputs)[:16]}")
        original.forward(windows, scratch, on_layer=job.progress("predictions for gates"))
        network = Network(original.loaded(), job.graph, bench.space, bench.trials.store.weight)
        with original.predicting(windows, scratch) as predicting:
            gates = train_gates(
                network, bench.space, tuple(-single for single in sensitivities.single), bench.orders, predicting,
                windows, limits=(limits[0], limits[-1]), steps=recipe.gate_steps, batch_size=recipe.tuning_batch,
                seed=job.prepared.seed, way=recipe.gates, on_step=job.progress("gates"), kept=kept,
            )  # fmt: skip
        kept.clear()
        return gates.to_tensors()

    return Gates.from_tensors(job.run.tensors("gates", inputs, compute))


def _information(job: Job) -> dict[str, float]:
    """Mutual information of what each projection of the original puts out and its prediction, nats."""
    windows, estimator = job.prepared.calibration.ids[:INFORMATION_WINDOWS], job.recipe.information
    inputs = job.inputs(of="the original", windows=digest_of(windows.tolist()), estimator=estimator)
    with job.scratch("information", inputs) as scratch:
        rows = job.run.values(
            "information",
            inputs,
            lambda: measure_information(
                job.original(), bit_units(job.graph, "projection"), windows, estimator=estimator,
                seed=job.prepared.seed, scratch=scratch, on_layer=job.progress("mutual information"),
            ),
        )  # fmt: skip
    return {row["unit"]: row["nats"] for row in rows}


def _starts(
    space: Space, guesses: Mapping[str, Estimate], gates: Gates | None, limits: Sequence[int]
) -> dict[str, Point]:
    """Points to begin with, by name: what each estimate chooses at every limit, with and without pairs."""
    every = dict(guesses)
    every |= {
        f"single {name}": guess.without_pairs() for name, guess in guesses.items() if guess.interaction is not None
    }
    every |= {} if gates is None else {"gates": gates.estimate(space)}
    return {
        f"{name} at {limit}": point
        for name, guess in every.items()
        for limit, point in zip(limits, projections(space, guess, limits), strict=True)
    }


def _trials(
    job: Job, bench: Bench, predicted: Estimate, limits: Sequence[int], stage: str, search: Callable, starts, **how
) -> list[joint.Trial]:
    recipe = job.recipe
    facts = dict(limits=limits, starts=starts, measured=recipe.sensitivity_windows, at_once=recipe.trials_at_once)
    journal = Journal(job.run.folder / f"{stage}.jsonl", bench.inputs | facts)
    past = [joint.Trial.from_json(json.dumps(line)) for line in journal.lines][: recipe.trials]
    if len(past) == recipe.trials:
        return past
    return search(
        bench.space, bench.evaluate(stage, recipe.trials, len(past)), starts=starts, limits=limits,
        n_trials=recipe.trials, at_once=recipe.trials_at_once, estimate=predicted, seed=job.prepared.seed, journal=past,
        on_trial=lambda trial: journal.append(json.loads(trial.to_json())), **how,
    )  # fmt: skip


def _control(job: Job, bench: Bench, predicted: Estimate, limits: Sequence[int], name: str) -> list[joint.Trial]:
    return _trials(job, bench, predicted, limits, name, CONTROLS[name], {})
