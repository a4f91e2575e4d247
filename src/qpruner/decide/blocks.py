"""A space cut into parts that only meet in the sum: all that a part can be, what that takes, and what it loses.

Notation
    part     variables that share a table of sizes, the layer's own left aside: a width and the specs that it narrows
    item     the parts of a layer that may go; elsewhere a single part
    combo    one option for each variable of a part                                       (parts, k, b)

What a part loses is exact while the other parts are as they are in a given point: the terms of `Estimate` that join
two parts are then numbers.
"""

import copy
import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from qpruner.decide.estimate import Estimate
from qpruner.decide.space import Point, Space
from qpruner.math.relaxation import Problem

COMBOS = 1 << 15  # of one part at most; where there are more, the longest variables lose every other option


class Blocks:
    """The parts of a space under an estimate."""

    def __init__(self, space: Space, estimate: Estimate):
        self.space, self.estimate = space, estimate
        n = len(space.variables)
        self.layer_of = np.full(n, -1)  # the variable that decides over the layer, for those inside it
        for of_layer, inside in space.layers.values():
            if of_layer is not None:
                self.layer_of[inside] = of_layer
        self.deciders = sorted({of_layer for of_layer, _ in space.layers.values() if of_layer is not None})
        self._cut()
        self._combine()
        self._weigh()
        self._price()

    def _cut(self) -> None:
        """Variables into parts, parts into items. A layer that may go without anything else to choose has no part's
        variables."""
        n = len(self.space.variables)
        root = list(range(n))

        def find(v: int) -> int:
            while root[v] != v:
                v = root[v]
            return v

        for table in self.space.tables:
            about = [v for v in table.variables if v not in set(self.deciders)]
            for v in about[1:]:
                root[find(v)] = find(about[0])
        grouped: dict[int, list[int]] = {}
        for v in range(n):
            if v not in set(self.deciders):
                grouped.setdefault(find(v), []).append(v)
        empty = [d for d in self.deciders if not (self.layer_of == d).any()]
        parts = sorted(grouped.values()) + [[] for _ in empty]
        owners = [int(self.layer_of[p[0]]) for p in parts[: len(grouped)]] + empty
        self.parts, self.owners = parts, owners
        items: dict[object, int] = {}
        self.item = np.array(
            [items.setdefault(("layer", o) if o >= 0 else ("part", i), len(items)) for i, o in enumerate(owners)]
        )
        self.decider = np.full(len(items), -1)
        for i, o in zip(self.item, owners, strict=True):
            self.decider[i] = o

    def _combine(self) -> None:
        combos = [self._combos(part) for part in self.parts]
        self.b = max(1, max(map(len, self.parts)))
        self.k = max(map(len, combos))
        self.variables = np.full((len(self.parts), self.b), -1)
        self.combo = np.zeros((len(self.parts), self.k, self.b), dtype=np.int64)
        self.offered = np.zeros((len(self.parts), self.k), dtype=bool)
        for i, (part, rows) in enumerate(zip(self.parts, combos, strict=True)):
            self.variables[i, : len(part)] = part
            self.combo[i, : len(rows), : len(part)] = rows
            self.offered[i, : len(rows)] = True

    def _combos(self, part: Sequence[int]) -> np.ndarray:
        options = {v: list(range(self.space.sizes[v])) for v in part}
        while np.prod([len(o) for o in options.values()], dtype=float) > COMBOS:
            longest = max(options, key=lambda v: len(options[v]))
            options[longest] = sorted({*options[longest][::2], options[longest][-1]})
        return np.array(list(itertools.product(*options.values())), dtype=np.int64).reshape(-1, len(part))

    def _weigh(self) -> None:
        """Sizes, and what is left of each option; all of layers that stay."""
        space, estimate = self.space, self.estimate
        parts, k = self.offered.shape
        rows = np.tile(np.array(space.top), (k, 1))
        self.S = np.zeros((parts, k), dtype=np.int64)
        self.z = np.zeros((parts, k, self.b))
        gone = {d: int(np.argmin(space.variables[d].options)) for d in self.deciders}
        about: dict[int, list] = {}
        part_of = {v: i for i, part in enumerate(self.parts) for v in part}
        of_layer: dict[int, list] = {d: [] for d in self.deciders}
        self.base = space.fixed_bytes
        for table in space.tables:
            inside = [v for v in table.variables if v in part_of]
            if inside:
                about.setdefault(part_of[inside[0]], []).append(table)
            elif table.variables:
                of_layer[table.variables[0]].append(table)
            else:
                self.base += int(table.values)
        for i, part in enumerate(self.parts):
            rows[:, part] = self.combo[i, :, : len(part)]
            for table in about.get(i, ()):
                self.S[i] += table.at(rows)
            self.z[i, :, : len(part)] = estimate.remaining(rows)[:, part]
            rows[:, part] = np.array(space.top)[part]
        self.index = self.combo + np.where(self.variables >= 0, estimate.offsets[self.variables], 0)[:, None, :]
        # What a layer takes and loses by staying is charged to the first of its parts.
        items = len(self.decider)
        self.S0 = np.zeros(items, dtype=np.int64)
        self.goes = np.zeros(items, dtype=bool)  # nothing but going is on offer
        for item, d in enumerate(self.decider):
            if d < 0:
                continue
            first = int(np.flatnonzero(self.item == item)[0])
            top = np.array([space.top])
            low = top.copy()
            low[0, d] = gone[d]
            if space.variables[d].options[-1]:
                self.S[first] += sum(int(t.at(top)[0]) for t in of_layer[d])
            else:
                self.goes[item] = True
            if not space.variables[d].options[gone[d]]:
                self.S0[item] = sum(int(t.at(low)[0]) for t in of_layer[d])
        self.gone_option = np.array([gone.get(d, -1) for d in self.decider])

    def _price(self) -> None:
        """Losses without other parts; all of layers that stay."""
        estimate, variables = self.estimate, self.space.variables
        self.V = (self.z * estimate.own[self.index]).sum(axis=2)
        self.zr = self.z * estimate.root[self.index]
        if estimate.interaction is not None:
            for a, c in itertools.combinations(range(self.b), 2):
                pair = estimate.interaction[self.index[..., a], self.index[..., c]]
                self.V += self.zr[..., a] * self.zr[..., c] * pair
        self.V0 = np.full(len(self.decider), np.inf)
        for item, d in enumerate(self.decider):
            if d < 0:
                continue
            if variables[d].options[-1]:
                self.V[int(np.flatnonzero(self.item == item)[0])] += estimate.own[
                    estimate.offsets[d] + self.space.top[d]
                ]
            if not variables[d].options[self.gone_option[item]]:
                self.V0[item] = estimate.own[estimate.offsets[d] + self.gone_option[item]]
        self.V[~self.offered] = np.inf

    def under(self, estimate: Estimate) -> "Blocks":
        """The same parts where the estimate has other factors."""
        other = copy.copy(self)
        other.estimate = estimate
        other._price()
        return other

    # Points and choices

    def point(self, chosen: np.ndarray) -> Point:
        point = np.zeros(len(self.space.variables), dtype=np.int64)
        for i, part in enumerate(self.parts):
            if chosen[i] >= 0:
                point[part] = self.combo[i, chosen[i], : len(part)]
            if self.owners[i] >= 0:
                d = self.owners[i]
                point[d] = self.gone_option[self.item[i]] if chosen[i] < 0 else self.space.sizes[d] - 1
        return tuple(self.space.canonical([tuple(point.tolist())])[0].tolist())

    def chosen(self, point: Point) -> np.ndarray:
        """The combos of a point; KeyError where a part had so many that this one was left out."""
        found = np.full(len(self.parts), -1)
        for i, part in enumerate(self.parts):
            if self.owners[i] >= 0 and not self.space.variables[self.owners[i]].options[point[self.owners[i]]]:
                continue
            found[i] = self._places[i][tuple(point[v] for v in part)]
        return found

    @cached_property
    def _places(self) -> list[dict[tuple, int]]:
        return [
            {tuple(row[: len(part)]): k for k, row in enumerate(self.combo[i][self.offered[i]].tolist())}
            for i, part in enumerate(self.parts)
        ]

    def together(self, part: int, old: int, new: int, other: int, other_old: int, other_new: int) -> float:
        """What two parts that both change cause beyond the sum of what each change causes alone."""
        interaction = self.estimate.interaction
        if interaction is None:
            return 0.0
        index, z = self._change(part, old, new)
        other_index, other_z = self._change(other, other_old, other_new)
        return float(z @ interaction[np.ix_(index, other_index)] @ other_z)

    def _change(self, part: int, old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
        return self.index[part, [new, old]].ravel(), (self.zr[part, [new, old]] * [[1.0], [-1.0]]).ravel()

    # Problems

    def problem(self, fixed: Mapping[int, int] | None = None, around: Point | None = None) -> Problem:
        """What is to be chosen: with the interactions of single options with the rest of a point, or without any."""
        V, V0 = self.V, self.V0
        if around is not None and self.estimate.interaction is not None:
            V, V0 = self._around(around)
        if fixed or self.goes.any():
            V, V0 = self._fixed(V.copy(), V0.copy(), fixed or {})
        return Problem(V, self.S, self.item, V0, self.S0)

    def _fixed(self, V: np.ndarray, V0: np.ndarray, fixed: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
        for part in np.flatnonzero(self.goes[self.item]):
            V[part] = np.inf
        for v, option in fixed.items():
            if v in self.deciders:
                item = int(np.flatnonzero(self.decider == v)[0])
                if self.space.variables[v].options[option]:
                    V0[item] = np.inf
                else:
                    V[self.item == item] = np.inf
                continue
            part, place = map(int, np.argwhere(self.variables == v)[0])
            V[part][self.combo[part, :, place] != option] = np.inf
        return V, V0

    def _around(self, point: Point) -> tuple[np.ndarray, np.ndarray]:
        estimate = self.estimate
        p = np.array([point])
        spread = np.zeros(len(estimate.own))
        now = (p + estimate.offsets)[0]  # the option of each variable
        z = estimate.remaining(p)[0] * estimate.root[now]
        spread[now] = z
        h = z @ estimate.interaction[now]
        V = self.V + (self.zr * h[self.index]).sum(axis=2)
        # A part does not meet itself, nor a layer what is inside of it.
        for a in range(self.b):
            v = self.variables[:, a]
            weight = np.where(v >= 0, z[v], 0.0)
            inside = estimate.interaction[self.index, np.where(v >= 0, now[v], 0)[:, None, None]]
            V -= weight[:, None] * (self.zr * inside).sum(axis=2)
        V0 = self.V0.copy()
        for item, d in enumerate(self.decider):
            if d < 0:
                continue
            parts = np.flatnonzero(self.item == item)
            inside = np.flatnonzero(self.layer_of == d)
            for part in parts:
                to_layer = estimate.interaction[self.index[part], now[d]]
                V[part] -= z[d] * (self.zr[part] * to_layer).sum(axis=1)
            option = estimate.offsets[d] + max(self.gone_option[item], 0)
            V0[item] += estimate.root[option] * (h[option] - z[inside] @ estimate.interaction[option, now[inside]])
        return V, V0
