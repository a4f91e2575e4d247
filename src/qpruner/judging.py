"""The stages of a run that judge: the original, and the written artifact."""

from dataclasses import asdict
from pathlib import Path

from qpruner.artifact.opened import artifact_digest, open_stream
from qpruner.job import Job
from qpruner.judge import divergence as divergence_of
from qpruner.judge import loss as judge
from qpruner.judge.paired import compare
from qpruner.judge.tasks import TaskReport, require_room, zero_shot
from qpruner.judge.turns import in_turn
from qpruner.model import load, memory
from qpruner.model.scratch import Scratch
from qpruner.model.whole import Streamable
from qpruner.run import digest_of

ROUNDS = 2  # in which speeds are measured


def judge_original(job: Job) -> dict:
    windows = job.prepared.evaluation
    inputs = job.inputs(windows=digest_of(windows.ids.tolist()), seed=None)  # which has no part in it
    with job.scratch("original", inputs) as scratch:

        def compute() -> dict:
            judged = _judged(job, job.original(), scratch, "original")
            return {"loss": loss_values(judge.evaluate_loss(judged, windows, batch_size=job.batch))}

        judged = job.run.values("original", inputs, compute)
    return judged


def judge_artifact(job: Job, folder: Path) -> dict:
    """Of what was written, loaded anew: the numbers are those of the files."""
    windows = job.prepared.evaluation
    inputs = job.inputs(windows=digest_of(windows.ids.tolist()), artifact=artifact_digest(folder))
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
    return judged


def _judged(job: Job, stream: Streamable, scratch: Scratch, which: str) -> judge.Streamed:
    return judge.Streamed(stream, scratch, job.progress(f"judging the {which}"))


def judge_speed(job: Job, folder: Path) -> dict[str, dict]:
    """Memory and tokens per second of the `original` and the `artifact`, in turn, each time in a process of its own.

    Of those that fit in memory; nothing if not asked for. The artifact's has its ratios to the original's.
    """
    trust = {"trust_remote_code": job.shape.source.trust_remote_code}
    folders = {"original": job.shape.source.folder, "artifact": folder}
    fits = lambda place: memory.fits(load.inspect_source(str(place), **trust).tensors, job.prepared.forecast.limit)
    folders = {name: place for name, place in folders.items() if job.measure_speed and fits(place)}
    if not folders:
        return {}

    def compute() -> dict:
        job.on_progress("speed", 0, ROUNDS)
        show = lambda done, total: job.on_progress("speed", done, total)
        turns = in_turn(folders, rounds=ROUNDS, on_round=show, **trust)
        found = {name: {"speed": turns.typical(name) | {"rounds": turns.rounds}} for name in folders}
        if len(folders) > 1:
            ratios = turns.ratios("artifact", "original")
            found["artifact"]["speed"]["ratios"] = {key: asdict(ratio) for key, ratio in ratios.items()}
        return found

    weights = {name: artifact_digest(place) for name, place in folders.items()}
    return job.run.values("speed", {"weights": weights, "rounds": ROUNDS}, compute)


def judge_tasks(job: Job, folder: Path) -> dict | None:
    """Zero-shot scores of the original and of the artifact, and what changed from one to the other; None if not asked
    for.

    Raises:
        MemoryLimitError: a model does not fit in memory as a whole.
    """
    if job.tasks is None:
        return None
    trust = {"trust_remote_code": job.shape.source.trust_remote_code}
    asked = asdict(job.tasks) | {"folder": str(job.tasks.folder)}
    reports = []
    for which, place in (("original", job.shape.source.folder), ("artifact", folder)):

        def compute(which=which, place=place) -> dict:
            source = load.inspect_source(str(place), **trust)
            require_room(source.tensors, job.prepared.forecast.limit)
            model = load.load_model(source)
            report = zero_shot(
                model, job.prepared.tokenizer, job.tasks.names, folder=job.tasks.folder, limit=job.tasks.limit,
                on_progress=lambda stage, *rest: job.on_progress(f"{stage}, {which}", *rest),
            )  # fmt: skip
            return report.to_dict(rows=True)

        inputs = {"weights": artifact_digest(place), "tasks": asked}
        reports.append(TaskReport.from_dict(job.run.values(f"{which}-tasks", inputs, compute)))
    return {
        "original": reports[0].to_dict(), "artifact": reports[1].to_dict(), "changes": compare(*reports).to_dict(),
    }  # fmt: skip


def loss_values(report: judge.LossReport) -> dict:
    return {
        **report.to_dict(),
        "protocol": str(report.protocol),
        "window_losses": report.window_losses,
    }
