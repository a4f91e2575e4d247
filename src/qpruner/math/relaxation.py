"""The multiple-choice knapsack for items made of parts, each with hundreds of options, or left out as a whole.

Notation
    V, S    loss and size of an option of a part; a loss of inf is no option          (parts, k), S whole numbers
    item    which item a part belongs to                                              (parts,)
    V0, S0  loss and size of an item that is left out; inf where it cannot be         (items,)
    limit   what all items together may take
    chosen  an option for every part, -1 where its item is left out                   (parts,)

The loss that remains when size costs t per unit is easy to minimise, part by part, and bounds what any choice that fits
can reach. The best t lies where two such minima meet, which a few secant steps find. A good choice that fits is made of
the smaller of the two by exchanges of one and two options; whatever would raise the bound above its loss is in no
better choice. Few options survive that, and of those the best choice is found exactly (`knapsack.choose`).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from qpruner.math.knapsack import choose

EXCHANGES = 64  # rounds of improving a choice by one or two options
PAIRED = 512  # options of the best loss per size that are paired with one that makes room


@dataclass(frozen=True)
class Problem:
    V: Float[np.ndarray, "parts k"]
    S: Int[np.ndarray, "parts k"]
    item: Int[np.ndarray, " parts"]
    V0: Float[np.ndarray, " items"]
    S0: Int[np.ndarray, " items"]

    def total(self, chosen: Int[np.ndarray, " parts"]) -> tuple[float, int]:
        """Loss and size of a choice."""
        stays = chosen >= 0
        parts, options = np.flatnonzero(stays), chosen[stays]
        gone = np.ones(len(self.V0), dtype=bool)
        gone[self.item[stays]] = False
        loss = self.V[parts, options].sum() + self.V0[gone].sum()
        return float(loss), int(self.S[parts, options].sum() + self.S0[gone].sum())

    def smallest(self) -> Int[np.ndarray, " parts"]:
        """The choice of least size, and of least loss among those."""
        sizes = np.where(np.isfinite(self.V), self.S, np.iinfo(np.int64).max)
        least = sizes.min(axis=1, keepdims=True)
        chosen = np.where(sizes == least, self.V, np.inf).argmin(axis=1)
        losses, taken = self._per_item(self.V, chosen), self._per_item(self.S, chosen)
        size0 = np.where(np.isfinite(self.V0), self.S0, np.inf)
        gone = (size0 < taken) | ((size0 == taken) & (self.V0 < losses))
        return np.where(gone[self.item], -1, chosen)

    def _per_item(self, values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        picked = values[np.arange(len(chosen)), chosen]
        return np.bincount(self.item, weights=picked, minlength=len(self.V0))

    def priced(self, t: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """At t per unit of size: what options cost, the cheapest of each part, and what items cost with and without."""
        cost = self.V + t * self.S
        best = cost.argmin(axis=1)
        return cost, best, self._per_item(cost, best), self.V0 + t * self.S0

    def bound(self, t: float, limit: int) -> float:
        """No choice that fits loses less."""
        _, _, stay, gone = self.priced(t)
        return float(np.minimum(stay, gone).sum() - t * limit)


def least(problem: Problem, limit: int, *, exact: bool = True) -> Int[np.ndarray, " parts"]:
    """The choice of least loss that fits; not exact: one that exchanges of two options do not better.

    Raises:
        ValueError: nothing fits.
    """
    chosen, t = _relaxed(problem, limit)
    if t == 0.0:
        return chosen
    chosen = _exchanged(problem, chosen, limit)
    return _completed(problem, chosen, t, limit) if exact else chosen


def reach(problem: Problem, limit: int) -> float:
    """A loss that no choice that fits is below; inf where nothing fits."""
    try:
        t = price(problem, limit)
    except ValueError:
        return float("inf")
    return problem.bound(t, limit)


def price(problem: Problem, limit: int) -> float:
    """The loss that a unit of size is worth at the limit; 0 where the best of everything fits."""
    return _relaxed(problem, limit)[1]


def _relaxed(problem: Problem, limit: int) -> tuple[np.ndarray, float]:
    """Of the two choices that cost the same at the best price the one that fits, and that price; 0 if the best fits."""
    low = problem.smallest()
    low_loss, low_size = problem.total(low)
    if low_size > limit:
        raise ValueError(f"the smallest choice takes {low_size}, more than the limit of {limit}")
    if not np.isfinite(low_loss):
        raise ValueError("a part has no option")
    high_loss, high_size = 0.0, 0
    t = 0.0
    while True:
        _, best, stay, gone = problem.priced(t)
        chosen = np.where((gone < stay)[problem.item], -1, best)
        loss, size = problem.total(chosen)
        if t == 0.0:
            if size <= limit:
                return chosen, 0.0
        elif size in (low_size, high_size) or loss + t * size >= low_loss + t * low_size:
            return low, t
        if size <= limit:
            low, low_loss, low_size = chosen, loss, size
        else:
            high_loss, high_size = loss, size
        if high_size <= low_size or high_loss >= low_loss:  # equals that rounding tells apart
            return low, t
        t = (low_loss - high_loss) / (high_size - low_size)


def _exchanged(problem: Problem, chosen: np.ndarray, limit: int) -> np.ndarray:
    """One option, or two, exchanged as long as that loses less and fits. Items stay or are left out as before."""
    chosen = chosen.copy()
    stays = np.flatnonzero(chosen >= 0)
    V, S = problem.V[stays], problem.S[stays]
    if not len(stays):
        return chosen
    here, each = chosen[stays], np.arange(len(stays))
    room = limit - problem.total(chosen)[1]
    for _ in range(EXCHANGES):
        dV, dS = V - V[each, here][:, None], S - S[each, here][:, None]
        single = np.where(dS <= room, dV, np.inf)
        moves, gain = [np.unravel_index(single.argmin(), single.shape)], float(single.min())
        up = np.flatnonzero(((dV < 0) & (dS > room)).ravel())
        down = np.flatnonzero(((dS < 0) & np.isfinite(dV)).ravel())
        if len(up) and len(down):
            fV, fS = dV.ravel(), dS.ravel()
            up = up[np.argsort(fV[up] / fS[up], kind="stable")[:PAIRED]]
            down = down[np.lexsort((fV[down], fS[down]))]
            cheapest = np.minimum.accumulate(fV[down])
            place = np.maximum.accumulate(np.where(fV[down] == cheapest, np.arange(len(down)), 0))
            last = np.searchsorted(fS[down], room - fS[up], side="right") - 1
            partner = down[place[np.maximum(last, 0)]]
            other = (last >= 0) & (partner // V.shape[1] != up // V.shape[1])
            both = np.where(other, fV[up] + fV[partner], np.inf)
            if (i := int(both.argmin())) >= 0 and both[i] < gain:
                moves, gain = [divmod(int(up[i]), V.shape[1]), divmod(int(partner[i]), V.shape[1])], float(both[i])
        if not gain < 0:
            break
        for part, option in moves:
            room -= int(dS[part, option])
            here[part] = option
    chosen[stays] = here
    return chosen


def _completed(problem: Problem, chosen: np.ndarray, t: float, limit: int) -> np.ndarray:
    """The exact optimum: what can still be in a choice better than `chosen`, combined in all ways."""
    known = problem.total(chosen)[0]
    cost, best, stay, gone = problem.priced(t)
    cheapest = np.minimum(stay, gone)
    slack = known - float(cheapest.sum() - t * limit)
    slack += 1e-9 * max(abs(known), 1e-300)
    with np.errstate(invalid="ignore"):  # parts without any option, of items that are left out in any case
        above = cost - cost[np.arange(len(best)), best][:, None] + (stay - cheapest)[problem.item][:, None]
    alive = above <= slack
    out = gone - cheapest <= slack

    options: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # of each item: sizes, losses, the parts' options
    members = [np.flatnonzero(problem.item == i) for i in range(len(problem.V0))]
    for i, parts in enumerate(members):
        sizes, losses, picks = np.zeros(1, np.int64), np.zeros(1), np.zeros((1, 0), np.int64)
        for part in parts:
            here = np.flatnonzero(alive[part])
            sizes = (sizes[:, None] + problem.S[part, here]).ravel()
            losses = (losses[:, None] + problem.V[part, here]).ravel()
            picks = np.concatenate((np.repeat(picks, len(here), axis=0), np.tile(here, len(picks))[:, None]), axis=1)
            front = _front(sizes, losses)
            sizes, losses, picks = sizes[front], losses[front], picks[front]
        if out[i]:
            sizes, losses = np.append(sizes, problem.S0[i]), np.append(losses, problem.V0[i])
            picks = np.concatenate((picks, np.full((1, len(parts)), -1)))
            front = _front(sizes, losses)
            sizes, losses, picks = sizes[front], losses[front], picks[front]
        options.append((sizes, losses, picks))

    result = chosen.copy()
    open_items = [i for i, (sizes, _, _) in enumerate(options) if len(sizes) > 1]
    taken = sum(int(sizes[0]) for sizes, _, _ in options if len(sizes) == 1)
    levels = {i: 0 for i in range(len(options))}
    if any(not len(sizes) for sizes, _, _ in options):
        return chosen
    if open_items:
        k = max(len(options[i][0]) for i in open_items)
        filled = [np.minimum(np.arange(k), len(options[i][0]) - 1) for i in open_items]
        S = np.stack([options[i][0][f] for i, f in zip(open_items, filled, strict=True)])
        V = np.stack([options[i][1][f] for i, f in zip(open_items, filled, strict=True)])
        if S.min(axis=1).sum() > limit - taken:
            return chosen
        picked = choose(-V, S, limit - taken)
        levels |= {i: int(f[l]) for i, f, l in zip(open_items, filled, picked, strict=True)}
    for i, parts in enumerate(members):
        result[parts] = options[i][2][levels[i]]
    loss, size = problem.total(result)
    return result if size <= limit and loss < known else chosen


def _front(sizes: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Indices of what no other option matches in size and loss."""
    order = np.lexsort((losses, sizes))
    before = np.minimum.accumulate(np.concatenate(([np.inf], losses[order])))[:-1]
    return order[losses[order] < before]
