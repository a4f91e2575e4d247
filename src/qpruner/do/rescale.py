"""Channels between the linears of a layer, made larger where they are read and smaller where they come from.

    a norm and all linears that read it         its weight and bias over s
    the linear whose rows go, times something, into the columns of another        those rows over s

Nothing is left to pay when the model runs. Which linear is the one, and whether all that reads a norm was found, is
tried: with factors in place the layer has to give what it gave without.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qpruner.do.junction import inputs_of
from qpruner.math import rescaling
from qpruner.math.gram import add_gram_
from qpruner.math.rescaling import spread
from qpruner.model.graph import Graph, Group
from qpruner.model.norms import offset_of
from qpruner.model.packed.split import packed
from qpruner.model.skeleton import linear_dims
from qpruner.model.stream import Step
from qpruner.model.surgery import refill_
from qpruner.plan import Plan

ROWS = 256  # of a weight that factors are tried on: all rows share them
PLAIN = {torch.float64: 1e-3, torch.float32: 1e-3}  # of what factors on one side alone would change: what both may
ROUGH = 0.03  # the same in shorter numbers
TRIALS = 16  # of where the columns of a group come from; layouts that are known are found by the first few
KINDS = ("kv_group", "channel")


@dataclass(frozen=True)
class Rescaled:
    """What became of a layer. Names are inner ones.

    sources: norms and linears that factors can be taken back in.
    changed: tensors other than the weights of quantized linears, as they now are. outputs: of linears whose outputs
        are now so many times what they were. errors: before and after, of the linears that were looked at, relative.
    """

    sources: tuple[str, ...] = ()
    changed: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Spot:
    """classes: of the inputs of every linear that reads, as in `math/rescaling.py`; m: of them.

    norm: where they come from, or `producer` and its row for every class.
    """

    classes: dict[str, Tensor]
    m: int
    norm: str | None = None
    producer: str | None = None
    rows: Tensor | None = None


def rescale_(
    ours: Step, graph: Graph, plan: Plan, rows: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype
) -> Rescaled:
    """Rescale what is between the quantized linears of a layer before they are rounded.

    Args:
        rows: rows and columns that are left of linears that lost some.
        dtype: in which norms are stored; factors are such that nothing is lost there.
    """
    return _Layer(ours, graph, plan, rows, dtype).rescaled()


class _Layer:
    def __init__(self, ours: Step, graph: Graph, plan: Plan, rows: Mapping, dtype: torch.dtype):
        self._ours, self._layer, self._plan, self._dtype = ours, ours.layer, plan, dtype
        self._path = graph.layers[ours.index] + "."
        self._groups = [g for g in graph.groups.values() if g.layer == ours.index and g.kind in KINDS]
        self._sites = {n.removeprefix(self._path): s for n, s in graph.linears.items() if s.layer == ours.index}
        self._remaining, self._kept = rows, plan.kept

    def rescaled(self) -> Rescaled:
        done = Rescaled()
        spots = [*self._norms(), *(spot for group in self._groups for spot in self._between(group))]
        for spot in spots:
            if any(self._bits(inner) < 16 for inner in spot.classes):
                self._rescale(spot, done)
        quantized = {f"{inner}.weight" for inner in self._sites if self._bits(inner) < 16}
        state = self._layer.state_dict()
        names = [name for name in done.changed if name not in quantized]
        sources = tuple(spot.norm or spot.producer for spot in spots)
        return Rescaled(sources, {name: state[name].clone() for name in names}, done.outputs, done.errors)

    def _bits(self, inner: str) -> int:
        return self._plan.specs[self._sites[inner].name].bits

    # --- where factors fit -------------------------------------------------------------------------------------------

    def _norms(self) -> list[_Spot]:
        """Norms whose output is the input of linears, and has been tried."""
        gave: dict[str, Tensor] = {}
        took: dict[str, Tensor] = {}
        handles = []
        for name, module in self._layer.named_modules():
            if name in self._sites:
                handles.append(module.register_forward_pre_hook(_taking(took, name)))
            elif name and _like_a_norm(module) and not linear_dims(module):
                handles.append(module.register_forward_hook(_giving(gave, name)))
        try:
            self._ours.run(0)
        finally:
            for handle in handles:
                handle.remove()
        spots = []
        for norm, output in gave.items():
            d = output.shape[-1]
            readers = [n for n, x in took.items() if x.data_ptr() == output.data_ptr() and x.numel() == output.numel()]
            if readers and self._layer.get_submodule(norm).weight.shape == (d,):
                spots.append(_Spot(dict.fromkeys(readers, torch.arange(d)), d, norm=norm))
        return [spot for spot in spots if self._holds(spot)]

    def _between(self, group: Group) -> list[_Spot]:
        """The first producer, and part of its rows, that can be divided by what the columns are multiplied with."""
        inner = lambda tables: {n.removeprefix(self._path): t for n, t in tables.items()}
        producers, consumers = inner(group.producers), inner(group.consumers)
        if not producers or not consumers or not {*producers, *consumers} <= self._sites.keys():
            return []
        kept = torch.tensor(self._kept[group.name])
        width = next(iter(consumers.values())).shape[1]
        if any(table.shape[1] != width for table in consumers.values()) or not len(kept):
            return []
        n_tried = 0
        for producer, table in reversed(producers.items()):  # values come after what attention looks at, up after gate
            for size, start in _parts(table.shape[1], width):
                rows = self._now(producer, table[kept, start : start + size].flatten(), 0)
                if rows is None or n_tried == TRIALS:
                    continue
                n_tried += 1
                classes = {n: self._classes(n, t[kept], size) for n, t in consumers.items()}
                spot = _Spot(classes, len(kept) * size, producer=producer, rows=rows)
                if self._holds(spot):
                    return [spot]
        return []

    def _now(self, inner: str, slices: Tensor, side: int) -> Tensor | None:
        """Numbers of rows (0) or columns (1) after the cuts; None where one is gone."""
        name = self._sites[inner].name
        if name not in self._remaining:
            return slices
        left = self._remaining[name][side]
        found = torch.searchsorted(left, slices).clamp(max=len(left) - 1)
        return found if torch.equal(left[found], slices) else None

    def _classes(self, inner: str, table: Tensor, size: int) -> Tensor:
        """Of the columns that are left: heads that share a producer's rows share their factors."""
        units = torch.arange(len(table))[:, None]
        site = self._sites[inner]
        classes = torch.full((site.d_in,), -1)
        classes[table] = units * size + torch.arange(table.shape[1]) % size
        return classes[self._remaining[site.name][1]] if site.name in self._remaining else classes

    def _holds(self, spot: _Spot) -> bool:
        """Whether factors on both sides change nothing, by what those on one side change."""
        generator = torch.Generator().manual_seed(0)
        s = torch.exp2(torch.randint(-1, 2, (spot.m,), generator=generator).double())  # exact in any dtype
        before, saved = self._ours.run(0).double(), self._save(spot)
        s = self._scale_source_(spot, s)
        one = self._ours.run(0).double()
        self._scale_readers_(spot, s)
        both = self._ours.run(0).double()
        for module, tensors in saved:
            refill_(module, **tensors)
        plain = PLAIN.get(next(self._layer.parameters()).dtype, ROUGH)
        return bool((both - before).norm() <= plain * (one - before).norm())

    # --- putting them there ------------------------------------------------------------------------------------------

    def _rescale(self, spot: _Spot, done: Rescaled) -> None:
        reads = {inner: classes for inner, classes in spot.classes.items() if self._bits(inner) < 16}
        first, classes = next(iter(reads.items()))
        G = self._gram(first)
        if G is None:
            return
        maps = [(self._rows_of(inner), self._round_of(inner)) for inner in reads]
        found = rescaling.choose(maps, G, classes.to(G.device), spot.m)
        size = sum(float(((W.double() @ G) * W.double()).sum()) for W, _ in maps) or 1.0
        done.errors.update(dict.fromkeys(reads, (found.error_before / size, found.error / size)))
        if found.error == found.error_before:
            return
        s = self._scale_source_(spot, found.s)
        self._scale_readers_(spot, s)
        source = spot.norm or spot.producer
        done.changed.update(dict.fromkeys(f"{inner}.weight" for inner in spot.classes))
        done.changed.update({f"{source}.{n}": None for n, _ in self._layer.get_submodule(source).named_parameters()})
        if spot.producer:
            n = self._matrix(spot.producer).shape[0]
            before = done.outputs.get(spot.producer, torch.ones(n, dtype=torch.float64))
            done.outputs[spot.producer] = before.index_copy(0, spot.rows, before[spot.rows] / s.cpu())

    def _matrix(self, inner: str) -> Tensor:
        weight = self._layer.get_submodule(inner).weight.detach()
        return weight.T if self._sites[inner].transposed else weight

    def _rows_of(self, inner: str) -> Tensor:
        W = self._matrix(inner)
        W = W if W.dtype == torch.float64 else W.float()
        return W[:: -(-len(W) // ROWS)]

    def _round_of(self, inner: str) -> Callable[[Tensor, Tensor], Tensor]:
        spec, rounding = self._plan.specs[self._sites[inner].name], self._plan.rounding

        def rounded(W: Tensor, counts: Tensor) -> Tensor:
            weight = counts[None] if rounding.method == "gptq" else None
            return packed(W, None, spec, ranges=rounding.ranges, weight=weight).dequantize(W.dtype)

        return rounded

    def _gram(self, inner: str) -> Tensor | None:
        """X^T X of the inputs as they come; None where there are none."""
        G = None
        for b in range(len(self._ours.batches)):
            X = inputs_of(self._ours, b, inner)
            if X is not None and len(X):
                X = X if X.dtype == torch.float64 else X.float()
                G = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64, device=X.device) if G is None else G
                add_gram_(G, X)
        return G

    def _save(self, spot: _Spot) -> list[tuple[nn.Module, dict[str, Tensor]]]:
        names = dict.fromkeys([*spot.classes, spot.norm or spot.producer])
        modules = [self._layer.get_submodule(name) for name in names]
        return [(m, {n: p.detach().clone() for n, p in m.named_parameters(recurse=False)}) for m in modules]

    def _scale_readers_(self, spot: _Spot, s: Tensor) -> None:
        for inner, classes in spot.classes.items():
            linear = self._layer.get_submodule(inner)
            factors = spread(s.to(linear.weight.device), classes.to(linear.weight.device))
            scaled = self._matrix(inner).double() * factors
            refill_(linear, weight=self._as_stored(inner, scaled))

    def _as_stored(self, inner: str, W: Tensor) -> Tensor:
        """A weight that stays in 16 bits is rounded to them here and now."""
        W = W.T if self._sites[inner].transposed else W
        return W if self._bits(inner) < 16 else W.to(self._dtype)

    def _scale_source_(self, spot: _Spot, s: Tensor) -> Tensor:
        """Divide by s; returns what it came to, where the quotient was rounded."""
        if spot.norm is not None:
            norm = self._layer.get_submodule(spot.norm)
            s, offset = s.to(norm.weight.device), offset_of(norm)
            gain = norm.weight.detach().double() + offset
            stored = (gain / s - offset).to(self._dtype)
            s = torch.where((gain == 0) | (stored.double() + offset == 0), s, gain / (stored.double() + offset))
            bias = (
                {}
                if getattr(norm, "bias", None) is None
                else {"bias": (norm.bias.detach().double() / s).to(self._dtype)}
            )
            refill_(norm, weight=stored, **bias)
            return s
        linear = self._layer.get_submodule(spot.producer)
        device = linear.weight.device
        factors = torch.ones(self._matrix(spot.producer).shape[0], dtype=torch.float64, device=device)
        factors[spot.rows.to(device)] = s.to(device)
        scaled = self._matrix(spot.producer).double() / factors[:, None]
        bias = {} if linear.bias is None else {"bias": (linear.bias.detach().double() / factors).to(self._dtype)}
        refill_(linear, weight=self._as_stored(spot.producer, scaled), **bias)
        return s


def _parts(n_rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Sizes and starts of equal parts of a unit's rows that the columns of a unit are a multiple of; the last first."""
    for size in range(width, 0, -1):
        if width % size == 0 and n_rows % size == 0:
            for start in range(n_rows - size, -1, -size):
                yield size, start


def _like_a_norm(module: nn.Module) -> bool:
    """Whether it has the parameters of a norm."""
    own = {name: p for name, p in module.named_parameters()}
    return "weight" in own and own.keys() <= {"weight", "bias"} and own["weight"].dim() == 1


def _taking(took: dict[str, Tensor], name: str) -> Callable:
    def hook(module: nn.Module, args: tuple) -> None:
        took[name] = args[0]

    return hook


def _giving(gave: dict[str, Tensor], name: str) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        if isinstance(output, Tensor):
            gave[name] = output

    return hook
