"""Claim: two workers try at least 1.7 times as many plans a minute as one, where two cores are free.

    python benchmarks/joint_workers.py FOLDER [--points 24] [--out FILE.json]

FOLDER is one that `qpruner search` left. The same random plans are evaluated by one and by two processes in turn, three
times each, on candidates that are all made beforehand. Prints the medians and their ratio.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from qpruner.facts import machine
from qpruner.joint.past import Past
from qpruner.joint.points import space_for
from qpruner.joint.runner import evaluator, item_of, open_runner, open_trials
from qpruner.prepare import prepare
from qpruner.workers import workers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--points", type=int, default=24)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)

    request = Past.open(args.folder).request
    texts = {name: value and Path(value) for name, value in (
        ("calibration", request.calibration), ("search_text", request.search_text))}  # fmt: skip
    prepared = prepare(
        request.model, request.budgets[0], args.folder / "none", recipe=request.recipe, evaluation=None,
        seed=request.seed, **texts,
    )  # fmt: skip
    space = space_for(prepared.shape, request.recipe)
    rng = np.random.default_rng(7)
    rows = space.canonical(rng.integers(0, space.sizes, (args.points + 2, len(space.sizes))))
    items = [item_of(space.selection(tuple(row))) for row in rows.tolist()]
    items, others = items[2:], items[:2]
    bench = args.folder / "bench"
    one = evaluator(open_trials(bench))
    for item in [*others, *items]:  # makes what candidates there are not
        one(item)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(3):
        for n in seconds:
            with workers(open_runner, str(bench), n=n) as pool:
                pool.map(others[:n])  # every process has its model
                start = time.perf_counter()
                pool.map(items)
                seconds[n].append(time.perf_counter() - start)
    median = {n: statistics.median(each) for n, each in seconds.items()}
    found = {
        "claim": __doc__.splitlines()[0], "model": request.model, "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "trials_per_minute": {n: round(60 * args.points / s, 1) for n, s in median.items()},
        "ratio": round(median[1] / median[2], 2), "seconds": seconds,
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
