"""Least squares on a model in a folder, by itself: prints what was promised and what the process held at its peak.

python reconstruction_peak.py MODEL TEXT resident|streamed SCRATCH
"""

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil

from qpruner import recipe as recipes
from qpruner.decide import widths
from qpruner.do.reconstruct import reconstruct
from qpruner.job import Job
from qpruner.model import memory
from qpruner.model.memory import present_bytes
from qpruner.model.residence import give_back_memory
from qpruner.model.scratch import Scratch
from qpruner.prepare import prepare
from qpruner.progress import silent
from qpruner.shape import work_for

RECIPE = (
    "llm-pruner[window=256,calibration_windows=10,search_windows=4,evaluation_windows=4,width_grid=16,kept=0.5,"
    "score=magnitude,steps=0,adapter_rank=0,protect_first=0,protect_last=0,reconstruction=least-squares]"
)


class Peak(threading.Thread):
    """The most that the process held while this ran, asked every other millisecond."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self._done, self._process = 0, threading.Event(), psutil.Process()

    def run(self):
        while not self._done.wait(0.002):
            self.most = max(self.most, self._process.memory_info().rss)

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self.most


def main(model: str, text: str, how: str, folder: str) -> None:
    recipe = recipes.load(RECIPE)
    options = dict(calibration=Path(text), search_text=None, evaluation=None, seed=0)
    prepared = prepare(model, "90%", Path(folder) / "out", recipe=recipe, **options)
    prepared = replace(prepared, forecast=replace(prepared.forecast, resident=how == "resident"))
    job = Job(prepared, None, silent, False)
    kept = widths.first_units(job.graph, prepared.counts)
    scratches = Scratch(), Scratch()
    if how == "streamed":
        scratches = Scratch(Path(folder) / "theirs"), Scratch(Path(folder) / "ours")
    sizes, work = memory.Sizes(job.shape.tensors, job.graph), work_for(job.shape, recipe, prepared.counts, 256)
    give_back_memory()
    promised = memory.stages_of(sizes, work, job.shape.hidden_size, resident=how == "resident")["reconstruction"]
    before = present_bytes()
    peak = Peak()
    peak.start()
    reconstruct(
        job.original(), job.pruned(kept, job.precision), job.graph, job.plan(kept, 16), prepared.calibration.ids,
        dtype=job.stored_dtype, scratches=scratches,
    )  # fmt: skip
    print(json.dumps({"before": before, "promised": promised, "peak": peak.stop()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
