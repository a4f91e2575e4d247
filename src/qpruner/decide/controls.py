"""What a joint search is compared with, at equal trials: chance, a projection, a genetic search, and widths first.

Each has the arguments of `joint.search`, those that are not named here in `how`, and its journal.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from qpruner.decide.allocate import spread
from qpruner.decide.estimate import Estimate
from qpruner.decide.joint import Batch, Evaluate, Trial, run, search
from qpruner.decide.projection import projected, projections
from qpruner.decide.repair import Repair
from qpruner.decide.space import Point, Space
from qpruner.errors import BudgetError, MissingExtraError

Options = Mapping[int, Sequence[int]]
NO_STARTS: Mapping[str, Point] = MappingProxyType({})
DRAWN = 64  # random points of which the first untried one is taken
POPULATION = 24


def random_search(
    space: Space,
    evaluate: Evaluate,
    *,
    starts: Mapping[str, Point] = NO_STARTS,
    limits: Sequence[int],
    estimate: Estimate,
    **how,
) -> list[Trial]:
    """Options drawn evenly, then lowered or raised by chance to one of the limits. The estimate is not looked at."""
    repair = Repair(estimate, blind=True)
    ascending = np.array(sorted(set(limits)), dtype=np.int64)

    def suggest(trials: Sequence[Trial], n: int, rng: np.random.Generator) -> Batch:
        tried = {t.point for t in trials}
        rows = rng.integers(0, space.sizes, (DRAWN + n, len(space.sizes)))
        rows = repair(rows, ascending[rng.permutation(np.arange(len(rows)) % len(ascending))], rng)
        fresh = [p for p in dict.fromkeys(map(tuple, rows.tolist())) if p not in tried]
        return Batch(tuple(("random", p) for p in fresh[:n]))

    return run(space, evaluate, suggest, starts=starts, limits=limits, **how)


def greedy(
    space: Space,
    evaluate: Evaluate,
    *,
    starts: Mapping[str, Point] = NO_STARTS,
    limits: Sequence[int],
    estimate: Estimate,
    **how,
) -> list[Trial]:
    """What single measurements alone choose at every limit, exactly; a trial for each."""
    ascending = sorted(set(limits))
    found = projections(space, estimate.without_pairs(), ascending)
    every = {**starts, **{f"greedy at {limit}": point for limit, point in zip(ascending, found, strict=True)}}
    nothing = lambda trials, n, rng: Batch(())
    return run(space, evaluate, nothing, starts=every, limits=limits, **how)


def genetic(
    space: Space,
    evaluate: Evaluate,
    *,
    starts: Mapping[str, Point] = NO_STARTS,
    limits: Sequence[int],
    at_once: int,
    estimate: Estimate,
    seed: int,
    **how,
) -> list[Trial]:
    """NSGA-II by optuna on bytes and loss; points above the largest limit are lowered to it by chance."""
    suggest = _Genetic(space, Repair(estimate, blind=True), max(limits), at_once, seed)
    return run(space, evaluate, suggest, starts=starts, limits=limits, at_once=at_once, seed=seed, **how)


def prune_then_allocate(
    space: Space,
    evaluate: Evaluate,
    *,
    starts: Mapping[str, Point] = NO_STARTS,
    estimate: Estimate,
    mean_bits: float = 4.0,
    **how,
) -> list[Trial]:
    """Widths and layers first, by the estimate as if everything had `mean_bits`; then a search over the rest."""
    settled = lambda limit: widths_at(space, estimate, limit, mean_bits)
    return widths_first(space, evaluate, settled, estimate=estimate, **how)


def uniform_widths(
    space: Space,
    evaluate: Evaluate,
    *,
    starts: Mapping[str, Point] = NO_STARTS,
    estimate: Estimate,
    patience: int | None = None,
    **how,
) -> list[Trial]:
    """For what takes one width for all layers: the widths of the least predicted loss, then a search over specs."""

    def settled(limit: int) -> dict[int, int]:
        point = projected(space, estimate, limit, uniform_widths=True)
        return {i: point[i] for i, v in enumerate(space.variables) if v.kind != "bits"}

    return widths_first(space, evaluate, settled, estimate=estimate, **how)


def widths_first(
    space: Space,
    evaluate: Evaluate,
    settled: Callable[[int], Mapping[int, int]],
    *,
    limits: Sequence[int],
    n_trials: int,
    at_once: int,
    estimate: Estimate,
    seed: int,
    journal: Sequence[Trial] = (),
    on_trial: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """A search over specs at every limit, with an equal part of the trials.

    settled: a limit, and the options of widths and layers at it.
    """
    ascending, done = sorted(set(limits)), []
    for i, limit in enumerate(ascending):
        share = n_trials * (i + 1) // len(ascending) - n_trials * i // len(ascending)
        options = {v: [o] for v, o in settled(limit).items()}
        inner = estimate.restricted(options)
        start = {"projection": projected(inner.space, inner, limit)}
        offset, name = len(done), f" at {limit}"
        outer = lambda t, offset=offset, name=name, options=options: replace(
            t, number=t.number + offset, origin=t.origin + name, point=widened([t.point], options)[0]
        )
        past = [
            replace(t, number=k, origin=t.origin.removesuffix(name), point=narrowed([t.point], options)[0])
            for k, t in enumerate(t for t in journal if t.origin.endswith(name))
        ]
        done += [
            outer(t)
            for t in search(
                inner.space,
                within(evaluate, options),
                starts=start,
                limits=[limit],
                n_trials=share,
                at_once=at_once,
                estimate=inner,
                seed=seed + i,
                journal=past,
                on_trial=on_trial and (lambda t, outer=outer: on_trial(outer(t))),
            )
        ]
    return done


def widths_at(space: Space, estimate: Estimate, limit: int, mean_bits: float) -> dict[int, int]:
    """What the estimate chooses for every width and layer where every spec has the width nearest to some bits.

    Where even the least of everything then takes too much, the bits are the next lower.
    """
    every = sorted({spec.bits for v in space.variables if v.kind == "bits" for spec in v.options})
    bits = min(every, key=lambda b: abs(b - mean_bits))
    for b in [*reversed(every[: every.index(bits) + 1])]:
        specs = {
            i: min(range(len(v.options)), key=lambda o, v=v, b=b: abs(v.options[o].bits - b))
            for i, v in enumerate(space.variables)
            if v.kind == "bits"
        }
        try:
            point = projected(space, estimate, limit, fixed=specs)
        except BudgetError:
            if b == every[0]:
                raise
            continue
        return {i: point[i] for i, v in enumerate(space.variables) if v.kind != "bits"}
    raise AssertionError("every spec has bits")


def bits_only(
    space: Space,
    evaluate: Evaluate,
    *,
    starts: Mapping[str, Point] = NO_STARTS,
    limits: Sequence[int],
    estimate: Estimate,
    **how,
) -> list[Trial]:
    """`genetic` over specs alone, nothing pruned, from the uniform point at every limit: AMQ's search."""
    options = unpruned(space)
    inner = estimate.restricted(options)
    even = {f"uniform at {limit}": uniform(inner.space, limit) for limit in sorted(set(limits))}
    begin = {name: point for name, point in even.items() if point is not None}
    past = [replace(t, point=narrowed([t.point], options)[0]) for t in how.pop("journal", ())]
    outer = lambda t: replace(t, point=widened([t.point], options)[0])
    told = how.pop("on_trial", None)
    found = genetic(
        inner.space, within(evaluate, options), starts=begin, limits=limits, estimate=inner, journal=past,
        on_trial=told and (lambda t: told(outer(t))), **how,
    )  # fmt: skip
    return [outer(t) for t in found]


def unpruned(space: Space) -> dict[int, list[int]]:
    """The options of a search in which nothing goes."""
    return {i: [space.top[i]] for i, v in enumerate(space.variables) if v.kind != "bits"}


def uniform(space: Space, limit_bytes: int) -> Point | None:
    """The same spec everywhere, nothing pruned, the best that fits; what is left raises some, evenly over the depth.

    None where not even the smallest fits.
    """
    bits = [i for i, v in enumerate(space.variables) if v.kind == "bits"]
    longest = max((space.sizes[i] for i in bits), default=1)
    rows = np.tile(space.top, (longest, 1))
    for k in range(longest):
        rows[k, bits] = [min(k, space.sizes[i] - 1) for i in bits]
    fitting = np.flatnonzero(space.size_bytes(rows) <= limit_bytes)
    if not len(fitting):
        return None
    point = rows[fitting[-1]]
    for v in np.array(bits)[spread(len(bits))]:
        raised = point.copy()
        raised[v] = min(raised[v] + 1, space.sizes[v] - 1)
        if space.size_bytes([raised])[0] <= limit_bytes:
            point = raised
    return tuple(point.tolist())


def within(evaluate: Evaluate, options: Options) -> Evaluate:
    """Evaluates points of `space.restricted(options)`."""
    return lambda points, bars: evaluate(widened(points, options), bars)


def widened(points: Sequence[Point], options: Options) -> list[Point]:
    """Points of a restricted space as points of the whole."""
    return [tuple(options[i][o] if i in options else o for i, o in enumerate(point)) for point in points]


def narrowed(points: Sequence[Point], options: Options) -> list[Point]:
    """Points of the whole space as points of a restricted one. What goes with its layer has the first option."""
    place = lambda i, o: list(options[i]).index(o) if o in options[i] else 0
    return [tuple(place(i, o) if i in options else o for i, o in enumerate(point)) for point in points]


class _Genetic:
    """NSGA-II asked and told in batches; what a journal holds is asked and told again."""

    def __init__(self, space: Space, repair: Repair, limit: int, at_once: int, seed: int):
        optuna = _optuna()
        self._optuna, self._space, self._repair, self._limit, self._at_once = optuna, space, repair, limit, at_once
        self._rng = np.random.default_rng(seed)
        self._study = optuna.create_study(
            directions=["minimize", "minimize"],
            sampler=optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed),
        )
        self._ranges = {str(i): optuna.distributions.IntDistribution(0, n - 1) for i, n in enumerate(space.sizes)}
        self._asked: list = []  # batches of optuna's trials, from the first trial that is none of the starts
        self._first: int | None = None
        self._told = 0

    def __call__(self, trials: Sequence[Trial], n: int, rng: np.random.Generator) -> Batch:
        if self._first is None:
            begun = next((i for i, t in enumerate(trials) if t.origin == "genetic"), len(trials))
            for trial in trials[:begun]:
                self._add(trial)
            self._first = self._told = begun
        while self._told < len(trials):
            for trial, asked in zip(trials[self._told : self._told + n], self._ask(n), strict=True):
                self._tell(asked, trial)
            self._told += n
            self._asked = []
        tried = {t.point for t in trials}
        self._asked = self._asked or self._ask(n)
        points: list[Point] = []
        for asked in self._asked:
            row = np.array([[asked.params[str(i)] for i in range(len(self._space.sizes))]])
            for _ in range(DRAWN):
                point = self._within(row, rng)
                if point not in tried and point not in points:
                    break
                row = np.where(rng.random(row.shape) < 0.05, rng.integers(0, self._space.sizes, row.shape), row)
            points.append(point)
        return Batch(tuple(("genetic", point) for point in points))

    def _within(self, row: np.ndarray, rng: np.random.Generator) -> Point:
        row = self._space.canonical(row)
        if self._space.size_bytes(row)[0] > self._limit:
            row = self._repair(row, np.array([self._limit]), rng)
        return tuple(row[0].tolist())

    def _ask(self, n: int) -> list:
        return self._asked or [self._study.ask(self._ranges) for _ in range(n)]

    def _tell(self, asked, trial: Trial) -> None:
        if trial.counts:
            self._study.tell(asked, [float(trial.size_bytes), trial.loss])
        else:
            self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)

    def _add(self, trial: Trial) -> None:
        if not trial.counts:
            return
        params = {str(i): int(o) for i, o in enumerate(trial.point)}
        self._study.add_trial(
            self._optuna.trial.create_trial(
                params=params, distributions=self._ranges, values=[float(trial.size_bytes), trial.loss]
            )
        )


def _optuna():
    try:
        import optuna
    except ImportError:
        raise MissingExtraError(
            "the genetic control needs optuna, which is not installed: pip install optuna"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
