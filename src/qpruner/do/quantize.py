"""Quantized layers with their LoftQ adapters, made once and swapped in and out of the pruned model.

A trial of the search and the final artifact use the same candidates: what was judged is what ships.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qpruner.do import starts
from qpruner.do.starts import Candidate
from qpruner.model import adapters
from qpruner.model.graph import Graph, LinearSite
from qpruner.model.packed.embedding import put_embedding_
from qpruner.model.packed.linear import PackedLinear
from qpruner.model.packed.split import Quantized, packed, stored
from qpruner.model.surgery import refill_
from qpruner.model.tensors import Stored
from qpruner.plan import Plan, QuantSpec


class Candidates:
    """The linears of a pruned model in every form that is asked for, made at the first asking and kept.

    On construction the model gets its adapters; from then on `put_` decides what stands at each place. It may be asked
    for embeddings and heads, too, if those of the model are not in codes yet.
    """

    def __init__(self, model: nn.Module, graph: Graph, plan: Plan, *, adapter_dtype: torch.dtype):
        """plan: for the ranks, the recovery settings and the seed; its specs are not looked at."""
        self._model, self._graph, self._plan, self._dtype = model, graph, plan, adapter_dtype
        self._dense = {name: model.get_submodule(name) for name in graph.linears}
        ends = {path for site in graph.embeddings.values() for path in (site.name, *site.heads)}
        self._ends = {path: model.get_submodule(path) for path in ends}
        self._made: dict[tuple[str, QuantSpec], Candidate] = {}
        self._matrices: dict[tuple[str, QuantSpec], PackedLinear] = {}  # embeddings and heads
        self._placed: dict[str, QuantSpec] = {}
        if plan.adapter_ranks:
            recovery = plan.recovery
            adapters.inject_adapters_(
                model, plan.adapter_ranks, alpha=recovery.adapter_alpha, dropout=recovery.adapter_dropout
            )
            model.eval()

    def candidate(self, name: str, spec: QuantSpec) -> Candidate:
        key = name, spec
        if key not in self._made:
            self._made[key] = self._make(name, spec)
        return self._made[key]

    def put_(self, specs: Mapping[str, QuantSpec]) -> None:
        """Have every linear stored as `specs` says; those that already are stay as they are."""
        factors = {}
        for name, spec in specs.items():
            if self._placed.get(name) == spec:
                continue
            if name in self._graph.embeddings:
                self._put_embedding_(name, spec)
                self._placed[name] = spec
                continue
            candidate = self.candidate(name, spec)
            self._place_(name, candidate.layer)
            if candidate.factors is not None:
                factors[name] = candidate.factors
            self._placed[name] = spec
        if factors:
            adapters.set_adapter_weights_(self._model, factors)

    def _put_embedding_(self, name: str, spec: QuantSpec) -> None:
        site = self._graph.embeddings[name]
        stood = {path: self._ends[path] for path in (name, *site.heads)}
        if spec.bits == 16:
            for path, module in stood.items():
                self._model.set_submodule(path, module)
            return
        dense, key = stood[name], (name, spec)
        assert isinstance(dense.weight, nn.Parameter), f"{name} was in codes before anything was asked for"
        if key not in self._matrices:
            self._matrices[key] = packed(
                dense.weight, getattr(dense, "bias", None), spec, ranges=self._plan.rounding.ranges
            )
        put_embedding_(self._model, site, self._matrices[key], dtype=dense.weight.dtype, dense=stood)

    def put_stored_(self, specs: Mapping[str, QuantSpec], codes: Stored) -> None:
        """Have the quantized linears that stand there store other codes; adapters start anew.

        codes: may have the starts that were found with them; other tensors of the model take the place of its own.
        """
        modules = dict(self._model.named_modules()) | self._dense
        for name in codes.places:
            path, _, attribute = name.rpartition(".")
            if path in modules and modules[path]._parameters.get(attribute) is not None:
                refill_(modules[path], **{attribute: codes.read(name)})
        for name, spec in specs.items():
            if spec.bits < 16:
                dense, site = self._dense[name], self._graph.linears[name]
                self._made[name, spec] = made(dense, site, spec, self._plan, self._dtype, codes=codes)
                self._placed.pop(name, None)
        self.put_(specs)

    def weights(self) -> dict[str, Tensor]:
        """Of every linear before anything was rounded, (d_out, d_in)."""
        return {name: matrix_of(dense, self._graph.linears[name]) for name, dense in self._dense.items()}

    def stored(self, specs: Mapping[str, QuantSpec]) -> dict[str, Tensor]:
        """What the quantized linears that stand there store, by name."""
        found = {}
        for name, spec in specs.items():
            if spec.bits < 16:
                standing = self._model.get_submodule(name)
                layer = getattr(standing, "base_layer", standing)
                found |= {f"{name}.{key}": tensor.detach().clone() for key, tensor in layer.state_dict().items()}
        return found

    def _place_(self, name: str, layer: nn.Module) -> None:
        """Under the adapter where there is one."""
        standing = self._model.get_submodule(name)
        if hasattr(standing, "base_layer"):
            standing.base_layer = layer
        else:
            self._model.set_submodule(name, layer)

    def errors(self) -> dict[str, tuple[float, float]]:
        """(plain, with LoftQ) of every linear that is now quantized."""
        linears = {name: spec for name, spec in self._placed.items() if name in self._graph.linears}
        made = {name: self._made[name, spec] for name, spec in linears.items() if spec.bits < 16}
        return {name: (c.plain_error, c.error) for name, c in made.items()}

    def forget(self) -> None:
        """Let go of every candidate that does not stand in the model."""
        self._made, self._dense, self._ends, self._matrices = {}, {}, {}, {}

    def _make(self, name: str, spec: QuantSpec) -> Candidate:
        return made(self._dense[name], self._graph.linears[name], spec, self._plan, self._dtype)


def made(
    dense: nn.Module,
    site: LinearSite,
    spec: QuantSpec,
    plan: Plan,
    adapter_dtype: torch.dtype,
    *,
    codes: Stored | None = None,
) -> Candidate:
    """One linear stored as `spec` says, with the start of the adapter that the plan gives it.

    codes: what quantized linears store, by name, and maybe the starts that were found with them; without codes the
        weight is rounded to nearest.
    """
    W = matrix_of(dense, site)
    if spec.bits == 16:
        return starts.fresh(dense, W.shape, site.name, plan, adapter_dtype)

    def rounding(weight: Tensor) -> tuple[Quantized, Tensor]:
        layer = packed(weight, dense.bias, spec, ranges=plan.rounding.ranges)
        return layer, layer.dequantize()

    if codes is None:
        return starts.started(W, site.name, rounding, plan, adapter_dtype)
    layer = stored_in(codes, site.name, spec, dense, W.shape[1])
    known = starts.read(codes, site.name, layer)
    return known or starts.started(W, site.name, lambda _: (layer, layer.dequantize()), plan, adapter_dtype)


def matrix_of(dense: nn.Module, site: LinearSite) -> Tensor:
    """(d_out, d_in), float32."""
    return (dense.weight.T if site.transposed else dense.weight).detach().float()


def stored_in(codes: Stored, name: str, spec: QuantSpec, dense: nn.Module, d_in: int) -> Quantized:
    """A linear from what it stores; its bias in the dtype of that of the dense one."""
    tensors = {n.removeprefix(f"{name}."): codes.read(n) for n in codes.places if n.startswith(f"{name}.")}
    tensors = {n: tensor.to(dense.weight.device) for n, tensor in tensors.items()}
    bias = tensors.pop("bias", None)
    return stored(tensors, None if bias is None else bias.to(dense.bias.dtype), spec, d_in)
