"""A quantized linear of any spec: packed as a whole, or with a few input channels packed apart at more bits."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qpruner.math import grids
from qpruner.math.salient import others
from qpruner.model.packed.linear import PackedLinear, autocast
from qpruner.plan import QuantSpec


class SplitLinear(nn.Linear):
    """y = rest(x without the salient channels) + high(x of the salient channels) + bias. Final.

    salient: ascending indices of the input channels that `high` reads; `rest` reads the others in ascending order.
    Like a PackedLinear it is an `nn.Linear` for PEFT, with a `weight` that says where it lives.
    """

    _is_hf_initialized = True

    def __init__(
        self, rest: PackedLinear, high: PackedLinear, salient: Tensor, bias: Tensor | None, spec: QuantSpec
    ) -> None:
        """salient: int32. spec: of the whole."""
        nn.Module.__init__(self)
        self.in_features = rest.in_features + high.in_features
        self.out_features = rest.out_features
        self.spec = spec
        self.rest, self.high = rest, high
        self.register_buffer("salient", salient)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def weight(self) -> Tensor:
        """The stored bytes of the channels that are not salient, flat."""
        return self.rest.weight

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A dense copy of the weight, (out_features, in_features)."""
        W = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.salient.device)
        W[:, others(self.salient, self.in_features)] = self.rest.dequantize(dtype)
        W[:, self.salient.long()] = self.high.dequantize(dtype)
        return W

    def forward(self, x: Tensor) -> Tensor:
        x = autocast(x)
        y = self.rest(x[..., others(self.salient, self.in_features)]) + self.high(x.index_select(-1, self.salient))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def reset_parameters(self) -> None:
        """Nothing to reset: codes are given, not trained."""

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {self.spec}"


Quantized = PackedLinear | SplitLinear


def packed(
    W: Tensor,
    bias: Tensor | None,
    spec: QuantSpec,
    salient: Tensor | None = None,
    *,
    ranges: str | grids.Ranges = "absmax",
    weight: Tensor | None = None,
) -> Quantized:
    """Round a weight of (d_out, d_in) as `spec` says.

    Args:
        salient: indices of `spec.salient` input channels to keep at `spec.salient_bits`; by default those whose columns
            have the largest norms.
        ranges, weight: as in `grids.quantize`; salient channels are rounded by absmax.
    Raises:
        ValueError: as `grids.quantize`; or so many channels are not there to be salient.
    """
    if not spec.salient:
        return PackedLinear.from_weight(W, bias, spec, ranges, weight)
    W = W.detach()
    d_in = W.shape[1]
    if spec.salient >= d_in:
        raise ValueError(f"{spec.salient} of {d_in} input channels cannot be salient: fewer than all")
    if salient is None:
        salient = largest_columns(W, spec.salient)
    salient = salient.to(W.device).int().sort().values
    if len(salient.unique()) != spec.salient:
        raise ValueError(f"{spec.salient} different channels are salient by the spec, not {salient.tolist()}")
    rest = others(salient, d_in)
    counts = weight if weight is None else weight[:, rest]
    return SplitLinear(
        PackedLinear.from_weight(W[:, rest], None, spec.rest, ranges, counts),
        PackedLinear.from_weight(W[:, salient.long()], None, spec.high),
        salient,
        None if bias is None else bias.detach().clone(),
        spec,
    )


def stored(tensors: Mapping[str, Tensor], bias: Tensor | None, spec: QuantSpec, d_in: int) -> Quantized:
    """From what it stores: the tensors that `stored_parts` names, the bias apart."""
    if not spec.salient:
        return PackedLinear(dict(tensors), bias, spec, d_in)
    of = lambda part: {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")}
    rest = PackedLinear(of("rest"), None, spec.rest, d_in - spec.salient)
    high = PackedLinear(of("high"), None, spec.high, spec.salient)
    return SplitLinear(rest, high, tensors["salient"], bias, spec)


def assembled(
    rest: grids.Rounded, high: grids.Rounded | None, salient: Tensor | None, bias: Tensor | None, spec: QuantSpec
) -> Quantized:
    """From codes and scales; without salient channels `rest` is all."""
    if high is None:
        return PackedLinear.from_rounded(rest, bias, spec)
    whole = PackedLinear.from_rounded(rest, None, spec.rest), PackedLinear.from_rounded(high, None, spec.high)
    return SplitLinear(*whole, salient.int(), None if bias is None else bias.detach().clone(), spec)


def empty(
    d_out: int,
    d_in: int,
    bias: bool,
    spec: QuantSpec,
    *,
    device: torch.device | str = "meta",
    dtype: torch.dtype | None = None,
) -> Quantized:
    """For a loader to fill. dtype: of the bias."""
    if not spec.salient:
        return PackedLinear.empty(d_out, d_in, bias, spec, device=device, dtype=dtype)
    return SplitLinear(
        PackedLinear.empty(d_out, d_in - spec.salient, False, spec.rest, device=device),
        PackedLinear.empty(d_out, spec.salient, False, spec.high, device=device),
        torch.empty(spec.salient, dtype=torch.int32, device=device),
        torch.empty(d_out, dtype=dtype, device=device) if bias else None,
        spec,
    )


def repacked(layer: Quantized, W: Tensor, ranges: str = "absmax") -> Quantized:
    """Another weight in the form of a layer: same spec, same salient channels, same bias."""
    return packed(W, layer.bias, layer.spec, getattr(layer, "salient", None), ranges=ranges)


def largest_columns(W: Tensor, n: int) -> Tensor:
    """Of equal columns the first."""
    return W.double().square().sum(0).sort(descending=True, stable=True).indices[:n]
