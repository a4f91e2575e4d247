"""Everything that can be refused is refused here, before a folder is made or an hour is spent."""

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qpruner.decide import widths
from qpruner.decide.draft import embeddings_of
from qpruner.errors import BudgetError, MissingExtraError, ModelError, OutputError, RecipeError
from qpruner.joint.points import counts_for, embedding_formats
from qpruner.model import checkpoint, corpus, depth, load, memory
from qpruner.model.corpus import Corpus, Windows
from qpruner.model.examples import Examples, examples_of
from qpruner.model.overlap import check_disjoint, fingerprints
from qpruner.model.packed.embedding import put_empty_embeddings_
from qpruner.model.pystdlib import BUNDLED_NAME
from qpruner.model.residual import fault_of
from qpruner.model.skeleton import build_skeleton
from qpruner.model.surgery import add_biases_, narrow_
from qpruner.model.turning import turn_of
from qpruner.plan import UNITS_BYTES, Budget
from qpruner.recipe import Recipe
from qpruner.shape import (
    Shape,
    any_layers,
    forecast_for,
    layers_for,
    needs_all_in_memory,
    shape_of,
    trains_adapters,
    tunes_network,
    tuning_windows,
    widths_for,
)


def without_layers(
    prepared: "Prepared", scores: dict[str, Tensor], worth: Sequence[float]
) -> tuple["Prepared", dict[str, Tensor]]:
    """The request for the model of the layers that stay, with the scores of its units; as it was where all stay.

    worth: of every decoder layer.
    """
    graph, recipe = prepared.shape.graph, prepared.recipe
    layers = layers_for(prepared.shape, recipe, prepared.limit_bytes, worth)
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


def check_reconstruction(shape: Shape, recipe: Recipe, counts: widths.Counts) -> None:
    """Refuse least squares where two models cannot walk side by side, and biases that a layer would not look at."""
    if recipe.reconstruction == "none":
        return
    if shape.graph.exchanges:
        raise RecipeError(
            f"recipe {recipe.name!r} refits linears layer by layer, and the layers of {shape.source.name!r} cannot run "
            f"one at a time: {shape.graph.exchanges[0]}. Set reconstruction to none."
        )
    added = shape.plan(recipe, widths.first_units(shape.graph, counts), recipe.bits[0]).added_biases
    config = depth.shortened_config(shape.source.config, shape.layers)
    add_biases_(build_skeleton(config, trust_remote_code=shape.source.trust_remote_code), added)


def check_rounding(shape: Shape, recipe: Recipe) -> None:
    """Refuse rounding with text where layers cannot run one at a time."""
    if not recipe.rounds_with_text:
        return
    if shape.graph.exchanges:
        raise RecipeError(
            f"recipe {recipe.name!r} rounds linears layer by layer, and the layers of {shape.source.name!r} cannot run "
            f"one at a time: {shape.graph.exchanges[0]}. Set rounding to nearest, loftq_weighting to none, and "
            "layer_steps and network_steps to 0."
        )


def check_embeddings(shape: Shape, recipe: Recipe) -> None:
    """Refuse to store an embedding in codes where the model has none that can be, or where its code asks for more of
    one than rows and products: it is tried without weights."""
    specs, key = embeddings_of(shape.graph, recipe), "embedding_bits to 16"
    if recipe.allocation == "joint" and recipe.pack_embeddings:
        specs, key = dict.fromkeys(shape.graph.embeddings, embedding_formats(recipe)[0]), "pack_embeddings to false"
    if recipe.embedding_bits < 16 and not specs:
        why = shape.graph.notes[-1] if shape.graph.notes else "it has no embedding"
        raise RecipeError(
            f"recipe {recipe.name!r} stores embeddings at {recipe.embedding_bits} bits, and {shape.source.name!r} has "
            f"none that can be: {why}. Set embedding_bits to 16."
        )
    if specs:
        config = depth.shortened_config(shape.source.config, shape.layers)
        skeleton = build_skeleton(config, trust_remote_code=shape.source.trust_remote_code)
        put_empty_embeddings_(skeleton, shape.graph, specs)
        if fault := fault_of(skeleton):
            raise RecipeError(
                f"recipe {recipe.name!r} stores embeddings in codes, and {shape.source.name!r} does not run so: "
                f"{fault.splitlines()[0]}. Set {key}."
            )


def check_transforms(shape: Shape, recipe: Recipe) -> None:
    """Refuse to rotate hidden states where the model would not stay what it is: it is tried without weights."""
    if "rotate" in recipe.transforms:
        config = depth.shortened_config(shape.source.config, shape.layers)
        turn_of(build_skeleton(config, trust_remote_code=shape.source.trust_remote_code), shape.graph)


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
    """Three disjoint corpora. note: what a person should know of their choice.

    training: what adapters are trained on, where that is another text than the calibration's; of the same role.
    """

    calibration: Corpus
    search: Corpus
    evaluation: Corpus
    note: str | None
    training: Corpus | None = None

    def digests(self) -> dict[str, str]:
        parts = ("calibration", "search", "evaluation", *(("training",) if self.training else ()))
        return {part: getattr(self, part).digest for part in parts}

    def fingerprints(self) -> dict[str, dict]:
        """Of those that shape the artifact, to know them by later."""
        return fingerprints(self.calibration, self.search)


def choose_texts(
    model_name: str,
    calibration: Path | None,
    search: Path | None,
    evaluation: Path | None,
    training: Path | None = None,
) -> Texts:
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
    trained_on = None if training is None else corpus.read_corpus(training, "calibration")
    check_disjoint(*parts.values(), *([trained_on] if trained_on else []))
    return Texts(parts["calibration"], parts["search"], parts["evaluation"], note, trained_on)


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
    training: Examples | None
    validation: Examples | None
    tuning: Windows | None
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
    training: Path | None = None,
    seed: int,
    memory_limit: str | None = None,
    trust_remote_code: bool = False,
) -> Prepared:
    """
    Args:
        training: a text for the adapters: instructions with answers, or running text; the calibration's by default.
    Raises:
        QPrunerError: what is wrong with the request.
    """
    require(recipe)
    parsed = Budget.parse(budget)
    allowed = None if memory_limit is None else bytes_of(memory_limit)
    source = load.inspect_source(model, trust_remote_code=trust_remote_code)
    require_weights(source)
    shape = shape_of(source)
    limit = limit_of(parsed, source)
    fewer = any_layers(shape, recipe, limit)
    check_residual(fewer, recipe)
    check_transforms(fewer, recipe)
    check_embeddings(fewer, recipe)
    counts = counts_for(fewer, recipe, limit)
    check_reconstruction(fewer, recipe, counts)
    check_rounding(fewer, recipe)
    tokenizer = load.load_tokenizer(source)
    texts = choose_texts(source.name, calibration, search_text, evaluation, training)
    length = min(recipe.window, source.context_length or recipe.window)

    def cut(text: Corpus, n: int, fewest: int, seed: int | None = seed) -> Windows:
        return corpus.token_windows(text, tokenizer, length=length, n_windows=n, fewest=fewest, seed=seed)

    def examples(text: Corpus, n: int, fewest: int) -> Examples:
        how = dict(length=length, seed=seed, mask_prompts=recipe.mask_prompts)
        return examples_of(text, tokenizer, n=n, fewest=fewest, **how)

    trains = trains_adapters(recipe)
    validates = trains and recipe.validations > 0
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
        training=examples(texts.training or texts.calibration, recipe.steps * recipe.batch_size, 4) if trains else None,
        validation=examples(texts.search, recipe.validation_windows, 1) if validates else None,
        tuning=cut(texts.calibration, tuning_windows(recipe), 4) if tunes_network(recipe) else None,
        search=cut(texts.search, recipe.search_windows, 2),
        evaluation=cut(texts.evaluation, recipe.evaluation_windows, 2, seed=None),
        output=output,
        seed=seed,
        weights_digest=checkpoint.checked_digest(source.folder),
        forecast=forecast,
    )
    return prepared


def bytes_of(text: str) -> int:
    """A size such as 4GiB."""
    size = Budget.parse(text)
    if size.unit not in UNITS_BYTES:
        raise BudgetError(f"the memory limit {text!r} is no size. Accepted: a number with {', '.join(UNITS_BYTES)}.")
    return size.to_bytes(parameters=0)


def require_weights(source: load.Source) -> None:
    """A configuration alone will do for `inspect`, for nothing else."""
    if source.folder is None:
        raise ModelError(
            f"{source.name!r} is a configuration without weights. Give the folder that has its safetensors."
        )


def require(recipe: Recipe) -> None:
    """The optional packages that this recipe and the report need, named before anything starts; and one process."""
    if (n_processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise RecipeError(
            f"{n_processes} processes were launched for a run that takes one: only training is shared. Compress in one "
            "process with steps=0, then launch the training of its artifact."
        )
    needed = {"plotly": "report"} | ({"botorch": "search"} if recipe.allocation in ("bayesian", "joint") else {})
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
