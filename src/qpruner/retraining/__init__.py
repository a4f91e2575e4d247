"""The verb `recover`: adapters trained beside a finished artifact, or merged into it.

An artifact of any recipe will do. Its base stays as it is stored, packed or not; its plan gets adapters, or goes on
with those that it has. Launched by torchrun or `accelerate launch`, all processes train and the first does the rest.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from qpruner.artifact.opened import manifest_of
from qpruner.artifact.save import CARD, write_manifest
from qpruner.body import body_of
from qpruner.errors import OutputError
from qpruner.files import write_text
from qpruner.job import unfinished
from qpruner.loading import loading
from qpruner.model import load
from qpruner.model_card import card_of
from qpruner.progress import OnProgress
from qpruner.recipe import Recipe
from qpruner.report.retrained import RetrainedFacts, retrained_page
from qpruner.retraining.facts import facts_of, manifest_after
from qpruner.retraining.request import request_for
from qpruner.retraining.stages import retrain
from qpruner.run import Run, digest_of


@dataclass(frozen=True)
class Recovery:
    """What `recover` leaves: the artifact's folder, the report, and the report's facts."""

    artifact: Path
    report: Path
    facts: RetrainedFacts

    def to_json(self) -> dict:
        return {"artifact": str(self.artifact), "report": str(self.report), "facts": self.facts.model_dump(mode="json")}


def recover(
    model: str,
    output: Path,
    *,
    teacher: str | None,
    recipe: Recipe,
    training: Path | None,
    search_text: Path | None,
    evaluation: Path | None,
    seed: int,
    memory_limit: int | None,
    command: str,
    trust_remote_code: bool,
    on_progress: OnProgress,
) -> Recovery | None:
    """See `qpruner.api.recover`. None in a process that was launched to take part in the training."""
    request = request_for(
        model, teacher=teacher, recipe=recipe, training=training, search_text=search_text, evaluation=evaluation,
        seed=seed, memory_limit=memory_limit, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    run_folder = output.with_name(output.name + ".run")
    report, facts_file = run_folder / "report.html", run_folder / "facts.json"
    follows = int(os.environ.get("RANK", "0")) > 0
    if output.exists() and not follows:
        if not load.is_artifact(output):
            raise OutputError(f"{output} exists and is no artifact of qpruner. Name another folder, or remove it.")
        manifest = manifest_of(load.inspect_source(str(output), trust_remote_code=trust_remote_code))
        if manifest.get("request") != digest_of(request.inputs()) or not facts_file.is_file():
            raise OutputError(
                f"{output} holds an artifact of another request. Name another output, or remove it and {run_folder}."
            )
        return Recovery(output, report, RetrainedFacts.read(facts_file))
    folder = unfinished(output)
    with Run(run_folder, follows=follows) as run:
        if not follows:
            shutil.rmtree(folder, ignore_errors=True)
        found = retrain(request, run, folder, on_progress)
        if found is None:
            return None
        manifest = manifest_after(request, found)
        write_manifest(folder, manifest)
        body = body_of(load.inspect_source(str(folder), trust_remote_code=trust_remote_code))
        card = request.source.folder / CARD
        write_text(folder / CARD, card_of(manifest, body, loading(body, "OUT"), card if card.is_file() else None))
        facts = facts_of(request, found, folder, output, command=command, seconds=run.seconds())
        write_text(facts_file, facts.to_json())
        write_text(report, retrained_page(facts))
        os.replace(folder, output)
        shutil.rmtree(run_folder / "passes", ignore_errors=True)
        run.event("done")
    return Recovery(output, report, facts)
