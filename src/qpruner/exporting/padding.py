"""Layers of different widths made equally wide with zeros, so that a class with one width for all holds them.

A removed unit computes the same as one whose weights are zero. Which of the removed ones come back is `widths.widest`'s
to say, and does not matter, because they come back as zeros.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Cuts = Sequence[tuple[int, Tensor]]


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
