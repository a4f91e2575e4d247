"""The stages of a run that judge: the original, and the written artifact."""

from pathlib import Path

from qpruner.artifact.opened import open_stream
from qpruner.job import Job
from qpruner.judge import divergence as divergence_of
from qpruner.judge import loss as judge
from qpruner.judge.speed import measure_in_fresh_process
from qpruner.model import checkpoint, load, memory
from qpruner.model.scratch import Scratch
from qpruner.model.whole import Streamable
from qpruner.run import digest_of


def judge_original(job: Job) -> dict:
    windows = job.prepared.evaluation
    inputs = job.inputs(windows=digest_of(windows.ids.tolist()), seed=None)  # which has no part in it
    with job.scratch("original", inputs) as scratch:

        def compute() -> dict:
            judged = _judged(job, job.original(), scratch, "original")
            return {"loss": loss_values(judge.evaluate_loss(judged, windows, batch_size=job.batch))}

        judged = job.run.values("original", inputs, compute)
    return judged | _speed(job, "original", job.shape.source.folder, job.prepared.weights_digest)


def judge_artifact(job: Job, folder: Path) -> dict:
    """Of what was written, loaded anew: the numbers are those of the files."""
    windows = job.prepared.evaluation
    weights = checkpoint.weights_digest(folder)
    inputs = job.inputs(windows=digest_of(windows.ids.tolist()), artifact=weights)
    with job.scratch("artifact", inputs) as ours, job.scratch("reference", inputs) as theirs:

        def artifact() -> judge.Streamed:
            written = load.inspect_source(str(folder), trust_remote_code=job.shape.source.trust_remote_code)
            return _judged(job, open_stream(written, dtype=job.precision, **job.where()), ours, "artifact")

        def loss() -> dict:
            return {"loss": loss_values(judge.evaluate_loss(artifact(), windows, batch_size=job.batch))}

        def divergence() -> dict:
            original = _judged(job, job.original(), theirs, "original")
            return {"kl": divergence_of.kl_to(artifact(), original, windows, batch_size=job.batch).to_dict()}

        judged = job.run.values("artifact", inputs, loss)
        if job.measure_kl:
            judged |= job.run.values("divergence", inputs, divergence)
    return judged | _speed(job, "artifact", folder, weights)


def _judged(job: Job, stream: Streamable, scratch: Scratch, which: str) -> judge.Streamed:
    return judge.Streamed(stream, scratch, job.progress(f"judging the {which}"))


def _speed(job: Job, which: str, folder: Path, weights: str) -> dict:
    """Memory and tokens per second, in a process of its own; nothing if not asked for, or where it does not fit."""
    trust = {"trust_remote_code": job.shape.source.trust_remote_code}
    tensors = load.inspect_source(str(folder), **trust).tensors
    if not job.measure_speed or not memory.fits(tensors, job.prepared.forecast.limit):
        return {}
    job.on_progress(f"speed of the {which}", 0, 1)
    measured = job.run.values(
        f"{which}-speed", {"weights": weights}, lambda: measure_in_fresh_process(folder, **trust).to_dict()
    )
    job.on_progress(f"speed of the {which}", 1, 1)
    return {"speed": measured}


def loss_values(report: judge.LossReport) -> dict:
    return {
        **report.to_dict(),
        "perplexity_standard_error": report.perplexity * report.standard_error,
        "protocol": str(report.protocol),
        "window_losses": report.window_losses,
    }
