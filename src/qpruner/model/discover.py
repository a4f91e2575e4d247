"""The coupled structure of any decoder, found by differentiation.

`probe` runs the model and takes derivatives, `coupling` reads the groups of one layer from them, and this puts the
layers together. Layers of the same shape are probed once.
"""

from collections import defaultdict
from dataclasses import replace

import torch
from torch import nn

from qpruner.errors import listed
from qpruner.model.coupling import Coupling, couple
from qpruner.model.graph import Graph, Group, LinearSite, Projection
from qpruner.model.probe import Recording, escaping, record
from qpruner.model.skeleton import linear_sites

# An integer that only says which layer this is does not make the layer different from its neighbours.
POSITION_ATTRIBUTES = {"layer_idx", "layer_id", "layer_number", "block_idx"}


def discover(model: nn.Module) -> Graph:
    """What can be removed from a model, and which linears share an input. Weights may be on the meta device.

    Costs one pass over a few tokens and some hundred derivatives per distinct layer: about a second for LLaMA-7B.
    Neither the model nor the global random state is touched, and the graph does not depend on the weights.

    Raises:
        ModelError: the model has no list of decoder layers, or does not run on embeddings.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        return _discover(model)


def _discover(model: nn.Module) -> Graph:
    run = record(model)
    sites = linear_sites(model)
    escapes = escaping(run)
    known: dict[tuple, Coupling] = {}
    groups, unreached, layers_of_note = {}, {}, defaultdict(list)
    for i, layer in enumerate(run.layers):
        inside = {name.removeprefix(layer + "."): run.calls.get(name) for name in sites if sites[name].layer == i}
        calls = {name: call for name, call in inside.items() if call}
        beyond = {name for name in calls if f"{layer}.{name}" in escapes}
        parameters = {name.removeprefix(layer + "."): p for name, p in run.parameters(layer).items()}
        key = (frozenset(beyond), tuple(calls), *shape_of(run.model.get_submodule(layer)))
        if key not in known:
            known[key] = couple(calls, parameters, beyond, run.generator)
        for group in known[key].groups:
            group = placed(group, layer, i)
            groups[group.name] = group
        unreached |= {f"{layer}.{name}": rows for name, rows in known[key].unreached.items()}
        for note in (*known[key].notes, *whole(inside, parameters)):
            layers_of_note[note].append(i)
    return Graph(
        layers=run.layers,
        linears=sites,
        groups=groups,
        projections=projections(run, sites, groups),
        unreached=unreached,
        notes=tuple(f"{note} (in decoder layers {spans(layers)})" for note, layers in layers_of_note.items()),
    )


def shape_of(layer: nn.Module) -> tuple:
    """Layers for which this is equal have the same groups: modules, parameter shapes, counts and switches."""
    return tuple(
        (
            name,
            type(module),
            tuple((p, tensor.shape) for p, tensor in module.named_parameters(recurse=False)),
            tuple(
                (k, v)
                for k, v in sorted(vars(module).items())
                if isinstance(v, int | str) and k not in POSITION_ATTRIBUTES
            ),
        )
        for name, module in layer.named_modules()
    )


def placed(group: Group, layer: str, index: int) -> Group:
    """A group of a layer shape, as the group of one layer."""
    return replace(
        group,
        name=f"{layer}.{group.name}",
        layer=index,
        module=f"{layer}.{group.module}".removesuffix("."),
        producers={f"{layer}.{name}": rows for name, rows in group.producers.items()},
        consumers={f"{layer}.{name}": columns for name, columns in group.consumers.items()},
    )


def whole(inside: dict, parameters: dict) -> list[str]:
    """What of a layer is left as it is: linears that did not run, and matrices that belong to no linear."""
    idle = [name for name, call in inside.items() if call is None]
    stacked = [name for name, p in parameters.items() if p.dim() > 1]
    notes = []
    if idle:
        notes.append(f"{listed(idle)}: not used for the few tokens of the probe, so never pruned")
    if stacked:
        notes.append(f"{listed(stacked)}: of no linear layer, so neither pruned nor quantized")
    return notes


def spans(numbers: list[int]) -> str:
    """0-3, 7"""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def projections(run: Recording, sites: dict[str, LinearSite], groups: dict[str, Group]) -> tuple[Projection, ...]:
    """Linears that read the same tensor and produce the same group, together; every other linear by itself."""
    produced = {name: group.name for group in groups.values() for name in group.producers}
    together = defaultdict(list)
    for name in sites:
        if name in produced:
            x, _ = run.calls[name]
            together[produced[name], x.data_ptr(), x.shape].append(name)
        else:
            together[name].append(name)
    return tuple(Projection(joined(names), sites[names[0]].layer, tuple(names)) for names in together.values())


def joined(names: list[str]) -> str:
    """model.layers.0.mlp.gate_proj+up_proj"""
    parent = names[0].rpartition(".")[0]
    rest = [n.removeprefix(parent + ".") if n.rpartition(".")[0] == parent else n for n in names[1:]]
    return "+".join([names[0], *rest])
