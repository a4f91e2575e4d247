"""transformers' Trainer, for adapters: a loss of our own, checkpoints of adapters alone, the best of them kept.

Importing this imports the Trainer.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from qpruner.do import sharding
from qpruner.do.objective import Objective
from qpruner.files import replacing

ADAPTERS = "adapters.safetensors"  # of a checkpoint
BEST = "best.safetensors"  # beside the checkpoints


class AdapterTrainer(Trainer):
    """Trains every parameter that requires a gradient."""

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        objective: Objective,
        training: Dataset,
        validation: Dataset | None,
        on_loss: Callable[[int, float], None],
        *,
        sharded: bool = False,
    ):
        """validation: None for no looking, and the last step is what stays. sharded: the model is shared out."""
        self._sharded = sharded
        super().__init__(
            model=model, args=arguments, train_dataset=training, eval_dataset=validation, data_collator=stacked,
            callbacks=[_Watch(self, on_loss)],
        )  # fmt: skip
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # then it counts the tokens of all parts of a batch, in all processes
        self._objective = objective
        self.best: tuple[int, float] | None = None  # step, and loss on the validation examples
        self._best_adapters: dict[str, Tensor] = {}

    # --- several processes -------------------------------------------------------------------------------------------

    def _move_model_to_device(self, model, device) -> None:
        if not self._sharded:
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model, training=True, dataloader=None) -> nn.Module:
        if not self._sharded or model is not self.model:
            return super()._wrap_model(model, training, dataloader)
        # accelerate puts autocast around the forward, but for training would refuse what has parts shared out
        return sharding.averaging(self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True))

    # --- the loss ----------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """A part of the batch's mean over tokens; that of several processes is averaged afterwards."""
        total = self._objective(model, inputs) * (self.accelerator.num_processes / num_items_in_batch)
        return (total.float(), None) if return_outputs else total.float()

    def floating_point_ops(self, inputs) -> int:
        return 0  # nobody asks, and counting goes through all modules at every step

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """The mean over all predicted tokens of the validation examples, by the loss that is trained on."""
        examples, size = self.eval_dataset, self.args.per_device_eval_batch_size
        n_processes, mine = self.accelerator.num_processes, self.accelerator.process_index * size
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.model.eval()
        for first in range(0, len(examples), n_processes * size):
            some = range(first + mine, min(first + mine + size, len(examples)))
            # A sharded model runs in all processes or in none: one without examples runs on the first.
            batch = self._prepare_inputs(stacked([examples[i] for i in some or (0,)]))
            total = self._objective(self.model, batch)
            if some:
                counted = (batch["labels"] != -100).sum()
                sums += torch.stack([total, counted.double()])
        if n_processes > 1:
            torch.distributed.all_reduce(sums)
        loss = float(sums[0] / sums[1])
        self.log({f"{metric_key_prefix}_loss": loss})
        self._consider(loss)
        found = {f"{metric_key_prefix}_loss": loss}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    # --- what is kept ------------------------------------------------------------------------------------------------

    def _consider(self, loss: float) -> None:
        state = self.trained()
        # Adapters that change nothing yet are none: there is no artifact with them.
        if not any(tensor.any() for name, tensor in state.items() if ".lora_B." in name):
            return
        if loss == loss and (self.best is None or loss < self.best[1]):
            self.best, self._best_adapters = (self.state.global_step, loss), state
            if self.args.should_save:
                said = {"step": str(self.state.global_step), "loss": repr(loss)}
                with replacing(Path(self.args.output_dir) / BEST) as temporary:
                    save_file(state, temporary, metadata=said)

    def remember_best(self) -> None:
        """What an interrupted process found."""
        path = Path(self.args.output_dir) / BEST
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                said = file.metadata()
            self.best, self._best_adapters = (int(said["step"]), float(said["loss"])), load_file(path)

    def put_best_(self) -> None:
        if self.best is not None:
            self._put_(self._best_adapters)

    def trained(self) -> dict[str, Tensor]:
        """Copies of what is trained, by name."""
        parameters = self.accelerator.unwrap_model(self.model).named_parameters()
        return {name: p.detach().to("cpu", copy=True).contiguous() for name, p in parameters if p.requires_grad}

    def _put_(self, state: Mapping[str, Tensor]) -> None:
        parameters = dict(self.accelerator.unwrap_model(self.model).named_parameters())
        for name, tensor in state.items():
            parameters[name].data.copy_(tensor)

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        state = self.trained()
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(state, Path(output_dir) / ADAPTERS)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        self._put_(load_file(Path(resume_from_checkpoint) / ADAPTERS))

    def _get_train_sampler(self, train_dataset=None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # they come in the order of training


class _Watch(TrainerCallback):
    def __init__(self, trainer: AdapterTrainer, on_loss: Callable[[int, float], None]):
        self._trainer, self._on_loss = trainer, on_loss

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.global_step and self._trainer.eval_dataset is not None:
            self._trainer.evaluate()  # training may make it worse than it was

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self._on_loss(state.global_step, float(logs["loss"]))


def stacked(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
