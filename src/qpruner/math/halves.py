"""Scales as float16."""

import math

import torch
from jaxtyping import Float, Float16
from torch import Tensor


def half_at_least(x: Float[Tensor, "*shape"]) -> Float16[Tensor, "*shape"]:
    """The smallest float16 that is not below x >= 0."""
    near = x.half()
    # Bits of floats >= 0 ascend with their value. Not torch.nextafter: not every device has it for float16.
    above = (near.view(torch.int16) + 1).view(torch.float16)
    return finite_half(x, torch.where(near.to(x.dtype) < x, above, near))


def finite_half(
    x: Float[Tensor, "*shape"], scales: Float16[Tensor, "*shape"] | None = None
) -> Float16[Tensor, "*shape"]:
    """x as float16, or `scales` that stand for it, if those are numbers."""
    scales = x.half() if scales is None else scales
    if not torch.isfinite(scales).all():
        largest = x.max().item()
        raise ValueError(
            f"a group of weights needs a scale of {largest:g}, beyond the largest float16, 65504; keep it in 16 bits"
            if math.isfinite(largest)
            else "the weight has values that are not finite"
        )
    return scales
