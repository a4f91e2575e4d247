"""Which unit gets which width: measurements and a limit in, one level per unit out. Every allocator meets the limit.

A unit is a decoder layer, or linears that are stored alike; a level is an index into the widths on offer. Nothing here
sees a tensor of the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qpruner.errors import BudgetError
from qpruner.math.knapsack import choose

Levels = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Choices:
    """What every allocator sees.

    units: names, in the order of the model's depth.
    bits: the width of each level, ascending.
    sizes_bytes: (n_units, n_levels) stored bytes of the unit's linears at each level, never falling with the width.
    limit_bytes: what all units together may take.
    information: (n_units,) mutual information of the unit's output with the prediction, in nats.
    sensitivity: (n_units, n_levels) KL to the original in nats per token that the level of one unit alone causes.
    seed: of the allocators that draw.
    """

    units: tuple[str, ...]
    bits: tuple[int, ...]
    sizes_bytes: np.ndarray
    limit_bytes: int
    information: np.ndarray | None = None
    sensitivity: np.ndarray | None = None
    seed: int = 0

    def __post_init__(self):
        n, k = len(self.units), len(self.bits)
        if not n or not k or list(self.bits) != sorted(set(self.bits)) or self.bits[0] < 1:
            raise ValueError(f"{n} units at the widths {self.bits}: at least one unit, and widths ascending from 1 bit")
        for name, shape in (("sizes_bytes", (n, k)), ("information", (n,)), ("sensitivity", (n, k))):
            array = getattr(self, name)
            if array is None:
                continue
            if array.shape != shape:
                raise ValueError(f"{name} has the shape {array.shape}; {n} units at {k} widths need {shape}")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} holds a value that is not finite")
        if not np.issubdtype(self.sizes_bytes.dtype, np.integer) or (self.sizes_bytes < 0).any():
            raise ValueError("sizes_bytes are whole bytes, none negative")
        if (np.diff(self.sizes_bytes, axis=1) < 0).any():
            unit = self.units[int(np.argmax((np.diff(self.sizes_bytes, axis=1) < 0).any(axis=1)))]
            raise ValueError(f"{unit!r} takes fewer bytes at more bits; leave out the width that is never worth it")
        smallest = int(self.sizes_bytes[:, 0].sum())
        if smallest > self.limit_bytes:
            raise BudgetError(
                f"{n} units at {self.bits[0]} bits take {smallest:,} bytes and {self.limit_bytes:,} are left for them. "
                f"A budget that is {smallest - self.limit_bytes:,} bytes larger would do; so would smaller widths or "
                "more pruning."
            )

    def size_bytes(self, levels: Sequence[int]) -> int:
        """Bytes of all units at these levels."""
        return int(self.sizes_bytes[np.arange(len(self.units)), np.asarray(levels)].sum())


def uniform(choices: Choices) -> Levels:
    """As even as the bytes allow, without any measurement: the baseline at equal bytes.

    Every unit at the highest level that fits all; what is left raises units that are spread evenly over the depth.
    """
    fitting = np.flatnonzero(choices.sizes_bytes.sum(axis=0) <= choices.limit_bytes)
    return fill((int(fitting[-1]),) * len(choices.units), choices, spread(len(choices.units)))


def random(choices: Choices) -> Levels:
    """Units raised one level at a time in an order drawn from the seed: the control without any thought."""
    n = len(choices.units)
    return fill((0,) * n, choices, np.random.default_rng(choices.seed).permutation(n))


def mutual_information(choices: Choices) -> Levels:
    """The largest sum of information times log2 bits, exactly; negative information counts as none.

    From b to b' bits a unit so gains I log2(b' / b). Units without any information take the bytes left over.

    Source: arXiv:2412.11629, whose procedure is not public in detail; this is the exact optimum of its greedy rule.
    """
    information = _measured(choices, "information").clip(min=0)
    gains = information[:, None] * np.log2(np.array(choices.bits, dtype=float))
    levels = choose(gains, choices.sizes_bytes, choices.limit_bytes)
    even = spread(len(choices.units))
    return fill(levels, choices, even[np.argsort(-information[even], kind="stable")])


def sensitivity(choices: Choices) -> Levels:
    """The smallest sum of the units' own measured KL, exactly: right wherever errors in different units just add up.

    Bytes may be left where more bits were measured to do harm.
    """
    return tuple(choose(-_measured(choices, "sensitivity"), choices.sizes_bytes, choices.limit_bytes).tolist())


ALLOCATORS: dict[str, Callable[[Choices], Levels]] = {
    "uniform": uniform,
    "random": random,
    "mutual-information": mutual_information,
    "sensitivity": sensitivity,
}


def fill(levels: Sequence[int], choices: Choices, order: Sequence[int]) -> Levels:
    """Raise units by one level in the given order, whatever still fits, round after round until nothing does."""
    rows, orders = np.array([levels]), np.array([order])
    return tuple(_raised(rows, choices, orders)[0].tolist())


def repair(levels: Sequence[int], choices: Choices, order: Sequence[int]) -> Levels:
    """Levels that meet the limit and leave no room for raising any one unit.

    Args:
        order: units by falling priority: the last is lowered first, and the first is raised first.
    """
    return tuple(repair_rows(np.array([levels]), choices, np.array([order]))[0].tolist())


def repair_rows(rows: np.ndarray, choices: Choices, orders: np.ndarray) -> np.ndarray:
    """`repair` for every row of (m, n_units) levels, each with its own order."""
    return _raised(_lowered(rows, choices, orders), choices, orders)


def _lowered(rows: np.ndarray, choices: Choices, orders: np.ndarray) -> np.ndarray:
    rows, each, sizes = rows.copy(), np.arange(len(rows)), choices.sizes_bytes
    total = sizes[np.arange(rows.shape[1]), rows].sum(axis=1)
    while (total > choices.limit_bytes).any():  # each round lowers something: all units at the lowest level fit
        for unit in reversed(orders.T):
            level = rows[each, unit]
            down = np.where((total > choices.limit_bytes) & (level > 0), level - 1, level)
            total += sizes[unit, down] - sizes[unit, level]
            rows[each, unit] = down
    return rows


def _raised(rows: np.ndarray, choices: Choices, orders: np.ndarray) -> np.ndarray:
    rows, each, sizes = rows.copy(), np.arange(len(rows)), choices.sizes_bytes
    total = sizes[np.arange(rows.shape[1]), rows].sum(axis=1)
    top = len(choices.bits) - 1
    for _ in range(top):
        for unit in orders.T:
            level = rows[each, unit]
            up = np.minimum(level + 1, top)
            growth = sizes[unit, up] - sizes[unit, level]
            fits = total + growth <= choices.limit_bytes
            rows[each, unit] = np.where(fits, up, level)
            total += np.where(fits, growth, 0)
    return rows


def spread(n: int) -> np.ndarray:
    """0..n-1 so ordered that every beginning lies evenly over the range: by the reversed binary digits."""
    digits = max(1, (n - 1).bit_length())
    return np.array(sorted(range(n), key=lambda i: int(f"{i:0{digits}b}"[::-1], 2)))


def _measured(choices: Choices, name: str) -> np.ndarray:
    array = getattr(choices, name)
    if array is None:
        raise ValueError(f"this allocator reads {name}, which was not measured")
    return array
