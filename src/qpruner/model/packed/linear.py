"""A linear layer whose weight stays in codes: in memory, on disk, and in the product."""

from functools import cache

import torch
from torch import Tensor, nn

from qpruner.math import grids, packing
from qpruner.math.books import book, lowest
from qpruner.model.checkpoint import TORCH_DTYPES
from qpruner.model.packed import native
from qpruner.model.packed.arranged import Arranged, fits, scales_fit
from qpruner.model.packed.products import product
from qpruner.model.packed.storage import code_width, signed_bytes, stored_parts
from qpruner.plan import QuantSpec

STORED = ("codes", "scales", "steps", "zeros")


class PackedLinear(nn.Linear):
    """y = x @ W.T + bias, W dequantized a few rows at a time. Final.

    Buffers: `codes`, dense as `packing` lays them out, or int8 where 8 bits are symmetric; `scales`, float16 or packed
    codes, then with `steps`; packed `zeros`. Those that a spec lacks are None. Floats stay float16 wherever the model
    is moved. The weight is frozen: gradients reach the input, the bias and adapters.

    It is an `nn.Linear` so that PEFT wraps it with no registration, also in a plain `PeftModel.from_pretrained`.
    `weight` is not a parameter but a flat view of the stored bytes: it says where the layer lives, and fits no product.

    Products may put codes, scales and zeros into another order, in place: see `arranged`. Whatever asks for one of
    them, for the state or for a copy gets the stored order back. Those that are shared stay in it.
    """

    _is_hf_initialized = True  # there is nothing that transformers could initialize
    _arranged: Arranged | None = None
    _misfit: Tensor | None = None
    shares: bool = False  # its buffers with others, of which one stores them under its name

    def __init__(self, parts: dict[str, Tensor], bias: Tensor | None, spec: QuantSpec, in_features: int):
        """parts: what `stored_parts` names."""
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate the dense weight
        self.in_features = in_features
        self.out_features = len(parts["codes"])
        self.spec = spec
        for name in STORED:
            self.register_buffer(name, parts.get(name))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @classmethod
    def from_weight(
        cls,
        W: Tensor,
        bias: Tensor | None,
        spec: QuantSpec,
        ranges: str | grids.Ranges = "absmax",
        weight: Tensor | None = None,
    ) -> "PackedLinear":
        """Round a weight of (d_out, d_in). ValueError where it has no place on the grid: see `grids.quantize`."""
        return cls.from_rounded(grids.quantize(W.detach(), spec, ranges, weight), bias, spec)

    @classmethod
    def from_rounded(cls, rounded: grids.Rounded, bias: Tensor | None, spec: QuantSpec) -> "PackedLinear":
        parts = cls.packed_parts(rounded, spec)
        return cls(parts, None if bias is None else bias.detach().clone(), spec, rounded.codes.shape[1])

    @staticmethod
    def packed_parts(rounded: grids.Rounded, spec: QuantSpec) -> dict[str, Tensor]:
        """What `stored_parts` names."""
        codes = rounded.codes
        parts = {
            "codes": (codes ^ 128).view(torch.int8) if signed_bytes(spec) else packing.pack(codes, code_width(spec)),
            "scales": rounded.scales if spec.scale_bits == 16 else packing.pack(rounded.scales, spec.scale_bits),
        }
        if rounded.steps is not None:
            parts["steps"] = rounded.steps
        if rounded.zeros is not None:
            parts["zeros"] = packing.pack(rounded.zeros, spec.bits)
        return parts

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
        parts = {
            name: torch.empty(shape, dtype=TORCH_DTYPES[kind], device=device)
            for name, (kind, shape) in stored_parts(d_out, d_in, spec).items()
        }
        return cls(parts, torch.empty(d_out, dtype=dtype, device=device) if bias else None, spec, d_in)

    def sharing(self, bias: Tensor | None) -> "PackedLinear":
        """Another linear that has the very buffers of this one, and its own bias. It stores nothing but the bias."""
        self.restore_()
        self.shares = True
        other = PackedLinear(
            {n: t for n, t in self._buffers.items() if t is not None}, bias, self.spec, self.in_features
        )
        other.shares, other._buffers = True, self._buffers  # one dictionary: who replaces a buffer does it for all
        other._non_persistent_buffers_set = set(self._buffers)
        return other

    def as_parameters_(self, given: dict[str, nn.Parameter] | None = None) -> dict[str, nn.Parameter]:
        """Have what is stored as frozen parameters, in the order that is stored, for code that sees parameters alone.

        They lose what keeps the scales' dtype: not to be converted.

        Args:
            given: what this gave for a linear with which this one shares its buffers.
        """
        if given is None:
            self.restore_()
            there = [name for name in STORED if self._buffers.get(name) is not None]
            given = {name: nn.Parameter(self._buffers.pop(name), requires_grad=False) for name in there}
        self.shares = True  # they stay in that order
        self._parameters.update(given)
        return given

    @property
    def weight(self) -> Tensor:
        """The stored bytes, flat."""
        codes = self._buffers["codes"] if "codes" in self._buffers else self._parameters["codes"]
        return codes.view(torch.uint8).flatten()

    def arranged(self, make: bool = False) -> Arranged | None:
        """The order of torch's 4-bit product: if the buffers are in it, or, to make, if the spec and the shape fit."""
        arranged = self._arranged
        if arranged is not None and self._buffers["codes"] is not arranged.codes:
            arranged = self._arranged = None  # other codes were put in their place
        if arranged is None and make and self.arrangeable:
            with torch.inference_mode(False):  # what is made there can never be written to outside
                arranged = Arranged(self.rounded(), self.spec)
            self._buffers.update({name: getattr(arranged, name) for name in ("codes", "scales", "zeros")})
            self._arranged = arranged
        return arranged

    @property
    def arrangeable(self) -> bool:
        if self.shares or not fits(self.spec, self.out_features, self.in_features) or self.scales is self._misfit:
            return False
        if not scales_fit(self.scales):
            self._misfit = self.scales  # looked through once
        return self._misfit is not self.scales

    def restore_(self) -> None:
        """Codes, scales and zeros in the order that is stored."""
        arranged, self._arranged = self._arranged, None
        if arranged is None:
            return
        with torch.inference_mode(False):
            stored = self.packed_parts(arranged.rounded(None), self.spec)
        for name in ("codes", "scales", "zeros"):
            if self._buffers[name] is getattr(arranged, name):
                self._buffers[name] = stored.get(name)

    def __getattr__(self, name: str):
        if name in ("codes", "scales", "zeros"):
            self.restore_()
        return super().__getattr__(name)

    def __getstate__(self) -> dict:
        self.restore_()
        return self.__dict__.copy()

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        self.restore_()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.restore_()
        super()._load_from_state_dict(*args, **kwargs)

    def rounded(self) -> grids.Rounded:
        """What is stored, one code per weight."""
        spec, n = self.spec, grids.group_count(self.in_features, self.spec.group_size)
        if signed_bytes(spec):
            codes = self.codes.view(torch.uint8) ^ 128
        else:
            codes = packing.unpack(self.codes, code_width(spec), self.in_features)
        scales = self.scales if self.steps is None else packing.unpack(self.scales, spec.scale_bits, n)
        zeros = None if self.zeros is None else packing.unpack(self.zeros, spec.bits, n)
        return grids.Rounded(codes, scales, self.steps, zeros)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A dense copy of the weight, (out_features, in_features)."""
        if not self.out_features:
            return torch.empty(0, self.in_features, dtype=dtype, device=self.codes.device)
        return torch.cat([self.dequantize_rows(rows, dtype) for rows in self.tiles()])

    def tiles(self) -> list[slice]:
        return grids.tiles(self.out_features, self.in_features)

    def dequantize_rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        spec, wide = self.spec, torch.float64 if dtype == torch.float64 else torch.float32
        width = code_width(spec)
        if arranged := self.arranged():
            values = arranged.codes_of(rows).to(wide)
            values = values.mul_(2).sub_(1) if spec.grid == "binary" else values.add_(lowest(spec))
            scales = grids.decode(
                arranged.by_row(arranged.scales, rows), None if self.steps is None else self.steps[rows]
            )
            zeros = None if arranged.zeros is None else arranged.by_row(arranged.zeros, rows)
            grids.scale_(values, scales, zeros, group_size=spec.group_size)
            return values.to(dtype)
        compiled = dtype == torch.bfloat16 and native.decodes(spec)
        if compiled and native.at_hand(self.codes.device, self.out_features * self.in_features):
            parts = self.codes[rows], self.scales_of(rows), self.zeros_of(rows)
            return native.decode(*parts, spec, self.in_features)
        if signed_bytes(spec):
            values = self.codes[rows].to(wide)
        elif width not in packing.WORD_BITS:  # integers all
            values = packing.unpack(self.codes[rows], width, self.in_features).to(wide).add_(lowest(spec))
        else:
            table = values_of_words(spec, wide, self.codes.device)
            values = packing.unpack_values(self.codes[rows], table, width, self.in_features)
        grids.scale_(values, self.scales_of(rows), self.zeros_of(rows), group_size=spec.group_size)
        return values.to(dtype)

    def integers_of(self, rows: slice) -> Tensor:
        """The codes of a symmetric integer grid as int8 numbers."""
        if signed_bytes(self.spec):
            return self.codes[rows]
        codes = packing.unpack(self.codes[rows], self.spec.bits, self.in_features)
        return codes.view(torch.int8) - 2 ** (self.spec.bits - 1)

    def scales_of(self, rows: slice) -> Tensor:
        """(rows, groups), float32."""
        if self.steps is None:
            return self.scales[rows].float()
        n = grids.group_count(self.in_features, self.spec.group_size)
        return grids.decode(packing.unpack(self.scales[rows], self.spec.scale_bits, n), self.steps[rows])

    def zeros_of(self, rows: slice) -> Tensor | None:
        n = grids.group_count(self.in_features, self.spec.group_size)
        return None if self.zeros is None else packing.unpack(self.zeros[rows], self.spec.bits, n)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():  # from code that gives inputs the dtype of the weight, which is bytes here
            raise TypeError(f"a packed linear takes inputs of floating point, not of {x.dtype}")
        x = autocast(x)
        # A CPU has no float16 arithmetic of its own: it is slow there, and sums in float16 in places.
        wide = torch.float32 if x.dtype == torch.float16 and x.device.type == "cpu" else x.dtype
        y = product(x.to(wide), self)
        if self.bias is not None:
            y = y + self.bias.to(wide)
        return y.to(x.dtype)

    def reset_parameters(self) -> None:
        """Nothing to reset: codes are given, not trained."""

    def _apply(self, fn, recurse: bool = True):
        """`model.to(bfloat16)` must not touch the scales: the codes were chosen for their exact values."""
        self.restore_()
        exact = {name: self._buffers[name] for name in ("scales", "steps") if self._buffers[name] is not None}
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            if self._buffers[name].dtype != tensor.dtype:
                self._buffers[name] = tensor.to(self._buffers[name].device)
        return self

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {self.spec}"


def autocast(x: Tensor) -> Tensor:
    """Inputs as a dense linear would multiply them, and give them back, where torch.autocast is on.

    Without this the product alone would be cast, and not its gradient: an autograd function goes back as it is written,
    in float32 if its output was.
    """
    kind = x.device.type
    narrow = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(kind)) if narrow else x


@cache
def values_of_words(spec: QuantSpec, dtype: torch.dtype, device: torch.device) -> Tensor:
    return packing.value_table(book(spec).to(device, dtype), code_width(spec))
