"""From decisions to the plan: what is kept and which bits, completed by what follows from them."""

from collections.abc import Mapping, Sequence

from qpruner.model.cost import kept_shapes
from qpruner.model.graph import Graph
from qpruner.model.surgery import bereft
from qpruner.plan import Plan, QuantSpec, Reconstruction
from qpruner.recipe import Recipe

INPUTS_PER_RANK = 32  # of a linear's smaller side: keeps adapters small beside narrow layers


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
) -> Plan:
    """The whole plan, for the model of these layers. An adapter's rank is at most 1/32 of its linear's smaller side."""
    ranks = {}
    # LoRA starts at zero and LoftQ corrects rounding: with neither training nor rounding adapters would change nothing.
    begun = recipe.steps > 0 or (recipe.loftq_iterations > 0 and recipe.bits[0] < 16)
    if recipe.adapter_rank and begun:
        for name, dims in kept_shapes(graph, kept).items():
            ranks[name] = max(1, min(recipe.adapter_rank, min(dims) // INPUTS_PER_RANK))
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
        rounding=recipe.rounds(),
        adapter_ranks=ranks,
        adapters=recipe.adapters,
        recovery=recipe.recovery(hidden_size),
        seed=seed,
    )
