"""From what a training run measured to the artifact's manifest and the facts of its report."""

import platform
from importlib.metadata import version

from qpruner import __version__
from qpruner.artifact.stock import how_to_load
from qpruner.facts import PREDICTIONS, compared, machine, on_disk, training_warnings
from qpruner.report import facts as report
from qpruner.report.retrained import RetrainedFacts
from qpruner.retraining.request import Request
from qpruner.retraining.stages import Retrained
from qpruner.run import digest_of


def facts_of(request: Request, found: Retrained, folder, output, *, command: str, seconds) -> RetrainedFacts:
    """folder: where the result lies now. output: its final place."""
    loads_in, snippet = how_to_load(folder, str(output))
    points = lambda curve: tuple(report.LossPoint(step=step, loss=loss) for step, loss in curve)
    ways = {way: loss for way, loss in found.losses.items() if way != "before"}
    shipped = ways[found.plan.adapters]
    warned = []
    if shipped > found.losses["before"]:
        warned.append(
            f"Training made the search text worse: {found.losses['before']:.4f} to {shipped:.4f} nats per token. Give "
            "it a lower learning_rate, more steps, or more text."
        )
    warned += training_warnings(found.trained)
    return RetrainedFacts(
        model_name=request.source.name,
        teacher=request.teacher and request.teacher.name,
        recipe=request.recipe.name,
        seed=request.seed,
        versions={"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers", "peft")}}
        | {"qpruner": __version__},
        machine=machine(),
        command=command,
        size_before=found.size_before,
        size_after=found.size_after,
        adapters=found.plan.adapters,
        losses=ways,
        trained_parameters=found.trained_parameters,
        original_loss=found.original_loss,
        metrics=metrics(found),
        protocol=found.after["loss"]["protocol"],
        recovery=report.Recovered(
            loss=found.plan.recovery.loss,
            curve=points(found.trained.curve),
            validation=points(found.trained.validation),
            best_step=found.trained.best_step,
            loss_before=found.losses["before"],
            loss_after=ways.get("beside"),
            loss_merged=ways.get("merged"),
            ships=found.plan.adapters,
        ),
        stages=tuple(report.Stage(name=name, seconds=s) for name, s in seconds.items()),
        notes=request.notes,
        warnings=tuple(warned),
        loads_in=loads_in,
        snippet=snippet,
    )


def metrics(found: Retrained) -> tuple[report.Metric, ...]:
    rows = [row for row in PREDICTIONS if row[2] in found.after]
    return (*compared(rows, found.before, found.after), on_disk(found.size_before, found.size_after))


def manifest_after(request: Request, found: Retrained) -> dict:
    """That of the artifact, with what was done to it since."""
    loss = {k: v for k, v in found.after["loss"].items() if k != "window_losses"}
    judged = {"artifact": loss, **({"kl": found.after["kl"]} if "kl" in found.after else {})}
    trained = {
        "adapters": found.plan.adapters,
        "artifact": request.digest,
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
