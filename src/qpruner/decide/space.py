"""What a joint search chooses between, and what any choice of all of it weighs: numbers alone, no tensor of a model.

Notation
    variable   one choice: how many units a group keeps, how fused linears are stored, whether a layer stays
    option     what a variable may be; options ascend in stored bytes, and the last one is as good as it gets
    point      one option for every variable                                                  (n,), int
    table      numbers for all combinations of the options of a few variables, which add up
"""

import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from qpruner.decide.ranks import rank_of
from qpruner.model import cost
from qpruner.model.graph import Graph
from qpruner.plan import DENSE, QuantSpec, Selection

Point = tuple[int, ...]


@dataclass(frozen=True)
class Variable:
    """One choice.

    name: of the decoder layer, the group, the projection or the embedding that it is about.
    layer: of the model; -1 for embeddings.
    options: of a layer whether it stays, (0, 1); of a width how many units stay; of bits a `QuantSpec` each.
    """

    name: str
    kind: Literal["layer", "width", "bits"]
    layer: int
    options: tuple


@dataclass(frozen=True, eq=False)
class Table:
    """values has one axis for each of `variables`, as long as it has options."""

    variables: tuple[int, ...]
    values: np.ndarray

    def at(self, points: np.ndarray) -> np.ndarray:
        """The number for every row of (m, n) points."""
        return self.values[tuple(points[:, v] for v in self.variables)]


@dataclass(frozen=True, eq=False)
class Space:
    """All points, and what they weigh. Where a layer goes, nothing else that is said of it means anything.

    layer_names: of all decoder layers. fixed_bytes: what no choice changes. tables: whole bytes besides. The sum is
    never below what is stored, and above it by a few bytes of the files' headers at most.
    """

    variables: tuple[Variable, ...]
    layer_names: tuple[str, ...]
    fixed_bytes: int
    tables: tuple[Table, ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """How many options each variable has."""
        return tuple(len(v.options) for v in self.variables)

    @property
    def top(self) -> Point:
        """The best of everything."""
        return tuple(n - 1 for n in self.sizes)

    def size_bytes(self, points: Sequence[Point] | np.ndarray) -> np.ndarray:
        """(m,) stored bytes of (m, n) points."""
        points = np.asarray(points, dtype=np.int64).reshape(-1, len(self.variables))
        return self.fixed_bytes + sum((table.at(points) for table in self.tables), np.zeros(len(points), np.int64))

    def canonical(self, points: Sequence[Point] | np.ndarray) -> np.ndarray:
        """The same points, with the first option wherever a layer that goes makes the choice mean nothing."""
        points = np.array(points, dtype=np.int64).reshape(-1, len(self.variables))
        for of_layer, inside in self.layers.values():
            if of_layer is not None:
                goes = np.array(self.variables[of_layer].options)[points[:, of_layer]] == 0
                points[np.ix_(goes, inside)] = 0
        return points

    @cached_property
    def layers(self) -> dict[int, tuple[int | None, list[int]]]:
        """Layer -> the variable that decides whether it stays, if there is one, and the others that are about it."""
        found: dict[int, tuple[int | None, list[int]]] = {}
        for layer in sorted({v.layer for v in self.variables if v.layer >= 0}):
            about = [i for i, v in enumerate(self.variables) if v.layer == layer]
            of_layer = next((i for i in about if self.variables[i].kind == "layer"), None)
            found[layer] = (of_layer, [i for i in about if i != of_layer])
        return found

    def selection(self, point: Point) -> Selection:
        """What a point says, in words."""
        chosen = {(v.kind, v.name): v.options[o] for v, o in zip(self.variables, point, strict=True)}
        gone = {name for (kind, name), stays in chosen.items() if kind == "layer" and not stays}
        layers = tuple(i for i, name in enumerate(self.layer_names) if name not in gone)
        inside = lambda v: v.layer < 0 or v.layer in layers
        return Selection(
            layers=layers,
            kept={v.name: chosen[v.kind, v.name] for v in self.variables if v.kind == "width" and inside(v)},
            specs={v.name: chosen[v.kind, v.name] for v in self.variables if v.kind == "bits" and inside(v)},
        )

    def restricted(self, options: Mapping[int, Sequence[int]]) -> "Space":
        """The space in which some variables have only some of their options, by index, ascending.

        Points of it are not points of this one; the variables are the same, in the same order.
        """
        some = {i: list(kept) for i, kept in options.items()}
        variables = tuple(
            replace(v, options=tuple(v.options[o] for o in some[i])) if i in some else v
            for i, v in enumerate(self.variables)
        )
        tables = tuple(
            Table(t.variables, t.values[np.ix_(*(some.get(v, range(self.sizes[v])) for v in t.variables))])
            for t in self.tables
        )
        return replace(self, variables=variables, tables=tables)


def space_of(
    graph: Graph,
    tensors: Mapping[str, cost.TensorSpec],
    *,
    dtype: str,
    widths: Mapping[str, Sequence[int]],
    specs: Sequence[QuantSpec],
    embeddings: Sequence[str] = (),
    embedding_specs: Sequence[QuantSpec] = (),
    droppable: Collection[int] = (),
    adapter_rank: int = 0,
    accepts: Callable[[QuantSpec, int], bool] = lambda spec, d_in: True,
) -> Space:
    """The space of a model, its sizes from shapes alone.

    Args:
        tensors, dtype: what the model stores, and in what its tensors of 32 bits would be stored.
        widths: units that a group may keep, ascending, the whole group last; groups without an entry stay whole.
        specs: how fused linears may be stored; ordered here, for each by what it then takes.
        embeddings: module paths of matrices outside the decoder layers, stored as one of `embedding_specs`.
        droppable: decoder layers that may go as a whole.
        adapter_rank: of the adapters beside the base, before `rank_of`; 0 for none.
        accepts: whether a linear with so many inputs may be stored so; offered is what is accepted at all widths.
    """
    sized = _Sized(graph, tensors, dtype, adapter_rank)
    variables: list[Variable] = []
    for layer, name in enumerate(graph.layers):
        if layer in droppable:
            variables.append(Variable(name, "layer", layer, (0, 1)))
        for group in graph.groups.values():
            if group.layer == layer and len(widths.get(group.name, ())) > 1:
                variables.append(Variable(group.name, "width", layer, tuple(widths[group.name])))
        for projection in graph.projections:
            if projection.layer == layer:
                weigh = lambda spec, p=projection: sized.projection(p.linears, {}, spec)
                inputs = sized.inputs(projection.linears, widths)
                offered = [spec for spec in specs if all(accepts(spec, d_in) for d_in in inputs)] or [DENSE]
                variables.append(Variable(projection.name, "bits", layer, tuple(sorted(offered, key=weigh))))
    for name in embeddings:
        weigh = lambda spec, name=name: sized.embedding(name, spec)
        variables.append(Variable(name, "bits", -1, tuple(sorted(embedding_specs, key=weigh))))
    return sized.space(tuple(variables), embeddings)


class _Sized:
    """Bytes of the parts of a model, with their share of the file's header."""

    def __init__(self, graph: Graph, tensors: Mapping[str, cost.TensorSpec], dtype: str, adapter_rank: int):
        self._graph, self._dtype, self._rank = graph, dtype, adapter_rank
        self._tensors = {name: (dtype if d in cost.WIDE else d, shape) for name, (d, shape) in tensors.items()}
        # No offset in a header has more digits than the size of the whole at 16 bits.
        self._digits = len(str(sum(map(cost.tensor_bytes, self._tensors.values()))))

    def entry(self, name: str, tensor: cost.TensorSpec) -> int:
        described = {"dtype": tensor[0], "shape": list(tensor[1]), "data_offsets": [10 ** (self._digits - 1)] * 2}
        text = json.dumps({name: described}, separators=(",", ":"))
        return cost.tensor_bytes(tensor) + len(text.encode()) - 1  # of the braces one becomes a comma

    def matrix(self, name: str, d_out: int, d_in: int, spec: QuantSpec) -> int:
        parts = cost.weight_tensors(d_out, d_in, spec, self._tensors[f"{name}.weight"][0])
        return sum(self.entry(f"{name}.{part}", tensor) for part, tensor in parts.items())

    def embedding(self, name: str, spec: QuantSpec) -> int:
        return self.matrix(name, *self._tensors[f"{name}.weight"][1], spec)

    def projection(self, linears: Sequence[str], kept: Mapping[str, int], spec: QuantSpec) -> int:
        """kept: units of groups that lose some."""
        total = 0
        for name, (d_out, d_in) in self._dims(linears, kept).items():
            total += self.matrix(name, d_out, d_in, spec)
            if (bias := self._tensors.get(f"{name}.bias")) is not None:
                total += self.entry(f"{name}.bias", (bias[0], (d_out,)))
            if self._rank:
                rank = rank_of(self._rank, (d_out, d_in))
                for part, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
                    total += self.entry(f"base_model.model.{name}.lora_{part}.weight", (self._dtype, shape))
        return total

    def slices(self, name: str, kept: Mapping[str, int]) -> int:
        """A tensor beside the linears that loses slices with the units of a group."""
        dtype, shape = self._tensors[name]
        for group in self._graph.groups.values():
            if name in group.tensors and group.name in kept:
                dim, table = group.tensors[name]
                lost = (group.n_units - kept[group.name]) * table.shape[1]
                shape = (*shape[:dim], shape[dim] - lost, *shape[dim + 1 :])
        return self.entry(name, (dtype, shape))

    def inputs(self, linears: Sequence[str], widths: Mapping[str, Sequence[int]]) -> set[int]:
        """All numbers of inputs that they may have."""
        found = {self._graph.linears[name].d_in for name in linears}
        for name, counts in widths.items():
            if any(linear in self._graph.groups[name].consumers for linear in linears):
                found |= {d_in for n in counts for _, d_in in self._dims(linears, {name: n}).values()}
        return found

    def _dims(self, linears: Sequence[str], kept: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        return {name: narrowed(self._graph, name, kept) for name in linears}

    def space(self, variables: tuple[Variable, ...], embeddings: Sequence[str]) -> Space:
        place = {(v.kind, v.name): i for i, v in enumerate(variables)}
        accounted = {f"{name}.{end}" for name in self._graph.linears for end in ("weight", "bias")}
        accounted |= {f"{name}.weight" for name in embeddings}
        tables, fixed = [], cost.header_bytes({}) + 8  # the header is filled up to eight bytes
        if self._rank:
            fixed *= 2
        for projection in self._graph.projections:
            bits = place["bits", projection.name]
            sites = set(projection.linears)
            groups = [g for g in self._cut(place) if sites & (g.producers.keys() | g.consumers.keys())]
            weigh = lambda kept, spec, p=projection: self.projection(p.linears, kept, spec)
            tables.append(self._table(variables, place, projection.layer, groups, weigh, bits))
        for name in self._tensors.keys() - accounted:
            layer = next((i for i, path in enumerate(self._graph.layers) if name.startswith(f"{path}.")), -1)
            groups = [g for g in self._cut(place) if name in g.tensors]
            if groups or ("layer", self._graph.layers[layer] if layer >= 0 else "") in place:
                weigh = lambda kept, _, name=name: self.slices(name, kept)
                tables.append(self._table(variables, place, layer, groups, weigh))
            else:
                fixed += self.slices(name, {})
        for name in embeddings:
            bits = place["bits", name]
            sizes = [self.embedding(name, spec) for spec in variables[bits].options]
            tables.append(Table((bits,), np.array(sizes, dtype=np.int64)))
        return Space(variables, self._graph.layers, fixed, _joined(tables))

    def _cut(self, place: Mapping) -> list:
        return [group for name, group in self._graph.groups.items() if ("width", name) in place]

    def _table(self, variables, place, layer: int, groups, weigh, bits: int | None = None) -> Table:
        """weigh: units kept of groups, and a spec, to bytes. Zero where the layer goes."""
        about = [place["width", group.name] for group in groups] + ([] if bits is None else [bits])
        values = np.empty([len(variables[v].options) for v in about], dtype=np.int64)
        for index in itertools.product(*map(range, values.shape)):
            chosen = [variables[v].options[o] for v, o in zip(about, index, strict=True)]
            kept = {group.name: n for group, n in zip(groups, chosen, strict=False)}
            values[index] = weigh(kept, None if bits is None else chosen[-1])
        stays = place.get(("layer", self._graph.layers[layer])) if layer >= 0 else None
        if stays is None:
            return Table(tuple(about), values)
        return Table((stays, *about), np.stack([np.zeros_like(values), values]))


def narrowed(graph: Graph, linear: str, kept: Mapping[str, int]) -> tuple[int, int]:
    """(d_out, d_in) of a linear where some groups keep so many units; any of them, all weigh the same."""
    d_out, d_in = graph.linears[linear].d_out, graph.linears[linear].d_in
    for name, n in kept.items():
        group = graph.groups[name]
        gone = group.n_units - n
        d_out -= gone * group.producers[linear].shape[1] if linear in group.producers else 0
        d_in -= gone * group.consumers[linear].shape[1] if linear in group.consumers else 0
    return d_out, d_in


def _joined(tables: Sequence[Table]) -> tuple[Table, ...]:
    """Tables of the same variables as one."""
    found: dict[tuple[int, ...], np.ndarray] = {}
    for table in tables:
        found[table.variables] = found.get(table.variables, 0) + table.values
    return tuple(Table(variables, values) for variables, values in found.items())
