"""Bayesian optimization of widths, layers and bits together: trials on the true loss, where they promise most.

A trial is a point of a space, at or just below one of the limits by construction. Trials are chosen in batches whose
size has nothing to do with how many run side by side, from a surrogate (`surrogate.py`) and a pool of proposals
(`proposals.py`), by the expected improvement of the front (`acquisition.py`). A batch depends on nothing but the seed
and the trials before it, so a search that was cut off continues from its journal exactly as it would have gone on.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from qpruner.decide.acquisition import at_limits, lengths, log_improvement, stretches
from qpruner.decide.estimate import Estimate
from qpruner.decide.projection import fill, projected
from qpruner.decide.proposals import Proposals
from qpruner.decide.space import Point, Space
from qpruner.decide.surrogate import Expected, Features, Surrogate, need_botorch
from qpruner.errors import BudgetError
from qpruner.math.pareto import front

SHIFTS = 2  # rounds in which the neighbours of the most promising proposals are considered too
PROMISING = 4
BEYOND = 0.5  # log loss above the worst trial, where there is no trial yet
DOUBT = 2  # deviations that what was not tried is thought to be worse than expected
QUIET = 1e-3  # relative improvement that is not worth a trial
QUIET_SHARE = 0.1  # of the deviation of a trial's noise: the same


@dataclass(frozen=True)
class Observed:
    """What a trial found. loss: KL in nats per token, not finite where the model diverged, None where it was lost.

    standard_error: of the loss, as far as two trials on the same windows may differ by it. n_windows: that were used.
    """

    loss: float | None
    standard_error: float = 0.0
    n_windows: int = 0


@dataclass(frozen=True)
class Trial:
    """One evaluated point.

    origin: the name of the start, or how it came to be proposed. expected: loss, by the surrogate that proposed it.
    """

    number: int
    origin: str
    point: Point
    size_bytes: int
    loss: float | None
    standard_error: float
    n_windows: int
    expected: float | None = None

    @property
    def counts(self) -> bool:
        """Whether it found a loss: neither lost nor diverged."""
        return self.loss is not None and math.isfinite(self.loss)

    def to_json(self) -> str:
        """One line; every float comes back bit by bit."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Trial":
        fields = json.loads(line)
        return cls(**fields | {"point": tuple(fields["point"])})


@dataclass(frozen=True)
class Batch:
    """points with how they came to be; quiet: nothing that was considered is expected to improve anything.

    expected: loss of each point, where a surrogate proposed it.
    """

    points: tuple[tuple[str, Point], ...]
    quiet: bool = False
    expected: tuple[float, ...] = ()


Evaluate = Callable[[list[Point], list[float]], Sequence[Observed]]
Suggest = Callable[[Sequence[Trial], int, np.random.Generator], Batch]


def search(
    space: Space,
    evaluate: Evaluate,
    *,
    starts: Mapping[str, Point],
    limits: Sequence[int],
    n_trials: int,
    at_once: int,
    estimate: Estimate,
    seed: int,
    journal: Sequence[Trial] = (),
    on_trial: Callable[[Trial], None] | None = None,
    patience: int | None = None,
    whole_front: bool = False,
) -> list[Trial]:
    """All trials, in order: the starts, then those of the largest expected improvement.

    Args:
        evaluate: points, and the loss that each has to stay below to matter, to what was found, in their order.
        starts: points to begin with, by name. Of equal ones the first is evaluated.
        limits: in bytes. A trial counts at every limit that it meets.
        n_trials: trials in all, those of the journal included. Fewer where no untried point is left.
        at_once: trials that are chosen before the first of them is known.
        journal: the first trials of the same search, which are not evaluated again.
        on_trial: called with each new trial when its batch is known.
        patience: stop after so many batches in a row of which no improvement was expected that noise would not hide.
        whole_front: sizes between the limits count as well, by the hypervolume of the front in logs.
    Raises:
        BudgetError: a limit below the smallest point, or a start above the largest limit.
        MissingExtraError: BoTorch is not installed.
        ValueError: a start or a journal does not belong to this space.
    """
    need_botorch()  # a missing extra is better known before the first evaluation than after it
    suggest = _Acquisition(space, estimate, sorted(set(limits)), whole_front)
    return run(
        space, evaluate, suggest, starts=starts, limits=limits, n_trials=n_trials, at_once=at_once, seed=seed,
        journal=journal, on_trial=on_trial, patience=patience,
    )  # fmt: skip


def best(trials: Sequence[Trial], limit_bytes: int | None = None) -> Trial | None:
    """The smallest loss within a limit; of equals the smaller in size, then the earlier. None where none counts."""
    inside = [t for t in trials if t.counts and (limit_bytes is None or t.size_bytes <= limit_bytes)]
    return min(inside, key=lambda t: (t.loss, t.size_bytes, t.number), default=None)


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other matches in both size and loss and beats in one, by ascending size."""
    counting = [t for t in trials if t.counts]
    points = np.array([(t.size_bytes, t.loss) for t in counting], dtype=float).reshape(-1, 2)
    return [counting[i] for i in front(points)]


def run(
    space: Space,
    evaluate: Evaluate,
    suggest: Suggest,
    *,
    starts: Mapping[str, Point],
    limits: Sequence[int],
    n_trials: int,
    at_once: int,
    seed: int,
    journal: Sequence[Trial] = (),
    on_trial: Callable[[Trial], None] | None = None,
    patience: int | None = None,
) -> list[Trial]:
    """What every way to search has in common: batches, the journal, and what belongs to the space."""
    limits = sorted(set(limits))
    first = _distinct(space, starts, limits)
    for trial in journal:
        _check(space, trial.point, limits, f"trial {trial.number} of the journal")
        if trial.size_bytes != int(space.size_bytes([trial.point])[0]):
            raise ValueError(f"trial {trial.number} of the journal has another size here; it is of another search")

    def batch_at(at: int) -> Batch:
        if at < len(first):
            return Batch(tuple(first[at : at + at_once]))
        return suggest(trials[:at], at_once, np.random.default_rng([seed, at]))

    trials, at = list(journal[:n_trials]), 0
    quiet: dict[int, bool] = {}
    while at < n_trials:
        size = min(at_once, len(first) - at) if at < len(first) else at_once
        if at + size <= len(trials):
            at += size
            continue
        batch = batch_at(at)
        quiet[at] = batch.quiet
        if patience and _all_quiet(quiet, at, at_once, patience, len(first), batch_at):
            break
        todo = batch.points[len(trials) - at : n_trials - at]
        if not todo and len(trials) >= at + len(batch.points):
            if not batch.points:
                break
            at = len(trials)
            continue
        points = [point for _, point in todo]
        bars = [bar(space, point, trials[:at], limits) for point in points]
        expected = (batch.expected or (None,) * len(batch.points))[len(trials) - at :]
        for (origin, point), found, guess in zip(todo, evaluate(points, bars), expected, strict=False):
            size_bytes = int(space.size_bytes([point])[0])
            loss = None if found.loss is None else float(found.loss)
            trial = Trial(
                len(trials), origin, point, size_bytes, loss, float(found.standard_error), found.n_windows, guess
            )
            trials.append(trial)
            if on_trial:
                on_trial(trial)
        at += len(batch.points)
    return trials


def _all_quiet(quiet, at, at_once, patience, n_starts, batch_at) -> bool:
    """Whether this batch and those before it are quiet; of a journal's the answer is found again, as late as can be."""
    for i in range(patience):
        place = at - i * at_once
        if place < n_starts:
            return False
        if place not in quiet:
            quiet[place] = batch_at(place).quiet
        if not quiet[place]:
            return False
    return True


def bar(space: Space, point: Point, trials: Sequence[Trial], limits: Sequence[int]) -> float:
    """The least loss among trials within the smallest limit that the point meets; inf without any."""
    size = int(space.size_bytes([point])[0])
    within = next((limit for limit in limits if limit >= size), limits[-1])
    known = best(trials, within)
    return math.inf if known is None else known.loss


def _distinct(space: Space, starts: Mapping[str, Point], limits: Sequence[int]) -> list[tuple[str, Point]]:
    found: dict[Point, str] = {}
    for name, point in starts.items():
        _check(space, point, limits, f"the start {name!r}")
        found.setdefault(tuple(space.canonical([point])[0].tolist()), name)
    return [(name, point) for point, name in found.items()]


def _check(space: Space, point: Point, limits: Sequence[int], what: str) -> None:
    if len(point) != len(space.sizes) or not all(0 <= o < n for o, n in zip(point, space.sizes, strict=True)):
        raise ValueError(f"{what} is not one option for each of {len(space.sizes)} variables: {tuple(point)}")
    if (size := int(space.size_bytes([point])[0])) > limits[-1]:
        raise BudgetError(f"{what} takes {size:,} bytes, and the largest limit is {limits[-1]:,}")


class _Acquisition:
    """Suggests what is expected to improve most."""

    def __init__(self, space: Space, estimate: Estimate, limits: Sequence[int], whole_front: bool):
        self.space, self.limits, self.whole_front = space, list(limits), whole_front
        self.features = Features(estimate)
        self.proposals = Proposals(estimate, limits)

    def __call__(self, trials: Sequence[Trial], n: int, rng: np.random.Generator) -> Batch:
        tried = {t.point for t in trials}
        known = [t for t in trials if t.loss is not None]
        finite = np.array([t.loss for t in known if t.counts and t.loss > 0])
        if len(set(finite.tolist())) < 2:
            pool = self.proposals.unlearned(trials, rng)
            fresh = {p: o for o, p in reversed(pool) if p not in tried}
            return Batch(tuple((fresh[p], p) for p in reversed(fresh))[:n])
        # A model that diverged is bad, but how bad must not set the scale for the others.
        losses = np.array([t.loss if t.counts else finite.max() for t in known])
        losses = np.maximum(losses, finite.min() * 1e-3)
        errors = np.array([t.standard_error if t.counts else 0.3 * finite.max() for t in known])
        errors = np.where(np.isfinite(errors), errors, 0.0)
        points = [t.point for t in known]
        surrogate = Surrogate(self.features, points, losses, errors, seed=int(rng.integers(2**31)))
        worst = float(np.log(losses).max()) + BEYOND
        front_sizes, front_means = self._log_sizes(points), surrogate.expects(points).mean
        scoring = self._scoring(front_sizes, front_means, worst)

        pool = self.proposals.pool(trials, surrogate, rng)
        pool = {p: o for o, p in reversed(pool) if p not in tried}
        rows = list(reversed(pool))
        if not rows:
            return Batch(())
        for _ in range(SHIFTS):
            score = scoring(surrogate.expects(rows), self._log_sizes(rows))
            promising = [rows[i] for i in np.argsort(-score, kind="stable")[:PROMISING]]
            more = [p for p in self.proposals.around(promising, rng) if p not in tried and p not in pool]
            pool |= {p: "polished" for p in more}
            rows += list(dict.fromkeys(more))
        expected, sizes = surrogate.expects(rows), self._log_sizes(rows)
        chosen: list[int] = []
        noise = math.sqrt(surrogate.noise + float(np.median(surrogate.fixed)))
        quiet = True
        for _ in range(min(n, len(rows))):
            score = scoring(expected, sizes)
            score[chosen] = -np.inf
            i = int(np.argmax(score))
            quiet &= bool(scoring.most(expected, sizes, i) < math.log(max(QUIET, QUIET_SHARE * noise)))
            chosen.append(i)
            expected.believe(i)
            front_sizes, front_means = np.append(front_sizes, sizes[i]), np.append(front_means, expected.mean[i])
            scoring = self._scoring(front_sizes, front_means, worst)
        losses = tuple(float(loss) for loss in np.exp(expected.mean[chosen]))
        return Batch(tuple((pool[rows[i]], rows[i]) for i in chosen), quiet, losses)

    def _scoring(self, log_sizes: np.ndarray, means: np.ndarray, worst: float) -> "_Scoring":
        limits = np.log(np.array(self.limits, dtype=float)) + 1e-12  # a point of exactly the limit meets it
        if self.whole_front:
            begins, ends, losses = stretches(log_sizes, means, min(log_sizes.min(), limits[0]), limits[-1], worst)
            return _Scoring(losses, lambda sizes: lengths(sizes, begins, ends))
        weight = lambda sizes: (sizes[:, None] <= limits).astype(float)
        return _Scoring(at_limits(log_sizes, means, limits, worst), weight)

    def _log_sizes(self, points: Sequence[Point]) -> np.ndarray:
        return np.log(self.space.size_bytes(points).astype(float))


class _Scoring:
    """The log of the expected improvement of points, by the front of what is expected of those tried."""

    def __init__(self, losses: np.ndarray, weight: Callable[[np.ndarray], np.ndarray]):
        self.losses, self.weight = losses, weight

    def __call__(self, expected: Expected, log_sizes: np.ndarray) -> np.ndarray:
        return log_improvement(expected.mean, expected.deviation, self.losses, self.weight(log_sizes))

    def most(self, expected: Expected, log_sizes: np.ndarray, i: int) -> float:
        """Of point i, in the log loss at the limit or the size where it is largest."""
        counts = self.weight(log_sizes[i : i + 1])[0] > 0
        front = self.losses[counts][:, None]
        mean, deviation = np.full(len(front), expected.mean[i]), np.full(len(front), expected.deviation[i])
        return float(log_improvement(mean, deviation, front, np.ones_like(front)).max(initial=-np.inf))


def point_for(space: Space, estimate: Estimate, trials: Sequence[Trial], limit_bytes: int, *, seed: int = 0) -> Point:
    """The best point within any limit by what trials have shown; nothing is evaluated.

    What was tried counts with its loss. What was not, that is the best of the former topped up with the bytes that are
    left, and what the estimate chooses once it is corrected by the trials, counts with what it will hardly surpass:
    the best of many expectations is an optimistic one.
    """
    known = [t for t in trials if t.counts and t.loss > 0]
    tried = best(known, limit_bytes)
    if len({t.loss for t in known}) < 2:
        return (
            projected(space, estimate, limit_bytes)
            if tried is None
            else fill(space, estimate, tried.point, limit_bytes)
        )
    losses, errors = np.array([t.loss for t in known]), np.array([t.standard_error for t in known])
    surrogate = Surrogate(Features(estimate), [t.point for t in known], losses, errors, seed=seed)
    corrected = estimate.scaled(surrogate.factors(None))
    options = [projected(space, corrected, limit_bytes, start=None if tried is None else tried.point)]
    if tried is not None:
        options += [fill(space, corrected, tried.point, limit_bytes), tried.point]
    expected = surrogate.expects(options)
    losses = expected.mean + DOUBT * expected.deviation
    if tried is not None:
        losses[-1] = math.log(tried.loss)
    return options[int(np.argmin(losses))]
