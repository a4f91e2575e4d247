"""Cutting units out of a model. The only file that assigns weights or configuration fields of one.

What follows a cut besides weights is data, in the tables below: attributes that count heads or channels, and
arguments that carry a value per head.
"""

from collections.abc import Mapping, Sequence
from inspect import signature, unwrap

import torch
from torch import Tensor, nn

from qpruner.errors import ModelError
from qpruner.model.check import check_kept
from qpruner.model.graph import Graph, Group, LinearSite
from qpruner.model.skeleton import linear_dims

# Attributes of a module that calls a cut linear, and fields of its configuration, that its forward reads as counts.
# They shrink as the number of units does. Not here, because they do not change: head_dim, num_key_value_groups (whole
# kv groups go), and what only __init__ reads (mostly embed_dim, hidden_size: see HEADS_WIDTHS).
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
    "channel": ("intermediate_size", "ffn_dim", "n_inner"),
}
# Attributes of an attention that are the width of all its heads together, if its forward reads them and they equal it.
HEADS_WIDTHS = ("hidden_size", "embed_dim", "inner_dim")
HEAD_KINDS = ("kv_group", "query_head")
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
        _check_whole(modules.get(name), graph.linears[name])
    for group in graph.groups.values():
        if len(kept[group.name]) < group.n_units:
            for path in dict.fromkeys(name.rpartition(".")[0] for name in (*group.producers, *group.consumers)):
                _keep_head_values_(modules[path], group, kept[group.name])
                _recount_(modules[path], group, len(kept[group.name]))
        for name in group.consumers.keys() & cuts.keys() if group.kind in HEAD_KINDS else ():
            _, columns = cuts[name]
            _heads_width_(modules[name.rpartition(".")[0]], graph.linears[name].d_in, len(columns))
    _cut_(model, graph, cuts_of(graph, kept))


def remaining(graph: Graph, kept: Mapping[str, Sequence[int]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows and columns that stay, ascending, of every linear that loses some."""
    rows, columns = {}, {}
    for group in graph.groups.values():
        gone = torch.ones(group.n_units, dtype=torch.bool)
        gone[list(kept[group.name])] = False
        if gone.any():
            for stay, side in ((rows, group.producers), (columns, group.consumers)):
                for name, table in side.items():
                    site = graph.linears[name]
                    size = site.d_out if stay is rows else site.d_in
                    stay.setdefault(name, torch.ones(size, dtype=torch.bool))[table[gone]] = False
    where = lambda stay, name, size: stay[name].nonzero().flatten() if name in stay else torch.arange(size)
    return {
        name: (where(rows, name, site.d_out), where(columns, name, site.d_in))
        for name, site in graph.linears.items()
        if name in rows or name in columns
    }


def cuts_of(graph: Graph, kept: Mapping[str, Sequence[int]]) -> dict[str, tuple[tuple[int, Tensor], ...]]:
    """For every tensor that loses something: the dimensions and, ascending, the indices along them that stay."""
    cuts = {}
    for name, (rows, columns) in remaining(graph, kept).items():
        site = graph.linears[name]
        cuts[f"{name}.weight"] = ((1, rows), (0, columns)) if site.transposed else ((0, rows), (1, columns))
        if site.bias:
            cuts[f"{name}.bias"] = ((0, rows),)
    return cuts


def cut_tensor(tensor: Tensor, cuts: Sequence[tuple[int, Tensor]]) -> Tensor:
    for dim, index in cuts:
        if len(index) < tensor.shape[dim]:
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def _check_whole(module: nn.Module | None, site: LinearSite) -> None:
    shape = (site.d_in, site.d_out) if site.transposed else (site.d_out, site.d_in)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.shape != shape or linear_dims(module) != (site.d_out, site.d_in):
        raise ModelError(
            f"{site.name!r} is not the {site.d_out} x {site.d_in} linear layer of the graph. Cut a model once, before "
            "its weights are packed, by the graph that was discovered on it."
        )


def _cut_(model: nn.Module, graph: Graph, cuts: Mapping[str, Sequence[tuple[int, Tensor]]]) -> None:
    for name, dims in cuts.items():
        path, _, attribute = name.rpartition(".")
        module, whole = model.get_submodule(path), model.get_parameter(name)
        cut = cut_tensor(whole.data, dims)
        if cut is not whole.data:
            setattr(module, attribute, nn.Parameter(cut, requires_grad=whole.requires_grad))
    for name in {name.rpartition(".")[0] for name in cuts} & graph.linears.keys():
        module, site = model.get_submodule(name), graph.linears[name]
        first, second = module.weight.shape
        if site.transposed:
            module.nf, module.nx = second, first
        else:
            module.out_features, module.in_features = first, second


def _recount_(module: nn.Module, group: Group, n_kept: int) -> None:
    """Lets counts follow, on a module and in the view that it gets of its configuration."""
    names = COUNTS[group.kind]
    for name, value in _counting(vars(module), group).items():
        if value % group.n_units:
            raise ModelError(f"{group.name!r} has {group.n_units} units, which do not divide its {name} of {value}.")
        setattr(module, name, value // group.n_units * n_kept)
    if config := vars(module).get("config"):
        fields = _counting({name: getattr(config, name, None) for name in names}, group)
        # a field that the units do not divide counts something else, or nothing that this model reads
        counts = {name: v // group.n_units * n_kept for name, v in fields.items() if v % group.n_units == 0}
        module.config = LayerConfig(config, counts)


def _counting(values: Mapping, group: Group) -> dict[str, int]:
    counts = {name: values[name] for name in COUNTS[group.kind] if isinstance(values.get(name), int)}
    if group.kind == "channel":  # a module may hold other widths too, those of experts for example
        return {name: value for name, value in counts.items() if value == group.n_units}
    return counts


def _heads_width_(module: nn.Module, whole: int, left: int) -> None:
    """Lets the width of all heads together follow, from so many columns to so many, where the forward reads it."""
    read = unwrap(type(module).forward).__code__.co_names
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


def _keep_head_values_(module: nn.Module, group: Group, kept: Sequence[int]) -> None:
    """Where an attention is handed values per head, the kept heads keep their own, such as their ALiBi slopes."""
    arguments = signature(module.forward).parameters.keys()
    n_heads = _n_heads(module)
    if group.kind != "kv_group" or not n_heads or not arguments & {*PER_HEAD_ARGUMENTS, *PERHAPS_PER_HEAD_ARGUMENTS}:
        return
    (columns,) = group.consumers.values()
    heads = (columns[list(kept)] * n_heads // columns.numel()).unique()
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
        given = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        surely = given.keys() & set(PER_HEAD_ARGUMENTS)
        perhaps = given.keys() & set(PERHAPS_PER_HEAD_ARGUMENTS)
        names = surely | {n for n in perhaps if given[n].dim() > 2 and given[n].shape[-3] == self.n_heads}
        return args, kwargs | {name: self.keep(given[name]) for name in names}

    def keep(self, values: Tensor) -> Tensor:
        heads = self.heads.to(values.device)
        if values.dim() == 4:
            return values[:, heads] if values.shape[1] == self.n_heads else values
        return values.unflatten(0, (-1, self.n_heads))[:, heads].flatten(0, 1)
