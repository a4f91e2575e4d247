"""The stages of a run that find the codes of a plan with the help of text: layer by layer, then all together."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from qpruner.do.quantize import Candidates
from qpruner.do.rounding import facts_of, round_
from qpruner.do.tune import layer_tuner, tune_network_
from qpruner.do.walk import read_facts, write_results
from qpruner.job import Job
from qpruner.model.packed.learned import vectors_of
from qpruner.model.scratch import Scratch
from qpruner.plan import Plan
from qpruner.run import digest_of

CURVE = "tuning.json"


def rounded(job: Job, plan: Plan) -> tuple[Job, list[dict]]:
    """The job that has the codes of all quantized linears, with what adapters start from, and a row for each whose
    codes text decided; as it was where the plan rounds without text, or nothing at all."""
    if not plan.rounds_with_text:
        return job, []
    windows = job.prepared.calibration.ids
    inputs = _inputs(job, plan, windows)
    with job.scratch("rounding", inputs) as ours, job.scratch("rounding-original", inputs) as theirs:

        def compute(folder: Path) -> None:
            settings = plan.rounding
            original = job.original_beside() if settings.needs_original else None
            results = round_(
                original, job.pruned(plan.kept, job.precision), job.graph, plan, windows, dtype=job.stored_dtype,
                scratches=(theirs, ours), on_layer=job.progress("rounding"),
                tune=layer_tuner(plan, len(windows)) if settings.layer_steps else None,
            )  # fmt: skip
            write_results(results, folder, partial(facts_of, plan))

        folder = job.run.files("rounding", inputs, compute)
    return replace(job, rounded=folder, rounded_from=digest_of(inputs)), read_facts(folder)


def tuned(job: Job, plan: Plan, model: nn.Module, candidates: Candidates) -> tuple[Job, dict | None]:
    """The job that has the codes that were learned from the original's predictions, and how that went.

    model: with the quantized linears of the plan in it; what was learned is put there.
    """
    if not plan.rounding.network_steps or all(spec.bits == 16 for spec in plan.specs.values()):
        return job, None
    windows = job.prepared.tuning.ids
    inputs = _inputs(job, plan, windows)

    def compute(folder: Path) -> None:
        original, scratch, settings = job.original(), Scratch(), plan.rounding
        kept = Scratch(job.passes / f"tuning-{digest_of(inputs)[:16]}")
        original.forward(windows, scratch, on_layer=job.progress("predictions"))  # one by one
        with original.predicting(windows, scratch) as predictions:
            found = tune_network_(
                model, predictions, windows, steps=settings.network_steps, batch_size=settings.tuning_batch,
                held_out=settings.held_out, seed=plan.seed, weights=candidates.weights(),
                on_step=job.progress("tuning"), kept=kept,
            )  # fmt: skip
        vectors = {name: p.detach() for name, p in vectors_of(model).items()}
        save_file(candidates.stored(plan.specs) | vectors, folder / "tuned.safetensors")
        (folder / CURVE).write_text(json.dumps(asdict(found)) + "\n")
        kept.clear()

    folder = job.run.files("tuning", inputs, compute)
    job = replace(job, rounded=folder, rounded_from=digest_of(inputs))
    codes = job.codes()
    candidates.put_stored_(plan.specs, codes)
    for name, p in vectors_of(model).items():
        p.data.copy_(codes.read(name))
    return job, json.loads((folder / CURVE).read_text())


def _inputs(job: Job, plan: Plan, windows: Tensor) -> dict:
    decided = plan.model_dump(mode="json", include={"kept", "layers", "specs", "rounding", "added_biases"})
    if plan.adapter_ranks and plan.recovery.loftq_iterations:
        settings = plan.recovery.model_dump(include={"adapter_alpha", "loftq_iterations", "loftq_weighting"})
        decided["starts"] = {"ranks": plan.adapter_ranks, **settings}
    if plan.packed_embeddings:
        decided["embeddings"] = {name: spec.model_dump(mode="json") for name, spec in plan.packed_embeddings.items()}
    return job.inputs(plan=decided, windows=digest_of(windows.tolist()))
