"""The space of a joint search for a model and a recipe, from shapes alone."""

import math

import numpy as np

from qpruner.decide import widths
from qpruner.decide.space import Space, space_of
from qpruner.errors import BudgetError, RecipeError
from qpruner.model.graph import Group
from qpruner.plan import DENSE, QuantSpec
from qpruner.recipe import Recipe
from qpruner.shape import Shape, widths_for
from qpruner.targets import Rules, rules_of

OF_HEADS = ("kv_group", "query_head")  # kinds that stay whole where all layers have equally many heads


def space_for(shape: Shape, recipe: Recipe) -> Space:
    """The choices that a recipe leaves open for a model."""
    protected = widths.layers_protected(len(shape.graph.layers), recipe)
    rules = rules_for(shape, recipe)
    can_go = recipe.drop_layers and rules.drops_layers and len(shape.graph.layers) > 1
    return space_of(
        shape.graph,
        shape.tensors,
        dtype=shape.dtype,
        widths={
            name: options_of(group, recipe, step_of(group, recipe, rules))
            for name, group in shape.graph.groups.items()
            if varies(group, recipe)
            and not protected[group.layer]
            and not (group.kind in OF_HEADS and rules.uniform_heads)
        },
        specs=recipe.formats(),
        embeddings=tuple(shape.graph.embeddings) if recipe.pack_embeddings and rules.packs_embeddings else (),
        embedding_specs=[spec for spec in embedding_formats(recipe) if rules.accepts(spec)],
        droppable=[layer for layer, whole in enumerate(protected) if can_go and not whole],
        adapter_rank=recipe.adapter_rank,
        accepts=rules.accepts,
    )


def rules_for(shape: Shape, recipe: Recipe) -> Rules:
    """What the recipe's target can load of the model."""
    tied = any(site.heads for site in shape.graph.embeddings.values())
    config = shape.source.config.to_dict()
    return rules_of(recipe.target, config, tied=tied, specs=[s for s in recipe.formats() if s.bits < 16])


def step_of(group: Group, recipe: Recipe, rules: Rules) -> int:
    """In what steps units of a group go."""
    if group.kind in widths.ON_GRID:
        return math.lcm(recipe.width_grid, rules.channel_multiple)
    columns = sum(table.shape[1] for table in group.consumers.values())
    return rules.kv_group_step(columns)


def embedding_formats(recipe: Recipe) -> tuple[QuantSpec, ...]:
    """What embeddings and heads may be stored as: no salient channels, inputs as they are."""
    bare = recipe.model_copy(update={"salient": 0, "salients": (), "activation_bits": 16})
    return tuple(dict.fromkeys((*bare.formats(), DENSE)))


def varies(group: Group, recipe: Recipe) -> bool:
    """Groups of other kinds, and those whose blocks have to stay equal, stay whole in a joint search."""
    return group.kind in widths.LAYER_KINDS and group.kind in recipe.units and group.n_blocks == 1


def options_of(group: Group, recipe: Recipe, step: int) -> tuple[int, ...]:
    """How many units a group may keep, evenly over what the recipe allows; the last is all of them."""
    fewest = max(group.at_least, 1, round(recipe.least_kept * group.n_units))
    counts = sorted({n for n in range(step, group.n_units, step) if n >= fewest} | {group.n_units})
    if len(counts) > recipe.width_choices:
        counts = [counts[i] for i in np.linspace(0, len(counts) - 1, recipe.width_choices).round().astype(int)]
    return tuple(counts)


def check_reach(space: Space, limit_bytes: int, name: str) -> None:
    """Refuse a limit below the smallest point.

    Raises:
        BudgetError
    """
    bottom = space.canonical([(0,) * len(space.variables)])
    smallest = int(space.size_bytes(bottom)[0])
    if smallest > limit_bytes:
        raise BudgetError(
            f"no plan of recipe {name!r} fits {limit_bytes:,} bytes. The smallest reachable is {smallest:,} bytes. "
            "Give a larger budget, or a recipe with fewer bits, a smaller `least_kept`, or fewer protected layers."
        )


def counts_for(shape: Shape, recipe: Recipe, limit_bytes: int) -> widths.Counts:
    """Units that each group keeps before anything is scored: with a joint search all that the recipe lets it have.

    Raises:
        BudgetError: nothing fits.
        RecipeError: a joint search cannot serve the model.
    """
    if recipe.allocation != "joint":
        return widths_for(shape, recipe, limit_bytes)
    if shape.graph.exchanges:
        raise RecipeError(
            f"recipe {recipe.name!r} tries plans layer by layer, and the layers of {shape.source.name!r} cannot run "
            f"one at a time: {shape.graph.exchanges[0]}. Choose another allocation."
        )
    check_reach(space_for(shape, recipe), limit_bytes, recipe.name)
    return widths.counts(shape.graph, recipe, 1.0)
