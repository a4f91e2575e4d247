"""Linears of a layer that share an input, seen as one: their weights on top of each other."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qpruner.model.graph import Graph, LinearSite
from qpruner.model.packed.split import Quantized
from qpruner.model.surgery import refill_
from qpruner.plan import QuantSpec


@dataclass(frozen=True)
class Fused:
    """Final. sites: by inner name, of the layer before the cuts."""

    layer: nn.Module
    sites: dict[str, LinearSite]
    spec: QuantSpec

    @property
    def first(self) -> str:
        return next(iter(self.sites))

    @property
    def linears(self) -> Iterator[tuple[str, nn.Module, Tensor]]:
        """Inner name, module, and weight of (d_out, d_in)."""
        for inner, site in self.sites.items():
            linear = self.layer.get_submodule(inner)
            yield inner, linear, (linear.weight.T if site.transposed else linear.weight).detach()

    @property
    def W(self) -> Tensor:
        """In float32 at least."""
        W = torch.cat([W for *_, W in self.linears])
        return W if W.dtype == torch.float64 else W.float()

    @property
    def b(self) -> Tensor | None:
        """The bias, where each of them has one."""
        biases = [linear.bias for _, linear, _ in self.linears]
        return None if any(bias is None for bias in biases) else torch.cat(biases).detach()

    @property
    def constant(self) -> Tensor:
        """What is added to the output, zero for those that have no bias."""
        filled = [W.new_zeros(len(W)) if linear.bias is None else linear.bias for _, linear, W in self.linears]
        return torch.cat(filled).detach()

    def kept(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Of the original's outputs, those that are left. rows: as `remaining` has them."""
        found, start = [], 0
        for site in self.sites.values():
            found.append(start + (rows[site.name][0] if site.name in rows else torch.arange(site.d_out)))
            start += site.d_out
        return torch.cat(found)

    def put_(
        self, made: Mapping[str, Quantized], dtype: torch.dtype, beside: Mapping[str, Tensor] | None = None
    ) -> None:
        """Have the layer compute with what will be stored, biases in dtype.

        beside: what adapters add to the weights of some of them.
        """
        for inner, linear, _ in self.linears:
            Q, bias = made[inner].dequantize(), made[inner].bias
            if beside and inner in beside:
                Q = (Q + beside[inner]).to(Q.dtype)
            changed = {"weight": Q.T if self.sites[inner].transposed else Q}
            refill_(linear, **changed, **({} if bias is None else {"bias": bias.to(dtype)}))


def fused_in(layer: nn.Module, index: int, graph: Graph, specs: Mapping[str, QuantSpec]) -> list[Fused]:
    """Those of a layer that are quantized."""
    path = graph.layers[index] + "."
    inside = lambda names: {name.removeprefix(path): graph.linears[name] for name in names}
    spec_of = lambda names: specs[names[0]]  # a plan is refused where they differ
    return [
        Fused(layer, inside(fused.linears), spec_of(fused.linears))
        for fused in graph.projections
        if fused.layer == index and spec_of(fused.linears).bits < 16
    ]


def by_name(all_of: Sequence[Fused], made: Mapping[str, Quantized], dtype: torch.dtype) -> dict[str, Tensor]:
    """What quantized linears store, under their names in the model, biases in dtype."""
    names = {inner: site.name for fused in all_of for inner, site in fused.sites.items()}
    found = {f"{names[inner]}.{key}": t for inner, layer in made.items() for key, t in layer.state_dict().items()}
    return {name: tensor.to(dtype) if name.endswith(".bias") else tensor for name, tensor in found.items()}
