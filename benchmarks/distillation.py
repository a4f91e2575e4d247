"""Claim: at half of the units and 4/8 bits, distillation recovers at least half of the lost loss within 10 minutes on
two cores, and more than plain LoRA does in equal steps.

    python benchmarks/distillation.py [--steps 300] [--seeds 0 1 2] [--rates 0.004] [--folder WHERE] [--out FILE.json]

Compresses the bundled model three times for each seed, with all stages up to the adapters in common: without training,
trained on the next token, and trained on the original's predictions. Losses are of the evaluation text.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from qpruner import api
from qpruner.facts import machine

HALF = "kept=0.5,protect_first=0,protect_last=0,shrink_to_fit=false,validations=10"
TRAINING = ("adapters", "teacher-training", "teacher-validation")


def run(model: str, budget: str, folder: Path, shared: Path, seed: int, changes: str, text: Path | None) -> dict:
    """What one compression lost, and how long its training took."""
    recipe = f"qpruner[{HALF},{changes}]"
    made = api.compress(
        model, budget, folder, recipe=recipe, seed=seed, shared=shared, measure_speed=False, calibration=text
    )  # fmt: skip
    loss, kl, recovery = made.facts.metric("loss"), made.facts.metric("KL to the original"), made.facts.recovery
    return {
        "original": loss.before,
        "loss": loss.after,
        "standard_error": loss.standard_error_after,
        "kl": kl.after,
        "best_step": recovery.best_step,
        "seconds": sum(stage.seconds for stage in made.facts.stages if stage.name in TRAINING),
        "mean_bits": sum(p.bits * p.parameters for p in made.facts.projections)
        / sum(p.parameters for p in made.facts.projections),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.splitlines()[:2]))
    parser.add_argument("--model", default="pystdlib-5M")
    parser.add_argument("--budget", default="29%", help="half of the units at 16 bits are 55 percent")
    parser.add_argument("--text", type=Path, help="in place of the bundled text")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates, in place of the default")
    parser.add_argument("--also", default="", help="other changes of the recipe, key=value,key=value")
    parser.add_argument("--folder", type=Path, help="where runs are kept; an interrupted benchmark goes on from there")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    rows, also = [], f",{args.also}" if args.also else ""
    place = args.folder or Path(tempfile.mkdtemp(prefix="distillation-"))
    for seed in args.seeds:
        where = lambda name, seed=seed: (args.model, args.budget, place / f"{seed}-{name}", place / "common", seed)
        cut = run(*where("cut"), f"steps=0{also}", args.text)
        for rate in args.rates or [None]:
            for loss in ("next-token", "distillation"):
                changes = f"loss={loss},steps={args.steps}{also}" + (f",learning_rate={rate}" if rate else "")
                found = run(*where(f"{loss}-{rate}-{args.steps}"), changes, args.text)
                recovered = (cut["loss"] - found["loss"]) / (cut["loss"] - found["original"])
                rows.append(
                    {"seed": seed, "trained_on": loss, "rate": rate, "untrained": cut["loss"], **found}
                    | {"untrained_kl": cut["kl"], "recovered": recovered}
                )
                print(
                    f"seed {seed}  {loss:12}  rate {rate or 'default'}  {found['original']:.4f} -> {cut['loss']:.4f} "
                    f"-> {found['loss']:.4f}  {recovered:.1%} recovered  KL {cut['kl']:.4f} -> {found['kl']:.4f}  "
                    f"step {found['best_step']}  {found['seconds']:.0f} s  {found['mean_bits']:.2f} bits",
                    flush=True,
                )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    if args.out:
        facts = dict(
            commit=commit, date=time.strftime("%Y-%m-%d"), machine=machine(), torch=torch.__version__,
            model=args.model, steps=args.steps, recipe=f"qpruner[{HALF}{also}]", budget=args.budget, rows=rows,
        )  # fmt: skip
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
