"""Claim: scoring and reconstruction of the bundled model take under 60 s on two cores, linear in tokens and in layers.

    python benchmarks/reconstruction.py [--windows 16 32 64] [--layers 2 4 6] [--kept 0.5] [--out FILE.json]

The score `element-mixed`, then least squares, at half of the units of every layer. First at the 64 windows of 512
tokens of a recipe, which is what the claim is about; then with fewer and more windows, and with the first few of the
layers. The exponent that is printed is the slope of log seconds over log size: 1 is linear.
"""

import argparse
import json
import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from qpruner import recipe
from qpruner import shape as shaping
from qpruner.decide import widths
from qpruner.decide.scores import SCORERS
from qpruner.do.reconstruct import reconstruct
from qpruner.facts import machine
from qpruner.model import corpus, depth, load
from qpruner.model.scratch import Scratch
from qpruner.model.skeleton import build_skeleton
from qpruner.model.stream import Stream
from qpruner.model.surgery import narrow_
from qpruner.model.tensors import Cut, Named, Renamed, Stored

MODEL, WINDOW, RECIPE_WINDOWS = "pystdlib-5M", 512, 64


def seconds(n_windows: int, n_layers: int, kept_fraction: float, seed: int) -> dict[str, float]:
    """Of the score, and of least squares, on so many windows and the first so many layers."""
    source = load.inspect_source(MODEL)
    shape = shaping.shape_of(source).of_layers(tuple(range(n_layers)))
    chosen = recipe.load("llm-pruner").but(
        dict(kept=kept_fraction, selection="grid", layers=[0, n_layers], reconstruction="least-squares", steps=0)
    )
    windows = corpus.token_windows(
        corpus.bundled_corpus("calibration"), load.load_tokenizer(source), length=WINDOW, n_windows=n_windows, seed=seed
    ).ids

    def opened(kept=None) -> Stream:
        whole, model = (
            build_skeleton(source.config),
            build_skeleton(depth.shortened_config(source.config, shape.layers)),
        )
        names = depth.original_names(shape.graph, shape.layers, model.state_dict())
        tensors = Renamed(Named(whole, Stored.of(source.folder)), names)
        if kept is not None:
            narrow_(model, shape.graph, kept)
            tensors = Cut(tensors, shape.graph, kept)
        return Stream(model, tensors, resident=True)

    start = time.perf_counter()
    scorer, generator = SCORERS["element-mixed"], torch.Generator().manual_seed(seed)
    scores = scorer(opened(), shape.graph, windows, generator, Scratch(), None)
    scored = time.perf_counter()
    counts = widths.counts(shape.graph, chosen, chosen.kept)
    kept = {name: tuple(sorted(scores[name].topk(n).indices.tolist())) for name, n in counts.items()}
    plan = shape.plan(chosen, kept, 16, seed).model_copy(update={"layers": None})
    scratches = Scratch(), Scratch()
    reconstruct(opened(), opened(kept), shape.graph, plan, windows, dtype=torch.bfloat16, scratches=scratches)
    return {"score": scored - start, "reconstruction": time.perf_counter() - scored}


def exponent(rows: list[dict], size: str, what: str) -> float:
    """Slope of log seconds over log size."""
    return float(np.polyfit(np.log([row[size] for row in rows]), np.log([row[what] for row in rows]), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, nargs="*", default=[16, 32, 64])
    parser.add_argument("--layers", type=int, nargs="*", default=[2, 4, 6])
    parser.add_argument("--kept", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--claim-windows", type=int, default=RECIPE_WINDOWS, help="fewer only to try the script")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    deepest = len(shaping.shape_of(load.inspect_source(MODEL)).graph.layers)

    def row(n_windows: int, n_layers: int) -> dict:
        found = {"tokens": n_windows * WINDOW, "layers": n_layers, **seconds(n_windows, n_layers, args.kept, args.seed)}
        print(
            "  ".join(
                f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()
            )
        )
        return found

    claim = row(args.claim_windows, deepest)
    print(f"together {claim['score'] + claim['reconstruction']:.1f} s with {torch.get_num_threads()} threads")
    by_tokens = [row(n, deepest) for n in args.windows]
    by_layers = [row(args.windows[0], n) for n in args.layers] if args.windows else []
    exponents = {
        f"{what} over {size}": exponent(rows, size, what)
        for size, rows in (("tokens", by_tokens), ("layers", by_layers))
        for what in ("score", "reconstruction")
        if len(rows) > 1
    }
    for what, slope in exponents.items():
        print(f"{what}: exponent {slope:.2f}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    if args.out:
        facts = {
            "claim": __doc__.splitlines()[0], "commit": commit, "date": time.strftime("%Y-%m-%d"), "seed": args.seed,
            "machine": machine(), "python": platform.python_version(), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "rows": [claim, *by_tokens, *by_layers], "exponents": exponents,
        }  # fmt: skip
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
