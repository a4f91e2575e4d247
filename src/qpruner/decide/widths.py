"""How many units each group keeps, and which: scores and a limit in, kept indices out."""

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from qpruner.errors import RecipeError
from qpruner.model.graph import Graph, Group
from qpruner.recipe import Recipe

Counts = dict[str, int]  # group -> units that stay
STEPS = 512  # kept fractions that are tried between none and all


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
    """Units of a group that stay. At least one always does; `grid` also keeps one step of the grid."""
    n = group.n_units
    if recipe.selection == "llm-pruner":
        # metapruner.py counts columns: C - int(C kept) of them go, whole heads only.
        columns_per_unit = next(iter(group.consumers.values())).shape[1]
        columns = n * columns_per_unit
        return max(1, n - (columns - int(columns * fraction)) // columns_per_unit)
    step = recipe.width_grid if group.kind == "channel" else 1
    if n <= step:
        return n
    return min(n, max(step, round(n * fraction / step) * step))


def counts(graph: Graph, recipe: Recipe, fraction: float) -> Counts:
    fractions = kept_fractions(len(graph.layers), recipe, fraction)
    return {name: count(group, fractions[group.layer], recipe) for name, group in graph.groups.items()}


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


def select(scores: Mapping[str, Tensor], wanted: Counts) -> dict[str, tuple[int, ...]]:
    """The best-scored units of every group, ascending. Of equal scores the first stays."""
    kept = {}
    for name, n in wanted.items():
        order = scores[name].argsort(descending=True, stable=True)
        kept[name] = tuple(sorted(order[:n].tolist()))
    return kept


def first_units(wanted: Counts) -> dict[str, Sequence[int]]:
    """Any kept units of the right number: enough to predict a size."""
    return {name: range(n) for name, n in wanted.items()}
