"""How many heads, channels and experts a plan leaves, in the words that configurations have for them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedConfig

from qpruner.errors import ModelError
from qpruner.fields import CHANNELS, EXPERTS, HEADS, HIDDEN, KV_HEADS
from qpruner.model.graph import Graph, Group
from qpruner.plan import Plan

# Fields of a configuration that count units, by kind of group. One counts the units of a group if its value is their
# number, for heads a multiple of it. Whether the words were understood is proven on the model that they describe.
FIELDS = {
    "kv_group": (*HEADS, *KV_HEADS),
    "query_head": HEADS,
    "channel": CHANNELS,
    "expert": EXPERTS,
    "residual": HIDDEN,
}
OF_SEVERAL = ("kv_group", "query_head")  # their fields may count a multiple of the units
GLOBAL = ("num_hidden_layers", "vocab_size", "hidden_size")


def counts_after(text: PreTrainedConfig, groups: Iterable[Group], kept: Mapping[str, Sequence[int]]) -> dict | None:
    """Field -> new value for what the groups change of it; None where they do not agree on one.

    Where heads go, `head_dim` is among them if the configuration does not state it: it would be derived from them.
    """
    sizes = defaultdict(set)
    for group in groups:
        sizes[group.kind, group.n_units // group.n_blocks].add(len(kept[group.name]) // group.n_blocks)
    if any(len(left) > 1 for left in sizes.values()):
        return None
    found: dict[str, int] = {}
    for (kind, n), (left,) in sizes.items():
        if left < n:
            for name, value in _counting(text, kind, n).items():
                found[name] = found.get(name, value) * left // n
    if found.keys() & set(HEADS) and (head_dim := _head_dim(text)):
        found["head_dim"] = head_dim
    return found


def field_of(text: PreTrainedConfig, name: str, default=None):
    """A field of a configuration; the default where there is none, or where every layer has its own."""
    try:
        return getattr(text, name, default)
    except RuntimeError:  # what transformers raises about a field that differs from layer to layer
        return default


def _counting(text: PreTrainedConfig, kind: str, n: int) -> dict[str, int]:
    """The fields that count units of which there are n, with what they count; one that is derived if left out too."""
    values = {name: v for name in FIELDS[kind] if (v := field_of(text, name, default=...)) is not ...}
    stated = {name: v for name, v in values.items() if isinstance(v, int)}
    if kind in OF_SEVERAL:
        return {name: v for name, v in stated.items() if v % n == 0}
    return {name: v for name, v in stated.items() if v == n} or {name: n for name, v in values.items() if v is None}


def _head_dim(text: PreTrainedConfig) -> int | None:
    """Width of a head where the configuration leaves it to be derived."""
    if isinstance(field_of(text, "head_dim"), int):
        return None
    heads = next((v for name in HEADS if isinstance(v := field_of(text, name), int)), None)
    width = field_of(text, "hidden_size")
    return width // heads if heads and isinstance(width, int) else None


def dimensions(text: PreTrainedConfig, graph: Graph, plan: Plan) -> dict:
    """What the original states of its sizes, and under `per_layer_config` what differs from them in each layer."""
    names = dict.fromkeys((*GLOBAL, *(name for fields in FIELDS.values() for name in fields), "head_dim"))
    found = {name: v for name in names if isinstance(v := field_of(text, name), int)}
    layers = {}
    for layer in sorted({group.layer for group in graph.groups.values()}):
        groups = [group for group in graph.groups.values() if group.layer == layer]
        for group in groups:
            found = _counting(text, group.kind, group.n_units // group.n_blocks) | found
        changed = counts_after(text, groups, plan.kept) or {}
        if head_dim := changed.pop("head_dim", None):  # the same in every layer
            found["head_dim"] = head_dim
        if layer < 0:
            found |= changed
        elif changed:
            layers[str(layer)] = changed
    return found | ({"per_layer_config": layers} if layers else {})


def widest(graph: Graph, kept: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Units of every group, with removed ones where a group of the same kind in another layer keeps more.

    Filled up with zeros, so that a class with one width for all layers holds them.

    Raises:
        ModelError: experts went; one of zeros would still be sent tokens.
    """
    if gone := [n for n, g in graph.groups.items() if g.kind == "expert" and len(kept[n]) < g.n_units]:
        raise ModelError(
            f"{gone[0]!r} lost whole experts, and one of zeros would still be sent tokens: there is no padding for it."
        )
    most: dict[tuple, int] = defaultdict(int)
    alike = lambda group: (group.kind, group.n_units // group.n_blocks)
    for name, group in graph.groups.items():
        most[alike(group)] = max(most[alike(group)], len(kept[name]) // group.n_blocks)
    return {name: _filled(kept[name], group, most[alike(group)]) for name, group in graph.groups.items()}


def _filled(units: Sequence[int], group, n: int) -> tuple[int, ...]:
    size, stay = group.n_units // group.n_blocks, set(units)
    found: list[int] = []
    for block in range(group.n_blocks):
        here = range(block * size, (block + 1) * size)
        inside = [u for u in here if u in stay]
        others = [u for u in here if u not in stay]
        found += sorted(inside + others[: n - len(inside)])
    return tuple(found)
