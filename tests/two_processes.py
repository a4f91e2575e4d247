"""Trains tiny adapters as one of several processes; `test_recover_processes.py` launches it."""

import sys
from pathlib import Path

import torch
from tiny_taught import TEXT, adapters_of, examples, packed

from qpruner.do import recover
from qpruner.recovering import recovered
from qpruner.run import Run


def main(folder: Path) -> None:
    import os

    torch.set_num_threads(1)
    recover.fast_bfloat16 = lambda device: False
    rank = int(os.environ.get("RANK", "0"))
    from tiny import tiny
    from tiny_stream import streamed

    model, plan = packed(with_plan=True)
    settings = TEXT.model_copy(update=dict(loss="distillation", steps=6, block_weight=0.3, validations=3))
    plan = plan.model_copy(update=dict(recovery=settings))
    with Run(folder, follows=rank > 0) as run:
        found = recovered(
            run, model, plan, training=examples(), validation=examples(5, seed=1), teacher_inputs={}, inputs={},
            teacher=lambda: streamed(tiny("llama", dtype=torch.float32)), dtype=torch.float32,
            passes=folder / "passes", progress=lambda name: lambda *done: None,
        )  # fmt: skip
    torch.save({"found": (found.curve, found.validation), "adapters": adapters_of(model)}, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
