"""Claim: before training, the Bayesian allocation loses no more than mutual information, and that no more than uniform.

    python benchmarks/before_recovery.py STUDY [STUDY ...] [--out FILE.json]

Takes the plans that the runs of a study decided, applies each to the bundled model without recovery, and measures the
held-out loss window by window. Differences are paired over windows, each window's mean over the seeds taken first.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path

import torch

from qpruner import shape as shaping
from qpruner.do.quantize import Candidates
from qpruner.facts import machine
from qpruner.judge.loss import evaluate_loss, mean_difference
from qpruner.model import corpus, load
from qpruner.model.surgery import narrow_
from qpruner.plan import Plan


def losses_before_recovery(plan: Plan) -> tuple[float, ...]:
    source = load.inspect_source("pystdlib-5M")
    shape = shaping.shape_of(source)
    windows = corpus.token_windows(
        corpus.bundled_corpus("evaluation"), load.load_tokenizer(source), length=512, n_windows=200, fewest=2
    )
    model = load.load_model(source)
    narrow_(model, shape.graph, plan.kept)
    Candidates(model, shape.graph, plan, adapter_dtype=load.stored_dtype(source)).put_(plan.specs)
    return evaluate_loss(model, windows).window_losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    cells: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for study in args.studies:
        for cell in json.loads((study / "study.json").read_text())["cells"]:
            budget, name = cell["limit"], cell["recipe"]
            plan = Plan.read(study / "runs" / f"{cell['run']}.run" / "plan.json")
            cells.setdefault((budget, name), []).append(losses_before_recovery(plan))
            print(cell["run"], sum(cells[budget, name][-1]) / 200, flush=True)
    over_seeds = {key: [sum(c) / len(c) for c in zip(*runs, strict=True)] for key, runs in cells.items()}
    rows = []
    for (budget, name), losses in over_seeds.items():
        baseline = next(v for (b, n), v in over_seeds.items() if b == budget and "uniform" in n)
        difference, error = mean_difference(losses, baseline)
        by_seed = [sum(run) / len(run) for run in cells[budget, name]]
        rows.append(
            dict(budget=budget, recipe=name, loss=sum(losses) / len(losses), by_seed=by_seed,
                 against_uniform=difference, standard_error=error)
        )  # fmt: skip
        print(f"{budget:5} {name:36} {rows[-1]['loss']:.4f}  {difference:+.4f} ± {error:.4f}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    if args.out:
        facts = dict(
            commit=commit, date=time.strftime("%Y-%m-%d"), machine=machine(), torch=torch.__version__, rows=rows
        )
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
