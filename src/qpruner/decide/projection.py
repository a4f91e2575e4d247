"""The point of least predicted loss that fits, found without trying anything.

What adds up between the parts of a space is chosen exactly (`math/relaxation.py`). What does not is then taken as it is
around the point that was found: the interactions of every part with the rest become part of its losses, and the choice
is made again, as long as that predicts less. Exchanges of the options of one and two parts come last, each accepted
only for a smaller prediction, so nothing here ends worse than where it began.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from qpruner.decide.blocks import Blocks
from qpruner.decide.estimate import Estimate
from qpruner.decide.space import Point, Space
from qpruner.errors import BudgetError
from qpruner.math.relaxation import least, price, reach

ROUNDS = 6  # of choosing again around the point that was found
EXCHANGES = 24  # rounds of exchanging the options of one or two parts
PAIRED = 256  # options that are paired with as many others
SHORTLIST = 64  # exchanges of two parts whose interaction with each other is looked at
TURNED = 6  # layers that are tried the other way, staying or left out
UNIFORM_TRIED = 3  # settings of uniform widths that are refined, the best without interactions

Fixed = Mapping[int, int]


def projected(
    space: Space,
    estimate: Estimate,
    limit_bytes: int,
    *,
    fixed: Fixed | None = None,
    uniform_widths: bool = False,
    start: Point | None = None,
) -> Point:
    """The point of least predicted loss within the limit: exactly without interactions, else nearly.

    Args:
        fixed: variable -> option that it has.
        uniform_widths: layers of one shape keep the same counts.
        start: a point that fits; the result is never predicted to lose more.
    Raises:
        BudgetError: nothing fits.
    """
    return projections(space, estimate, [limit_bytes], fixed=fixed, uniform_widths=uniform_widths, start=start)[0]


def projections(
    space: Space,
    estimate: Estimate,
    limits: Sequence[int],
    *,
    fixed: Fixed | None = None,
    uniform_widths: bool = False,
    start: Point | None = None,
    blocks: Blocks | None = None,
) -> list[Point]:
    """`projected` at ascending limits; a larger one is never predicted to lose more."""
    if list(limits) != sorted(limits):
        raise ValueError(f"limits ascend, not {tuple(limits)}")
    blocks = blocks or Blocks(space, estimate)
    found: list[Point] = []
    for limit in limits:
        if uniform_widths:
            point = _uniform(blocks, limit, dict(fixed or {}))
        else:
            point = _refined(blocks, _additive(blocks, limit, fixed), limit, fixed)
        known = [p for p in (start, found[-1] if found else None) if p is not None]
        for other in known:
            if space.size_bytes([other])[0] <= limit:
                point = _less(estimate, point, other)
        found.append(point)
    return found


def fill(space: Space, estimate: Estimate, point: Point, limit_bytes: int, *, fixed: Fixed | None = None) -> Point:
    """Spends the bytes that a point leaves: step by step the option that saves most loss per byte, while any does."""
    blocks = Blocks(space, estimate)
    return filled(blocks, point, limit_bytes, fixed)


def filled(blocks: Blocks, point: Point, limit_bytes: int, fixed: Fixed | None = None) -> Point:
    """`fill` with parts that are known already."""
    room = limit_bytes - int(blocks.space.size_bytes([point])[0])
    while room > 0:
        problem = blocks.problem(fixed, around=point)
        chosen = blocks.chosen(point)
        stays = np.flatnonzero(chosen >= 0)
        if not len(stays):
            break
        here = chosen[stays]
        dV = problem.V[stays] - problem.V[stays, here][:, None]
        dS = problem.S[stays] - problem.S[stays, here][:, None]
        worth = np.where((dV < 0) & (dS <= room), -dV / np.maximum(dS, 1), 0.0)
        if not worth.max() > 0:
            break
        part, option = np.unravel_index(worth.argmax(), worth.shape)
        chosen[stays[part]] = option
        better = blocks.point(chosen)
        if _predicted(blocks.estimate, better) >= _predicted(blocks.estimate, point):
            break
        room -= int(dS[part, option])
        point = better
    return point


def _additive(
    blocks: Blocks, limit: int, fixed: Fixed | None, around: Point | None = None, exact: bool = True
) -> Point:
    problem = blocks.problem(fixed, around)
    try:
        return blocks.point(least(problem, limit - blocks.base, exact=exact))
    except ValueError:
        chosen = problem.smallest()
        smallest = problem.total(chosen)[1] + blocks.base
        raise BudgetError(
            f"the smallest that can be reached takes {smallest:,} bytes, and the limit is {limit:,}. A budget that is "
            f"{smallest - limit:,} bytes larger would do; so would smaller formats or more pruning."
        ) from None


def _refined(blocks: Blocks, point: Point, limit: int, fixed: Fixed | None) -> Point:
    if blocks.estimate.interaction is None:
        return point
    for _ in range(ROUNDS):
        again = _additive(blocks, limit, fixed, around=point)
        better = _less(blocks.estimate, point, again)
        if better == point:
            break
        point = better
    for _ in range(EXCHANGES):
        better = _exchanged(blocks, point, limit, fixed)
        if better == point and blocks.deciders:
            better = _turned(blocks, point, limit, fixed)
        if better == point:
            break
        point = better
    return point


def _turned(blocks: Blocks, point: Point, limit: int, fixed: Fixed | None) -> Point:
    """The best that comes of leaving out one layer more, or one less: of those most nearly worth it."""
    fixed = dict(fixed or {})
    problem = blocks.problem(fixed, around=point)
    _, _, stay, gone = problem.priced(price(problem, limit - blocks.base))
    items = {int(d): i for i, d in enumerate(blocks.decider) if d >= 0 and d not in fixed and np.isfinite(gone[i])}
    nearest = sorted(items, key=lambda d: abs(stay[items[d]] - gone[items[d]]))[:TURNED]
    other = {
        d: blocks.space.top[d] if point[d] == blocks.gone_option[items[d]] else int(blocks.gone_option[items[d]])
        for d in nearest
    }
    found = [point]
    for d in nearest:
        turned = fixed | {d: other[d]}
        problem = blocks.problem(turned, around=point)
        if problem.total(problem.smallest())[1] + blocks.base <= limit:
            # The rest goes all ways at once, and then step by step from there.
            settled = blocks.point(least(problem, limit - blocks.base, exact=False))
            found += [settled, _exchanged(blocks, settled, limit, turned)]
    return _least_of(blocks.estimate, found)


def _exchanged(blocks: Blocks, point: Point, limit: int, fixed: Fixed | None) -> Point:
    """The best exchange of the options of one part, or of two, if it is predicted to lose less; else the point."""
    problem, chosen = blocks.problem(fixed, around=point), blocks.chosen(point)
    stays = np.flatnonzero(chosen >= 0)
    if not len(stays):
        return point
    here, k = chosen[stays], problem.V.shape[1]
    dV = (problem.V[stays] - problem.V[stays, here][:, None]).ravel()
    dS = (problem.S[stays] - problem.S[stays, here][:, None]).ravel()
    room = limit - int(blocks.space.size_bytes([point])[0])
    single = np.where(dS <= room, dV, np.inf)
    best, moves = float(single.min()), [int(single.argmin())]
    up = _first(dV / np.maximum(dS, 1), (dV < 0) & (dS > 0))
    down = _first(dV / np.maximum(-dS, 1), (dS < 0) & np.isfinite(dV))
    if len(up) and len(down):
        fits = (dS[up][:, None] + dS[down] <= room) & (up[:, None] // k != down // k)
        both = np.where(fits, dV[up][:, None] + dV[down], np.inf)
        # What the two parts cause together is not in the sum: it is looked up for the best few.
        rows, columns = np.unravel_index(_first(both.ravel(), np.isfinite(both.ravel()), SHORTLIST), both.shape)
        for i, j in zip(up[rows], down[columns], strict=True):
            changed = (
                dV[i] + dV[j] + blocks.together(stays[i // k], here[i // k], i % k, stays[j // k], here[j // k], j % k)
            )
            if changed < best:
                best, moves = float(changed), [int(i), int(j)]
    if not best < 0:
        return point
    for at in moves:
        chosen[stays[at // k]] = at % k
    return _less(blocks.estimate, point, blocks.point(chosen))


def _first(values: np.ndarray, among: np.ndarray, n: int = PAIRED) -> np.ndarray:
    """Indices of the n smallest of some values, ascending."""
    index = np.flatnonzero(among)
    if len(index) > n:
        index = np.sort(index[np.argpartition(values[index], n)[:n]])
    return index[np.argsort(values[index], kind="stable")]


def _uniform(blocks: Blocks, limit: int, fixed: dict[int, int]) -> Point:
    """Every setting of the widths is bounded; the ones that may be best are solved, by ascending bound."""
    settings = [fixed | setting for setting in uniform_settings(blocks.space, fixed)]
    bounds = np.array([reach(blocks.problem(s), limit - blocks.base) for s in settings])
    solved: list[tuple[float, int, Point]] = []
    for i in np.argsort(bounds, kind="stable"):
        worst = sorted(solved)[UNIFORM_TRIED - 1][0] if len(solved) >= UNIFORM_TRIED else np.inf
        if not bounds[i] < worst:
            break
        point = _additive(blocks, limit, settings[i])
        solved.append((float(_predicted(blocks.estimate.without_pairs(), point)), int(i), point))
        if blocks.estimate.interaction is None and len(solved) > 1:
            solved = [min(solved)] * UNIFORM_TRIED
    if not solved:
        _additive(blocks, limit, settings[0])  # raises, with the smallest size of the smallest setting
    best = sorted(solved)[: UNIFORM_TRIED if blocks.estimate.interaction is not None else 1]
    return _least_of(blocks.estimate, [_refined(blocks, point, limit, settings[i]) for _, i, point in best])


def uniform_settings(space: Space, fixed: Fixed | None = None) -> list[dict[int, int]]:
    """All ways to give the layers of one shape the same counts: width variable -> option. The smallest comes first."""
    fixed = fixed or {}
    alike: dict[tuple, list[int]] = {}
    for i, v in enumerate(space.variables):
        if v.kind == "width":
            alike.setdefault((v.name.removeprefix(space.layer_names[v.layer]), v.options), []).append(i)
    choices = [
        [o for o in range(len(options)) if all(fixed.get(v, o) == o for v in members)]
        for (_, options), members in alike.items()
    ]
    return [
        {v: o for members, o in zip(alike.values(), setting, strict=True) for v in members}
        for setting in itertools.product(*choices)
    ]


def _predicted(estimate: Estimate, point: Point) -> float:
    return float(estimate.predict([point])[0])


def _less(estimate: Estimate, first: Point, second: Point) -> Point:
    return _least_of(estimate, [first, second])


def _least_of(estimate: Estimate, points: Sequence[Point]) -> Point:
    """The first of the smallest prediction."""
    return points[int(np.argmin(estimate.predict(points)))]
