"""A request to train a finished artifact: everything that can be refused is refused here."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qpruner import __version__
from qpruner.artifact.loader import ADAPTER, PLAN, shell
from qpruner.artifact.opened import artifact_digest, manifest_of, open_stream
from qpruner.decide.draft import ranks_of
from qpruner.decide.ranks import uniform
from qpruner.do import sharding
from qpruner.do.recover import part_of
from qpruner.errors import MemoryLimitError, ModelError, RecipeError
from qpruner.model import adapters, checkpoint, corpus, load, memory
from qpruner.model.corpus import Windows
from qpruner.model.examples import Examples, examples_of
from qpruner.model.overlap import check_unseen
from qpruner.model.pystdlib import BUNDLED_NAME
from qpruner.plan import Plan
from qpruner.prepare import Texts, choose_texts
from qpruner.recipe import Recipe
from qpruner.shape import evaluation_batch


@dataclass(frozen=True)
class Request:
    """An artifact that can be trained, with all that is known before its weights are read.

    plan: of the result, with adapters beside the base. begun: whether the artifact has adapters that are gone on with.
    manifest: of the artifact. digest: of its weights and adapters. notes: what a person should know of choices.
    """

    source: load.Source
    plan: Plan
    begun: bool
    manifest: dict
    teacher: load.Source | None
    teacher_digest: str | None
    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    texts: Texts
    training: Examples
    validation: Examples | None
    search: Windows
    evaluation: Windows
    seed: int
    digest: str
    notes: tuple[str, ...]

    @property
    def stock(self) -> bool:
        """Whether transformers loads it without us, so that nothing may stand beside its weights."""
        return self.source.config.model_type != load.OWN_MODEL_TYPE

    @property
    def batch(self) -> int:
        return evaluation_batch(self.search.ids.shape[1], self.source.original.get_text_config(decoder=True).vocab_size)

    def inputs(self) -> dict:
        """All that the result's bytes depend on."""
        return {
            "qpruner": __version__,
            "artifact": self.digest,
            "plan": self.plan.model_dump(mode="json"),
            "teacher": self.teacher_digest,
            "recipe": self.recipe.model_dump(mode="json"),
            "texts": self.texts.digests(),
            "seed": self.seed,
        }


def request_for(
    model: str,
    *,
    teacher: str | None,
    recipe: Recipe,
    training: Path | None,
    search_text: Path | None,
    evaluation: Path | None,
    seed: int,
    memory_limit: int | None,
    trust_remote_code: bool,
) -> Request:
    """Everything that can be refused is refused here.

    Raises:
        QPrunerError: no artifact of ours, or one that does not fit in memory; the teacher has another vocabulary; a
            text is too short, or serves two purposes; processes were launched that cannot share the work as asked.
    """
    source = load.inspect_source(model, trust_remote_code=trust_remote_code)
    manifest = manifest_of(source)
    if not manifest:
        raise ModelError(
            f"{source.name!r} is no artifact of qpruner, and only what was compressed is recovered. "
            "Name a folder that `qpruner compress` wrote."
        )
    if not memory.fits(source.tensors, memory_limit):
        raise MemoryLimitError(
            f"training needs the whole artifact in memory, and {source.name!r} does not fit. Give a larger "
            "--memory-limit, or a machine with more memory."
        )
    if not recipe.steps or not recipe.adapter_rank:
        raise RecipeError(f"recipe {recipe.name!r} trains nothing: give it `steps` and an `adapter_rank`.")
    part_of(recipe.batch_size, sharding.processes(), recipe.micro_batch)  # before what the original says is computed
    notes = [words] if (words := sharding.in_words()) else []
    taught_by = _teacher(source, teacher, manifest, recipe, trust_remote_code, notes)
    teacher_digest = None
    if taught_by is not None:
        teacher_digest = checkpoint.checked_digest(taught_by.folder)
        if teacher_digest != manifest["digests"]["model_weights"]:
            notes.append(f"The teacher, {taught_by.name}, is not the model that was compressed.")
    else:
        recipe = recipe.model_copy(update={"loss": "next-token", "block_weight": 0.0})
    tokenizer = load.load_tokenizer(source)
    texts = choose_texts(manifest["base_model"], training, search_text, evaluation)
    check_unseen(manifest, texts.evaluation)
    notes += [texts.note] if texts.note else []
    length = min(recipe.window, source.context_length or recipe.window)
    cut = partial(corpus.token_windows, tokenizer=tokenizer, length=length)
    learned = partial(examples_of, tokenizer=tokenizer, length=length, seed=seed, mask_prompts=recipe.mask_prompts)
    validation = learned(texts.search, n=recipe.validation_windows, fewest=1) if recipe.validations else None
    plan, begun = _plan(source, recipe, seed)
    return Request(
        source=source, plan=plan, begun=begun, manifest=manifest, teacher=taught_by,
        teacher_digest=teacher_digest, recipe=recipe, tokenizer=tokenizer,
        texts=texts, training=learned(texts.calibration, n=recipe.steps * recipe.batch_size, fewest=4),
        validation=validation, search=cut(texts.search, n_windows=recipe.search_windows, fewest=2, seed=seed),
        evaluation=cut(texts.evaluation, n_windows=recipe.evaluation_windows, fewest=2), seed=seed,
        digest=artifact_digest(source.folder, weights=checkpoint.checked_digest(source.folder)), notes=tuple(notes),
    )  # fmt: skip


def _teacher(
    source: load.Source, named: str | None, manifest: dict, recipe: Recipe, trust_remote_code: bool, notes: list[str]
) -> load.Source | None:
    """The original, if it was named or comes with qpruner; None for learning from text alone."""
    if named is None and manifest["base_model"] == BUNDLED_NAME:
        named = BUNDLED_NAME
    if named is None:
        if recipe.loss == "distillation":
            notes.append(
                "No --teacher was named, so adapters learned the next token of the text. From the original's "
                "predictions they learn more: name the model that was compressed."
            )
        return None
    teacher = load.inspect_source(named, trust_remote_code=trust_remote_code)
    ours, theirs = (each.original.get_text_config(decoder=True).vocab_size for each in (source, teacher))
    if ours != theirs:
        raise ModelError(
            f"the teacher {teacher.name!r} predicts {theirs:,} tokens and {source.name!r} {ours:,}: they do not share "
            f"a vocabulary. Name the model that was compressed ({manifest['base_model']})."
        )
    return teacher


def _plan(source: load.Source, recipe: Recipe, seed: int) -> tuple[Plan, bool]:
    """The plan with adapters, and whether the artifact has them already: those keep their ranks and scaling."""
    plan = Plan.read(source.folder / PLAN)
    hidden = source.original.get_text_config(decoder=True).hidden_size
    recovery = recipe.recovery(hidden)
    begun = (source.folder / ADAPTER).is_dir()
    if begun:
        ranks, alpha, _, _ = adapters.read_adapters(source.folder / ADAPTER)
        recovery = recovery.model_copy(update={"adapter_alpha": alpha})
    else:
        ranks = _ranks(source, recipe, plan)
    recovery = recovery.model_copy(update={"loftq_iterations": 0})
    update = {"adapter_ranks": ranks, "adapters": "beside", "recovery": recovery, "seed": seed}
    return plan.model_copy(update=update), begun


def _ranks(source: load.Source, recipe: Recipe, plan: Plan) -> dict[str, int]:
    """As the recipe gives them out; evenly in a stock model, which does not say what it was cut from."""
    if source.config.model_type == load.OWN_MODEL_TYPE:
        _, graph = shell(source.folder, source.config, trust_remote_code=source.trust_remote_code)
        return ranks_of(graph, recipe, plan.kept, plan.specs)
    model = open_stream(source).model
    return uniform(recipe.adapter_rank, {n: adapters.features(model.get_submodule(n)) for n in plan.specs})
