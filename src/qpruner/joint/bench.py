"""Where the points of a joint search are evaluated: prepared once, at the first question, and then asked in batches."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property

import numpy as np
from torch import Tensor

from qpruner.decide import joint
from qpruner.decide.space import Point, Space
from qpruner.files import write_text
from qpruner.job import Job
from qpruner.joint.points import varies
from qpruner.joint.runner import evaluator, item_of, open_runner, open_trials, prepare_runner
from qpruner.joint.trials import Observed, TrialRunner
from qpruner.model.memory import TRIAL_BYTES
from qpruner.run import digest_of
from qpruner.workers import Lost, Pool, workers


class Bench:
    """Where points are evaluated: a folder with all that a trial needs, and workers on it. Final.

    Nothing of it is made before something is asked: a finished search is read back without a model.
    """

    def __init__(self, job: Job, space: Space, scores: Mapping[str, Tensor], stack: ExitStack):
        self.space = space
        self._job, self._stack = job, stack
        groups = {name: group for name, group in job.graph.groups.items() if varies(group, job.recipe)}
        self.orders = {name: scores[name].argsort(descending=True, stable=True) for name in groups}
        self._costs_file = job.run.folder / "costs.json"

    @classmethod
    @contextmanager
    def opened(cls, job: Job, space: Space, scores: Mapping[str, Tensor]) -> Iterator["Bench"]:
        with ExitStack() as stack:
            yield cls(job, space, scores, stack)

    @property
    def inputs(self) -> dict:
        """What all that is measured here depends on."""
        job, recipe = self._job, self._job.recipe
        return job.inputs(
            orders={name: order.tolist() for name, order in self.orders.items()},
            calibration=digest_of(job.prepared.calibration.ids.tolist()),
            windows=digest_of(job.prepared.search.ids.tolist()),
            rounding=[recipe.rounding, recipe.ranges],
            options=[[v.name, v.kind, [str(o) for o in v.options]] for v in self.space.variables],
        )

    @cached_property
    def trials(self) -> TrialRunner:
        """In this process."""
        job = self._job
        folder = job.run.folder / "bench"
        with job.scratch("bench", self.inputs) as scratch:
            prepare_runner(
                folder, job.original(), job.graph, model=str(job.shape.source.folder), windows=job.prepared.search.ids,
                trust_remote_code=job.shape.source.trust_remote_code, calibration=job.prepared.calibration.ids,
                orders=self.orders, settings=job.recipe.rounds(), identity=job.prepared.weights_digest,
                resident=job.prepared.forecast.resident, memory_bytes=TRIAL_BYTES, scratch=scratch,
                on_layer=job.progress("preparing trials"),
            )  # fmt: skip
        return open_trials(folder, device=job.where()["device"])

    @cached_property
    def pool(self) -> Pool:
        places, device = self._job.places, self._job.where()["device"]
        event = lambda text: self._job.run.event("workers", said=text)
        make: tuple = (evaluator, self.trials)
        if places.workers or places.ray:
            make = (open_runner, str(self._job.run.folder / "bench"), device)
        return self._stack.enter_context(workers(*make, n=places.workers, ray=places.ray, on_event=event))

    def observed(
        self, items: Sequence[str], stage: str, done: int = 0, total: int | None = None
    ) -> list[Observed | Lost]:
        """stage, done, total: for the progress that is shown."""
        show, finished, spent = self._job.progress(stage), 0, self.costs()

        def on_result(_: int, found: dict | Lost) -> None:
            nonlocal finished
            finished += 1
            show(done + finished, total or len(items))

        found = self.pool.map(items, on_result=on_result)
        measured = [each for each in found if not isinstance(each, Lost)]
        own = spent.setdefault(stage, {"n": 0, "seconds": 0.0, "passes": 0.0})
        own["n"] += len(measured)
        for key in ("seconds", "passes"):
            own[key] += sum(each[key] for each in measured)
        write_text(self._costs_file, json.dumps(spent, indent=1))
        return [each if isinstance(each, Lost) else Observed.of(each["window_losses"]) for each in found]

    def evaluate(
        self, stage: str, total: int, done: int = 0
    ) -> Callable[[list[Point], list[float]], list[joint.Observed]]:
        """For a search that makes so many trials, of which some are known."""
        n_windows = len(self._job.prepared.search.ids)

        def evaluate(points: list[Point], bars: list[float]) -> list[joint.Observed]:
            nonlocal done
            items = [
                item_of(self.space.selection(point), bar=bar if np.isfinite(bar) else None)
                for point, bar in zip(points, bars, strict=True)
            ]
            found = self.observed(items, stage, done, total)
            done += len(points)
            return [_as_trial(each, n_windows) for each in found]

        return evaluate

    def costs(self) -> dict[str, dict[str, float]]:
        """Of every stage: evaluations, seconds of workers, passes over all windows."""
        return json.loads(self._costs_file.read_text()) if self._costs_file.is_file() else {}


def _as_trial(found: Observed | Lost, n_windows: int) -> joint.Observed:
    """All trials see the same windows, so only one that was given up early is uncertain."""
    if isinstance(found, Lost):
        return joint.Observed(None)
    return joint.Observed(found.kl, 0.0 if found.n_windows == n_windows else found.standard_error, found.n_windows)
