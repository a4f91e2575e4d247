"""Training the adapters after the cuts: LoRA on the next-token loss, the base frozen and packed."""

import tempfile
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qpruner.plan import Recovery


class _Rows(torch.utils.data.Dataset):
    def __init__(self, windows: Tensor):
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self._windows[i], "labels": self._windows[i]}


def train_adapters_(
    model: nn.Module,
    recovery: Recovery,
    windows: Tensor,
    *,
    seed: int,
    on_step: Callable[[int, int, float], None],
) -> list[tuple[int, float]]:
    """Train every parameter that requires a gradient, in place; returns (step, loss in nats per token).

    Args:
        windows: (n, length) token ids; shuffled by `seed`, passed over as often as the steps need.
        on_step: called with the step, the number of steps and the loss.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    curve: list[tuple[int, float]] = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                curve.append((state.global_step, float(logs["loss"])))
                on_step(state.global_step, recovery.steps, float(logs["loss"]))

    with tempfile.TemporaryDirectory() as scratch:  # Trainer insists on a folder; nothing is saved in it
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=recovery.steps,
            per_device_train_batch_size=min(recovery.batch_size, len(windows)),
            learning_rate=recovery.learning_rate,
            warmup_steps=min(recovery.warmup_steps, recovery.steps // 2),
            lr_scheduler_type="linear",
            weight_decay=0.0,
            max_grad_norm=1.0,
            logging_steps=max(1, recovery.steps // 50),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=seed,
            data_seed=seed,
            dataloader_pin_memory=False,
            use_cpu=model.device.type == "cpu",
            bf16=fast_bfloat16(model.device),  # of products; adapters and their updates stay float32
            remove_unused_columns=False,
            label_names=["labels"],
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=_Rows(windows), callbacks=[Watch()])
        trainer.remove_callback(PrinterCallback)
        model.train()
        trainer.train()
        model.eval()
    return curve


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is computed, not emulated, which is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
