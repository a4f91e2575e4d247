"""Claim: adapters start nearer to the original when codes and factors are found in the norm of what comes out.

    python benchmarks/loftq_start.py [--model pystdlib-5M] [--bits 2 3 4] [--rank 8] [--steps 30] [--out FILE.json]

The whole model at each number of bits, groups of 64, rounded to nearest and with feedback (gptq), nothing pruned. For
each: the mean relative error of the linears, and the loss on the search text, with rounding alone, with LoftQ in the
Frobenius norm, and with LoftQ in the norm of what comes out. Errors of one row are in one norm, those of plain rounding
beside them in the same. With steps: adapters are then trained, and stay beside or are merged and rounded again.
"""

import argparse
import json
import platform
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from qpruner import api

QUICK = "kept=1,shrink_to_fit=false,calibration_windows=32,search_windows=16,evaluation_windows=16,window=256"
STARTS = {"plain": "adapter_rank=0", "loftq": "loftq_weighting=none", "weighted": "loftq_weighting=gram"}


def run(args, bits: int, rounding: str, changes: str) -> api.Result:
    grid = "grid=integer,group_size=64,symmetric=false,ranges=mse"
    recipe = f"gptq[{QUICK},bits=[{bits}],rounding={rounding},{grid},adapters=best,loss=next-token,{changes}]"
    with tempfile.TemporaryDirectory() as folder:
        options = dict(recipe=recipe, measure_speed=False, seed=args.seed)
        return api.compress(args.model, "60%", Path(folder) / "out", **options)


def start_of(args, bits: int, rounding: str, start: str) -> dict | None:
    if rounding == "gptq" and start == "loftq":
        return None  # which has but the weighted norm
    rank = "" if start == "plain" else f"adapter_rank={args.rank},"
    made = run(args, bits, rounding, f"{rank}{STARTS[start]},loftq_iterations={args.iterations},steps=0")
    found = dict(bits=bits, rounding=rounding, start=start, size_bytes=made.facts.sizes.on_disk)
    found["loss"] = made.facts.metric("loss").after
    found["kl"] = made.facts.metric("KL to the original").after
    if start != "plain":
        starts = made.facts.recovery.starts
        mean = lambda values: sum(values) / len(starts)
        found |= dict(plain_error=mean(s.plain for s in starts), error=mean(s.loftq for s in starts))
    return found


def end_of(args, bits: int, rounding: str) -> dict:
    """After a short training: beside, and merged."""
    changes = f"adapter_rank={args.rank},loftq_iterations={args.iterations},steps={args.steps},loftq_weighting=gram"
    recovered = run(args, bits, rounding, changes).facts.recovery
    return dict(
        bits=bits, rounding=rounding, before=recovered.loss_before, beside=recovered.loss_after,
        merged=recovered.loss_merged, ships=recovered.ships,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pystdlib-5M")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = dict(
        commit=commit, date=time.strftime("%Y-%m-%d"), machine=platform.machine(), threads=torch.get_num_threads(),
        model=args.model, rank=args.rank, iterations=args.iterations, steps=args.steps, seed=args.seed,
    )  # fmt: skip
    found = {"about": about, "starts": [], "ends": []}
    for bits in args.bits:
        for rounding in ("nearest", "gptq"):
            rows = [start_of(args, bits, rounding, start) for start in STARTS]
            found["starts"] += [row for row in rows if row]
            if args.steps:
                found["ends"].append(end_of(args, bits, rounding))
            if args.out:
                args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
