"""How many units each group keeps, and which: scores and a limit in, kept indices out."""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qpruner.errors import BudgetError, RecipeError
from qpruner.model.graph import Graph, Group
from qpruner.recipe import Recipe

Counts = dict[str, int]  # group -> units that stay
Kept = dict[str, tuple[int, ...]]  # group -> the units that stay, ascending
STEPS = 512  # kept fractions that are tried between none and all
ON_GRID = ("channel", "residual")
LAYER_KINDS = ("kv_group", "channel")  # between them, each once, the weights of a layer that can go

# Kinds of units that a recipe may ask for in vain, and why a model has none.
ABSENT = {
    "query_head": "no key/value head of it is shared by several query heads that can be told apart",
    "expert": "it has no mixture of experts that can lose some",
    "residual": "its hidden states have no channels that can be told apart all through it",
}


def kept_fractions(n_layers: int, recipe: Recipe, fraction: float) -> list[float]:
    """Kept fraction of every decoder layer when the pruned ones keep `fraction`."""
    if recipe.layers is not None:
        start, end = recipe.layers
        if not 0 <= start < end <= n_layers:
            raise RecipeError(
                f"recipe {recipe.name!r} prunes layers {start} to {end - 1}; the model has layers 0 to {n_layers - 1}."
            )
    else:
        start = math.ceil(recipe.protect_first * n_layers)
        end = n_layers - math.ceil(recipe.protect_last * n_layers)
    outside = [layer for layer in recipe.kept_per_layer if not 0 <= layer < n_layers]
    if outside:
        raise RecipeError(f"kept_per_layer names layer {outside[0]}; the model has layers 0 to {n_layers - 1}.")
    inside = [fraction if start <= layer < end else 1.0 for layer in range(n_layers)]
    return [recipe.kept_per_layer.get(layer, f) for layer, f in enumerate(inside)]


def count(group: Group, fraction: float, recipe: Recipe) -> int:
    """Units of a group that stay, equally many in every block. At least one always does, or one step of the grid."""
    if group.kind not in recipe.units:
        return group.n_units
    kept = group.n_blocks * _count_in_block(group, group.n_units // group.n_blocks, fraction, recipe)
    return max(kept, group.at_least)


def _count_in_block(group: Group, n: int, fraction: float, recipe: Recipe) -> int:
    if fraction >= 1:
        return n
    if recipe.selection == "llm-pruner":
        # metapruner.py counts columns: C - int(C kept) of them go, whole heads only.
        columns_per_unit = next(iter(group.consumers.values())).shape[1]
        columns = n * columns_per_unit
        return max(1, n - (columns - int(columns * fraction)) // columns_per_unit)
    step = recipe.width_grid if group.kind in ON_GRID else 1
    if n <= step:
        return n
    return min(n, max(step, round(n * fraction / step) * step))


def counts(graph: Graph, recipe: Recipe, fraction: float) -> Counts:
    check_units(graph, recipe)
    fractions = [*kept_fractions(len(graph.layers), recipe, fraction), fraction]  # the last of a model-wide group
    return {name: count(group, fractions[group.layer], recipe) for name, group in graph.groups.items()}


def check_units(graph: Graph, recipe: Recipe) -> None:
    present = {group.kind for group in graph.groups.values()}
    for kind in recipe.units:
        if kind in ABSENT and kind not in present:
            raise RecipeError(
                f"recipe {recipe.name!r} prunes units of kind {kind!r}, and the model has none: {ABSENT[kind]}. "
                "Leave the kind out of `units`; `qpruner inspect` shows what there is."
            )


def fit(graph: Graph, recipe: Recipe, size_bytes: Callable[[Counts], float], limit_bytes: float) -> Counts | None:
    """The widest counts within the recipe whose size meets the limit; None where even the narrowest do not."""
    widest = round(recipe.kept * STEPS)
    if not recipe.shrink_to_fit:
        exact = counts(graph, recipe, recipe.kept)
        return exact if size_bytes(exact) <= limit_bytes else None
    low, high = 0, widest  # sizes grow with the fraction: the largest step that fits, by bisection
    if size_bytes(counts(graph, recipe, 0.0)) > limit_bytes:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if size_bytes(counts(graph, recipe, middle / STEPS)) <= limit_bytes:
            low = middle
        else:
            high = middle - 1
    return counts(graph, recipe, low / STEPS)


def layer_worth(graph: Graph, scores: Mapping[str, Tensor]) -> list[float]:
    """Of every decoder layer: the sum over its kv groups and channels, which hold all its weights that can go."""
    worth = [0.0] * len(graph.layers)
    for name, group in graph.groups.items():
        if group.kind in LAYER_KINDS:
            worth[group.layer] += float(scores[name].double().sum())
    return worth


def layers_protected(n_layers: int, recipe: Recipe) -> list[bool]:
    return [fraction == 1.0 for fraction in kept_fractions(n_layers, recipe, 0.0)]


def keep_layers(
    graph: Graph, recipe: Recipe, worth: Sequence[float], n_kept: int | None = None
) -> tuple[int, ...] | None:
    """The decoder layers that stay as a whole, ascending; None for all.

    Protected layers stay, then those that are worth most; of equal ones the earlier.

    Args:
        worth: one number per decoder layer, higher = keep.
        n_kept: how many stay; by default the recipe's fraction of them.
    Raises:
        RecipeError: more layers are protected than are to stay.
    """
    n = len(graph.layers)
    n_kept = max(1, round(n * recipe.layers_kept)) if n_kept is None else n_kept
    if n_kept == n:
        return None
    protected = layers_protected(n, recipe)
    if sum(protected) > n_kept:
        raise RecipeError(
            f"recipe {recipe.name!r} keeps {n_kept} of {n} decoder layers and protects {sum(protected)}. Accepted: "
            "layers_kept above the protected fractions together."
        )
    order = sorted(range(n), key=lambda layer: (not protected[layer], -worth[layer], layer))
    return tuple(sorted(order[:n_kept]))


def select(graph: Graph, scores: Mapping[str, Tensor], wanted: Counts) -> Kept:
    """The best-scored units of every block of every group, ascending. Of equal scores the first stays."""
    kept = {}
    for name, n in wanted.items():
        best = _by_rank(graph.groups[name], scores[name])[:, : n // graph.groups[name].n_blocks]
        kept[name] = tuple(best.flatten().sort().values.tolist())
    return kept


def _by_rank(group: Group, scores: Tensor) -> Tensor:
    """Units of each block, the best first: (n_blocks, units in a block)."""
    blocks = scores.view(group.n_blocks, -1)
    order = blocks.argsort(dim=1, descending=True, stable=True)
    return order + blocks.shape[1] * torch.arange(len(blocks))[:, None]


def first_units(graph: Graph, wanted: Counts) -> Kept:
    """Any kept units of the right number: enough to predict a size."""
    return select(graph, {name: torch.zeros(graph.groups[name].n_units) for name in wanted}, wanted)


# --- all layers against each other -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lot:
    """Units of one group that go together: a step of the grid, one unit of every block.

    left: units of the group that stay once it is gone. worth: their score, per stored byte unless the recipe has them
    compete by the bare score. gone: fraction of the group.
    """

    group: str
    left: int
    worth: float
    gone: float


def choose(
    graph: Graph,
    recipe: Recipe,
    scores: Mapping[str, Tensor],
    fitted: Counts,
    sizes: Sequence[Callable[[Kept], float]],
    limit_bytes: float,
) -> Kept:
    """The kept units of every group, the best of each.

    With `scope: layer` as many as were fitted before anything was scored. With `scope: global` all units that the
    recipe may prune compete by their score, or by their score per stored byte: the lots that are worth least go, as
    many as the recipe's `kept` and the limit ask for. Equals go evenly: the lot first that leaves most of its group.

    Args:
        sizes: bytes stored with so much kept, in order of preference: the first whose limit can be met is taken.
    Raises:
        BudgetError: nothing that the recipe allows fits.
    """
    if recipe.scope == "layer":
        return select(graph, scores, fitted)
    for size_bytes in sizes:
        left = compete(graph, recipe, scores, size_bytes, limit_bytes)
        if left is not None:
            return select(graph, scores, left)
    raise BudgetError(f"recipe {recipe.name!r} leaves more than {limit_bytes:,.0f} bytes. Give a smaller `kept`.")


def compete(
    graph: Graph,
    recipe: Recipe,
    scores: Mapping[str, Tensor],
    size_bytes: Callable[[Kept], float],
    limit_bytes: float,
) -> Counts | None:
    """The counts that are left when the lots that are worth least are gone; None where too much is left even then."""
    widest, narrowest = (counts(graph, recipe, fraction) for fraction in (1.0, 0.0))
    weight = unit_bytes(graph, widest, narrowest, size_bytes)
    lots = [
        lot for name in weight for lot in lots_of(graph.groups[name], recipe, scores[name], narrowest[name], weight)
    ]
    places = {name: i for i, name in enumerate(weight)}
    lots.sort(key=lambda lot: (lot.worth, lot.gone, places[lot.group]))

    def left(n: int) -> Counts:
        return widest | {lot.group: lot.left for lot in lots[:n]}

    def prunable_bytes(left: Counts) -> float:
        return sum(weight[name] * left[name] for name in weight)

    fits = lambda n: size_bytes(first_units(graph, left(n))) <= limit_bytes
    n = first(len(lots), lambda n: prunable_bytes(left(n)) <= recipe.kept * prunable_bytes(widest))
    if recipe.shrink_to_fit and not fits(n):
        n = first(len(lots), lambda m: m > n and fits(m))
    return left(n) if fits(n) else None


def first(last: int, holds: Callable[[int], bool]) -> int:
    """The smallest number up to `last` for which something holds that holds from there on, or `last`."""
    return bisect.bisect_left(range(last), True, key=holds)


def unit_bytes(
    graph: Graph, widest: Counts, narrowest: Counts, size_bytes: Callable[[Kept], float]
) -> dict[str, float]:
    """Stored bytes per unit of every group that can lose some, all else whole; groups of one shape weigh the same."""
    whole, known, weight = size_bytes(first_units(graph, widest)), {}, {}
    for name, group in graph.groups.items():
        if widest[name] > narrowest[name]:
            shape = (widest[name], narrowest[name], shape_of(graph, group))
            if shape not in known:
                without = size_bytes(first_units(graph, widest | {name: narrowest[name]}))
                known[shape] = (whole - without) / (widest[name] - narrowest[name])
            weight[name] = known[shape]
    return weight


@dataclass(frozen=True, eq=False)
class Pool:
    """Units that compete with each other for what may stay.

    weights: (units,) float64, of the groups' units one after the other: stored bytes, or 1 inside one group.
    target: what is to stay, in the unit of `weights`.
    """

    groups: tuple[str, ...]
    weights: Tensor
    target: float


def pools(graph: Graph, recipe: Recipe, fitted: Counts, size_bytes: Callable[[Kept], float]) -> list[Pool]:
    """Who competes with whom: inside each group, or in scope `global` all that can lose units; the others stay whole.

    Args:
        fitted: counts that meet the limit; together they say how much is to stay.
        size_bytes: stored bytes with so much kept.
    """
    weight = {}
    if recipe.scope == "global":
        weight = unit_bytes(graph, counts(graph, recipe, 1.0), counts(graph, recipe, 0.0), size_bytes)
    ones = lambda name: torch.ones(graph.groups[name].n_units, dtype=torch.float64)
    found = [Pool((name,), ones(name), float(fitted[name])) for name in graph.groups if name not in weight]
    if weight:
        weights = torch.cat([weight[name] * ones(name) for name in weight])
        found.append(Pool(tuple(weight), weights, sum(weight[name] * fitted[name] for name in weight)))
    return found


def shape_of(graph: Graph, group: Group) -> tuple:
    sites = {**graph.linears, **graph.stacks}
    sides = (group.producers.items(), group.consumers.items())
    tables = tuple(tuple((sites[n].d_out, sites[n].d_in, *table.shape) for n, table in side) for side in sides)
    return group.kind, group.n_blocks, tables, tuple((dim, *table.shape) for dim, table in group.tensors.values())


def lots_of(group: Group, recipe: Recipe, scores: Tensor, fewest: int, weight: Mapping[str, float]) -> list[Lot]:
    """What a group can lose, the worst first, until `fewest` units are left."""
    ranked = scores.double()[_by_rank(group, scores)].mean(0)  # of the units in one rank of all blocks
    per = weight[group.name] if recipe.worth == "per-byte" else 1.0
    step = recipe.width_grid if group.kind in ON_GRID else 1
    lots, stay, worth = [], len(ranked), -math.inf
    while stay * group.n_blocks > fewest:
        left = (stay - 1) // step * step
        worth = max(worth, float(ranked[left:stay].mean()) / per)
        lots.append(Lot(group.name, left * group.n_blocks, worth, 1 - left / len(ranked)))
        stay = left
    return lots
