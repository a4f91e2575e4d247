"""The stages of a run that train the adapters of a model: what the original says, then the training.

Nothing here knows where the model comes from: a job that just made it, or an artifact that was opened again.
"""

import gc
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qpruner.do.objective import compared_layers
from qpruner.do.recover import Material, Trained, taught_layers, train_adapters_
from qpruner.errors import RecipeError
from qpruner.model import adapters, residual
from qpruner.model.examples import Examples
from qpruner.model.lessons import Lessons, write_lessons
from qpruner.model.scratch import Scratch
from qpruner.model.skeleton import decoder_layers
from qpruner.model.whole import Streamable
from qpruner.plan import Plan
from qpruner.run import Run, digest_of

CURVE, VALIDATION, BEST = "loss_curve", "validation_curve", "best_step"  # beside the adapters in their stage's file


def recovered(
    run: Run,
    model: nn.Module,
    plan: Plan,
    *,
    training: Examples,
    validation: Examples | None,
    teacher: Callable[[], Streamable] | None,
    teacher_inputs: Mapping,
    inputs: Mapping,
    dtype: torch.dtype,
    passes: Path,
    progress: Callable[[str], Callable[..., None]],
) -> Trained:
    """Train the adapters of a model in place, or read back what was trained with these inputs.

    Args:
        model: in memory, with the adapters of the plan beside its linears.
        plan: what the model is of the original, and how it is trained.
        validation: from another text than `training`; not looked at with 0 validations.
        teacher: opens the original, in the basis of the model; asked only for distillation, and only if what it says is
            not on disk yet.
        teacher_inputs: JSON values that what the original says depends on besides the examples: its weights.
        inputs: JSON values that the adapters depend on, besides plan and examples: the base they stand beside.
        dtype: of the adapters on disk; they are read back from there.
        passes: a folder for what is unfinished; an interrupted process goes on from there.
        progress: gives for the name of a stage what is called with what was done and all there is to do.
    Raises:
        RecipeError: the plan asks for distillation and there is no teacher.
    """
    recovery = plan.recovery
    if not recovery.validations:
        validation = None
    materials = {"training": training} | ({} if validation is None else {"validation": validation})
    facts = {f"{name} examples": each.digest for name, each in materials.items()}
    inputs = {**inputs, "plan": plan.model_dump(mode="json"), **facts}
    if recovery.loss == "distillation":
        if teacher is None:
            raise RecipeError(
                "the loss is distillation, and the original to learn from is not at hand. Name it, or set loss to "
                "next-token."
            )
        inputs |= {"teacher": dict(teacher_inputs)}

    def compute() -> dict[str, Tensor]:
        folder = passes / f"recovery-{digest_of(inputs)[:16]}"
        found = train_adapters_(
            model, recovery, seed=plan.seed, folder=folder, on_step=progress("recovery"),
            **{
                name: Material(each, _lessons(run, model, plan, name, each, teacher, teacher_inputs, passes, progress))
                for name, each in materials.items()
            },
        )  # fmt: skip
        gc.collect()  # the trainer is in a cycle with the model, its optimizer and its last batch
        if not run.follows:
            shutil.rmtree(folder, ignore_errors=True)
        curve = lambda points: torch.tensor(points, dtype=torch.float64).reshape(-1, 2)
        best = torch.tensor(-1 if found.best_step is None else found.best_step)
        told = {CURVE: curve(found.curve), VALIDATION: curve(found.validation), BEST: best}
        return adapters.adapter_state(model, dtype) | told

    state = run.tensors("adapters", inputs, compute, together=True)
    points = lambda name: tuple((int(step), value) for step, value in state[name].tolist())
    names = {linear: adapters.tensor_names(linear) for linear in plan.adapter_ranks}
    adapters.set_adapter_weights_(model, {linear: (state[a], state[b]) for linear, (a, b) in names.items()})
    best = int(state[BEST])
    return Trained(points(CURVE), points(VALIDATION), None if best < 0 else best)


def _lessons(
    run: Run, model: nn.Module, plan: Plan, name: str, examples: Examples, teacher, teacher_inputs, passes, progress
) -> Lessons | None:
    """What the original says to these examples, in a stage of its own."""
    recovery = plan.recovery
    if recovery.loss == "next-token":
        return None
    layers = compared_layers(len(decoder_layers(model))) if taught_layers(recovery) else ()
    if plan.layers is not None:
        layers = tuple(plan.layers[i] for i in layers)
    channels = plan.kept.get(residual.NAME) if layers else None
    inputs = {
        **teacher_inputs, "examples": examples.digest, "top": recovery.teacher_top, "layers": list(layers),
        "channels": channels and list(channels),
    }  # fmt: skip

    def compute(folder: Path) -> None:
        unfinished = passes / f"teacher-{digest_of(inputs)[:16]}"
        scratch = Scratch(unfinished / "states")
        write_lessons(
            teacher(), examples.ids, folder, scratch, top=recovery.teacher_top, layers=layers, channels=channels,
            passes=unfinished, on_layer=progress(f"teacher, {name} text"),
        )  # fmt: skip
        shutil.rmtree(unfinished)

    return Lessons(run.files(f"teacher-{name}", inputs, compute))
