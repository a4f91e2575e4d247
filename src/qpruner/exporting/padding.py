"""Layers of different widths made equally wide with zeros, so that a class with one width for all holds them.

A removed unit computes the same as one whose weights are zero. So every layer gets as many units as the widest of its
kind keeps; which of the removed ones come back does not matter, because they come back as zeros.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qpruner.errors import ModelError
from qpruner.model.graph import Graph

Kept = Mapping[str, Sequence[int]]
Cuts = Sequence[tuple[int, Tensor]]


def widest(graph: Graph, kept: Kept) -> dict[str, tuple[int, ...]]:
    """Units of every group, with removed ones where a group of the same kind in another layer keeps more.

    Raises:
        ModelError: experts went; one of zeros would still be sent tokens.
    """
    if gone := [n for n, g in graph.groups.items() if g.kind == "expert" and len(kept[n]) < g.n_units]:
        raise ModelError(
            f"{gone[0]!r} lost whole experts, and one of zeros would still be sent tokens: there is no padding for it."
        )
    most: dict[tuple, int] = defaultdict(int)
    alike = lambda group: (group.kind, group.n_units // group.n_blocks)
    for name, group in graph.groups.items():
        most[alike(group)] = max(most[alike(group)], len(kept[name]) // group.n_blocks)
    return {name: _filled(kept[name], group, most[alike(group)]) for name, group in graph.groups.items()}


def _filled(units: Sequence[int], group, n: int) -> tuple[int, ...]:
    size, stay = group.n_units // group.n_blocks, set(units)
    found: list[int] = []
    for block in range(group.n_blocks):
        here = range(block * size, (block + 1) * size)
        inside = [u for u in here if u in stay]
        others = [u for u in here if u not in stay]
        found += sorted(inside + others[: n - len(inside)])
    return tuple(found)


def padded(tensor: Tensor, cuts: Cuts, wider: Cuts, shape: Sequence[int]) -> Tensor:
    """A tensor that was cut, with zeros in the places that the wider cuts leave in.

    Args:
        cuts, wider: of this tensor, as `surgery.cuts_of` has them. shape: of the result.
    """
    stay = dict(wider)
    for dim, index in cuts:
        every = torch.arange(shape[dim])
        around = stay.get(dim, every if index.dim() == 1 else every.expand(len(index), -1))
        if index.dim() == 1:
            tensor = _spread(tensor, dim, torch.searchsorted(around, index), len(around))
        else:  # experts of a stack, each with channels of its own
            each = zip(tensor, around.contiguous(), index, strict=True)
            tensor = torch.stack([_spread(t, dim - 1, torch.searchsorted(a, i), a.numel()) for t, a, i in each])
    assert tuple(tensor.shape) == tuple(shape), (tensor.shape, shape)
    return tensor


def _spread(tensor: Tensor, dim: int, places: Tensor, n: int) -> Tensor:
    wide = tensor.new_zeros(*tensor.shape[:dim], n, *tensor.shape[dim + 1 :])
    return wide.index_copy_(dim, places, tensor)
