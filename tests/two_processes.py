"""Trains tiny adapters as one of several processes; `test_recover_processes.py` launches it."""

import json
import os
import sys
from pathlib import Path

import torch
from tiny_taught import TEXT, adapters_of, examples, packed

from qpruner.do import recover, sharding
from qpruner.model.packed.linear import PackedLinear
from qpruner.recovering import recovered
from qpruner.run import Run

SHARED: dict[str, list] = {"bytes": [], "whole layers": []}  # of what was shared out


def watch_sharing() -> None:
    """Note how many bytes of codes and scales there are, here and in all, and which layers are whole while one runs."""
    share_out = sharding.shared_out

    def watched(model, device):
        twin = share_out(model, device)
        layers = [twin.get_submodule(path) for path in recover.decoder_layers(twin)]
        stored = [m._parameters for layer in layers for m in layer.modules() if isinstance(m, PackedLinear)]
        tensors = [t for parts in stored for t in parts.values() if t is not None]
        SHARED["bytes"] = [sum(t.to_local().nbytes for t in tensors), sum(t.nbytes for t in tensors)]
        is_whole = lambda layer: not any(hasattr(p, "to_local") for p in layer.parameters())
        note = lambda *_: SHARED["whole layers"].append([is_whole(layer) for layer in layers])
        for layer in layers:
            attention = next(layer.children())
            attention.register_forward_hook(note)
            attention.register_full_backward_pre_hook(note)
        return twin

    sharding.shared_out = watched


def main(folder: Path, *changes: str, last: int | None = None) -> None:
    """changes: settings of the recovery, as name=value. last: a step that is not survived."""
    torch.set_num_threads(1)
    recover.fast_bfloat16 = lambda device: False
    rank = int(os.environ.get("RANK", "0"))
    from tiny import tiny
    from tiny_stream import streamed

    def on_step(done, total, loss):
        if done == last:
            raise KeyboardInterrupt

    model, plan = packed(with_plan=True)
    settings = dict(loss="distillation", steps=6, block_weight=0.3, validations=3, learning_rate=0.002)
    settings |= {name: json.loads(value) for name, value in (each.split("=") for each in changes)}
    plan = plan.model_copy(update=dict(recovery=TEXT.model_copy(update=settings)))
    with Run(folder, follows=rank > 0) as run:
        found = recovered(
            run, model, plan, training=examples(), validation=examples(5, seed=1), teacher_inputs={}, inputs={},
            teacher=lambda: streamed(tiny("llama", dtype=torch.float32)), dtype=torch.float32,
            passes=folder / "passes", progress=lambda name: on_step if name == "recovery" else lambda *done: None,
        )  # fmt: skip
    left = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if not t.requires_grad)
    told = {"found": (found.curve, found.validation), "adapters": adapters_of(model), "shared": SHARED, "left": left}
    torch.save(told, folder / f"{rank}.pt")


if __name__ == "__main__":
    watch_sharing()
    main(Path(sys.argv[1]), *sys.argv[2:])
