"""Which stage did the damage: the loss of the model after every stage of a run, on a few windows of the search text.

Each costs a pass over these windows. What the original predicts for them is kept as its last hidden states.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from qpruner.artifact.opened import artifact_digest, open_stream
from qpruner.decide import widths
from qpruner.job import Job
from qpruner.judge import divergence
from qpruner.judge import loss as judge
from qpruner.model import load
from qpruner.model.corpus import Windows
from qpruner.model.scratch import Scratch
from qpruner.model.whole import Streamable
from qpruner.plan import Plan
from qpruner.run import digest_of

WINDOWS = 8
ORIGINAL, CUT, EMBEDDINGS, REFITTED, ROUNDED, TUNED, RECOVERED, SHIPPED = (
    "original", "cut", "embeddings rounded", "refitted", "rounded", "tuned", "recovered", "as shipped",
)  # fmt: skip


class StageLosses:
    """Takes a model after each stage; stages that change nothing are passed over. Final.

    rows: for every stage so far its name, loss, its standard error, and KL to the original; nats per token.
    """

    def __init__(self, job: Job) -> None:
        self.rows: list[dict] = []
        self.windows: Windows = job.prepared.search.first(WINDOWS)
        self._on = job.measure_stages
        self._facts = {"windows": digest_of(self.windows.ids.tolist())}
        place = None if job.prepared.forecast.resident else f"reference-{digest_of(job.inputs(**self._facts))[:16]}"
        self._reference = Scratch(place and job.passes / place)  # what the original's last layer returns

    def cut(self, job: Job, kept: widths.Kept) -> None:
        """The original, and the model of what stays of it, before anything is made up for."""
        self._measure(job, ORIGINAL, {}, job.original)
        dense = replace(job, embeddings={})
        if _loses(job, kept):
            self._measure(dense, CUT, self._of(dense, kept), lambda: dense.pruned(kept, job.precision))
        if job.plan(kept, 16).packed_embeddings:
            self._measure(job, EMBEDDINGS, self._of(job, kept), lambda: job.pruned(kept, job.precision))

    def refitted(self, job: Job, kept: widths.Kept) -> None:
        if job.refitted is not None:
            self._measure(job, REFITTED, self._of(job, kept), lambda: job.pruned(kept, job.precision))

    def rounded(self, job: Job, model: nn.Module, plan: Plan) -> None:
        """model: in memory, with the codes of the plan in it, and adapters as LoftQ starts them."""
        if plan.quantizes:
            self._measure(job, ROUNDED, {"plan": plan.model_dump(mode="json")}, lambda: model)

    def tuned(self, job: Job, model: nn.Module, plan: Plan, found: dict | None) -> None:
        """found: how the learning of codes went; None where there was none."""
        if found is not None:
            self._measure(job, TUNED, {"plan": plan.model_dump(mode="json")}, lambda: model)

    def shipped(self, job: Job, folder: Path, plan: Plan, *, trained: bool) -> None:
        """The written artifact, loaded anew. It is named after the last stage that made it."""
        known = {row["stage"] for row in self.rows}
        stage = RECOVERED if trained else ROUNDED if plan.quantizes and not known & {ROUNDED, TUNED} else SHIPPED

        def artifact() -> Streamable:
            written = load.inspect_source(str(folder), trust_remote_code=job.shape.source.trust_remote_code)
            return open_stream(written, dtype=job.precision, **job.where())

        if self._on:
            self._measure(job, stage, {"artifact": artifact_digest(folder)}, artifact)
        self._reference.clear()

    def _of(self, job: Job, kept: widths.Kept) -> dict:
        return {"kept": kept, "layers": job.shape.layers, **job.basis}

    def _measure(self, job: Job, stage: str, facts: dict, model: Callable[[], Streamable | nn.Module]) -> None:
        if not self._on:
            return
        name, inputs = f"loss-{stage.replace(' ', '-')}", job.inputs(**self._facts, **facts)
        show, how = job.progress(f"loss, {stage}"), {"batch_size": job.batch}

        def compute() -> dict:
            with job.scratch(name, inputs) as scratch:
                found = model()
                streamed = self._reference if stage == ORIGINAL else scratch
                judged = found if isinstance(found, nn.Module) else judge.Streamed(found, streamed, show)
                loss = judge.evaluate_loss(judged, self.windows, **how)
                row = {"stage": stage, "loss": loss.loss, "standard_error": loss.to_dict()["standard_error"], "kl": 0.0}
                if stage != ORIGINAL:
                    original = judge.Streamed(job.original(), self._reference)
                    row["kl"] = divergence.kl_to(judged, original, self.windows, **how).kl
                return row

        self.rows.append(job.run.values(name, inputs, compute))


def _loses(job: Job, kept: widths.Kept) -> bool:
    fewer = any(len(kept[name]) < group.n_units for name, group in job.graph.groups.items())
    return fewer or job.shape.layers is not None
