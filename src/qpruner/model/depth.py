"""A model with fewer decoder layers: its configuration, its graph, and where its tensors come from.

Nothing here touches a weight. The layers that stay are numbered anew, so the shorter model is one of the original
class with a configuration of its own, and everything that speaks of it uses the new numbers.

    layers   numbers of the decoder layers that stay, ascending, in the original   (n_kept,)
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from qpruner.errors import ModelError, PlanError
from qpruner.model.discover import POSITION_ATTRIBUTES
from qpruner.model.graph import Graph, Group, Projection
from qpruner.model.skeleton import build_skeleton, decoder_layers

# How fields of a configuration speak of single layers; any list as long as there are layers has an entry for each.
NUMBERS = ("mlp_only_layers", "attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids", "rope_scaling_layers")
LEADING = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")  # so many at the beginning
NOT_OF_LAYERS = ("eos_token_id", "architectures")
DEPENDS_ON_NUMBER = ("scale_attn_by_inverse_layer_idx",)  # a layer with another number computes something else


def check_layers(layers: Sequence[int], n_layers: int, origin: str = "plan") -> None:
    """Raises PlanError unless these are decoder layers of the original, ascending, one at least."""
    rising = all(a < b for a, b in zip(layers, layers[1:], strict=False))
    if not layers or not rising or not 0 <= layers[0] <= layers[-1] < n_layers:
        raise PlanError(
            f"{origin} keeps the decoder layers {list(layers)}. Accepted: at least one of 0 to {n_layers - 1}, each "
            "once and in ascending order."
        )


def shortened_config(config: PreTrainedConfig, layers: Sequence[int] | None) -> PreTrainedConfig:
    """The configuration of the model of these layers; None for all of them."""
    config = copy.deepcopy(config)
    if layers is None:
        return config
    text = config.get_text_config(decoder=True)
    n_layers = text.num_hidden_layers
    check_layers(layers, n_layers, f"a plan for {config.model_type!r}")
    for name, value in list(vars(text).items()):
        if name in LEADING and isinstance(value, int):
            setattr(text, name, sum(layer < value for layer in layers))
        elif not isinstance(value, list | tuple) or name in NOT_OF_LAYERS:
            continue
        elif name in NUMBERS:
            setattr(text, name, type(value)(new for new, old in enumerate(layers) if old in value))
        elif len(value) == n_layers:
            setattr(text, name, type(value)(value[layer] for layer in layers))
    text.num_hidden_layers = len(layers)
    return config


def check_depth(config: PreTrainedConfig, layers: Sequence[int], *, trust_remote_code: bool = False) -> None:
    """Refuse a model whose layers would be others under the shortened configuration.

    Raises:
        ModelError: a layer that stays has other modules, shapes or settings there, or depends on its number.
    """
    kind = config.model_type
    advice = "Leave whole layers in place: layers_kept of 1 in the recipe."
    if field := next((f for f in DEPENDS_ON_NUMBER if getattr(config.get_text_config(decoder=True), f, False)), None):
        raise ModelError(f"the decoder layers of this {kind!r} depend on their number ({field}). {advice}")
    whole = build_skeleton(config, trust_remote_code=trust_remote_code)
    try:
        short = build_skeleton(shortened_config(config, layers), trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ModelError(f"{kind!r} cannot be built with {len(layers)} of its layers: {error}. {advice}") from error
    for path, old in zip(decoder_layers(short), layers, strict=True):
        if difference := _difference(short.get_submodule(path), whole.get_submodule(decoder_layers(whole)[old])):
            raise ModelError(
                f"decoder layer {old} of this {kind!r} would be another one as layer {path.rpartition('.')[2]} of "
                f"{len(layers)}: {difference} differs. {advice}"
            )


def _difference(a: nn.Module, b: nn.Module) -> str:
    """The first module, tensor or setting in which two layers differ; empty where they are alike."""
    ours, theirs = (dict(_settings(layer)) for layer in (a, b))
    return next((name for name in {**ours, **theirs} if not _same(ours.get(name), theirs.get(name))), "")


def _settings(layer: nn.Module) -> Iterable[tuple[str, object]]:
    for path, module in layer.named_modules():
        yield path or "the layer itself", type(module)
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{path}.{name}", parameter.shape
        yield from ((f"{path}.{name}", buffer) for name, buffer in module.named_buffers(recurse=False))
        for name, value in vars(module).items():
            if isinstance(value, int | float | str) and name not in POSITION_ATTRIBUTES:
                yield f"{path}.{name}", value


def _same(a: object, b: object) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


# --- names -----------------------------------------------------------------------------------------------------------


class Renaming:
    """From names in the original to names in the model of some of its layers."""

    def __init__(self, graph: Graph, layers: Sequence[int]) -> None:
        check_layers(layers, len(graph.layers))
        self._stem = graph.layers[0].rpartition(".")[0] + "."
        self._numbers = {str(old): new for new, old in enumerate(layers)}

    def __call__(self, name: str) -> str | None:
        """None for what is in a layer that goes."""
        if not name.startswith(self._stem):
            return name
        number, dot, rest = name.removeprefix(self._stem).partition(".")
        return f"{self._stem}{self._numbers[number]}{dot}{rest}" if number in self._numbers else None

    def of_keys(self, table: dict) -> dict:
        return {new: value for name, value in table.items() if (new := self(name)) is not None}


def tensor_names(graph: Graph, layers: Sequence[int], names: Iterable[str]) -> dict[str, str]:
    """Name in the shorter model -> name in the original, of every tensor that stays."""
    return Renaming(graph, layers).of_keys({name: name for name in names})


def original_names(graph: Graph, layers: Sequence[int] | None, names: Iterable[str]) -> dict[str, str]:
    """The other way round, of names in the model of these layers; `graph` may be that of either."""
    stem = graph.layers[0].rpartition(".")[0] + "."

    def original(name: str) -> str:
        number, dot, rest = name.removeprefix(stem).partition(".")
        return f"{stem}{layers[int(number)]}{dot}{rest}" if name.startswith(stem) else name

    return {} if layers is None else {name: original(name) for name in names}


def shortened(graph: Graph, layers: Sequence[int] | None) -> Graph:
    """The graph of the model of these layers, as `discover` finds it there. Notes are still about the original."""
    if layers is None:
        return graph
    renamed, number = Renaming(graph, layers), {old: new for new, old in enumerate(layers)}
    placed = lambda site: replace(site, name=renamed(site.name), layer=number[site.layer])
    inside = lambda sites: {renamed(n): placed(s) for n, s in sites.items() if s.layer in number}
    groups = [_shortened_group(g, renamed, number) for g in graph.groups.values() if g.layer in (-1, *layers)]
    return replace(
        graph,
        layers=graph.layers[: len(layers)],
        linears=inside(graph.linears),
        stacks={
            name: replace(stack, bias=stack.bias and renamed(stack.bias))
            for name, stack in inside(graph.stacks).items()
        },
        groups={group.name: group for group in groups},
        projections=tuple(
            Projection(renamed(p.name), number[p.layer], tuple(map(renamed, p.linears)))
            for p in graph.projections
            if p.layer in number
        ),
        unreached=renamed.of_keys(graph.unreached),
    )


def _shortened_group(group: Group, renamed: Renaming, number: dict[int, int]) -> Group:
    return replace(
        group,
        name=renamed(group.name),
        layer=number.get(group.layer, -1),
        module=renamed(group.module),
        producers=renamed.of_keys(group.producers),
        consumers=renamed.of_keys(group.consumers),
        tensors=renamed.of_keys(group.tensors),
    )
