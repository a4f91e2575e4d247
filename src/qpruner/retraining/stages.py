"""The stages of a run that trains a finished artifact: judge, train, store the better way, judge again."""

import copy
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors import safe_open
from torch import nn

from qpruner.artifact.loader import ADAPTER, MANIFEST, PLAN, WEIGHTS
from qpruner.artifact.opened import open_stream
from qpruner.artifact.save import CARD, tensors_of, weight_bytes
from qpruner.do.recover import Trained
from qpruner.judge.divergence import kl_to
from qpruner.judge.loss import Streamed, evaluate_loss
from qpruner.judging import loss_values
from qpruner.merging import put_better_
from qpruner.model import adapters, load
from qpruner.model.scratch import Scratch
from qpruner.model.tensors import write_safetensors
from qpruner.plan import Plan
from qpruner.progress import OnProgress
from qpruner.recovering import recovered
from qpruner.retraining.request import Request
from qpruner.run import Run, digest_of


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
    judged_with = {"artifact": request.digest, "teacher": inputs["teacher"]}
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
    for layer in adapters.adapter_layers(model).values():  # those that were loaded stand still
        for factor in adapters.factors(layer):
            factor.requires_grad_(True)
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
    if how != "merged":
        losses["beside"] = _search_loss(request, model)
    if how == "beside":
        return request.plan
    ranges = request.plan.rounding.ranges
    merged = {
        name: adapters.merged(copy.deepcopy(layer.get_base_layer()), adapters.correction(layer), ranges=ranges)
        for name, layer in adapters.adapter_layers(model).items()
    }
    ships, losses["merged"] = put_better_(model, merged, partial(_search_loss, request), most=losses.get("beside"))
    return request.plan.model_copy(update={"adapters": ships})


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
