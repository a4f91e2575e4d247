"""The coupled structure of any decoder, found by differentiation.

`probe` runs the model and takes derivatives, `coupling` reads the groups of one layer from them, and this puts the
layers together. Layers of the same shape are probed once.
"""

from collections import defaultdict
from dataclasses import replace

import torch
from torch import Tensor, nn

from qpruner.errors import listed
from qpruner.model.coupling import Coupling, Surroundings, couple
from qpruner.model.embeddings import embedding_sites
from qpruner.model.graph import Graph, Group, LinearSite, Projection, Stack
from qpruner.model.mixture import expert_groups
from qpruner.model.probe import HIDDEN_STATES, Escapes, Recording, escapes_of, record, spans
from qpruner.model.residual import Roles, residual_group, roles_in
from qpruner.model.skeleton import linear_sites

# An integer that only says which layer this is does not make the layer different from its neighbours.
POSITION_ATTRIBUTES = {"layer_idx", "layer_id", "layer_number", "block_idx"}

# What the code of a module takes for granted and no derivative shows.
RIGID = {
    "TrOCRAttention": "its code gives all heads together the width of the hidden states",
    "xLSTMLayer": "its state has the width that the configuration gives, for all layers at once",
    "RwkvSelfAttention": "its state has the width that the configuration gives, for all layers at once",
}

INNER = ("query_head", "expert", "residual")  # kinds that share linears with those of others, and come after them


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
    escapes = escapes_of(run)
    stacks = stacks_of(run, sites)
    known: dict[tuple, tuple[Coupling, Roles]] = {}
    groups, unreached, layers_of_note, roles = {}, {}, defaultdict(list), []
    for i, layer in enumerate(run.layers):
        inner = lambda named, layer=layer: {n.removeprefix(f"{layer}."): v for n, v in named.items()}
        calls, values = run.calls(layer), run.values(layer)
        around = surroundings(run, layer, stacks, escapes, values)
        beyond = {name for name in calls if name in escapes.names}
        key = (
            frozenset(inner(dict.fromkeys(beyond))),
            tuple(inner(calls)),
            tuple(inner(around.fixed)),
            tuple(inner(around.stream)),
        )
        key += shape_of(run.model.get_submodule(layer))
        if key not in known:
            relative = Surroundings(*map(inner, vars(around).values()))
            alone = set(inner(dict.fromkeys(beyond)))
            known[key] = (
                couple(inner(calls), relative, alone, run.generator),
                stream_roles(run, i, sites, stacks, alone),
            )
        coupling, role = known[key]
        roles.append(role)
        for group in coupling.groups:
            group = placed(group, layer, i)
            groups[group.name] = group
        unreached |= {f"{layer}.{name}": rows for name, rows in coupling.unreached.items()}
        here = {name: site for name, site in sites.items() if site.layer == i}
        for note in (*coupling.notes, *whole(run, inner(here), inner(values), layer, stacks)):
            layers_of_note[note].append(i)
    experts, without = expert_groups(model, sites, stacks)
    groups |= {group.name: group for group in experts}
    for i, path, reason in without:
        name = path.removeprefix(f"{run.layers[i]}.")
        layers_of_note[f"{name!r}: {reason}, so no expert of it is ever left out whole"].append(i)
    residual, why_not = residual_group(run, sites | stacks, roles)
    if residual:
        groups[residual.name] = residual
    embeddings, left_out = embedding_sites(model)
    notes = [f"{note} (in decoder layers {spans(layers)})" for note, layers in layers_of_note.items()]
    return Graph(
        layers=run.layers,
        linears=sites,
        groups={name: g for part in (False, True) for name, g in groups.items() if (g.kind in INNER) == part},
        projections=projections(run, sites, groups),
        stacks=stacks,
        embeddings=embeddings,
        unreached=unreached,
        notes=(*notes, why_not, *left_out) if why_not else (*notes, *left_out),
        exchanges=escapes.exchanges,
    )


def stream_roles(
    run: Recording, index: int, sites: dict[str, LinearSite], stacks: dict[str, Stack], beyond: set[str]
) -> Roles:
    """Who takes part in the hidden states of a layer, or why that cannot be said."""
    layer, biases = run.layers[index], {stack.bias for stack in stacks.values()}
    inner = lambda named: {n.removeprefix(f"{layer}."): v for n, v in named.items()}
    calls, values = inner(run.calls(layer)), inner({n: v for n, v in run.values(layer).items() if n not in biases})
    members = {name: 0 for name in (*sites, *run.uses) if name.startswith(f"{layer}.")}
    if unclear := [name for name in inner(members) if name not in calls]:
        return Roles(why_not=f"{unclear[0]!r} was not used once as a whole")
    if HIDDEN_STATES not in run.given.get(layer, {}):
        return Roles(why_not="it is not seen what they are")
    own = torch.Generator().manual_seed(0)  # what else is found does not depend on whether this was asked
    return roles_in(calls, run.given[layer][HIDDEN_STATES], run.outputs[index], values, beyond, own)


def stacks_of(run: Recording, sites: dict[str, LinearSite]) -> dict[str, Stack]:
    """Every stack of experts of which single experts were multiplied with."""
    found = {}
    for i, layer in enumerate(run.layers):
        for name, use in run.of(layer).items():
            if name not in sites and run.separable(name):
                p = use.product
                bias = bias_of(run.model, name, (p.n_experts, p.d_out))
                found[name] = Stack(name, i, p.n_experts, p.d_out, p.d_in, p.transposed, bias)
    return found


def bias_of(model: nn.Module, stack: str, shape: tuple[int, int]) -> str | None:
    """The parameter that a module keeps under its stack's name and something after it, with a value for every row."""
    path, _, attribute = stack.rpartition(".")
    beside = model.get_submodule(path).named_parameters(recurse=False)
    return next((f"{path}.{n}" for n, p in beside if n.startswith(attribute) and p.shape == shape), None)


def surroundings(
    run: Recording, layer: str, stacks: dict[str, Stack], escapes: Escapes, values: dict[str, Tensor]
) -> Surroundings:
    """What the linears of a layer may depend on besides each other's rows that can be cut."""
    biases = {stack.bias for stack in stacks.values()}
    values = {name: v for name, v in values.items() if v is not None and name not in biases}
    convolved = {
        n: v for n, v in values.items() if hasattr(run.model.get_submodule(n.rpartition(".")[0]), "kernel_size")
    }
    mine, given = run.of(layer), run.given.get(layer, {})
    whole = [n for n in mine if n in escapes.names or not run.separable(n)]
    fixed = convolved | {
        f"{n} (use {i + 1})" if i else n: leaf
        for n in (*whole, *sorted(escapes.into.get(layer, ())))
        for i, (_, leaf) in enumerate(run.uses[n].all_calls)
    }
    width = given[HIDDEN_STATES].shape[-1] if given else 0
    fixed |= given
    stream = {n: v for n, v in fixed.items() if v.shape[-1] == width and n not in convolved}
    stream |= {n: one for n, one in run.made_up.items() if n.startswith(f"{layer}.")}
    return Surroundings(
        values={n: v for n, v in values.items() if n not in convolved},
        fixed={n: v for n, v in fixed.items() if n not in stream},
        stream=stream,
        experts={n: (s.n_experts, s.d_out, s.d_in) for n, s in stacks.items() if n in mine},
        rigid={
            path: RIGID[type(module).__name__]
            for path, module in run.model.get_submodule(layer).named_modules(prefix=layer)
            if type(module).__name__ in RIGID
        },
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
    within = lambda tables: {f"{layer}.{name}": t for name, t in tables.items()}
    return replace(
        group,
        name=f"{layer}.{group.name}",
        layer=index,
        module=f"{layer}.{group.module}".removesuffix("."),
        producers=within(group.producers),
        consumers=within(group.consumers),
        tensors=within(group.tensors),
    )


def whole(run: Recording, linears: dict, values: dict, layer: str, stacks: dict[str, Stack]) -> list[str]:
    """What of a layer is left as it is: linears that did not run or not once, and matrices that belong to no linear."""
    full = lambda name: f"{layer}.{name}"
    idle = [name for name in linears if full(name) not in run.uses]
    shared = [n.removeprefix(f"{layer}.") for n in run.of(layer) if not run.separable(n)]
    biases = {stack.bias for stack in stacks.values()}
    matrices = [n for n, v in values.items() if (v is None or v.dim() > 1) and full(n) not in biases]
    notes = []
    if idle:
        notes.append(f"{listed(idle)}: not used for the few tokens of the probe, so never pruned")
    if shared:
        notes.append(f"{listed(shared)}: used in several places or in parts, so never pruned")
    if matrices:
        notes.append(f"{listed(matrices)}: of no linear layer, so neither pruned nor quantized")
    return notes


def projections(run: Recording, sites: dict[str, LinearSite], groups: dict[str, Group]) -> tuple[Projection, ...]:
    """Linears that read the same tensor and produce the same group, together; every other linear by itself."""
    produced = {name: g.name for g in groups.values() if g.kind not in INNER for name in g.producers}
    together = defaultdict(list)
    for name in sites:
        if name in produced:
            [(x, _)] = run.uses[name].all_calls
            together[produced[name], x.data_ptr(), x.shape].append(name)
        else:
            together[name].append(name)
    return tuple(Projection(joined(names), sites[names[0]].layer, tuple(names)) for names in together.values())


def joined(names: list[str]) -> str:
    """model.layers.0.mlp.gate_proj+up_proj"""
    parent = names[0].rpartition(".")[0]
    rest = [n.removeprefix(parent + ".") if n.rpartition(".")[0] == parent else n for n in names[1:]]
    return "+".join([names[0], *rest])
