"""From decisions to the plan: what is kept and which bits, completed by what follows from them."""

from collections.abc import Mapping, Sequence
from typing import Literal

from qpruner.decide.ranks import by_cut, numbers, uniform
from qpruner.model import cost
from qpruner.model.graph import Graph
from qpruner.model.surgery import bereft
from qpruner.plan import DENSE, Plan, QuantSpec, Reconstruction
from qpruner.recipe import Recipe


def embeddings_of(graph: Graph, recipe: Recipe) -> dict[str, QuantSpec]:
    """How the embedding and the head are stored; empty for at 16 bits."""
    return dict.fromkeys(graph.embeddings if recipe.embedding_bits < 16 else (), recipe.embedding_spec())


def draft(
    graph: Graph,
    recipe: Recipe,
    *,
    model_name: str,
    model_digest: str,
    hidden_size: int,
    kept: Mapping[str, Sequence[int]],
    specs: Mapping[str, QuantSpec],
    seed: int,
    layers: tuple[int, ...] | None = None,
    embeddings: Mapping[str, QuantSpec] | None = None,
) -> Plan:
    """The whole plan, for the model of these layers.

    embeddings: how embeddings and heads are stored; without it as the recipe says, all of them the same way.
    """
    embeddings = embeddings_of(graph, recipe) if embeddings is None else embeddings
    ranks = {}
    # LoRA starts at zero and LoftQ corrects rounding: with neither training nor rounding adapters would change nothing.
    begun = recipe.steps > 0 or (recipe.loftq_iterations > 0 and recipe.bits[0] < 16)
    if recipe.adapter_rank and begun:
        ranks = ranks_of(graph, recipe, kept, specs)
    settings = None
    if recipe.reconstruction != "none":
        settings = Reconstruction(method=recipe.reconstruction, dampings=recipe.dampings, held_out=recipe.held_out)
    added = bereft(graph, kept) if settings and recipe.added_biases else {}
    return Plan(
        model_name=model_name,
        model_digest=model_digest,
        layers=layers,
        kept={name: tuple(units) for name, units in kept.items()},
        reconstruction=settings,
        added_biases=tuple(name for name, site in added.items() if not site.bias),
        specs=dict(specs),
        embeddings=dict(embeddings),
        rounding=recipe.rounds(),
        adapter_ranks=ranks,
        adapters=adapters_in(recipe),
        recovery=recipe.recovery(hidden_size),
        seed=seed,
    )


def adapters_in(recipe: Recipe) -> Literal["beside", "merged"]:
    """Where `best` is asked for: beside the base, which is larger, until both were tried. Weights of 16 bits take
    adapters in without a loss, so there is nothing to try."""
    if recipe.adapters != "best":
        return recipe.adapters
    return "merged" if recipe.bits[0] == 16 else "beside"


def ranks_of(
    graph: Graph, recipe: Recipe, kept: Mapping[str, Sequence[int]], specs: Mapping[str, QuantSpec]
) -> dict[str, int]:
    """Of every linear. Their file is never larger than with the same rank for all, so a plan may be sized with that.

    Where bits are tried with adapters beside them, these stand before any bits are known: widths alone count.
    """
    shapes = {name: dims for name, dims in cost.kept_shapes(graph, kept).items() if name in graph.linears}
    ranks = uniform(recipe.adapter_rank, shapes)
    if recipe.rank_by == "uniform":
        return ranks
    gone = {}
    for name, dims in shapes.items():
        site, spec = graph.linears[name], DENSE if recipe.tries_adapters else specs[name]
        whole = cost.linear_bytes(site.d_out, site.d_in, DENSE)
        gone[name] = max(0.0, 1 - cost.linear_bytes(*dims, spec) / whole)
    size = lambda ranks: cost.safetensors_size(cost.factor_tensors(shapes, ranks))
    if not any(gone.values()):
        return ranks
    limit, largest = numbers(ranks, shapes), size(ranks)
    while size(found := by_cut(recipe.adapter_rank, shapes, gone, limit=limit)) > largest:
        limit -= size(found) - largest  # shapes and offsets in the header have other numbers of digits
    return found
