"""From decisions to the plan: what is kept and which bits, completed by what follows from them."""

from collections.abc import Mapping, Sequence

from qpruner.model.cost import kept_shapes
from qpruner.model.graph import Graph
from qpruner.model.surgery import bereft
from qpruner.plan import Plan, QuantSpec, Reconstruction
from qpruner.recipe import Recipe

INPUTS_PER_RANK = 32  # of a linear's smaller side: keeps adapters small beside narrow layers


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
    """The whole plan, for the model of these layers. An adapter's rank is at most 1/32 of its linear's smaller side.

    embeddings: how embeddings and heads are stored; without it as the recipe says, all of them the same way.
    """
    embeddings = embeddings_of(graph, recipe) if embeddings is None else embeddings
    ranks = {}
    # LoRA starts at zero and LoftQ corrects rounding: with neither training nor rounding adapters would change nothing.
    begun = recipe.steps > 0 or (recipe.loftq_iterations > 0 and recipe.bits[0] < 16)
    if recipe.adapter_rank and begun:
        for name, dims in kept_shapes(graph, kept).items():
            ranks[name] = rank_of(recipe.adapter_rank, dims)
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
        # The larger of the two, until both were tried.
        adapters="beside" if recipe.adapters == "best" else recipe.adapters,
        recovery=recipe.recovery(hidden_size),
        seed=seed,
    )


def rank_of(asked: int, dims: tuple[int, int]) -> int:
    """Of the adapter of a linear of (d_out, d_in)."""
    return max(1, min(asked, min(dims) // INPUTS_PER_RANK))
