"""Products with a weight that is packed: which function computes one, and the gradient of its input.

Each takes (x, layer, rows) and gives x @ W[rows].T, or (x, layer) and gives it all. `product_as_is` chooses, and
`product_of_rounded` for rounded inputs.
"""

from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qpruner.model.packed import arranged, native
from qpruner.model.packed.arranged import Arranged
from qpruner.model.packed.storage import signed_bytes
from qpruner.plan import QuantSpec

# Up to how many tokens a product is the fastest on a CPU, by benchmarks/packed_decoding.py at 4096 x 4096 to 11008.
# Up to four tokens cost torch's 4-bit product about as much as one, then each costs its share, whereas unpacking costs
# the same whatever comes, as much as some 30 or, from the 4-bit order, 100 tokens of that product.
# Compiled products cost each token its share from the second on. `_int_mm` multiplies one token by rows as they lie,
# and copies the weight for more.
MOST = {"to arrange": 32, "in order": 96, "compiled": 16, "integers one by one": 8}


class Packed(Protocol):
    """What products need of a packed linear."""

    spec: QuantSpec
    steps: Tensor | None
    in_features: int
    out_features: int

    @property
    def codes(self) -> Tensor: ...
    @property
    def scales(self) -> Tensor: ...
    def arranged(self, make: bool = False) -> Arranged | None: ...
    def tiles(self) -> list[slice]: ...
    def dequantize_rows(self, rows: slice, dtype: torch.dtype) -> Tensor: ...
    def zeros_of(self, rows: slice) -> Tensor | None: ...
    def scales_of(self, rows: slice) -> Tensor: ...
    def integers_of(self, rows: slice) -> Tensor: ...


def product(x: Tensor, layer: Packed) -> Tensor:
    """x @ W.T, differentiable in x; as if x were not rounded, where the spec has it rounded."""
    if torch.is_grad_enabled() and x.requires_grad:
        return PackedProduct.apply(x, layer)
    return product_alone(x, layer)  # an autograd function costs a token a tenth of its time


def product_alone(x: Tensor, layer: Packed) -> Tensor:
    return product_of_rounded(x, layer) if layer.spec.activation_bits < 16 else product_as_is(x, layer)


class PackedProduct(torch.autograd.Function):
    """x @ W.T that keeps neither W nor, for the backward pass, x: the gradient of x needs the codes alone."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: Packed) -> Tensor:
        ctx.layer = layer
        return product_alone(x, layer)

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
    """x @ W.T by the fastest function for such x."""
    if order := order_for(x, layer):
        return by_token(order.product, x, layer.steps)
    if n_tokens(x) <= MOST["compiled"] and compiled_fits(x, layer):
        return by_token(product_compiled, x, layer)
    # Not torch._weight_int8pack_mm for 8 bits, which is faster for few tokens: it crashes on some weights, and not only
    # where rows are no multiples of what it reads at a time.
    return by_tile(product_of_codes if scale_last(x, layer.spec) else product_of_values, x, layer)


def order_for(x: Tensor, layer: Packed) -> Arranged | None:
    """The weight in the order of torch's 4-bit product, if that is the fastest."""
    n = n_tokens(x)
    return layer.arranged(make=n <= MOST["to arrange"]) if torchs_own(x) and n <= MOST["in order"] else None


def torchs_own(x: Tensor) -> bool:
    """Whether torch's products of few bits can take such inputs."""
    narrow = x.numel() > 0 and x.dtype == torch.bfloat16 and x.device.type == "cpu"
    return narrow and arranged.supported() and native.reads_contents()  # whether its order fits is read from scales


def n_tokens(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def by_token(one_product, x: Tensor, *args) -> Tensor:
    """A product of (tokens, d_in) for inputs of any shape."""
    y = one_product(x.reshape(n_tokens(x), x.shape[-1]), *args)
    return y.view(*x.shape[:-1], y.shape[-1])


def compiled_fits(x: Tensor, layer: Packed) -> bool:
    """Whether there is a compiled product."""
    floats = x.numel() > 0 and x.dtype in (torch.bfloat16, torch.float32)
    return floats and native.fits(layer.spec) and native.at_hand(x.device, layer.out_features * layer.in_features)


def product_compiled(x: Tensor, layer: Packed) -> Tensor:
    zeros = layer.zeros_of(slice(None))
    return native.product(x, layer.codes, layer.scales, zeros, layer.spec).to(x.dtype)


def scale_last(x: Tensor, spec: QuantSpec) -> bool:
    """One scale per row may come after the product. Not in float16, whose range the unscaled sums can leave."""
    return signed_bytes(spec) and spec.group_size is None and x.dtype != torch.float16


def product_of_values(x: Tensor, layer: Packed, rows: slice) -> Tensor:
    return x @ layer.dequantize_rows(rows, x.dtype).T


def product_of_codes(x: Tensor, layer: Packed, rows: slice) -> Tensor:
    """8 bits, one scale per row: integers up to 128 are exact in every dtype, and the scale is applied to the sums."""
    sums, scales = x @ layer.codes[rows].to(x.dtype).T, layer.scales_of(rows)[:, 0]
    wide = torch.promote_types(sums.dtype, torch.float32)  # bfloat16 would round the scales
    return (sums * scales.to(wide)).to(x.dtype)  # within autocast the sums are of fewer bits than x


def by_tile(one_product, x: Tensor, layer: Packed) -> Tensor:
    parts = [one_product(x, layer, rows) for rows in layer.tiles()]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def product_of_rounded(x: Tensor, layer: Packed) -> Tensor:
    """The inputs of each token rounded to integers times one scale, which is applied to the sums."""
    counts, steps = rounded_tokens(x, layer.spec.activation_bits)
    if x.dtype == torch.float16:  # the sums of integers could leave its range
        return product_as_is((counts * steps).to(x.dtype), layer)
    if integer_arithmetic(x, layer.spec) and not order_for(x, layer):
        y = by_token(partial(by_tile, product_of_integers), counts.to(torch.int8), layer)
    else:
        y = product_as_is(counts.to(x.dtype), layer)
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
    W = layer.integers_of(rows).T
    few = len(x) <= MOST["integers one by one"]
    sums = torch.cat([torch._int_mm(token, W) for token in x.split(1)]) if few else torch._int_mm(x, W)
    return sums.float() * layer.scales_of(rows)[:, 0]
