"""A model without its weights: what any plan for it would weigh, the widths that fit, and the memory of a run.

Everything here is computed from shapes, in seconds, and touches no file of weights.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from qpruner.decide import widths
from qpruner.decide.draft import draft
from qpruner.decide.saliences import BATCH_TOKENS
from qpruner.do.recover import part_of
from qpruner.errors import BudgetError, ModelError
from qpruner.model import cost, depth, load, memory
from qpruner.model.discover import discover
from qpruner.model.graph import Graph
from qpruner.model.skeleton import build_skeleton
from qpruner.model.surgery import bereft, bereft_stacks
from qpruner.plan import Plan, QuantSpec
from qpruner.recipe import Recipe

EVALUATION_BATCH, LOGITS_AT_ONCE = 8, 2**26  # windows, elements


@dataclass(frozen=True)
class Shape:
    """A model without its weights, and what any plan for it would weigh.

    tensors: what the unpruned model stores: name -> (dtype, shape). dtype: of stored 16-bit tensors.
    layers: decoder layers of the original that this is the model of; None for all.
    """

    source: load.Source
    graph: Graph
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    dtype: str
    layers: tuple[int, ...] | None = None

    def of_layers(self, layers: tuple[int, ...] | None) -> "Shape":
        """The model of some of the decoder layers; None for all.

        Raises:
            ModelError: its layers would not be those of the original.
        """
        if layers is None:
            return self
        if self.graph.exchanges:
            raise ModelError(f"no whole layer of {self.source.name!r} can go: {self.graph.exchanges[0]}.")
        depth.check_depth(self.source.config, layers, trust_remote_code=self.source.trust_remote_code)
        return self.shortened(layers)

    def shortened(self, layers: tuple[int, ...] | None) -> "Shape":
        """`of_layers` without asking whether there is such a model: enough to predict a size."""
        if layers is None:
            return self
        names = depth.tensor_names(self.graph, layers, self.tensors)
        tensors = {new: self.tensors[old] for new, old in names.items()}
        return replace(self, graph=depth.shortened(self.graph, layers), tensors=tensors, layers=layers)

    @property
    def hidden_size(self) -> int:
        return self.source.config.get_text_config(decoder=True).hidden_size

    @property
    def vocabulary(self) -> int:
        return self.source.config.get_text_config(decoder=True).vocab_size

    def plan(
        self,
        recipe: Recipe,
        kept,
        bits: int | dict[str, int] | dict[str, QuantSpec],
        seed: int = 0,
        *,
        embeddings: dict[str, QuantSpec] | None = None,
    ) -> Plan:
        """The plan that keeps these units with these bits, one for all linears, or for each its number or spec.

        embeddings: how the embedding and the head are stored, by name; without it as the recipe says.
        """
        each = bits if isinstance(bits, dict) else dict.fromkeys(self.graph.linears, bits)
        return draft(
            self.graph, recipe, model_name=self.source.name, model_digest=self.source.digest, kept=kept,
            hidden_size=self.hidden_size,
            specs={name: b if isinstance(b, QuantSpec) else recipe.spec(b) for name, b in each.items()},
            seed=seed, layers=self.layers,
            embeddings=embeddings,
        )  # fmt: skip

    def stored(self, plan: Plan) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors of the weights file under a plan, name -> (dtype, shape)."""
        return cost.stored_tensors(self.tensors, self.graph, plan, dtype=self.dtype)

    def size(self, plan: Plan) -> cost.StoredSize:
        return cost.predict_size(self.tensors, self.graph, plan, dtype=self.dtype)


def shape_of(source: load.Source) -> Shape:
    require_original(source)
    skeleton = build_skeleton(source.config, trust_remote_code=source.trust_remote_code)
    return Shape(source, discover(skeleton), cost.named_tensors(skeleton), cost.TORCH_NAMES[load.stored_dtype(source)])


def stored_sizes(shape: Shape, recipe: Recipe) -> tuple[Callable[[widths.Kept], float], ...]:
    """Bytes of what is kept when the linears have `mean_bits` on average, and when they have the fewest bits.

    With the same rank for all adapters, which is never less than what they take by another rule.
    """
    recipe = recipe.model_copy(update={"rank_by": "uniform"})
    low, high = recipe.bits[0], recipe.bits[-1]

    def size_at(bits: float) -> Callable[[widths.Kept], float]:
        part = 0.0 if high == low else (bits - low) / (high - low)

        def size(kept: widths.Kept) -> float:
            at = [shape.size(shape.plan(recipe, kept, b)).total for b in (low, high)]
            return at[0] + part * (at[1] - at[0])

        return size

    return tuple(size_at(bits) for bits in (min(max(recipe.mean_bits, low), high), low))


def widths_for(shape: Shape, recipe: Recipe, limit_bytes: int) -> widths.Counts:
    """Units that each group keeps, the most that the recipe and the budget allow, by one kept fraction for all.

    Widths are fitted so that the linears can have `mean_bits` on average; where that cannot be, the fewest bits.
    """
    for size in stored_sizes(shape, recipe):
        fitted = lambda counts, size=size: size(widths.first_units(shape.graph, counts))
        counts = widths.fit(shape.graph, recipe, fitted, limit_bytes)
        if counts is not None:
            return counts
    low = recipe.bits[0]
    narrowest = widths.counts(shape.graph, recipe, 0.0 if recipe.shrink_to_fit else recipe.kept)
    smallest = shape.size(shape.plan(recipe, widths.first_units(shape.graph, narrowest), low))
    parts = sorted(((n, size) for n, size in smallest.parts().items()), key=lambda part: -part[1])
    holding = ", ".join(f"{name} {size:,}" for name, size in parts[:3])
    raise BudgetError(
        f"no plan of recipe {recipe.name!r} fits {limit_bytes:,} bytes. The smallest reachable is {smallest.total:,} "
        f"bytes ({holding}). Give a larger budget, or a recipe with "
        + ("fewer bits, no adapters, or fewer protected layers." if recipe.shrink_to_fit else "a smaller `kept`.")
    )


@dataclass(frozen=True)
class Room:
    """What the kv groups and channels of all decoder layers hold, and the file of the whole model at 16 bits."""

    parameters: int
    size_bytes: int
    whole_bytes: int

    @classmethod
    def of(cls, shape: Shape) -> "Room":
        whole = {name: tuple(range(group.n_units)) for name, group in shape.graph.groups.items()}
        bare = {name: () if shape.graph.groups[name].kind in widths.LAYER_KINDS else all for name, all in whole.items()}
        plans = [shape.plan(Recipe(name="whole", adapter_rank=0), kept, 16) for kept in (whole, bare)]
        with_units, without = (shape.stored(plan) for plan in plans)
        size = lambda stored: sum(map(cost.tensor_bytes, stored.values()))
        return cls(
            parameters=cost.parameter_count(with_units) - cost.parameter_count(without),
            size_bytes=size(with_units) - size(without),
            whole_bytes=shape.size(plans[0]).total,
        )

    def limit_bytes(self, kept: float) -> int:
        """The stored size when this fraction of the units' bytes stays, and everything else."""
        return self.whole_bytes - self.size_bytes + int(kept * self.size_bytes)


def loses_layers(recipe: Recipe) -> bool:
    return recipe.fit_by == "depth" or recipe.layers_kept < 1


def measures_influence(recipe: Recipe) -> bool:
    return loses_layers(recipe) and recipe.layer_score == "block-influence"


def layers_for(shape: Shape, recipe: Recipe, limit_bytes: int, worth: Sequence[float]) -> tuple[int, ...] | None:
    """The decoder layers that stay, ascending; None for all. worth: one number per layer, higher = keep.

    As many as the recipe says, or with `fit_by: depth` as many as fit with the recipe's `kept` of their units.

    Raises:
        BudgetError: with `fit_by: depth`, not even the protected layers fit, or one.
    """
    if recipe.fit_by == "width":
        return widths.keep_layers(shape.graph, recipe, worth)
    n = len(shape.graph.layers)
    fewest = max(1, sum(widths.layers_protected(n, recipe)))
    of_number = lambda n_kept: widths.keep_layers(shape.graph, recipe, worth, n_kept)

    def size(n_kept: int, at: int) -> float:
        short = shape.shortened(of_number(n_kept))
        counts = widths.counts(short.graph, recipe, recipe.kept)
        return stored_sizes(short, recipe)[at](widths.first_units(short.graph, counts))

    for at in range(2):  # with `mean_bits`, or else with the fewest
        n_kept = n - widths.first(n - fewest, lambda gone, at=at: size(n - gone, at) <= limit_bytes)
        if size(n_kept, at) <= limit_bytes:
            return of_number(n_kept)
    raise BudgetError(
        f"no plan of recipe {recipe.name!r} fits {limit_bytes:,} bytes: {size(fewest, 1):,.0f} are stored with "
        f"{fewest} of {n} decoder layers. Give a larger budget, or a recipe with fewer protected layers or a smaller "
        "`kept`."
    )


def any_layers(shape: Shape, recipe: Recipe, limit_bytes: int) -> Shape:
    """The model of as many layers as stay, whichever: layers of a decoder are mostly alike."""
    return shape.of_layers(layers_for(shape, recipe, limit_bytes, [0.0] * len(shape.graph.layers)))


def needs_all_in_memory(recipe: Recipe) -> bool:
    """Whether the plan is decided or carried out on a model that is in memory as a whole."""
    return recipe.tries_adapters or tunes_network(recipe) or trains_adapters(recipe)


def trains_adapters(recipe: Recipe) -> bool:
    return recipe.steps > 0 and recipe.adapter_rank > 0


GATED_COPIES = 3  # of the model in float32: its weights, those that a step puts in their place, gradients of these


def trains_gates(recipe: Recipe) -> bool:
    return recipe.allocation == "joint" and recipe.gate_steps > 0


def tunes_network(recipe: Recipe) -> bool:
    return recipe.network_steps > 0 and recipe.bits[0] < 16


def tuning_windows(recipe: Recipe) -> int:
    """So many that no step sees what another saw, if the text has them, and those that are held out."""
    return math.ceil(recipe.network_steps * recipe.tuning_batch / (1 - recipe.held_out))


def forecast_for(
    shape: Shape, recipe: Recipe, counts: widths.Counts, window: int, limit: int | None
) -> memory.Forecast:
    """Peak memory of every stage, and whether all layers may stay in memory; refused where a stage needs more."""
    sizes = memory.Sizes(shape.tensors, shape.graph)
    work = work_for(shape, recipe, counts, window)
    return memory.forecast(sizes, work, shape.hidden_size, exchanges=shape.graph.exchanges, limit=limit)


def work_for(shape: Shape, recipe: Recipe, counts: widths.Counts, window: int) -> memory.Work:
    whole = None
    if needs_all_in_memory(recipe):
        kept = widths.first_units(shape.graph, counts)
        sizes = {bits: shape.size(shape.plan(recipe, kept, bits)) for bits in {16, *recipe.bits}}
        candidates = sum(sizes[bits].linears for bits in recipe.bits if bits < 16)
        whole = 2 * sizes[16].total + candidates + 2 * sizes[16].adapters
        if tunes_network(recipe):
            predictions = tuning_windows(recipe) * window * shape.hidden_size * 4  # of the original, before its head
            whole += memory.LEARNED_COPIES * 2 * sizes[16].linears + predictions
    if trains_gates(recipe):
        original = cost.parameter_count(shape.tensors)
        whole = max(whole or 0, GATED_COPIES * 4 * original + memory.TRIAL_BYTES)
    refits = []
    if recipe.reconstruction != "none":
        kept = widths.first_units(shape.graph, counts)
        # in scope `global` some layers keep more than others, all of their units at the most
        dims = cost.kept_shapes(shape.graph, kept) if recipe.scope == "layer" else {}
        for name, site in (bereft(shape.graph, kept) | bereft_stacks(shape.graph, kept)).items():
            n_experts = site.n_experts if name in shape.graph.stacks else 0
            refits.append(memory.Refit(*dims.get(name, (site.d_out, site.d_in)), n_experts))
    return memory.Work(
        score=recipe.score,
        calibration=(recipe.calibration_windows, window),
        score_tokens=max(window, BATCH_TOKENS),
        judged=(evaluation_batch(window, shape.vocabulary), window),
        judged_windows=recipe.evaluation_windows,
        vocabulary=shape.vocabulary,
        dtype=getattr(torch, recipe.precision),
        quantizes=recipe.bits[0] < 16,
        measures_information=len(recipe.bits) > 1,
        measures_influence=measures_influence(recipe),
        whole_bytes=whole,
        refits=max(refits, key=lambda refit: refit.size_bytes, default=None),
        rounds=rounds_for(shape, recipe),
        packs_embeddings=recipe.embedding_bits < 16 or (recipe.allocation == "joint" and recipe.pack_embeddings),
        tries=recipe.allocation == "joint",
        training_tokens=part_of(recipe.batch_size, 1, recipe.micro_batch) * window if trains_adapters(recipe) else 0,
        recomputes=recipe.gradient_checkpointing,
        tuning_tokens=recipe.tuning_batch * window if tunes_network(recipe) else 0,
    )


def rounds_for(shape: Shape, recipe: Recipe) -> memory.Rounds | None:
    """The most that rounding with text is asked for at once."""
    if not recipe.rounds_with_text:
        return None
    settings, found, ends = recipe.rounds(), [], Counter()
    for fused in shape.graph.projections:
        sites = [shape.graph.linears[name] for name in fused.linears]
        ends[fused.layer] += sites[0].d_in if len(sites) == 1 else 0
        found.append((sum(site.d_out for site in sites), sites[0].d_in))
    how = max(ends.values(), default=0), settings.needs_original, 1 + len(settings.dampings), settings.layer_steps > 0
    rounds = [memory.Rounds(d_out, k, *how, weighs=recipe.weighs_adapters) for d_out, k in found]
    return max(rounds, key=lambda each: each.size_bytes, default=None)


def evaluation_batch(window: int, vocabulary: int) -> int:
    """Windows that are judged at once: their logits decide, so that the number depends on nothing but the model."""
    return max(1, min(EVALUATION_BATCH, LOGITS_AT_ONCE // (window * vocabulary)))


def require_original(source: load.Source) -> None:
    if source.parameters is None:
        raise ModelError(
            f"{source.name!r} is an artifact of qpruner, already compressed: its plan.json and manifest.json say how. "
            "Name the original model instead."
        )
