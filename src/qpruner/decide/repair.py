"""Points changed as little as need be, so that they meet a limit and leave no room below it for one step of anything.

Each row goes its own way: its variables are lowered, and then raised, by one option at a time, in an order that follows
what the step saves in loss for its bytes, with chance.
"""

import numpy as np

from qpruner.decide.estimate import Estimate

CHANCE = 1.0  # scale of the Gumbel noise on log loss per byte that orders the steps


class Repair:
    """Repairs rows of points of a space, by the losses per byte of an estimate; blind, by chance alone."""

    def __init__(self, estimate: Estimate, *, blind: bool = False):
        self.space, self.estimate = estimate.space, estimate
        self._tabulate()
        steps = np.full(len(estimate.own), np.nan)
        top = np.array(self.space.top)
        for v, (start, n) in enumerate(zip(estimate.offsets, self.space.sizes, strict=True)):
            rows = np.tile(top, (n, 1))
            rows[:, v] = range(n)
            if blind:
                steps[start + 1 : start + n] = 0.0
                continue
            saved = np.maximum(-np.diff(estimate.own[start : start + n]), 1e-12)
            steps[start + 1 : start + n] = np.log(saved) - np.log(np.maximum(np.diff(self.space.size_bytes(rows)), 1))
        self.steps = steps  # (N,) log loss per byte of the step up to each option

    def _tabulate(self) -> None:
        """For every variable the tables that it is in, flat, with strides, padded to equal numbers."""
        space = self.space
        about: list[list[int]] = [[] for _ in space.variables]
        for t, table in enumerate(space.tables):
            for v in table.variables:
                about[v].append(t)
        starts = np.concatenate(([0], np.cumsum([t.values.size for t in space.tables])[:-1])).astype(np.int64)
        self._flat = np.concatenate([t.values.ravel() for t in space.tables] + [np.zeros(1, np.int64)])
        deep = max((len(t.variables) for t in space.tables), default=1)
        most = max(map(len, about), default=1)
        n = len(space.variables)
        self._start = np.full((n, most), len(self._flat) - 1)  # the zero at the end
        self._of = np.zeros((n, most, deep), dtype=np.int64)
        self._stride = np.zeros((n, most, deep), dtype=np.int64)
        for v in range(n):
            for place, t in enumerate(about[v]):
                table = space.tables[t]
                self._start[v, place] = starts[t]
                self._of[v, place, : len(table.variables)] = table.variables
                strides = np.array(table.values.strides) // table.values.itemsize
                if not table.values.flags.c_contiguous:
                    strides = np.array(np.ascontiguousarray(table.values).strides) // table.values.itemsize
                self._stride[v, place, : len(table.variables)] = strides

    def _taken(self, rows: np.ndarray, v: np.ndarray) -> np.ndarray:
        """(m,) bytes of all tables of one variable per row."""
        options = rows[np.arange(len(rows))[:, None, None], self._of[v]]
        return self._flat[self._start[v] + (options * self._stride[v]).sum(axis=2)].sum(axis=1)

    def __call__(
        self, rows: np.ndarray, limits: np.ndarray, rng: np.random.Generator, kept: np.ndarray | None = None
    ) -> np.ndarray:
        """Canonical points (m, n) within limits (m,).

        Args:
            kept: (m, n) variables that are changed only where nothing else helps.
        Raises:
            ValueError: not even the smallest point meets a limit.
        """
        rows = self.space.canonical(rows)
        total = self.space.size_bytes(rows)
        kept = np.zeros(rows.shape, dtype=bool) if kept is None else kept
        noise = rng.gumbel(scale=CHANCE, size=rows.shape)
        rows, total = self._lowered(rows, total, limits, kept, noise)
        raised = self._raised(rows, total, limits, kept, noise)
        return self.space.canonical(raised)

    def _score(self, rows: np.ndarray, up: int) -> np.ndarray:
        top = rows >= np.array(self.space.top)
        index = np.where(top, 0, rows + up) if up else rows
        return np.nan_to_num(self.steps[index + self.estimate.offsets], nan=-np.inf)

    def _lowered(self, rows, total, limits, kept, noise) -> tuple[np.ndarray, np.ndarray]:
        while len(over := np.flatnonzero(total > limits)):
            part, size = rows[over], total[over]
            score = np.where(rows[over] > 0, self._score(part, 0) + noise[over], np.inf) + np.where(kept[over], 1e3, 0)
            before = size.copy()
            for v in np.argsort(score, axis=1, kind="stable").T:
                part, size = self._step(part, size, v, -1, size > limits[over], None)
                if not (size > limits[over]).any():
                    break
            rows[over] = self.space.canonical(part)
            total[over] = self.space.size_bytes(rows[over])
            if (total[over] >= before).any() and not (rows[over] > 0).any(axis=1).all():
                raise ValueError("a limit is below the smallest point")
        return rows, total

    def _raised(self, rows, total, limits, kept, noise) -> np.ndarray:
        active = np.arange(len(rows))
        for _ in range(max(self.space.sizes)):
            part, size = rows[active], total[active]
            score = self._score(part, 1) + noise[active] - np.where(kept[active], 1e3, 0)
            order = np.argsort(-score, axis=1, kind="stable")
            before = size.copy()
            for v in order.T:
                part, size = self._step(part, size, v, 1, np.ones(len(part), bool), limits[active])
            rows[active], total[active] = part, size
            active = active[size > before]
            if not len(active):
                break
        return rows

    def _step(self, rows, total, v, by, wanted, limits) -> tuple[np.ndarray, np.ndarray]:
        each = np.arange(len(rows))
        option = rows[each, v]
        other = np.clip(option + by, 0, np.array(self.space.top)[v])
        wanted = wanted & (other != option)
        if not wanted.any():
            return rows, total
        taken = self._taken(rows, v)
        rows[each, v] = other
        change = self._taken(rows, v) - taken
        accept = wanted & ((change < 0) if limits is None else ((change > 0) & (total + change <= limits)))
        rows[each, v] = np.where(accept, other, option)
        return rows, total + np.where(accept, change, 0)
