"""The stage of a run that makes up for what the cuts took, and the same in small for a trial."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from qpruner.decide import widths
from qpruner.do.reconstruct import facts_of, reconstruct
from qpruner.do.walk import read_facts, write_results
from qpruner.job import Job
from qpruner.model.scratch import Scratch
from qpruner.model.stream import OnLayer
from qpruner.model.surgery import bereft, bereft_stacks
from qpruner.run import digest_of

TRIAL_WINDOWS = 8  # of calibration text that trials are refitted on: they are to be compared, not to ship


def reconstructed(job: Job, kept: widths.Kept) -> tuple[Job, list[dict]]:
    """The job whose pruned model has its refitted linears, and a row for each of them; as it was where none is asked
    for, or nothing was cut."""
    plan = job.plan(kept, 16)
    if not _refits(job, kept):
        return job, []
    windows = job.prepared.calibration.ids
    inputs = job.inputs(
        kept=kept, layers=job.shape.layers, reconstruction=plan.reconstruction.model_dump(mode="json"),
        added_biases=plan.added_biases, windows=digest_of(windows.tolist()), **job.basis,
    )  # fmt: skip
    with job.scratch("reconstruction", inputs) as ours, job.scratch("reconstruction-original", inputs) as theirs:

        def compute(folder: Path) -> None:
            _refit(job, kept, windows, folder, (theirs, ours), job.progress("reconstruction"))

        folder = job.run.files("reconstruction", inputs, compute)
    return replace(job, refitted=folder, refitted_from=digest_of(inputs)), read_facts(folder)


def reconstructed_on_trial(job: Job, kept: widths.Kept, folder: Path, scratch: Scratch) -> Job:
    """The same on few windows, for one evaluation.

    Args:
        folder: of its own, for what is refitted.
    """
    if not _refits(job, kept):
        return job
    folder.mkdir(parents=True, exist_ok=True)
    windows = job.prepared.calibration.ids[:TRIAL_WINDOWS]
    _refit(job, kept, windows, folder, (scratch.part("theirs"), scratch.part("ours")), None)
    return replace(job, refitted=folder)


def _refits(job: Job, kept: widths.Kept) -> bool:
    lost = bereft(job.graph, kept) or bereft_stacks(job.graph, kept)
    return job.plan(kept, 16).reconstruction is not None and bool(lost)


def _refit(
    job: Job,
    kept: widths.Kept,
    windows: Tensor,
    folder: Path,
    scratches: tuple[Scratch, Scratch],
    on_layer: OnLayer | None,
) -> None:
    results = reconstruct(
        job.original_beside(), job.pruned(kept, job.precision), job.graph, job.plan(kept, 16), windows,
        dtype=job.stored_dtype, scratches=scratches, on_layer=on_layer,
    )  # fmt: skip
    write_results(results, folder, facts_of)
