"""One level for every item, at the largest total value that fits: the multiple-choice knapsack, solved exactly.

Notation
    values   what an item at a level is worth               (n, k), any sign
    sizes    what it takes                                  (n, k), integers
    limit    what all items together may take
    state    one level for each item seen so far, as its (size, value)

Items are added one at a time to a list of states (Nemhauser and Ullmann), so the cost does not depend on how large the
sizes are. A state goes when another is no larger and worth no less, or when even a fractional completion, the linear
relaxation, cannot reach a complete choice that is already known. Items at which the relaxation hesitates come first,
which makes known choices good early (Pisinger's core).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

# Values are rounded to integers whose total stays below this: sums are then exact, ties are ties, and a product with a
# fraction below one is off by far less than one.
RESOLUTION = 2.0**46

WIDTH = 1 << 14  # states kept in the first pass; four times as many in each pass after it
TOLERANCE = 1e-8  # of the range of totals: where states had to be dropped, what they might have added is below this


@dataclass(frozen=True)
class _Completion:
    """The linear relaxation over the items that are still to come: the cheapest levels, then steps by falling slope."""

    base_size: int
    base_value: int
    sizes: np.ndarray  # (steps + 1,) sizes after each step, from 0
    values: np.ndarray  # (steps + 1,)

    def bounds(self, room: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each room left above the cheapest levels: values that can be had, and that cannot be surpassed."""
        step = np.searchsorted(self.sizes, room, side="right") - 1
        after = np.minimum(step + 1, len(self.sizes) - 1)
        width = np.maximum(self.sizes[after] - self.sizes[step], 1)
        part = (self.values[after] - self.values[step]) * ((room - self.sizes[step]) / width)
        reached = self.base_value + self.values[step]
        return reached, reached + np.floor(part + 0.25).astype(np.int64)  # a quarter covers the rounding of `part`


def choose(values: Float[np.ndarray, "n k"], sizes: Int[np.ndarray, "n k"], limit: int) -> Int[np.ndarray, " n"]:
    """The level of each item that maximises the total value at a total size within the limit.

    Exact up to the rounding of values to about 1e-14 of their total range, with the smaller of equally valuable
    choices, as long as no more than WIDTH states compete. Where more do, which takes values that follow the sizes
    almost to the last digit (the problem is NP-hard), the total is proven to be within TOLERANCE of the best.

    Raises:
        ValueError: not even the smallest level of every item fits, a size is negative, or a value is not finite.
    """
    n, k = values.shape
    if not np.isfinite(values).all():
        raise ValueError("a value is not finite")
    if n == 0 or k == 0:
        raise ValueError(f"{n} items with {k} levels: at least one of each")
    sizes = sizes.astype(np.int64)
    if (sizes < 0).any():
        raise ValueError("a size is negative")
    smallest = int(sizes.min(axis=1).sum())
    if smallest > limit:
        raise ValueError(f"the smallest levels together take {smallest}, more than the limit of {limit}")

    gains = values.astype(np.float64) / max(1.0, float(np.abs(values).max()))  # no overflow in what follows
    gains = gains - gains.min(axis=1, keepdims=True)
    total = gains.max(axis=1).sum()
    worths = np.rint(gains / (total if total > 0 else 1.0) * RESOLUTION).astype(np.int64)

    levels = [_undominated(sizes[i], worths[i]) for i in range(n)]
    steps = [_hull_steps(sizes[i], worths[i], levels[i]) for i in range(n)]
    order = _core_order(steps, limit - smallest)
    completions = [_completion(order[i:], sizes, worths, levels, steps) for i in range(n + 1)]

    width, found, worth = WIDTH, None, 0
    while True:
        better, reached, missed = _pass(order, sizes, worths, levels, completions, limit, width, worth)
        if better is not None:
            found, worth = better, reached
        if missed <= worth + TOLERANCE * RESOLUTION:
            return found
        width *= 4


def _pass(order, sizes, worths, levels, completions, limit, width, known) -> tuple[np.ndarray | None, int, int]:
    """The best choice with at most `width` states, its worth, and the most that a dropped state might have reached.

    No choice at all where one worth `known` was there before and only dropped states could match it.
    """
    S, V = np.zeros(1, np.int64), np.zeros(1, np.int64)
    history, dropped = [], -1
    for position, item in enumerate(order):
        kept, rest = levels[item], completions[position + 1]
        new_S = (S[:, None] + sizes[item, kept]).ravel()
        new_V = (V[:, None] + worths[item, kept]).ravel()
        index = np.flatnonzero(new_S <= limit - rest.base_size)
        index = index[_undominated(new_S[index], new_V[index])]
        reached, ceiling = rest.bounds(limit - rest.base_size - new_S[index])
        reached, ceiling = reached + new_V[index], ceiling + new_V[index]
        known = max(known, int(reached.max()))
        keep = np.flatnonzero(ceiling >= known)
        if len(keep) > width:
            # The state that reached most stays, so that what this pass knows to be had is not lost on the way.
            ceiling[np.argmax(reached)] += int(RESOLUTION)
            by_promise = keep[np.argsort(-ceiling[keep], kind="stable")]
            dropped = max(dropped, int(ceiling[by_promise[width]]))
            keep = np.sort(by_promise[:width])
        index = index[keep]
        if not len(index):
            return None, known, dropped
        S, V = new_S[index], new_V[index]
        history.append((index // len(kept), kept[index % len(kept)]))

    state = int(np.argmax(V))  # sizes ascend, so the first of equals is the smallest
    worth = int(V[state])
    chosen = np.empty(len(order), np.int64)
    for item, (parents, chosen_levels) in zip(reversed(order), reversed(history), strict=True):
        chosen[item] = chosen_levels[state]
        state = parents[state]
    return chosen, worth, dropped


def _undominated(sizes: np.ndarray, worths: np.ndarray) -> np.ndarray:
    """Indices by ascending size of what is worth more than all that is no larger; of equals the first."""
    order = np.lexsort((-worths, sizes))
    most_before = np.maximum.accumulate(np.concatenate(([-1], worths[order])))[:-1]
    return order[worths[order] > most_before]


def _hull_steps(sizes: np.ndarray, worths: np.ndarray, levels: np.ndarray) -> list[tuple[float, int, int]]:
    """(slope, size, worth) of the steps along the upper convex hull of one item's levels; the slopes fall."""
    hull: list[tuple[int, int]] = []
    for s, w in zip(sizes[levels].tolist(), worths[levels].tolist(), strict=True):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (s - hull[-1][0]) <= (w - hull[-1][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((s, w))
    return [((b[1] - a[1]) / (b[0] - a[0]), b[0] - a[0], b[1] - a[1]) for a, b in zip(hull, hull[1:], strict=False)]


def _core_order(steps: list[list[tuple[float, int, int]]], room: int) -> list[int]:
    """Items by how near one of their slopes is to the slope at which the relaxation runs out of room."""
    ranked = sorted((step for item in steps for step in item), key=lambda step: -step[0])
    filled = np.cumsum([size for _, size, _ in ranked])
    at = int(np.searchsorted(filled, room, side="right")) if ranked else 0
    critical = ranked[min(at, len(ranked) - 1)][0] if ranked else 0.0
    nearness = [min((abs(slope - critical) for slope, _, _ in item), default=np.inf) for item in steps]
    return [int(i) for i in np.argsort(nearness, kind="stable")]


def _completion(items, sizes, worths, levels, steps) -> _Completion:
    # Sorting is stable and an item's slopes fall strictly, so every prefix of the steps is a choice of whole levels.
    ranked = sorted((step for item in items for step in steps[item]), key=lambda step: -step[0])
    cheapest = [(item, levels[item][0]) for item in items]
    return _Completion(
        base_size=sum(int(sizes[c]) for c in cheapest),
        base_value=sum(int(worths[c]) for c in cheapest),
        sizes=np.concatenate(([0], np.cumsum([s for _, s, _ in ranked], dtype=np.int64))),
        values=np.concatenate(([0], np.cumsum([w for _, _, w in ranked], dtype=np.int64))),
    )
