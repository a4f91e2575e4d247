"""The job of `recover`: adapters trained beside a finished artifact.

An artifact of any recipe will do. Its base stays as it is stored, packed or not; its plan gets adapters, or goes on
with those that it has.
"""

import copy
import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedTokenizerBase

from qpruner import __version__
from qpruner.artifact.loader import ADAPTER, PLAN, WEIGHTS
from qpruner.artifact.opened import open_stream
from qpruner.artifact.save import tensors_of, weight_bytes
from qpruner.decide.ranks import uniform
from qpruner.do.recover import Trained
from qpruner.errors import MemoryLimitError, ModelError, RecipeError
from qpruner.judge.divergence import kl_to
from qpruner.judge.loss import Streamed, evaluate_loss
from qpruner.judging import loss_values
from qpruner.model import adapters, checkpoint, corpus, load, memory
from qpruner.model.corpus import Windows
from qpruner.model.examples import Examples, examples_of
from qpruner.model.overlap import check_unseen
from qpruner.model.pystdlib import BUNDLED_NAME
from qpruner.model.scratch import Scratch
from qpruner.model.tensors import write_safetensors
from qpruner.plan import Plan
from qpruner.prepare import Texts, choose_texts
from qpruner.progress import OnProgress
from qpruner.recipe import Recipe
from qpruner.recovering import recovered
from qpruner.run import Run, digest_of
from qpruner.shape import evaluation_batch

CARD = "README.md"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Request:
    """An artifact that can be trained, with all that is known before its weights are read.

    plan: of the result, with adapters beside the base. begun: whether the artifact has adapters that are gone on with.
    manifest: of the artifact. note: what a person should know of the choices made.
    """

    source: load.Source
    plan: Plan
    begun: bool
    manifest: dict
    teacher: load.Source | None
    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    texts: Texts
    training: Examples
    validation: Examples | None
    search: Windows
    evaluation: Windows
    seed: int
    weights_digest: str
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
            "artifact": self.weights_digest,
            "plan": self.plan.model_dump(mode="json"),
            "teacher": self.teacher and checkpoint.weights_digest(self.teacher.folder),
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
            text is too short, or serves two purposes.
    """
    source = load.inspect_source(model, trust_remote_code=trust_remote_code)
    if source.folder is None or not load.is_artifact(source.folder):
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
    manifest = json.loads((source.folder / MANIFEST).read_text())
    notes: list[str] = []
    taught_by = _teacher(source, teacher, manifest, recipe, trust_remote_code, notes)
    if taught_by is None:
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
        source=source, plan=plan, begun=begun, manifest=manifest, teacher=taught_by, recipe=recipe, tokenizer=tokenizer,
        texts=texts, training=learned(texts.calibration, n=recipe.steps * recipe.batch_size, fewest=4),
        validation=validation, search=cut(texts.search, n_windows=recipe.search_windows, fewest=2, seed=seed),
        evaluation=cut(texts.evaluation, n_windows=recipe.evaluation_windows, fewest=2), seed=seed,
        weights_digest=checkpoint.checked_digest(source.folder), notes=tuple(notes),
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
    if checkpoint.weights_digest(teacher.folder) != manifest["digests"]["model_weights"]:
        notes.append(f"The teacher, {teacher.name}, is not the model that was compressed ({manifest['base_model']}).")
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
        model = open_stream(source).model
        shapes = {name: adapters.features(model.get_submodule(name)) for name in plan.specs}
        ranks = uniform(recipe.adapter_rank, shapes)
    recovery = recovery.model_copy(update={"loftq_iterations": 0})
    update = {"adapter_ranks": ranks, "adapters": "beside", "recovery": recovery, "seed": seed}
    return plan.model_copy(update=update), begun


@dataclass(frozen=True)
class Retrained:
    """What came of it. plan: of the result, with adapters as they are stored.

    before, after: what was measured of the artifact, `loss` and with a teacher `kl`. original_loss: of the teacher.
    losses: on the search text: before training, and of every way to store the adapters that was tried.
    """

    plan: Plan
    trained: Trained
    losses: dict[str, float]
    before: dict
    after: dict
    original_loss: float | None
    trained_parameters: int
    size_before: int
    size_after: int


def retrain(request: Request, run: Run, folder: Path, on_progress: OnProgress) -> Retrained | None:
    """All stages; the result is written into `folder`. None in a process that only takes part in the training."""
    inputs = request.inputs()
    size_before = weight_bytes(request.source.folder)
    judged_with = {"artifact": request.weights_digest, "teacher": inputs["teacher"]}
    judged_with["windows"] = digest_of(request.evaluation.ids.tolist())
    of = partial(_judged, request, on_progress)
    before = run.values("before", judged_with, lambda: of(request.source, "the artifact"))
    original_loss = None
    if request.teacher is not None:
        alone = lambda: of(request.teacher, "the original", divergence=False)["loss"]["loss"]
        original_loss = run.values("original", judged_with, alone)
    model = load.load_model(request.source)
    recovery = request.plan.recovery
    if not request.begun:
        adapters.inject_adapters_(
            model, request.plan.adapter_ranks, alpha=recovery.adapter_alpha, dropout=recovery.adapter_dropout,
            seed=request.seed,
        )  # fmt: skip
    losses = {"before": run.values("search", inputs, lambda: _search_loss(request, model))}
    trained = recovered(
        run, model, request.plan, training=request.training, validation=request.validation,
        teacher=request.teacher and partial(open_stream, request.teacher),
        teacher_inputs={"teacher": inputs["teacher"]}, inputs=inputs, dtype=load.stored_dtype(request.source),
        passes=run.folder / "passes",
        progress=lambda stage: lambda done, total, *_: on_progress(stage, done, total),
    )  # fmt: skip
    if run.follows:
        return None
    n_trained = sum(p.numel() for layer in adapters.adapter_layers(model).values() for p in adapters.factors(layer))
    plan = _best_stored(request, model, losses)
    _write(request, plan, model, folder)
    written = load.inspect_source(str(folder), trust_remote_code=request.source.trust_remote_code)
    return Retrained(
        plan, trained, losses, before, of(written, "the result"), original_loss, n_trained, size_before,
        weight_bytes(folder),
    )  # fmt: skip


def _best_stored(request: Request, model: nn.Module, losses: dict[str, float]) -> Plan:
    """Leaves the model with its adapters beside or merged, whichever loses less on the search text, or as asked."""
    how = "merged" if request.stock else request.recipe.adapters
    layers = adapters.adapter_layers(model)
    if how != "merged":
        losses["beside"] = _search_loss(request, model)
    if how == "beside":
        return request.plan
    for name, layer in layers.items():
        base = copy.deepcopy(layer.get_base_layer())
        ranges = request.plan.rounding.ranges
        model.set_submodule(name, adapters.merged(base, adapters.correction(layer), ranges=ranges))
    losses["merged"] = _search_loss(request, model)
    if how == "best" and losses["merged"] > losses["beside"]:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        return request.plan
    del model.peft_config
    return request.plan.model_copy(update={"adapters": "merged"})


def _write(request: Request, plan: Plan, model: nn.Module, folder: Path) -> None:
    """The artifact again, with what was trained; the card and the manifest are to come."""
    source, merged = request.source, plan.adapters == "merged"
    anew = {ADAPTER, PLAN, MANIFEST, CARD} | ({WEIGHTS} if merged else set())
    shutil.copytree(source.folder, folder, ignore=lambda _, names: anew & set(names))
    (folder / PLAN).write_text(plan.to_json())
    if merged:
        with safe_open(source.folder / WEIGHTS, framework="pt") as file:
            expected = {name: (source.tensors[name].dtype, source.tensors[name].shape) for name in file.keys()}
        write_safetensors(folder / WEIGHTS, expected, tensors_of(model, expected))
        return
    state = adapters.adapter_state(model, load.stored_dtype(source))
    recovery = plan.recovery
    config = adapters.lora_config(plan.adapter_ranks, alpha=recovery.adapter_alpha, dropout=recovery.adapter_dropout)
    adapters.write_adapters(folder / ADAPTER, state, config)


def _search_loss(request: Request, model: nn.Module) -> float:
    return evaluate_loss(model, request.search, batch_size=request.batch).loss


def _judged(
    request: Request, on_progress: OnProgress, source: load.Source, which: str, *, divergence: bool = True
) -> dict:
    """Loss on the evaluation text, and the distance from the teacher."""
    show = lambda done, total, *_: on_progress(f"judging {which}", done, total)
    opened = lambda of: Streamed(open_stream(of, resident=True), Scratch(), show)
    report = evaluate_loss(opened(source), request.evaluation, batch_size=request.batch)
    found = {"loss": loss_values(report)}
    if request.teacher is not None and divergence:
        theirs = opened(request.teacher)
        found["kl"] = kl_to(opened(source), theirs, request.evaluation, batch_size=request.batch).to_dict()
    return found


def manifest_of(request: Request, found: Retrained) -> dict:
    """That of the artifact, with what was done to it since."""
    loss = {k: v for k, v in found.after["loss"].items() if k != "window_losses"}
    judged = {"artifact": loss, **({"kl": found.after["kl"]} if "kl" in found.after else {})}
    trained = {
        "adapters": found.plan.adapters,
        "artifact": request.weights_digest,
        "recipe": request.recipe.name,
        "recovery": found.plan.recovery.model_dump(mode="json"),
        "seed": request.seed,
        "teacher": request.teacher and request.teacher.name,
        "texts": request.texts.digests(),
    }
    old = request.manifest
    sizes = {**old["bytes"], "on_disk": found.size_after, "predicted": found.size_after}
    change = found.size_after - found.size_before
    sizes["parts"] = {**old["bytes"]["parts"], "adapters": max(0, old["bytes"]["parts"].get("adapters", 0) + change)}
    marks = dict(request.texts.fingerprints())
    return {
        **old,
        "made_by": f"qpruner {__version__}",
        "request": digest_of(request.inputs()),
        "bytes": sizes,
        "digests": {**old["digests"], "texts": request.texts.digests()},
        "fingerprints": {**old.get("fingerprints", {}), **marks},
        "evaluation": {**old["evaluation"], **judged},
        "recovered": [*old.get("recovered", []), trained],
    }
