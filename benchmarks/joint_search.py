"""Claim: at equal bytes, searching widths and bits together loses less than every other way to search, 30 % and below.

    python benchmarks/joint_search.py MODEL --out DIR [--budgets 50%,40%,30%,25%,20%,15%] [--seeds 0,1,2]
        [--calibration FILE] [--search-text FILE] [--evaluation FILE] [--recipe auto] [--final k=v,...] [--random N]

For every seed one `qpruner search` over all budgets with all controls, on the same candidates, text and number of
trials; beside them random search with `--random` trials. Then the best plan of every way at every budget is carried out
in the same manner (least squares, codes with propagated error) and judged on held-out text; of the joint search also
the best of its `--finalists` best plans, by their KL on the search text once they are carried out. `uniform` has one
spec everywhere, raised evenly over the depth as far as the bytes allow. Finished cells are kept in DIR; the same
command goes on, and takes searches that are finished as they are.
"""

import argparse
import json
import platform
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from qpruner import api
from qpruner import recipe as recipes
from qpruner.artifact.opened import open_stream
from qpruner.compress import carry_out
from qpruner.decide import controls, joint
from qpruner.decide.space import Point
from qpruner.drafting import of_selection
from qpruner.facts import machine
from qpruner.job import Job, Places, unfinished
from qpruner.joint.bench import Bench
from qpruner.joint.past import FRONT, Past
from qpruner.joint.stages import CONTROLS, Searched, _trials, searched
from qpruner.judge.divergence import kl_to
from qpruner.judge.loss import Streamed
from qpruner.math.pareto import hypervolume
from qpruner.model import load
from qpruner.model.scratch import Scratch
from qpruner.prepare import Prepared, prepare
from qpruner.run import Run, digest_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budgets", default="50%,40%,30%,25%,20%,15%")
    parser.add_argument("--seeds", default="0,1,2")
    for name in ("calibration", "search-text", "evaluation"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--recipe", default="auto")
    parser.add_argument("--final", default="network_steps=0", help="changes of the recipe when plans are carried out")
    parser.add_argument("--controls", default=",".join(CONTROLS))
    parser.add_argument("--methods", default="", help="carry out only these")
    parser.add_argument("--at", default="", help="carry out at these budgets only")
    parser.add_argument("--finalists", type=int, default=3, help="plans of the joint search that are compared")
    parser.add_argument("--random", type=int, default=300, help="trials of random search; 0 for none")
    args = parser.parse_args()

    rows = []
    for seed in map(int, args.seeds.split(",")):
        rows += cells(args, seed)
        (args.out / "rows.json").write_text(json.dumps(facts(rows), indent=1) + "\n")
    print(table(rows))


def cells(args: argparse.Namespace, seed: int) -> list[dict]:
    folder = args.out / f"seed-{seed}"
    texts = dict(calibration=args.calibration, search_text=args.search_text)
    start = time.monotonic()
    if not (folder / FRONT).is_file():
        api.search(
            args.model, args.budgets.split(","), folder, recipe=args.recipe, controls=args.controls.split(","),
            seed=seed, **texts,
        )  # fmt: skip
        print(f"seed {seed}: searched in {time.monotonic() - start:.0f} s", flush=True)
    volumes = None
    request = Past.open(folder).request
    recipe = request.recipe.but(recipes.changes_of(args.final))
    rows = []
    for budget, limit in zip(request.budgets, request.limits, strict=True):
        if args.at and budget not in args.at.split(","):
            continue
        output = folder / "out"
        prepared = prepare(
            args.model, budget, output, recipe=recipe, evaluation=args.evaluation, seed=seed, **texts
        )  # fmt: skip
        found = read(prepared, request, folder, args.random)
        volumes = volumes or hypervolumes(found)
        for method, point in plans(found, limit).items():
            if args.methods and method not in args.methods.split(","):
                continue
            rows.append(cell(prepared, found, method, point, args.out / "cells"))
            print(json.dumps(rows[-1]), flush=True)
        best = [
            cell(prepared, found, "", point, args.out / "cells") for point in found.finalists(limit, args.finalists)
        ]
        if best:
            rows.append(min(best, key=lambda row: row["carried_out_kl"]) | {"method": f"joint, best of {len(best)}"})
            print(json.dumps(rows[-1]), flush=True)
    print(f"seed {seed}: hypervolume", {name: round(v, 3) for name, v in volumes.items()}, flush=True)
    return rows


def read(prepared: Prepared, request, folder: Path, n_random: int) -> Searched:
    """With more trials of random search beside the others."""
    with Run(folder) as run:
        job = Job(replace(prepared, recipe=request.recipe), run, lambda *_: None, False, places=Places())
        found = searched(job, request.limits, request.controls)
        if n_random:
            more = replace(job, prepared=replace(job.prepared, recipe=request.recipe.but({"trials": n_random})))
            with Bench.opened(more, found.space, found.scores) as bench:
                name = f"random-{n_random}"
                trials = _trials(more, bench, found.estimate, request.limits, name, controls.random_search, {})
                found.controls[name] = trials
        return found


def hypervolumes(found: Searched) -> dict[str, float]:
    """In logarithms of bytes and loss, up to the largest limit and the largest loss of any front."""
    fronts = {name: joint.pareto(trials) for name, trials in {"joint": found.trials, **found.controls}.items()}
    points = {name: np.log([(t.size_bytes, t.loss) for t in some]) for name, some in fronts.items() if some}
    worst = max(each[:, 1].max() for each in points.values())
    corner = (float(np.log(found.limits[-1])) + 1e-9, float(worst) + 1e-9)
    return {name: hypervolume(each, corner) for name, each in points.items()}


def plans(found: Searched, limit: int) -> dict[str, Point]:
    """What every way to search would take within a limit: its best trial."""
    every = {"joint": found.trials, **found.controls}
    best = {name: joint.best(trials, limit) for name, trials in every.items()}
    points = {name: trial.point for name, trial in best.items() if trial is not None}
    uniform = controls.uniform(found.space, limit)
    return points | ({} if uniform is None else {"uniform": uniform})


def cell(prepared: Prepared, found: Searched, method: str, point: Point, folder: Path) -> dict:
    selection = found.space.selection(point)
    known = [t for trials in (found.trials, *found.controls.values()) for t in trials if t.point == point]
    name = digest_of([selection.model_dump(mode="json"), prepared.seed, str(prepared.recipe.model_dump())])[:16]
    path = folder / f"{name}.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        start = time.process_time()
        output = folder / name
        with Run(folder / f"{name}.run", shared=folder / "common") as run:
            one = replace(prepared, output=output)
            job = Job(one, run, lambda *_: None, measure_speed=False, measure_kl=False)
            _, _, measured = carry_out(job, lambda j: of_selection(j.prepared, found.scores, selection))
            written = open_stream(load.inspect_source(str(unfinished(output))), dtype=job.precision, **job.where())
            original = Streamed(job.original(), Scratch())
            carried_out = kl_to(Streamed(written, Scratch()), original, prepared.search).kl
        loss, dense = measured.artifact["loss"], measured.original["loss"]
        differences = [a - b for a, b in zip(loss["window_losses"], dense["window_losses"], strict=True)]
        increase = torch.tensor(differences, dtype=torch.float64)
        path.write_text(json.dumps({
            "increase": increase.mean().item(), "standard_error": increase.std().item() / len(increase) ** 0.5,
            "carried_out_kl": carried_out, "bytes": measured.on_disk, "cpu_seconds": time.process_time() - start,
        }))  # fmt: skip
        for leftover in (output.with_name(f".{output.name}.partial"), folder / f"{name}.run"):
            subprocess.run(["rm", "-rf", str(leftover)], check=True)
    return {
        "seed": prepared.seed, "budget": str(prepared.budget), "method": method,
        "search_kl": known[0].loss if known else None, "layers": len(selection.layers), **json.loads(path.read_text()),
    }  # fmt: skip


def facts(rows: list[dict]) -> dict:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "claim": __doc__.splitlines()[0], "commit": commit, "date": time.strftime("%Y-%m-%d"), "machine": machine(),
        "python": platform.python_version(), "torch": torch.__version__, "rows": rows,
    }  # fmt: skip


def table(rows: list[dict]) -> str:
    """Mean increase of the loss over the seeds, by budget and way to search."""
    budgets, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("budget", "method"))
    lines = [f"{'':18}" + "".join(f"{budget:>10}" for budget in budgets)]
    for method in methods:
        cells = [[r["increase"] for r in rows if (r["budget"], r["method"]) == (b, method)] for b in budgets]
        lines.append(f"{method:18}" + "".join(f"{sum(c) / len(c):10.4f}" if c else f"{'':>10}" for c in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
