"""Claim: a trial of the search costs no more than 1.5 evaluation passes, its surrogate included.

    python benchmarks/search_trial.py [--trials 20] [--out FILE.json]

On the bundled model, pruned for 30 % of its 16-bit bytes, with random levels in turn: an evaluation pass of the search
text with the plan already in place; the same after cached candidates were swapped in; the same after quantizing anew,
LoftQ included. Then a real search, timed trial by trial. Prints medians and ratios to the bare pass.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import time
from pathlib import Path

import torch

from qpruner import recipe
from qpruner import shape as shaping
from qpruner.decide import widths
from qpruner.decide.allocate import ALLOCATORS, Choices
from qpruner.decide.information import bit_units
from qpruner.decide.search import search
from qpruner.do.quantize import Candidates
from qpruner.facts import machine
from qpruner.judge.loss import evaluate_loss
from qpruner.model import corpus, cost, load
from qpruner.model.surgery import narrow_


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    chosen = recipe.load("qpruner")
    source = load.inspect_source("pystdlib-5M")
    shape = shaping.shape_of(source)
    limit = source.bytes_16bit * 30 // 100
    kept = widths.first_units(shape.graph, shaping.widths_for(shape, chosen, limit))
    plan = shape.plan(chosen, kept, 16, args.seed)
    tokenizer = load.load_tokenizer(source)
    windows = corpus.token_windows(
        corpus.bundled_corpus("search"), tokenizer, length=512, n_windows=chosen.search_windows, seed=args.seed
    )
    model = load.load_model(source)
    narrow_(model, shape.graph, kept)
    candidates = Candidates(model, shape.graph, plan, adapter_dtype=torch.bfloat16)
    units = bit_units(shape.graph, chosen.bit_unit)
    draw = random.Random(args.seed)

    def specs(levels) -> dict:
        return {n: chosen.spec(chosen.bits[level]) for u, level in zip(units, levels, strict=True) for n in u.linears}

    def evaluate() -> float:
        return evaluate_loss(model, windows).loss

    def swap(levels) -> None:
        candidates.put_(specs(levels))

    def requantize(levels) -> None:
        for name, spec in specs(levels).items():
            candidates._make(name, spec)  # what the cache saves
        candidates.put_(specs(levels))

    for level in range(len(chosen.bits)):
        swap([level] * len(units))
    evaluate()
    seconds = {"evaluation pass": [], "swap and pass": [], "quantize anew and pass": []}
    for _ in range(args.trials):
        levels = [draw.randrange(len(chosen.bits)) for _ in units]
        seconds["swap and pass"].append(timed(lambda: (swap(levels), evaluate())))  # noqa: B023
        seconds["evaluation pass"].append(timed(evaluate))
        seconds["quantize anew and pass"].append(timed(lambda: (requantize(levels), evaluate())))  # noqa: B023

    dims = cost.kept_shapes(shape.graph, plan.kept)
    import numpy as np

    sizes = np.array(
        [[sum(cost.linear_bytes(*dims[n], chosen.spec(b)) for n in u.linears) for b in chosen.bits] for u in units]
    )
    choices = Choices(
        units=tuple(u.name for u in units), bits=chosen.bits, sizes_bytes=sizes, seed=args.seed,
        limit_bytes=int(sizes.mean(1).sum()), information=np.ones(len(units)),
    )  # fmt: skip
    ends: list[float] = [time.perf_counter()]
    search(
        choices, lambda levels: (swap(levels), evaluate())[1],
        starts={"uniform": ALLOCATORS["uniform"](choices)}, n_trials=args.trials + 8, seed=args.seed,
        on_trial=lambda trial: ends.append(time.perf_counter()),
    )  # fmt: skip
    gaps = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    seconds["trial of the search, surrogate included"] = gaps[8:]

    bare = statistics.median(seconds["evaluation pass"])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {
        "claim": __doc__.splitlines()[0], "commit": commit, "date": time.strftime("%Y-%m-%d"), "seed": args.seed,
        "machine": machine(), "python": platform.python_version(), "torch": torch.__version__,
        "rows": [
            {"what": what, "median_s": round(statistics.median(s), 4), "ratio": round(statistics.median(s) / bare, 3)}
            for what, s in seconds.items()
        ],
    }  # fmt: skip
    for row in result["rows"]:
        print(f"{row['what']:42} {row['median_s']:8.3f} s   {row['ratio']:.2f} passes")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
