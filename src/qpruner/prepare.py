"""Everything that can be refused is refused here, before a folder is made or an hour is spent."""

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qpruner.decide import widths
from qpruner.decide.draft import draft
from qpruner.decide.scores import BATCH_TOKENS
from qpruner.errors import BudgetError, MissingExtraError, ModelError, OutputError, RecipeError
from qpruner.model import checkpoint, corpus, cost, depth, load, memory
from qpruner.model.corpus import Corpus, Windows
from qpruner.model.discover import discover
from qpruner.model.graph import Graph
from qpruner.model.pystdlib import BUNDLED_NAME
from qpruner.model.residual import fault_of
from qpruner.model.skeleton import build_skeleton
from qpruner.model.surgery import narrow_
from qpruner.plan import SPECS, UNITS_BYTES, Budget, Plan
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
        names = depth.tensor_names(self.graph, layers, self.tensors)
        tensors = {new: self.tensors[old] for new, old in names.items()}
        return replace(self, graph=depth.shortened(self.graph, layers), tensors=tensors, layers=layers)

    @property
    def hidden_size(self) -> int:
        return self.source.config.get_text_config(decoder=True).hidden_size

    @property
    def vocabulary(self) -> int:
        return self.source.config.get_text_config(decoder=True).vocab_size

    def plan(self, recipe: Recipe, kept, bits: int | dict[str, int], seed: int = 0) -> Plan:
        """The plan that keeps these units with these bits, one number for all linears or one for each."""
        each = bits if isinstance(bits, dict) else dict.fromkeys(self.graph.linears, bits)
        return draft(
            self.graph, recipe, model_name=self.source.name, model_digest=self.source.digest, kept=kept,
            hidden_size=self.hidden_size,
            specs={name: SPECS[b] for name, b in each.items()}, seed=seed, layers=self.layers,
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
    """Bytes of what is kept when the linears have `mean_bits` on average, and when they have the fewest bits."""
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


def without_layers(prepared: "Prepared", scores: dict[str, Tensor]) -> tuple["Prepared", dict[str, Tensor]]:
    """The request for the model of the layers that stay, with the scores of its units; as it was where all stay."""
    graph, recipe = prepared.shape.graph, prepared.recipe
    layers = widths.keep_layers(graph, recipe, scores)
    if layers is None:
        return prepared, scores
    shape = prepared.shape.of_layers(layers)
    counts = widths_for(shape, recipe, prepared.limit_bytes)
    return replace(prepared, shape=shape, counts=counts), depth.Renaming(graph, layers).of_keys(scores)


def check_residual(shape: Shape, recipe: Recipe) -> None:
    """Refuse to prune the hidden states of a model whose code insists on their width: it is tried without weights."""
    if "residual" not in recipe.units or "residual" not in shape.graph.groups:
        return
    whole = {name: range(group.n_units) for name, group in shape.graph.groups.items()}
    config = depth.shortened_config(shape.source.config, shape.layers)
    skeleton = build_skeleton(config, trust_remote_code=shape.source.trust_remote_code)
    narrow_(skeleton, shape.graph, whole | {"residual": whole["residual"][::2]})
    if fault := fault_of(skeleton):
        raise RecipeError(
            f"recipe {recipe.name!r} prunes channels of the hidden states, and {shape.source.name!r} does not run with "
            f"half of them: {fault.splitlines()[0]}. Leave 'residual' out of `units`."
        )


def any_layers(shape: Shape, recipe: Recipe) -> Shape:
    """The model of as many layers as stay, whichever: layers of a decoder are mostly alike."""
    equal = {name: torch.zeros(group.n_units) for name, group in shape.graph.groups.items()}
    return shape.of_layers(widths.keep_layers(shape.graph, recipe, equal))


def limit_of(budget: Budget, source: load.Source) -> int:
    """The budget in bytes; refused above the model's own size at 16 bits."""
    limit = budget.to_bytes(parameters=source.parameters)
    if limit > source.bytes_16bit:
        raise BudgetError(
            f"the budget {budget} is {limit:,} bytes; {source.name!r} has {source.bytes_16bit:,} bytes at 16 bits. "
            "Nothing needs to be compressed: give a smaller budget."
        )
    return limit


@dataclass(frozen=True)
class Texts:
    """Three disjoint corpora. note: what a person should know of their choice."""

    calibration: Corpus
    search: Corpus
    evaluation: Corpus
    note: str | None

    def digests(self) -> dict[str, str]:
        return {role: getattr(self, role).digest for role in ("calibration", "search", "evaluation")}


def choose_texts(model_name: str, calibration: Path | None, search: Path | None, evaluation: Path | None) -> Texts:
    note = None
    if calibration is None:
        parts = {role: corpus.bundled_corpus(role) for role in ("calibration", "search", "evaluation")}
        if model_name != BUNDLED_NAME:
            note = (
                "No --calibration file was given: scores, search, training and judging used the source of Python's "
                "standard library, which may be far from what the model was made for."
            )
    else:
        parts = corpus.split_corpus(corpus.read_corpus(calibration, "calibration"))
    for role, path in (("search", search), ("evaluation", evaluation)):
        if path is not None:
            parts[role] = corpus.read_corpus(path, role)
    corpus.check_disjoint(*parts.values())
    return Texts(parts["calibration"], parts["search"], parts["evaluation"], note)


@dataclass(frozen=True)
class Prepared:
    """A request that can be served, with all that is known before any weight is read."""

    shape: Shape
    recipe: Recipe
    budget: Budget
    limit_bytes: int
    counts: widths.Counts
    tokenizer: PreTrainedTokenizerBase
    texts: Texts
    calibration: Windows
    training: Windows | None
    search: Windows
    evaluation: Windows
    output: Path
    seed: int
    weights_digest: str
    forecast: memory.Forecast

    @property
    def in_memory(self) -> bool:
        """Whether a stage needs the whole pruned model in memory."""
        return needs_all_in_memory(self.recipe)


def prepare(
    model: str,
    budget: str,
    output: Path,
    *,
    recipe: Recipe,
    calibration: Path | None,
    search_text: Path | None,
    evaluation: Path | None,
    seed: int,
    memory_limit: str | None = None,
    trust_remote_code: bool = False,
) -> Prepared:
    require(recipe)
    parsed = Budget.parse(budget)
    allowed = None if memory_limit is None else bytes_of(memory_limit)
    source = load.inspect_source(model, trust_remote_code=trust_remote_code)
    require_weights(source)
    shape = shape_of(source)
    limit = limit_of(parsed, source)
    fewer = any_layers(shape, recipe)
    check_residual(fewer, recipe)
    counts = widths_for(fewer, recipe, limit)
    tokenizer = load.load_tokenizer(source)
    texts = choose_texts(source.name, calibration, search_text, evaluation)
    length = min(recipe.window, source.context_length or recipe.window)

    def cut(text: Corpus, n: int, fewest: int, seed: int | None = seed) -> Windows:
        return corpus.token_windows(text, tokenizer, length=length, n_windows=n, fewest=fewest, seed=seed)

    widest = counts if fewer is shape else widths.counts(shape.graph, recipe, 1.0)
    forecast = forecast_for(shape, recipe, widest, length, allowed)
    prepared = Prepared(
        shape=shape,
        recipe=recipe,
        budget=parsed,
        limit_bytes=limit,
        counts=counts,
        tokenizer=tokenizer,
        texts=texts,
        calibration=cut(texts.calibration, recipe.calibration_windows, 4),
        training=cut(texts.calibration, recipe.steps * recipe.batch_size, 4) if recipe.steps else None,
        search=cut(texts.search, recipe.search_windows, 2),
        evaluation=cut(texts.evaluation, recipe.evaluation_windows, 2, seed=None),
        output=output,
        seed=seed,
        weights_digest=checkpoint.checked_digest(source.folder),
        forecast=forecast,
    )
    check_output(prepared)
    return prepared


def needs_all_in_memory(recipe: Recipe) -> bool:
    searched = len(recipe.bits) > 1 and recipe.allocation in ("sensitivity", "bayesian")
    return searched or (recipe.steps > 0 and recipe.adapter_rank > 0)


def bytes_of(text: str) -> int:
    """A size such as 4GiB."""
    size = Budget.parse(text)
    if size.unit not in UNITS_BYTES:
        raise BudgetError(f"the memory limit {text!r} is no size. Accepted: a number with {', '.join(UNITS_BYTES)}.")
    return size.to_bytes(parameters=0)


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
        whole_bytes=whole,
        training_tokens=recipe.batch_size * window if recipe.steps and recipe.adapter_rank else 0,
    )


def evaluation_batch(window: int, vocabulary: int) -> int:
    """Windows that are judged at once: their logits decide, so that the number depends on nothing but the model."""
    return max(1, min(EVALUATION_BATCH, LOGITS_AT_ONCE // (window * vocabulary)))


def require_original(source: load.Source) -> None:
    if source.parameters is None:
        raise ModelError(
            f"{source.name!r} is an artifact of qpruner, already compressed: its plan.json and manifest.json say how. "
            "Name the original model instead."
        )


def require_weights(source: load.Source) -> None:
    """A configuration alone will do for `inspect`, for nothing else."""
    if source.folder is None:
        raise ModelError(
            f"{source.name!r} is a configuration without weights. Give the folder that has its safetensors."
        )


def require(recipe: Recipe) -> None:
    """The optional packages that this recipe and the report need, named before anything starts."""
    needed = {"plotly": "report"} | ({"botorch": "search"} if recipe.allocation == "bayesian" else {})
    for package, extra in needed.items():
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(f"{package} is not installed, which this run needs: pip install 'qpruner[{extra}]'")
    if recipe.allocation != "uniform" and len(recipe.bits) == 1:
        raise RecipeError(
            f"recipe {recipe.name!r} has allocation {recipe.allocation!r} but one choice of bits, {recipe.bits[0]}."
        )


def check_output(prepared: Prepared) -> None:
    """Refuse a folder that holds something else, and a disk that cannot take what will be written."""
    output = prepared.output
    if output.exists() and not load.is_artifact(output):
        raise OutputError(f"{output} exists and is no artifact of qpruner. Name another folder, or remove it.")
    parent = next(p for p in output.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    # The artifact is written beside its final place, and the run keeps scores and adapters: less than as much again.
    needed = 2 * prepared.limit_bytes + prepared.forecast.disk
    if free < needed:
        raise OutputError(
            f"{parent} has {free:,} bytes free; this run may write {needed:,}. Make room, or name another place."
        )
