"""Products with a weight that is packed: which function computes one, and the gradient of its input.

Each takes (x, layer, rows) and gives x @ W[rows].T; `function_of` and `product_of_rounded`, for rounded inputs, choose.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qpruner.model import arranged
from qpruner.model.arranged import Arranged
from qpruner.model.storage import signed_bytes
from qpruner.plan import QuantSpec

FEW = 32  # tokens


class Packed(Protocol):
    """What products need of a packed linear."""

    spec: QuantSpec
    steps: Tensor | None

    @property
    def codes(self) -> Tensor: ...
    def arranged(self, make: bool = False) -> Arranged | None: ...
    def tiles(self) -> list[slice]: ...
    def dequantize_rows(self, rows: slice, dtype: torch.dtype) -> Tensor: ...
    def scales_of(self, rows: slice) -> Tensor: ...
    def integers_of(self, rows: slice) -> Tensor: ...


def product(x: Tensor, layer: Packed) -> Tensor:
    """x @ W.T, differentiable in x; as if x were not rounded, where the spec has it rounded."""
    return PackedProduct.apply(x, layer)


def function_of(x: Tensor, layer: Packed):
    # One scale per row may come after the product. Not in float16, whose range the unscaled sums can leave.
    scale_last = signed_bytes(layer.spec) and layer.spec.group_size is None and x.dtype != torch.float16
    return product_of_codes if scale_last else product_of_values


class PackedProduct(torch.autograd.Function):
    """x @ W.T that keeps neither W nor, for the backward pass, x: the gradient of x needs the codes alone."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: Packed) -> Tensor:
        ctx.layer = layer
        if layer.spec.activation_bits < 16:
            return product_of_rounded(x, layer)
        return product_as_is(x, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        layer = ctx.layer
        total = None
        for rows in layer.tiles():
            part = gradient[..., rows] @ layer.dequantize_rows(rows, gradient.dtype)
            if part.dtype in (torch.bfloat16, torch.float16) and len(layer.tiles()) > 1:
                part = part.float()  # sums over tiles are not rounded at every step
            total = part if total is None else total + part
        return total.to(gradient.dtype), None


def product_as_is(x: Tensor, layer: Packed) -> Tensor:
    if few_on_cpu(x) and (order := layer.arranged(make=True)):
        return order.product(x.reshape(-1, x.shape[-1]), layer.steps).unflatten(0, x.shape[:-1])
    return by_tile(function_of(x, layer), x, layer)


def few_on_cpu(x: Tensor) -> bool:
    """Whether torch's 4-bit product is the fastest for such inputs."""
    n = x.numel() // max(x.shape[-1], 1)
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and 0 < n <= FEW and arranged.supported()


def product_of_values(x: Tensor, layer: Packed, rows: slice) -> Tensor:
    return x @ layer.dequantize_rows(rows, x.dtype).T


def product_of_codes(x: Tensor, layer: Packed, rows: slice) -> Tensor:
    """8 bits, one scale per row: integers up to 128 are exact in every dtype, and the scale is applied to the sums."""
    # Not torch._weight_int8pack_mm, which is faster for few tokens: it reads past the end of some weights and crashes.
    sums = x @ layer.codes[rows].to(x.dtype).T
    scale = layer.scales_of(rows)[:, 0].to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 would round it
    return (sums * scale).to(x.dtype)


def by_tile(one_product, x: Tensor, layer: Packed) -> Tensor:
    parts = [one_product(x, layer, rows) for rows in layer.tiles()]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def product_of_rounded(x: Tensor, layer: Packed) -> Tensor:
    """The inputs of each token rounded to integers times one scale, which is applied to the sums."""
    counts, steps = rounded_tokens(x, layer.spec.activation_bits)
    if x.dtype == torch.float16:  # the sums of integers could leave its range
        x = (counts * steps).to(x.dtype)
        return product_as_is(x, layer)
    if integer_arithmetic(x, layer.spec):
        y = by_tile(product_of_integers, counts.to(torch.int8).flatten(0, -2), layer).unflatten(0, x.shape[:-1])
    else:
        counts = counts.to(x.dtype)
        y = product_as_is(counts, layer)
    return (y * steps).to(x.dtype)


def rounded_tokens(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers and scale of each token, symmetric, by absmax; at least in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    steps = wide.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (wide / torch.where(steps == 0, 1, steps)).round_(), steps


def integer_arithmetic(x: Tensor, spec: QuantSpec) -> bool:
    """Whether torch multiplies the integers themselves: scales have to be of whole rows."""
    whole_rows = spec.grid == "integer" and spec.symmetric and spec.group_size is None
    return whole_rows and x.device.type == "cpu" and x.dim() > 1 and x.dtype != torch.float64


def product_of_integers(x: Tensor, layer: Packed, rows: slice) -> Tensor:
    """x: int8, (tokens, d_in). Sums are exact in int32 up to 2^17 inputs."""
    return torch._int_mm(x, layer.integers_of(rows).T).float() * layer.scales_of(rows)[:, 0]
