"""Ranks of adapters: the same for all linears, or more where a plan cut deeper, in as many bytes.

A linear of (d_out, d_in) pays d_out + d_in numbers for each rank. How deep a linear was cut is the fraction of its
bytes at 16 bits that is gone, be it by its width or by its bits.
"""

import heapq
import math
from collections.abc import Mapping

INPUTS_PER_RANK = 32  # of a linear's smaller side: keeps adapters small beside narrow layers

Shapes = Mapping[str, tuple[int, int]]  # (d_out, d_in) of every linear after the cuts


def rank_of(asked: int, dims: tuple[int, int]) -> int:
    """Of the adapter of a linear of (d_out, d_in), where none gets more than another."""
    return min(asked, most(dims))


def most(dims: tuple[int, int]) -> int:
    return max(1, min(dims) // INPUTS_PER_RANK)


def uniform(asked: int, shapes: Shapes) -> dict[str, int]:
    return {name: rank_of(asked, dims) for name, dims in shapes.items()}


def numbers(ranks: Mapping[str, int], shapes: Shapes) -> int:
    """That all factors hold together."""
    return sum(rank * sum(shapes[name]) for name, rank in ranks.items())


def by_cut(asked: int, shapes: Shapes, gone: Mapping[str, float], *, limit: int | None = None) -> dict[str, int]:
    """Ranks in proportion to what is gone, 1 at least and at most 1/32 of the smaller side.

    Of two linears of one shape the one that lost more never gets less. What rounding leaves over goes out rank by rank
    while it fits, to whoever is furthest below their share; of equal ones to the first.

    Args:
        gone: fraction of each linear's bytes, 0 to 1.
        limit: on `numbers`; without it those of `uniform`.
    """
    least = dict.fromkeys(shapes, 1)
    left = (numbers(uniform(asked, shapes), shapes) if limit is None else limit) - numbers(least, shapes)
    ranks, order = least, {name: i for i, name in enumerate(shapes)}
    # A linear waits with the price per share of its next rank: rank r is due at r / gone.
    due = lambda name, rank: (rank / gone[name] if gone[name] > 0 else math.inf, rank, order[name], name)
    waiting = [due(name, 2) for name, dims in shapes.items() if most(dims) > 1]
    heapq.heapify(waiting)
    while waiting:
        _, rank, _, name = heapq.heappop(waiting)
        price = sum(shapes[name])
        if price > left:
            continue  # for good: others of its shape come later, and have no more left
        left -= price
        ranks[name] = rank
        if rank < most(shapes[name]):
            heapq.heappush(waiting, due(name, rank + 1))
    return ranks
