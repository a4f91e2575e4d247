"""Points that may be worth a trial, all at or just below one of the limits.

Where the estimate is as good as what it was corrected by, the best point is a projection of it: of what the surrogate
expects, and of draws from what it holds possible, each around the best trial of a limit. Where it is not, what was good
is changed a little: neighbours in a trust region, whole areas shifted, two good points crossed. The region grows while
trials succeed and shrinks while they fail.
"""

from collections.abc import Sequence

import numpy as np

from qpruner.decide.blocks import Blocks
from qpruner.decide.estimate import Estimate
from qpruner.decide.repair import Repair
from qpruner.decide.space import Point
from qpruner.decide.surrogate import Surrogate
from qpruner.math.relaxation import least

N_NEIGHBOURS, N_SHIFTS, N_CROSSED, N_RANDOM = 320, 120, 80, 8
N_DRAWS = 16  # corrected estimates that are projected, over all limits
N_POLISHED = 160  # neighbours of the most promising proposals
PARENTS = 2  # trials per limit whose neighbours are considered
REACH = 4.0  # variables that a neighbour changes at most, at first
GROWS, SHRINKS = 1.3, 0.95
SPREAD = 0.5  # deviation of log factors of estimates that nothing was learned about yet

Named = list[tuple[str, Point]]


class Proposals:
    """Proposes points of a space under an estimate, for ascending limits."""

    def __init__(self, estimate: Estimate, limits: Sequence[int]):
        self.estimate, self.space, self.limits = estimate, estimate.space, list(limits)
        self.blocks = Blocks(self.space, estimate)
        self.repair = Repair(estimate)
        self.tops = np.array(self.space.top)
        self.kinds = [
            (v.kind, v.name.removeprefix(self.space.layer_names[v.layer]) if v.layer >= 0 else v.name)
            for v in self.space.variables
        ]
        self.depth = np.array([v.layer for v in self.space.variables])

    def pool(self, trials: Sequence, surrogate: Surrogate, rng: np.random.Generator) -> Named:
        """Everything that is considered, without regard to what was tried."""
        parents = self._parents(trials)
        points = [t.point for t in parents]
        found = [("expected", p) for p in self._projected(trials, surrogate, None)]
        found += [("drawn", p) for p in self._projected(trials, surrogate, rng)]
        found += [("neighbour", p) for p in self._neighbours(points, N_NEIGHBOURS, self._reach(trials), rng)]
        found += [("shifted", p) for p in self._shifted(points, rng)]
        found += [("crossed", p) for p in self._crossed(points, rng)]
        found += [("random", p) for p in self.scattered(N_RANDOM, 1.5, rng)]
        return found

    def unlearned(self, trials: Sequence, rng: np.random.Generator) -> Named:
        """Before there is anything to learn from: projections of the estimate with errors drawn."""
        drawn = [("drawn", p) for p in self.scattered(N_DRAWS, SPREAD, rng)]
        rows = rng.integers(0, self.space.sizes, (N_RANDOM, len(self.tops)))
        return drawn + [("random", p) for p in self.repaired(rows, self._spread_limits(N_RANDOM, rng), rng)]

    def around(self, points: Sequence[Point], rng: np.random.Generator) -> list[Point]:
        return self._neighbours(points, N_POLISHED, 3.0, rng)

    def scattered(self, n: int, spread: float, rng: np.random.Generator) -> list[Point]:
        """Projections of estimates that are off at random, over the limits."""
        return [
            self._project(self.estimate.scaled(np.exp(rng.normal(0, spread, len(self.estimate.own)))), limit, None)
            for limit in self._spread_limits(n, rng)
        ]

    def repaired(self, rows: np.ndarray, limits: np.ndarray, rng: np.random.Generator, kept=None) -> list[Point]:
        return [tuple(row) for row in self.repair(rows, limits, rng, kept).tolist()]

    def _spread_limits(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return np.array(self.limits, dtype=np.int64)[rng.permutation(np.arange(n) % len(self.limits))]

    def _limits_above(self, points: np.ndarray) -> np.ndarray:
        """The smallest limit that each point meets."""
        place = np.searchsorted(self.limits, self.space.size_bytes(points))
        return np.array(self.limits, dtype=np.int64)[np.minimum(place, len(self.limits) - 1)]

    def _parents(self, trials: Sequence) -> list:
        """The best few of every limit."""
        counting = sorted((t for t in trials if t.counts), key=lambda t: (t.loss, t.size_bytes, t.number))
        found = {}
        for limit in self.limits:
            found |= {t.number: t for t in [t for t in counting if t.size_bytes <= limit][:PARENTS]}
        return list(found.values()) or counting[:PARENTS]

    def _reach(self, trials: Sequence) -> float:
        """Variables that a neighbour may change: more after a trial that was the best of a limit, else fewer."""
        reach, least_loss = REACH, np.full(len(self.limits), np.inf)
        for t in trials:
            meets = np.array(self.limits) >= t.size_bytes
            better = meets & (t.loss < least_loss) if t.counts else np.zeros(len(self.limits), dtype=bool)
            least_loss[better] = t.loss if t.counts else 0
            reach = reach * GROWS if better.any() else reach * SHRINKS
            reach = float(np.clip(reach, 2.0, max(2.0, len(self.tops) / 4)))
        return reach

    # Projections

    def _projected(self, trials: Sequence, surrogate: Surrogate, rng: np.random.Generator | None) -> list[Point]:
        best = {}
        for limit in self.limits:
            inside = [t for t in trials if t.counts and t.size_bytes <= limit]
            best[limit] = min(inside, key=lambda t: (t.loss, t.number)).point if inside else None
        found = []
        for limit in self.limits if rng is None else self._spread_limits(N_DRAWS, rng):
            estimate = self.estimate.scaled(surrogate.factors(rng))
            found.append(self._project(estimate, int(limit), best[int(limit)]))
            if rng is None:
                found.append(self._project(estimate, int(limit), None))
        return found

    def _project(self, estimate: Estimate, limit: int, around: Point | None) -> Point:
        blocks = self.blocks.under(estimate)
        problem = blocks.problem(around=around)
        return blocks.point(least(problem, int(limit) - blocks.base, exact=False))

    # Changes

    def _neighbours(self, points: Sequence[Point], n: int, reach: float, rng: np.random.Generator) -> list[Point]:
        """A few variables changed at random, mostly by a step, the rest as little as the limit makes necessary."""
        if not points:
            return []
        rows = np.array(points)[rng.permutation(np.arange(n) % len(points))]
        limits = self._limits_above(rows)
        count = np.floor(np.exp(rng.uniform(0, np.log(reach + 1), n))).astype(int)
        order = rng.random(rows.shape).argsort(axis=1)
        changed = order < count[:, None]
        step = rng.choice([-2, -1, -1, -1, 1, 1, 1, 2], rows.shape)
        anything = rng.integers(0, self.tops + 1, rows.shape)
        moved = np.where(rng.random(rows.shape) < 0.2, anything, np.clip(rows + step, 0, self.tops))
        rows = self._settled(rows, np.where(changed, moved, rows))
        return self.repaired(rows, limits, rng, changed)

    def _shifted(self, points: Sequence[Point], rng: np.random.Generator) -> list[Point]:
        """All choices of one kind in a stretch of layers made larger or smaller by a step, others pay for it."""
        if not points:
            return []
        rows = np.array(points)[rng.permutation(np.arange(N_SHIFTS) % len(points))]
        limits = self._limits_above(rows)
        kinds = list(dict.fromkeys(self.kinds))
        changed = np.zeros(rows.shape, dtype=bool)
        last = max(1, self.depth.max())
        for row in range(len(rows)):
            kind = kinds[rng.integers(len(kinds))]
            begin = rng.integers(-1, last + 1)
            end = begin + rng.integers(1, max(2, last // 2 + 1))
            inside = (self.depth >= begin) & (self.depth < end) if kind[0] != "bits" or self.depth.min() >= 0 else True
            changed[row] = np.array([k == kind for k in self.kinds]) & inside
        step = rng.choice([-1, 1], (len(rows), 1))
        rows = self._settled(rows, np.where(changed, np.clip(rows + step, 0, self.tops), rows))
        return self.repaired(rows, limits, rng, changed)

    def _crossed(self, points: Sequence[Point], rng: np.random.Generator) -> list[Point]:
        """Layer by layer, or from some layer on, one good point or another."""
        if len(points) < 2:
            return []
        all_points = np.array(points)
        rows = np.empty((N_CROSSED, len(self.tops)), dtype=np.int64)
        limits = np.empty(N_CROSSED, dtype=np.int64)
        for i in range(N_CROSSED):
            a, b = all_points[rng.choice(len(points), 2, replace=False)]
            if i % 2:
                from_b = rng.random(self.depth.max() + 2)[self.depth + 1] < 0.5
            else:
                from_b = self.depth >= rng.integers(0, self.depth.max() + 1)
            rows[i] = np.where(from_b, b, a)
            limits[i] = self._limits_above(np.array([a, b])[rng.integers(2)][None])[0]
        return self.repaired(rows, limits, rng)

    def _settled(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """A layer that comes back is stored as the nearest one that stays and is alike is."""
        for layer, (decider, inside) in self.space.layers.items():
            if decider is None:
                continue
            back = np.flatnonzero((before[:, decider] == 0) & (after[:, decider] > 0))
            if not len(back):
                continue
            others = [
                (abs(other - layer), d, there)
                for other, (d, there) in self.space.layers.items()
                if other != layer and [self.kinds[v] for v in there] == [self.kinds[v] for v in inside]
                and [self.tops[v] for v in there] == [self.tops[v] for v in inside]
            ]  # fmt: skip
            for row in back:
                for _, d, there in sorted(others, key=lambda o: o[0]):
                    if d is None or before[row, d]:
                        after[row, inside] = before[row, there]
                        break
        return after
