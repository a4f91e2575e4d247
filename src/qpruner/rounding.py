"""The stage of a run that finds the codes of a plan with the help of text."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from qpruner.do.rounding import facts_of, round_
from qpruner.do.walk import read_facts, write_results
from qpruner.job import Job
from qpruner.plan import Plan
from qpruner.run import digest_of


def rounded(job: Job, plan: Plan) -> tuple[Job, list[dict]]:
    """The job that has the codes of all quantized linears, and a row for each of them; as it was where the plan rounds
    to nearest, or nothing at all."""
    if not plan.rounding.needs_text or all(spec.bits == 16 for spec in plan.specs.values()):
        return job, []
    windows = job.prepared.calibration.ids
    plain = plan.model_dump(mode="json", include={"kept", "layers", "specs", "rounding", "added_biases"})
    inputs = job.inputs(plan=plain, windows=digest_of(windows.tolist()))
    with job.scratch("rounding", inputs) as ours, job.scratch("rounding-original", inputs) as theirs:

        def compute(folder: Path) -> None:
            beside = plan.rounding.propagation or plan.rounding.layer_steps
            original = job.original_beside() if beside else None
            results = round_(
                original, job.pruned(plan.kept, job.precision), job.graph, plan, windows, dtype=job.stored_dtype,
                scratches=(theirs, ours), on_layer=job.progress("rounding"),
            )  # fmt: skip
            write_results(results, folder, partial(facts_of, plan))

        folder = job.run.files("rounding", inputs, compute)
    return replace(job, rounded=folder, rounded_from=digest_of(inputs)), read_facts(folder)
