"""Training the adapters after the cuts: LoRA (arXiv 2106.09685) with the base frozen and packed.

What is learned from lies ready in the order of training, so that a batch is the same whole or in parts, in one process
or in several (`sharding`), and after an interruption.
"""

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qpruner.do import sharding
from qpruner.do.objective import Objective, compared_layers, labels_of
from qpruner.errors import RecipeError
from qpruner.model.examples import Examples
from qpruner.model.lessons import Lessons
from qpruner.model.skeleton import decoder_layers
from qpruner.plan import Recovery

POINTS = 50  # of the loss curve, and checkpoints where nothing is validated
OnStep = Callable[[int, int, float], None]  # steps done, steps in all, loss


@dataclass(frozen=True, eq=False)
class Material:
    """Examples, and what the original gives for them; None for what trains on the text alone."""

    examples: Examples
    lessons: Lessons | None = None


@dataclass(frozen=True)
class Trained:
    """(step, loss) while training, and on the validation examples, from step 0 on; nats per token, of the recovery's
    own loss. best_step: what the model has now; None where nothing was validated."""

    curve: tuple[tuple[int, float], ...]
    validation: tuple[tuple[int, float], ...] = ()
    best_step: int | None = None

    @property
    def before_and_best(self) -> tuple[float, float] | None:
        """Validation losses of the start and of what the model has now; None where nothing was validated.

        The start is lower where no step did as well and adapters that started at zero cannot be what stays.
        """
        losses = dict(self.validation)
        return None if self.best_step is None else (losses[0], losses[self.best_step])


def train_adapters_(
    model: nn.Module,
    recovery: Recovery,
    training: Material,
    validation: Material | None = None,
    *,
    seed: int,
    folder: Path | None = None,
    on_step: OnStep | None = None,
) -> Trained:
    """Train every parameter that requires a gradient, in place. What does best on the validation examples stays.

    Processes that share the model (`sharding.wanted`) have nothing of its base afterwards, but for the first.

    Args:
        training: shuffled by `seed`, passed over as often as the steps need.
        folder: for checkpoints; with those of an interrupted process training goes on to the same result.
        on_step: called with the step, the number of steps and the loss, now and then.
    Raises:
        RecipeError: a batch cannot be shared evenly by the processes.
    """
    from qpruner.do.trainer import AdapterTrainer

    steps = recovery.steps
    order = order_of(len(training.examples), steps * recovery.batch_size, seed)
    if not recovery.validations:
        validation = None
    layers = compared_layers(len(decoder_layers(model))) if taught_layers(recovery) else ()
    sharded = sharding.wanted()
    with ExitStack() as stack:
        place = folder or stack.enter_context(tempfile.TemporaryDirectory())
        afterwards = stack.enter_context(as_it_was(model))
        stack.enter_context(sharding.without_accelerates())
        arguments = arguments_for(recovery, str(place), seed, looks=validation is not None)
        if sharded:
            model = sharding.shared_out(model, arguments.device)
        trainer = AdapterTrainer(
            model,
            arguments,
            Objective(model, layers, recovery.block_weight),
            _Ordered(training, order),
            validation and _Ordered(validation, torch.arange(len(validation.examples))),
            lambda step, loss: on_step(step, steps, loss) if on_step else None,
            sharded=sharded,
        )
        afterwards(lambda: leave(trainer))
        trainer.remember_best()
        with recomputing(model, recovery.gradient_checkpointing):
            trainer.train(resume_from_checkpoint=last_checkpoint(Path(place)))
            trainer.put_best_()
            trainer.accelerator.wait_for_everyone()  # before any of them takes the folder away
    points = lambda key: tuple((int(e["step"]), float(e[key])) for e in trainer.state.log_history if key in e)
    return Trained(points("loss"), points("eval_loss"), trainer.best and trainer.best[0])


def taught_layers(recovery: Recovery) -> bool:
    """Whether hidden states are compared with the original's."""
    return recovery.loss == "distillation" and recovery.block_weight > 0


def arguments_for(recovery: Recovery, place: str, seed: int, *, looks: bool):
    """The TrainingArguments; whether there is a GPU and how many processes there are is read from the machine."""
    from transformers import TrainingArguments

    steps, on_cpu = recovery.steps, not torch.cuda.is_available()
    n_processes = sharding.processes()
    part = part_of(recovery.batch_size, n_processes, recovery.micro_batch)
    often = max(1, steps // POINTS)
    every = often * max(
        1, round(steps / (recovery.validations or POINTS // 5) / often)
    )  # so that a checkpoint never cuts a point of the curve in two
    return TrainingArguments(
        output_dir=place,
        max_steps=steps,
        per_device_train_batch_size=part,
        per_device_eval_batch_size=part,
        gradient_accumulation_steps=recovery.batch_size // (n_processes * part),
        learning_rate=recovery.learning_rate,
        warmup_steps=min(recovery.warmup_steps, steps // 2),
        lr_scheduler_type="linear",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=often,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if looks else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        seed=seed,
        data_seed=seed,
        dataloader_pin_memory=False,
        use_cpu=on_cpu,
        bf16=fast_bfloat16(torch.device("cpu" if on_cpu else "cuda")),  # of products; adapters stay float32
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_backend="gloo" if on_cpu and n_processes > 1 else None,
        ddp_broadcast_buffers=False,  # the packed weights are buffers, and never change
        ddp_find_unused_parameters=False,
    )


def part_of(batch_size: int, n_processes: int, most: int | None) -> int:
    """Examples that one process has in memory at once: an equal share of the batch, or of an equal part of that."""
    if batch_size % n_processes:
        raise RecipeError(
            f"a batch of {batch_size} cannot be shared evenly by {n_processes} processes. Set batch_size to a multiple "
            f"of {n_processes}, or launch fewer."
        )
    share = batch_size // n_processes
    return max(part for part in range(1, min(most or share, share) + 1) if share % part == 0)


def order_of(n: int, wanted: int, seed: int) -> Tensor:
    """Numbers below n, so many, in an order of chance; none comes up again before all others have."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-wanted // n)
    return torch.cat([torch.randperm(n, generator=generator) for _ in range(rounds)])[:wanted]


def last_checkpoint(folder: Path) -> str | None:
    """The last that was written to its end, where the state of training comes last."""
    whole = {}
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        try:
            whole[json.loads(state.read_text())["global_step"]] = str(state.parent)
        except json.JSONDecodeError:
            continue
    return whole[max(whole)] if whole else None


@contextmanager
def as_it_was(model: nn.Module):
    """Afterwards the model is where it was and computes as it did, whatever happens; gives `ExitStack.callback`."""
    device, use_cache = model.device, getattr(model.config, "use_cache", None)
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), ExitStack() as stack:
        try:
            yield stack.callback
        finally:
            stack.close()
            for parameter in model.parameters():
                parameter.grad = None
            if use_cache is not None:
                model.config.use_cache = use_cache
            model.to(device).eval()


def leave(trainer) -> None:
    """accelerate puts a forward of its own on the model, which would compute in bfloat16 for good."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    model.__dict__.pop("forward", None)  # now the one of its class
    trainer.accelerator.free_memory()


@contextmanager
def recomputing(model: nn.Module, wanted: bool):
    """Within, layers keep only what comes in, if wanted."""
    if not wanted:
        yield
        return
    new = hasattr(model, "activation_checkpointing_enable")  # and the other name is deprecated
    # Not reentrant: it gives adapters gradients although nothing that comes in asks for one.
    (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)({"use_reentrant": False})
    try:
        yield
    finally:
        (model.activation_checkpointing_disable if new else model.gradient_checkpointing_disable)()


class _Ordered(torch.utils.data.Dataset):
    """Examples by their place in an order."""

    def __init__(self, material: Material, order: Tensor):
        self._material, self._order = material, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        i, (examples, lessons) = int(self._order[place]), (self._material.examples, self._material.lessons)
        found = {"input_ids": examples.ids[i], "labels": labels_of(examples.ids[i], examples.predicted[i])}
        return found | (lessons[i] if lessons is not None else {})


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is computed, not emulated, which is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
