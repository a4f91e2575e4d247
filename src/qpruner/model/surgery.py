"""Cutting units out of a model. The only file that assigns weights or configuration fields of one.

What follows a cut besides weights is data, in the tables below: attributes that count heads or channels, and
arguments that carry a value per head.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from inspect import isfunction, signature, unwrap

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qpruner.errors import ModelError
from qpruner.model.check import check_kept
from qpruner.model.graph import Graph, Group, LinearSite, Stack
from qpruner.model.skeleton import linear_dims

# Attributes of a module that calls a cut linear, and fields of its configuration, that its forward reads as counts.
# They shrink as the number of units in a block does. Not here, because they do not change: head_dim,
# num_key_value_groups where whole kv groups go, and what only __init__ reads (mostly embed_dim, hidden_size: see
# HEADS_WIDTHS).
COUNTS = {
    "kv_group": (
        "num_heads",
        "num_attention_heads",
        "num_key_value_heads",
        "num_kv_heads",
        "n_head",
        "n_heads",
        "split_size",
    ),
    "query_head": ("num_heads", "num_attention_heads", "num_key_value_groups", "n_head", "n_heads"),
    "channel": ("intermediate_size", "ffn_dim", "n_inner"),
    "expert": ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts"),
}
# Attributes of an attention that are the width of all its heads together, if its code reads them and they equal it.
HEADS_WIDTHS = ("hidden_size", "embed_dim", "inner_dim", "all_head_size", "attn_dim", "kv_projection_size")
HEAD_KINDS = ("kv_group", "query_head")
STREAM_WIDTHS = ("hidden_dim", "hidden_size", "input_size", "dim_norm")
QUERY_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")

# Arguments in which a model hands its attention one value per head, made for all its heads: (batch * heads, ...) or
# (batch, heads, ...). A mask is (batch, 1, ...) unless ALiBi is already in it.
PER_HEAD_ARGUMENTS = ("alibi", "position_bias")
PERHAPS_PER_HEAD_ARGUMENTS = ("attention_mask",)


def narrow_(model: nn.Module, graph: Graph, kept: Mapping[str, Sequence[int]]) -> None:
    """Removes all units but the kept ones, in place. Weights may be on the meta device.

    The narrowed model computes what the model did with the input columns of the removed units at zero. A group that
    keeps all its units is left as it is. The configuration of the model stays that of the original; the attention and
    MLP modules see their own counts.

    Raises:
        PlanError: `kept` does not fit the graph.
        ModelError: the model is not the one of the graph, or was narrowed or packed before.
    """
    check_kept(graph, kept)
    modules = dict(model.named_modules())
    cuts = remaining(graph, kept)
    for name in cuts:
        if name in graph.linears:
            _check_whole(modules.get(name), graph.linears[name])
        else:
            _check_whole_stack(model, graph.stacks[name])
    for group in graph.groups.values():
        if group.kind == "kv_group" and cuts.keys() & group.consumers:
            for path in modules_of(group):
                _keep_head_values_(modules[path], group, cuts)
        if group.kind == "residual" and len(kept[group.name]) < group.n_units:
            _set_stream_widths_(modules, graph, group, len(kept[group.name]))
        if group.kind in COUNTS and len(kept[group.name]) < group.n_units:
            for path in modules_of(group):
                _recount_(modules[path], group, len(kept[group.name]))
        for name in group.consumers.keys() & cuts.keys() if group.kind in HEAD_KINDS else ():
            site = graph.linears.get(name) or graph.stacks[name]
            left = len(cuts[name][1]) // _matrices(site)
            for path in modules_of(group):
                _heads_width_(modules[path], site.d_in, left)
    _cut_(model, graph, cuts_of(graph, kept))


def add_biases_(model: nn.Module, names: Iterable[str]) -> None:
    """A bias for linears that have none, where their weights are; its values are left to whoever fills the model.

    Raises:
        ModelError: a layer of another kind, which would not look at it, or one that has a bias.
    """
    for name in names:
        linear = model.get_submodule(name)
        if type(linear).forward is not nn.Linear.forward or linear.bias is not None:
            raise ModelError(
                f"{name!r} is a {type(linear).__name__}, and biases are added to an nn.Linear without one. Set "
                "added_biases to false."
            )
        weight = linear.weight
        linear.bias = nn.Parameter(
            torch.empty(len(weight), dtype=weight.dtype, device=weight.device), weight.requires_grad
        )


def refill_(module: nn.Module, **tensors: Tensor) -> None:
    """Other values for parameters of a module, as it stores them."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            getattr(module, name).copy_(tensor)


def modules_of(group: Group) -> list[str]:
    """Paths of the modules that call the linears of a group: those that hold one, up to the one that holds all."""
    found = {}
    for name in (*group.producers, *group.consumers, *group.tensors):
        path = name.rpartition(".")[0]
        found[path] = None
        while len(path) > len(group.module) > 0:
            path = path.rpartition(".")[0]
            found[path] = None
    return list(found)


def remaining(graph: Graph, kept: Mapping[str, Sequence[int]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows and columns that stay, ascending, of every linear and every stack that loses some."""
    rows, columns = {}, {}
    sites = graph.linears | graph.stacks
    size = {name: (_matrices(site) * site.d_out, _matrices(site) * site.d_in) for name, site in sites.items()}
    for group in graph.groups.values():
        gone = torch.ones(group.n_units, dtype=torch.bool)
        gone[list(kept[group.name])] = False
        if gone.any():
            for side, (stay, tables) in enumerate(((rows, group.producers), (columns, group.consumers))):
                for name, table in tables.items():
                    if group.kind == "expert" and name in graph.stacks:  # a slice of the stack goes instead
                        continue
                    stay.setdefault(name, torch.ones(size[name][side], dtype=torch.bool))[table[gone]] = False
    where = lambda stay, name, n: stay[name].nonzero().flatten() if name in stay else torch.arange(n)
    return {
        name: (where(rows, name, size[name][0]), where(columns, name, size[name][1]))
        for name in sites
        if name in rows or name in columns
    }


def bereft(graph: Graph, kept: Mapping[str, Sequence[int]]) -> dict[str, LinearSite]:
    """The linears that lose inputs, in the model's order."""
    cut = remaining(graph, kept)
    return {n: site for n, site in graph.linears.items() if n in cut and len(cut[n][1]) < site.d_in}


def bereft_stacks(graph: Graph, kept: Mapping[str, Sequence[int]]) -> dict[str, Stack]:
    """The stacks whose experts lose inputs, in the model's order."""
    cut = remaining(graph, kept)
    return {n: s for n, s in graph.stacks.items() if n in cut and len(cut[n][1]) < s.n_experts * s.d_in}


def _matrices(site: LinearSite | Stack) -> int:
    return site.n_experts if isinstance(site, Stack) else 1


def cuts_of(graph: Graph, kept: Mapping[str, Sequence[int]]) -> dict[str, tuple[tuple[int, Tensor], ...]]:
    """For every tensor that loses something: the dimensions and, ascending, the indices along them that stay.

    Of a stack each expert has its own: the indices then are (n_experts, n), one row for each slice of dimension 0.
    """
    cuts = {}
    for name, (rows, columns) in remaining(graph, kept).items():
        site = graph.linears.get(name) or graph.stacks[name]
        first = 0
        if isinstance(site, Stack):
            experts, first = torch.arange(site.n_experts)[:, None], 1
            rows = rows.view(site.n_experts, -1) - experts * site.d_out
            columns = columns.view(site.n_experts, -1) - experts * site.d_in
        weight, bias = names_of(site)
        dims = (1, 0) if site.transposed else (0, 1)
        cuts[weight] = ((first + dims[0], rows), (first + dims[1], columns))
        if bias:
            cuts[bias] = ((first, rows),)
    for name, slices in remaining_slices(graph, kept).items():
        cuts[name] = (*cuts.get(name, ()), *slices)  # an expert goes after channels of it
    return cuts


def remaining_slices(graph: Graph, kept: Mapping[str, Sequence[int]]) -> dict[str, tuple[tuple[int, Tensor], ...]]:
    """Dimensions and slices that stay, ascending, of every tensor that loses some by `Group.tensors`."""
    members, gone, found = defaultdict(set), defaultdict(set), defaultdict(tuple)
    for group in graph.groups.values():
        cut = sorted(set(range(group.n_units)).difference(kept[group.name]))
        for name, (dim, table) in group.tensors.items():
            members[name, dim] |= set(table.flatten().tolist())
            gone[name, dim] |= set(table[cut].flatten().tolist())
    for (name, dim), slices in gone.items():
        if slices:
            found[name] += ((dim, torch.tensor(sorted(members[name, dim] - slices))),)
    return dict(found)


def names_of(site: LinearSite | Stack) -> tuple[str, str | None]:
    """Of the parameters of a linear or a stack."""
    if isinstance(site, Stack):
        return site.name, site.bias
    return f"{site.name}.weight", f"{site.name}.bias" if site.bias else None


def cut_tensor(tensor: Tensor, cuts: Sequence[tuple[int, Tensor]]) -> Tensor:
    for dim, index in cuts:
        if index.shape[-1] < tensor.shape[dim]:
            index = index.to(tensor.device)
            if index.dim() == 1:
                tensor = tensor.index_select(dim, index)
            else:
                tensor = torch.stack([t.index_select(dim - 1, i) for t, i in zip(tensor, index, strict=True)])
    return tensor


def _check_whole(module: nn.Module | None, site: LinearSite) -> None:
    shape = (site.d_in, site.d_out) if site.transposed else (site.d_out, site.d_in)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.shape != shape or linear_dims(module) != (site.d_out, site.d_in):
        raise ModelError(
            f"{site.name!r} is not the {site.d_out} x {site.d_in} linear layer of the graph. Cut a model once, before "
            "its weights are packed, by the graph that was discovered on it."
        )


def _check_whole_stack(model: nn.Module, stack: Stack) -> None:
    found = tuple(dict(model.named_parameters())[stack.name].shape)
    expected = (stack.n_experts, *((stack.d_in, stack.d_out) if stack.transposed else (stack.d_out, stack.d_in)))
    if found != expected:
        raise ModelError(
            f"{stack.name!r} is of shape {found}, in the graph of {expected}. Cut a model once, by the graph that was "
            "discovered on it."
        )


def _cut_(model: nn.Module, graph: Graph, cuts: Mapping[str, Sequence[tuple[int, Tensor]]]) -> None:
    for name, dims in cuts.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        whole = getattr(module, attribute)
        data = whole.data
        cut = cut_tensor(data, dims)
        if cut is not data:
            parameter = isinstance(whole, nn.Parameter)  # else it is a table that the model keeps, such as of slopes
            setattr(module, attribute, nn.Parameter(cut, requires_grad=whole.requires_grad) if parameter else cut)
    for path in {name.rpartition(".")[0] for name in cuts}:
        _follow_shapes_(model.get_submodule(path))
    if cuts.keys() & (getattr(model, "all_tied_weights_keys", None) or {}).keys():
        model.tie_weights()


def _follow_shapes_(module: nn.Module) -> None:
    """What a linear, an embedding or a norm knows of the shape of its weight."""
    if isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(getattr(module, "in_features", None), int):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)


def _recount_(module: nn.Module, group: Group, n_kept: int) -> None:
    """Lets counts follow, on a module and in the view that it gets of its configuration."""
    by_block = group.n_blocks if group.kind in ("channel", "query_head") else 1
    n_units, n_kept = group.n_units // by_block, n_kept // by_block
    for name, value in _counting(vars(module), group).items():
        if value % n_units:
            raise ModelError(f"{group.name!r} has {n_units} units, which do not divide its {name} of {value}.")
        setattr(module, name, value // n_units * n_kept)
    if config := vars(module).get("config"):
        fields = _counting({name: getattr(config, name, None) for name in COUNTS[group.kind]}, group)
        # a field that the units do not divide counts something else, or nothing that this model reads
        counts = {name: v // n_units * n_kept for name, v in fields.items() if v % n_units == 0}
        module.config = LayerConfig(config, counts)


def _set_stream_widths_(modules: Mapping[str, nn.Module], graph: Graph, group: Group, n_kept: int) -> None:
    """Where a router, or what holds experts, knows how wide the hidden states are that it reads."""
    paths = {name.rpartition(".")[0] for name in (*group.tensors, *graph.stacks)}
    paths |= {name.rpartition(".")[0].rpartition(".")[0] for name in graph.stacks} - set(graph.layers)
    for path in paths:
        for name in STREAM_WIDTHS:
            if vars(modules[path]).get(name) == group.n_units:
                setattr(modules[path], name, n_kept)


def _counting(values: Mapping, group: Group) -> dict[str, int]:
    counts = {name: values[name] for name in COUNTS[group.kind] if isinstance(values.get(name), int)}
    if group.kind in ("channel", "expert"):  # a module may hold other widths too, those of experts for example
        return {name: value for name, value in counts.items() if value * group.n_blocks == group.n_units}
    return counts


def _heads_width_(module: nn.Module, whole: int, left: int) -> None:
    """Lets the width of all heads together follow, from so many columns to so many, where the module reads it."""
    functions = [unwrap(f) for name, f in vars(type(module)).items() if isfunction(f) and name != "__init__"]
    read = {name for function in functions for name in function.__code__.co_names}
    for name in HEADS_WIDTHS:
        if name in read and vars(module).get(name) == whole:
            setattr(module, name, left)


class LayerConfig:
    """The configuration as one narrowed module sees it: counts of its own, the rest the model's, as it changes."""

    def __init__(self, config, counts: dict[str, int]) -> None:
        self.__dict__.update(counts, _config=config)

    def __getattr__(self, name: str):
        if name == "_config" or name.startswith("__"):  # copy and pickle ask before the fields are there
            raise AttributeError(name)
        return getattr(self._config, name)


def _keep_head_values_(module: nn.Module, group: Group, cuts: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Where an attention is handed values per head, the kept heads keep their own, such as their ALiBi slopes."""
    arguments, n_heads = signature(module.forward).parameters.keys(), _n_heads(module)
    handed = arguments & {*PER_HEAD_ARGUMENTS, *PERHAPS_PER_HEAD_ARGUMENTS}
    if not n_heads or not handed:
        return
    name, columns = max(group.consumers.items(), key=lambda item: item[1].numel())  # a gate may read values too
    if name in cuts:
        heads = (cuts[name][1] * n_heads // columns.numel()).unique()
        module.register_forward_pre_hook(KeptHeads(n_heads, heads), with_kwargs=True)


def _n_heads(module: nn.Module) -> int | None:
    """Query heads of an attention, which knows them itself or reads them from its configuration."""
    config = vars(module).get("config")
    found = (vars(module).get(name, getattr(config, name, None)) for name in QUERY_HEAD_COUNTS)
    return next((n for n in found if isinstance(n, int)), None)


class KeptHeads:
    """A forward pre-hook that takes the values of the kept heads out of per-head arguments."""

    def __init__(self, n_heads: int, heads: Tensor) -> None:
        self.n_heads, self.heads = n_heads, heads

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        named = dict(zip(signature(module.forward).parameters, args, strict=False)) | kwargs
        batch = next((len(value) for value in named.values() if isinstance(value, Tensor)), 0)  # of the hidden states
        for name, value in named.items():
            surely, perhaps = name in PER_HEAD_ARGUMENTS, name in PERHAPS_PER_HEAD_ARGUMENTS
            if isinstance(value, Tensor) and (surely or (perhaps and self.by_head(value, batch))):
                named[name] = self.keep(value)
        return tuple(named.pop(name) for name in list(named)[: len(args)]), named

    def by_head(self, mask: Tensor, batch: int) -> bool:
        """Of three dimensions, a mask may be that of a batch; if both are as many, it is taken for that."""
        return mask.dim() > 2 and mask.shape[-3] == self.n_heads and not (mask.dim() == 3 and len(mask) == batch)

    def keep(self, values: Tensor) -> Tensor:
        heads = self.heads.to(values.device)
        if values.dim() == 4:
            return values[:, heads] if values.shape[1] == self.n_heads else values
        return values.unflatten(0, (-1, self.n_heads))[:, heads].flatten(0, 1)
