"""A linear layer whose weight stays in codes: in memory, on disk, and in the product."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qpruner.math import grids, packing
from qpruner.plan import QuantSpec


class PackedLinear(nn.Linear):
    """y = x @ dequantize(codes, scales).T + bias, a few rows of the weight at a time. Final.

    Buffers: `codes`, int8 for 8 bits and two to a byte for 4; `scales`, float16 whatever dtype the model is moved to.
    The weight is frozen: gradients reach the input, the bias and adapters.

    It is an `nn.Linear` so that PEFT wraps it with no registration, also in a plain `PeftModel.from_pretrained`.
    `weight` is not a parameter but a flat view of the stored bytes: it says where the layer lives, and fits no product.
    """

    _is_hf_initialized = True  # there is nothing that transformers could initialize

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None, spec: QuantSpec, in_features: int):
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate the dense weight
        self.in_features = in_features
        self.out_features = len(codes)
        self.spec = spec
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @classmethod
    def from_weight(cls, W: Tensor, bias: Tensor | None, spec: QuantSpec) -> "PackedLinear":
        """Round a weight of (d_out, d_in). ValueError where it has no place on the grid: see `grids.quantize`."""
        codes, scales = grids.quantize(W.detach(), **grid_of(spec))
        return cls.from_codes(codes, scales, bias, spec)

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, bias: Tensor | None, spec: QuantSpec) -> "PackedLinear":
        """From one code per weight, as `grids.quantize` gives them."""
        stored = packing.pack(codes) if spec.bits == 4 else codes
        return cls(stored, scales, None if bias is None else bias.detach().clone(), spec, codes.shape[1])

    @classmethod
    def empty(
        cls,
        d_out: int,
        d_in: int,
        bias: bool,
        spec: QuantSpec,
        *,
        device: torch.device | str = "meta",
        dtype: torch.dtype | None = None,
    ) -> "PackedLinear":
        """For a loader to fill. dtype: of the bias."""
        codes_shape, scales_shape = stored_shapes(d_out, d_in, spec)
        return cls(
            torch.empty(codes_shape, dtype=torch.uint8 if spec.bits == 4 else torch.int8, device=device),
            torch.empty(scales_shape, dtype=torch.float16, device=device),
            torch.empty(d_out, dtype=dtype, device=device) if bias else None,
            spec,
            d_in,
        )

    @property
    def weight(self) -> Tensor:
        """The stored bytes, flat."""
        return self.codes.view(torch.uint8).flatten()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A dense copy of the weight, (out_features, in_features)."""
        if not len(self.codes):
            return torch.empty(0, self.in_features, dtype=dtype, device=self.codes.device)
        return torch.cat([self.dequantize_rows(rows, dtype) for rows in self.tiles()])

    def tiles(self) -> list[slice]:
        return grids.tiles(self.out_features, self.in_features)

    def dequantize_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if self.spec.bits == 8:
            values = self.codes[rows].to(wide)
        else:
            table = value_pairs(self.spec.bits, self.spec.grid, wide, self.codes.device)
            values = packing.unpack_values(self.codes[rows], table, self.in_features)
        grids.scale_(values, self.scales[rows], group_size=self.spec.group_size)
        return values.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        # A CPU has no float16 arithmetic of its own: it is slow there, and sums in float16 in places.
        wide = torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype
        y = PackedProduct.apply(x.to(wide), self)
        if self.bias is not None:
            y = y + self.bias.to(wide)
        return y.to(x.dtype)

    def reset_parameters(self) -> None:
        """Nothing to reset: codes are given, not trained."""

    def _apply(self, fn, recurse: bool = True):
        """`model.to(bfloat16)` must not touch the scales: the codes were chosen for their exact values."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        spec = self.spec
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, bits={spec.bits}, grid={spec.grid}, group_size={spec.group_size}"


def grid_of(spec: QuantSpec) -> dict:
    return {"bits": spec.bits, "grid": spec.grid, "group_size": spec.group_size}


def stored_shapes(d_out: int, d_in: int, spec: QuantSpec) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of `codes` and `scales`."""
    row = -(-d_in // 2) if spec.bits == 4 else d_in
    return (d_out, row), (d_out, grids.group_count(d_in, spec.group_size))


@cache
def value_pairs(bits: int, grid: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    return packing.pair_table(grids.book(bits, grid).to(device, dtype))


class PackedProduct(torch.autograd.Function):
    """x @ W.T that keeps neither W nor, for the backward pass, x: the gradient of x needs the codes alone."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        # One scale per row may come after the product. Not in float16, whose range the unscaled sums can leave.
        scale_last = layer.spec.bits == 8 and layer.spec.group_size is None and x.dtype != torch.float16
        one_product = product_of_codes if scale_last else product_of_values
        parts = [one_product(x, layer, rows) for rows in layer.tiles()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

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


def product_of_values(x: Tensor, layer: PackedLinear, rows: slice) -> Tensor:
    return x @ layer.dequantize_rows(rows, x.dtype).T


def product_of_codes(x: Tensor, layer: PackedLinear, rows: slice) -> Tensor:
    """8 bits, one scale per row: integers up to 127 are exact in every dtype, and the scale is applied to the sums."""
    # Not torch._weight_int8pack_mm, which is faster for few tokens: it reads past the end of some weights and crashes.
    sums = x @ layer.codes[rows].to(x.dtype).T
    scale = layer.scales[rows, 0].to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 would round it
    return (sums * scale).to(x.dtype)
