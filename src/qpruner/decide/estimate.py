"""What a point of a joint search will lose, predicted from what its options lose one at a time.

Notation
    z     how much of what an option says is still there: 0 where it is not chosen          (m, N)
    own   KL that an option causes alone, nats per token                                    (N,)
    I     what two options cause together beyond the sum of both                            (N, N)

All options of all variables lie end to end, N in all. The prediction is own . z + z I z / 2. Rounding errors of
different units are independent, so where a group keeps a fraction of its units, a linear that it narrows keeps that
fraction of its rounding error, and of its products with others; what goes with its layer causes nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from qpruner.decide.space import Point, Space

FLOOR = 0.05  # of the sum of what the options cause alone: interactions that were measured with noise take no more
CHUNK = 1 << 24  # numbers that a prediction holds at a time
FEW = 24  # points whose pairs are picked one by one, and not multiplied out


@dataclass(frozen=True, eq=False)
class Estimate:
    """The predicted KL of any points of a space.

    single: for each variable the KL that each option causes alone, all else at the top; 0 at the top.
    interaction: symmetric; what concerns two options of one variable is not looked at.
    kept: width variable -> fraction of the units that each option keeps; without it by the counts, whole at the top.
    factors: (N,) how much more each option causes than was measured; what two cause together by the geometric mean.
    """

    space: Space
    single: tuple[np.ndarray, ...]
    interaction: np.ndarray | None = None
    kept: Mapping[int, np.ndarray] | None = None
    factors: np.ndarray | None = None

    def __post_init__(self):
        if tuple(map(len, self.single)) != self.space.sizes:
            raise ValueError(
                f"{len(self.single)} measurements with {sum(map(len, self.single))} options; the space has "
                f"{len(self.space.sizes)} variables with {sum(self.space.sizes)}"
            )
        for variable, single in zip(self.space.variables, self.single, strict=True):
            if not (np.isfinite(single).all() and (single >= 0).all()):
                raise ValueError(
                    f"{variable.name!r} ({variable.kind}) has a KL that is negative or not finite: {single}"
                )
        if self.interaction is not None and self.interaction.shape != (n := sum(self.space.sizes), n):
            raise ValueError(f"interactions of the shape {self.interaction.shape}; {n} options need ({n}, {n})")
        if self.interaction is not None:
            object.__setattr__(self, "interaction", self._between_variables(self.interaction))

    def _between_variables(self, interaction: np.ndarray) -> np.ndarray:
        """With zeros between the options of one variable; as it is where it has them."""
        within = [slice(start, start + n) for start, n in zip(self.offsets, self.space.sizes, strict=True)]
        if any(interaction[s, s].any() for s in within):
            interaction = interaction.copy()
            for s in within:
                interaction[s, s] = 0
        return interaction

    @cached_property
    def offsets(self) -> np.ndarray:
        """(n,) where the options of each variable begin among all options."""
        return np.concatenate(([0], np.cumsum(self.space.sizes)[:-1])).astype(np.int64)

    @cached_property
    def own(self) -> np.ndarray:
        own = np.concatenate(self.single).astype(np.float64)
        return own if self.factors is None else own * self.factors

    @cached_property
    def root(self) -> np.ndarray:
        """(N,) the factor of each option in products of two."""
        return np.ones(len(self.own)) if self.factors is None else np.sqrt(self.factors)

    @cached_property
    def kept_fractions(self) -> dict[int, np.ndarray]:
        counted = {
            i: np.array(v.options, dtype=np.float64) / v.options[-1]
            for i, v in enumerate(self.space.variables)
            if v.kind == "width"
        }
        return counted | {i: np.asarray(f, dtype=np.float64) for i, f in (self.kept or {}).items()}

    @cached_property
    def narrowed_by(self) -> dict[int, list[int]]:
        """Spec variable -> the width variables whose units its linears lose."""
        kinds = [v.kind for v in self.space.variables]
        found: dict[int, list[int]] = {i: [] for i, kind in enumerate(kinds) if kind == "bits"}
        for table in self.space.tables:
            widths = [v for v in table.variables if kinds[v] == "width"]
            for v in table.variables:
                if kinds[v] == "bits":
                    found[v] += [w for w in widths if w not in found[v]]
        return found

    def remaining(self, points: Sequence[Point] | np.ndarray) -> np.ndarray:
        """(m, n) how much of what each variable says is still there."""
        points = self._rows(points)
        z = np.ones(points.shape)
        for v, widths in self.narrowed_by.items():
            for w in widths:
                z[:, v] *= self.kept_fractions[w][points[:, w]]
        for of_layer, inside in self.space.layers.values():
            if of_layer is not None:
                stays = np.array(self.space.variables[of_layer].options, dtype=np.float64)[points[:, of_layer]]
                z[:, inside] *= stays[:, None]
        return z

    def contributions(self, points: Sequence[Point] | np.ndarray) -> np.ndarray:
        """(m, n) what each variable adds to the sum."""
        points = self._rows(points)
        return self.remaining(points) * self.own[points + self.offsets]

    def predict(self, points: Sequence[Point] | np.ndarray) -> np.ndarray:
        """(m,) KL, never less than a small part of the sum of what the options cause alone."""
        points = self._rows(points)
        z = self.remaining(points)
        total = (z * self.own[points + self.offsets]).sum(axis=1)
        if self.interaction is None:
            return total
        if len(points) <= FEW:
            z = z * self.root[points + self.offsets]
            return self._floored(
                total,
                np.array(
                    [w @ self.interaction[np.ix_(o, o)] @ w / 2 for o, w in zip(points + self.offsets, z, strict=True)]
                ),
            )
        together = np.empty(len(points))
        chunk = max(1, CHUNK // len(self.own))
        for at in range(0, len(points), chunk):
            rows = slice(at, at + chunk)
            spread = np.zeros((len(points[rows]), len(self.own)))
            np.put_along_axis(
                spread, points[rows] + self.offsets, z[rows] * self.root[points[rows] + self.offsets], axis=1
            )
            together[rows] = ((spread @ self.interaction) * spread).sum(axis=1) / 2
        return self._floored(total, together)

    @staticmethod
    def _floored(total: np.ndarray, together: np.ndarray) -> np.ndarray:
        return np.maximum(total + together, FLOOR * total)

    def _rows(self, points: Sequence[Point] | np.ndarray) -> np.ndarray:
        return np.asarray(points, dtype=np.int64).reshape(-1, len(self.space.sizes))

    def scaled(self, factors: np.ndarray) -> "Estimate":
        """The estimate if each option caused `factors` (N,) times as much."""
        return replace(self, factors=factors if self.factors is None else self.factors * factors)

    def without_pairs(self) -> "Estimate":
        return replace(self, interaction=None)

    def restricted(self, options: Mapping[int, Sequence[int]]) -> "Estimate":
        """The same of `space.restricted(options)`."""
        some = [list(options.get(i, range(n))) for i, n in enumerate(self.space.sizes)]
        index = np.concatenate([start + np.array(kept) for start, kept in zip(self.offsets, some, strict=True)])
        return Estimate(
            self.space.restricted(options),
            tuple(s[kept] for s, kept in zip(self.single, some, strict=True)),
            None if self.interaction is None else self.interaction[np.ix_(index, index)],
            {v: f[some[v]] for v, f in self.kept_fractions.items()},
            None if self.factors is None else self.factors[index],
        )


def by_information(space: Space, nats: Mapping[str, float]) -> Estimate:
    """QPruner's rule as an estimate: a projection's information times log2 of the bits that an option is short of.

    What has no information of its own gets the mean. Nothing goes unless nothing else fits.

    Args:
        nats: mutual information of a projection's output and the prediction, by the projection's name.
    """
    mean = sum(nats.values()) / max(1, len(nats))
    best = max((spec.bits for v in space.variables if v.kind == "bits" for spec in v.options), default=1)
    single = [
        np.array([max(nats.get(v.name, mean), 0.0) * math.log2(best / spec.bits) for spec in v.options])
        if v.kind == "bits"
        else np.zeros(len(v.options))
        for v in space.variables
    ]
    single = [each - each[-1] if len(each) else each for each in single]  # the best of everything loses nothing
    worst = 1 + sum(float(each.max()) for each in single)
    for i, v in enumerate(space.variables):
        if v.kind != "bits":
            single[i] = worst * (1 - np.array(v.options, dtype=np.float64) / v.options[-1])
    return Estimate(space, tuple(np.maximum(each, 0.0) for each in single))


@dataclass(frozen=True)
class Correlation:
    """How well predictions follow measurements.

    spearman: correlation of ranks. pearson: of logarithms. mean_log_ratio: mean of |ln(predicted / measured)|.
    """

    spearman: float
    pearson: float
    mean_log_ratio: float


def correlation(predicted: Sequence[float] | np.ndarray, measured: Sequence[float] | np.ndarray) -> Correlation:
    """Of the pairs that are both finite and positive; not a number where fewer than two are."""
    p, q = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    usable = np.isfinite(p) & np.isfinite(q) & (p > 0) & (q > 0)
    p, q = np.log(p[usable]), np.log(q[usable])
    if len(p) < 2:
        return Correlation(*[float("nan")] * 3)
    return Correlation(_pearson(_ranks(p), _ranks(q)), _pearson(p, q), float(np.abs(p - q).mean()))


def _ranks(x: np.ndarray) -> np.ndarray:
    """Equals share the mean of their places."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place]


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm > 0 else float("nan")
