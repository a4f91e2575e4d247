"""Linears whose codes and scales are learned, in the place of packed ones."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qpruner.math import grids
from qpruner.math.books import index_
from qpruner.math.straight import Nudge, Snap, latents_near, spread
from qpruner.model.packed.linear import PackedLinear
from qpruner.model.packed.products import rounded_tokens
from qpruner.model.packed.split import SplitLinear, others


class LearnedLinear(nn.Linear):
    """A packed linear, unpacked for learning. What it computes is always what would be stored. Final.

    Parameters: `latents`, weights in units of their scale; `growths`, the logarithm of what scales are multiplied by.
    Both float32. Zero points stay: rates that move them at all make it worse.
    """

    def __init__(self, packed: PackedLinear, W: Tensor | None = None):
        """W: the weight that the codes stand for, if it is still known: latents begin as near to it as codes allow."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.spec = packed.in_features, packed.out_features, packed.spec
        self.bias = None if packed.bias is None else nn.Parameter(packed.bias.detach().float(), requires_grad=False)
        rounded = packed.rounded()
        scales = grids.decoded_scales(rounded, self.spec)
        self.register_buffer("scales", scales)
        self.growths = nn.Parameter(torch.zeros_like(scales))
        self.register_buffer("zeros", rounded.zeros)
        W = packed.dequantize() if W is None else W.float()
        self.latents = nn.Parameter(latents_near(W, rounded.codes, scales, rounded.zeros, self.spec))

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features), as it would be stored; gradients reach latents and growths."""
        spec, d = self.spec, self.in_features
        values = Snap.apply(self.latents, spec)
        if self.zeros is not None:
            values = values - spread(self.zeros, spec.group_size, d)
        return values * spread(self._scales(), spec.group_size, d)

    def _scales(self) -> Tensor:
        wanted = self.scales * self.growths.exp()
        stored = grids.decode(*grids.stored_scales(wanted.detach(), self.spec, up=False))
        return Nudge.apply(wanted, stored)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self._rounded(x), self.weight, self.bias)

    def _rounded(self, x: Tensor) -> Tensor:
        if self.spec.activation_bits == 16:
            return x
        counts, steps = rounded_tokens(x.detach(), self.spec.activation_bits)
        return Nudge.apply(x, (counts * steps).to(x.dtype))

    def packed(self) -> PackedLinear:
        """What was learned, packed again."""
        with torch.no_grad():
            scales, steps = grids.stored_scales(self.scales * self.growths.exp(), self.spec, up=False)
            codes = index_(self.latents.clone(), self.spec)
        return PackedLinear.from_rounded(grids.Rounded(codes, scales, steps, self.zeros), self.bias, self.spec)


def learnable(
    module: nn.Module, weights: Mapping[str, Tensor], inside: str | tuple[str, ...] = ""
) -> dict[str, LearnedLinear]:
    """For every packed linear inside, also the two of a split one, what takes its place for learning.

    weights: what linears stand for, by name, where that is known. inside: how the names begin that are looked at.
    """
    found, columns = {}, {}
    for name, inner in module.named_modules():
        if not name.startswith(inside):
            continue
        if isinstance(inner, SplitLinear):
            columns[f"{name}.rest"] = others(inner.salient, inner.in_features)
            columns[f"{name}.high"] = inner.salient.long()
        elif isinstance(inner, PackedLinear):
            own = columns.get(name)
            whole = name if own is None else name.rpartition(".")[0]
            W = weights.get(whole.removesuffix(".base_layer"))
            found[name] = LearnedLinear(inner, W if W is None or own is None else W[:, own])
    return found


def vectors_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Norms and whatever else is one number per channel, by name; biases of quantized linears are stored with these."""
    packed = tuple(
        f"{n}." for n, m in model.named_modules() if isinstance(m, PackedLinear | SplitLinear | LearnedLinear)
    )
    named = model.named_parameters()
    return {n: p for n, p in named if p.dim() == 1 and p.is_floating_point() and not n.startswith(packed)}
