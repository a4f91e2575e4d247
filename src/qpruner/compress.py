"""The main job: a prepared request in, an artifact and a report out, through the stages of a run folder.

prune -> refit what is left -> measure it -> choose bits -> round -> recover -> save -> judge what was saved. Each
stage names the digest of all that it depends on, so an interrupted run continues at the stage where it stopped.

Everything goes through a `Stream`, layer by layer, whether all layers fit in memory or one does: the results are the
same. Only the Bayesian search, sensitivities and training need the whole pruned model in memory.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from qpruner.artifact import save
from qpruner.artifact.opened import open_stream
from qpruner.damage import StageLosses
from qpruner.decide import widths
from qpruner.deciding import Decided, search_loss, shipping
from qpruner.do.quantize import Candidates
from qpruner.do.recover import Trained, taught_layers
from qpruner.do.streamed import LayerByLayer
from qpruner.drafting import Drafted, completed, drafted
from qpruner.job import Job, unfinished
from qpruner.judge import divergence
from qpruner.judge import loss as judge
from qpruner.judging import judge_artifact, judge_original, judge_speed, judge_tasks
from qpruner.merging import Merging, merged_or_beside
from qpruner.model import cost, load
from qpruner.model.scratch import Scratch
from qpruner.plan import Plan
from qpruner.prepare import Prepared
from qpruner.recovering import recovered
from qpruner.refitting import reconstructed
from qpruner.rounding import rounded, tuned
from qpruner.run import Run, digest_of

FINALISTS = "finalists"  # the folder of plans that are compared once they are carried out


@dataclass(frozen=True)
class Done:
    """What was seen while the plan was carried out."""

    trained: Trained
    search_loss: dict[str, float]
    loftq_errors: dict[str, tuple[float, float]]
    rounding: list[dict]  # a row for each linear whose codes were found with text
    tuning: dict | None = None  # as `do.tune.Tuned`, where codes were learned from predictions
    merging: Merging | None = None


@dataclass(frozen=True)
class Measured:
    """What was measured of the original and of the saved artifact, as stored by the run."""

    original: dict
    artifact: dict
    done: Done
    reconstruction: list[dict]
    size: cost.StoredSize
    on_disk: int
    stages: list[dict]  # the loss after each stage, as `damage.StageLosses.rows`
    tasks: dict | None = None  # as `judging.judge_tasks`


def carry_out(job: Job, draft: Callable[[Job], Drafted] = drafted) -> tuple[Prepared, Decided, Measured]:
    """All stages of the job. The request that comes back is about the model of the layers that stayed."""
    original = judge_original(job)
    found = _best_of(job, draft(job))
    prepared = found.prepared
    job = replace(job, prepared=prepared, embeddings=found.embeddings)
    losses = StageLosses(job)
    losses.cut(job, found.kept)
    job, reconstruction = reconstructed(job, found.kept)
    losses.refitted(job, found.kept)
    decide = partial(completed, job, found)
    made = partial(_in_memory, losses) if prepared.in_memory else _layer_by_layer
    decided, done = made(job, found.kept, decide)
    folder, size = unfinished(prepared.output), job.shape.size(decided.plan)
    on_disk = save.weight_bytes(folder)
    assert on_disk == size.total, f"{on_disk} bytes on disk, {size.total} predicted"
    artifact, speeds = judge_artifact(job, folder), judge_speed(job, folder)
    original, artifact = original | speeds.get("original", {}), artifact | speeds.get("artifact", {})
    losses.shipped(job, folder, decided.plan, trained=bool(done.trained.curve))
    tasks = judge_tasks(job, folder)
    shutil.rmtree(job.run.folder / FINALISTS, ignore_errors=True)
    shutil.rmtree(job.passes, ignore_errors=True)  # with what earlier requests may have left unfinished
    return prepared, decided, Measured(original, artifact, done, reconstruction, size, on_disk, losses.rows, tasks)


def _best_of(job: Job, first: Drafted) -> Drafted:
    """Of a draft and its rivals what is nearest to the original on the search text once its codes are found.

    Stages of the one that is taken are not computed again: all look for results in one place.
    """
    drafts = (first, *first.rivals)
    if not first.rivals:
        return first
    folder = job.run.folder / FINALISTS
    job.run.shared = job.run.shared or folder / "common"
    said = [{"kept": each.kept, "layers": each.prepared.shape.layers, "specs": _said(each)} for each in drafts]
    windows = job.prepared.search

    def kl_of(number: int) -> float:
        place, each = folder / str(number), drafts[number]
        with Run(place, shared=job.run.shared) as run:
            prepared = replace(each.prepared, output=place / "artifact")
            one = replace(job, prepared=prepared, embeddings=each.embeddings, run=run)
            one, _ = reconstructed(one, each.kept)
            _layer_by_layer(one, each.kept, partial(completed, one, each))
            written = unfinished(prepared.output)
            trust = job.shape.source.trust_remote_code
            stream = open_stream(
                load.inspect_source(str(written), trust_remote_code=trust), dtype=job.precision, **job.where()
            )
            judged = judge.Streamed(stream, Scratch(place / "states"), job.progress("judging finalists"))
            original = judge.Streamed(job.original(), Scratch(place / "original"))
            kl = divergence.kl_to(judged, original, windows, batch_size=job.batch).kl
        shutil.rmtree(place)
        return kl

    inputs = job.inputs(drafts=said, windows=digest_of(windows.ids.tolist()), rounding=repr(job.recipe.rounds()))
    losses = job.run.values("finalists", inputs, lambda: [kl_of(number) for number in range(len(drafts))])
    best = drafts[losses.index(min(losses))]
    return replace(best, rivals=())


def _said(draft: Drafted) -> dict:
    every = draft.specs | (draft.embeddings or {})
    return {name: spec.model_dump(mode="json") for name, spec in every.items()}


Decide = Callable[[tuple[nn.Module, Candidates] | None], Decided]  # of the pruned model, if it is in memory


def _in_memory(losses: StageLosses, job: Job, kept: widths.Kept, decide: Decide) -> tuple[Decided, Done]:
    model = job.pruned(kept).loaded()
    of_plan = lambda plan: Candidates(model, job.graph, plan, adapter_dtype=job.stored_dtype)
    if job.recipe.tries_adapters:
        candidates = of_plan(job.plan(kept, 16))
        decided = decide((model, candidates))
    else:  # ranks may depend on the bits, which no trial decides
        decided = decide(None)
        candidates = of_plan(decided.plan)
    candidates.put_(decided.plan.specs)
    job, rows = rounded(job, decided.plan)
    if codes := job.codes():
        candidates.put_stored_(decided.plan.specs, codes)
    losses.rounded(job, model, decided.plan)
    job, tuning = tuned(job, decided.plan, model, candidates)
    losses.tuned(job, model, decided.plan, tuning)
    errors, before = candidates.errors(), search_loss(job, model)
    candidates.forget()
    trained = _recover(job, model, decided.plan)
    after = search_loss(job, model) if trained.curve else before
    merging = merged_or_beside(job, decided.plan, model, beside=after)
    decided = shipping(job, decided, merging.plan)
    save.save_artifact(_cleared(job), model, job.graph, decided.plan, **_saved_as(job, decided.plan))
    return decided, Done(trained, {"before": before, "after": after}, errors, rows, tuning, merging)


def _layer_by_layer(job: Job, kept: widths.Kept, decide: Decide) -> tuple[Decided, Done]:
    decided = decide(None)
    job, rows = rounded(job, decided.plan)
    pruned, plan = job.pruned(kept), decided.plan
    with job.scratch("writing", job.inputs(plan=plan.model_dump(mode="json"))) as scratch:
        doing = LayerByLayer(pruned, job.graph, plan, job.shape.stored(plan), scratch, job.codes())
        tensors = doing.tensors(job.stored_dtype, job.progress("writing"))
        save.write_artifact(
            _cleared(job), tensors, lambda: doing.adapter_state, job.graph, plan,
            architecture=type(pruned.model).__name__, **_saved_as(job, plan),
        )  # fmt: skip
    return decided, Done(Trained(()), {}, doing.errors, rows)


def _recover(job: Job, model: nn.Module, plan: Plan) -> Trained:
    """Trains the adapters, or reads them back."""
    if not plan.adapter_ranks or not plan.recovery.steps:
        return Trained(())
    # What the original says depends on nothing that was found since; hidden states do on the basis they are in.
    bare = replace(job, refitted_from=None, rounded_from=None)
    turned = {"transforms": ["rotate"]} if job.rotates and taught_layers(plan.recovery) else {}
    return recovered(
        job.run, model, plan,
        training=job.prepared.training,
        validation=job.prepared.validation,
        teacher=job.original_beside if turned else job.original,
        teacher_inputs=bare.inputs(**turned),
        inputs=job.inputs(),
        dtype=job.stored_dtype,
        passes=job.passes,
        progress=job.progress,
    )  # fmt: skip


def _cleared(job: Job) -> Path:
    """Where the artifact is written; what an interrupted run left there is removed."""
    folder = unfinished(job.prepared.output)
    if folder.exists():
        shutil.rmtree(folder)
    return folder


def _saved_as(job: Job, plan: Plan) -> dict:
    return {"expected": job.shape.stored(plan), "dtype": job.stored_dtype, "source": job.shape.source}
