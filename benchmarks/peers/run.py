"""Claim: none; measures what post-training quantizers lose, store and cost, on the same model and the same tokens.

    python benchmarks/peers/run.py --models ../shared/models/stories260K pystdlib-5M --bits 4 3 2 -o DIR
        [--shares 50 40 30 25 20 15] [--peers hqq gptqmodel:gptaq ...] [--environments build/peers]
        [--text MODEL CALIBRATION EVALUATION] [--threads 2]

Every cell runs in a process and an environment of its own, one after the other; cells already in DIR are not run again.
Peers that choose widths themselves are asked for shares, in percent of the bytes of the whole model in 16 bits.
Then one evaluator judges all of them: the loss increase over the dense model in nats per token, with
the standard error of the paired differences over windows. DIR/table.md and DIR/table.json are written at the end.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from environments import PEERS, python_of
from peer import Sizes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qpruner.facts import machine
from qpruner.judge.loss import evaluate_loss, mean_difference
from qpruner.model.corpus import Windows

HERE = Path(__file__).resolve().parent
# Threads that wait must not spin: on a shared machine that costs more than the work.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}


def inputs_of(model: str, texts: list[list[str]], out: Path, group_size: int, seed: int) -> Path:
    folder = out / "inputs" / Path(model).name
    if not (folder / "inputs.json").exists():
        asked = [sys.executable, HERE / "inputs.py", model, "-o", folder]
        asked += ["--group-size", str(group_size), "--seed", str(seed)]
        for name, calibration, evaluation in texts:
            if Path(name).name == Path(model).name:
                asked += ["--calibration-text", calibration, "--evaluation-text", evaluation]
        subprocess.run(asked, check=True)
    return folder


def run_cell(python: Path, name: str, variant: str, asked_for: list[str], inputs: Path, cell: Path, args) -> None:
    """One adapter; what it printed stays beside the cell, and a failure leaves its last line."""
    if (cell / "peer.json").exists() or (cell / "failed.txt").exists():
        return
    cell.mkdir(parents=True, exist_ok=True)
    print(f"{time.strftime('%H:%M:%S')} {cell.relative_to(args.out)}", flush=True)
    asked = [python, HERE / PEERS[name].adapter, "--model", inputs / "model", "--inputs", inputs, *asked_for]
    asked += ["--group-size", str(args.group_size), "--variant", variant, "--seed", str(args.seed), "-o", cell]
    asked += ["--threads", str(args.threads), "--shared", args.out / "shared" / cell.parent.name / name]
    with open(cell / "log.txt", "w") as log:
        ours = {"OMP_NUM_THREADS": str(args.threads)}
        if name == "qpruner":
            ours["PYTHONPATH"] = str(HERE.parents[1] / "src")
        code = subprocess.run(
            asked, stdout=log, stderr=log, cwd=cell, env={**os.environ, **ENVIRONMENT, **ours}
        ).returncode
    if code:
        lines = (cell / "log.txt").read_text().strip().splitlines()
        (cell / "failed.txt").write_text((lines or [f"ended with {code}"])[-1] + "\n")
        print("    failed:", lines[-1] if lines else code, flush=True)


def targets_of(inputs: Path, shares: list[float]) -> dict[float, int]:
    """Bytes of a share of the whole model in 16 bits, as it was before padding."""
    sizes = Sizes.of(AutoModelForCausalLM.from_pretrained(inputs / "model", dtype=torch.float32), inputs)
    return {share: int(sizes.dense_bytes * share / 100) for share in shares}


def judge(folder: Path, windows: Windows, kept: Path) -> tuple[float, ...]:
    """Window losses of a dense folder; they are kept, since weights of a finished cell do not change."""
    if kept.exists():
        return tuple(json.loads(kept.read_text()))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = evaluate_loss(model, windows).window_losses
    kept.write_text(json.dumps(losses))
    return losses


def rows_of(model: str, inputs: Path, out: Path) -> list[dict]:
    facts = json.loads((inputs / "inputs.json").read_text())
    text = facts["evaluation"]
    ids = load_file(inputs / "evaluation.safetensors")["ids"]
    windows = Windows(ids, text["first_token"], tuple(text["covered_bytes"]), text["text"], text["corpus_digest"])
    dense = judge(inputs / "model", windows, inputs / "losses.json")
    rows = []
    for found in sorted(out.glob(f"cells/{Path(model).name}/*/peer.json")):
        cell = json.loads(found.read_text())
        increase, error = mean_difference(judge(found.parent, windows, found.parent / "losses.json"), dense)
        rows.append(
            {
                "model": Path(model).name, "dense": statistics.fmean(dense), "increase": increase,
                "standard_error": error, **cell,
                "bits_per_weight": cell["stored_bytes"] * 8 / facts["n_weights"],
                "share": share_of(found.parent.name),
            }
        )  # fmt: skip
    return rows


def share_of(cell: str) -> float | None:
    last = cell.rsplit("-", 1)[1]
    return float(last.removesuffix("pc")) if last.endswith("pc") else None


def shares_table(rows: list[dict]) -> str:
    """Cells of one share beside each other; widths are counted over linears."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        some = [r for r in rows if r["model"] == model and r["share"] is not None]
        if not some:
            continue
        lines += [
            f"### {model}, bytes of the whole model, dense {some[0]['dense']:.4f}\n",
            "| share | target | peer | variant | loss increase | bytes | linears by bits | CPU | peak RSS, MiB |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for r in sorted(some, key=lambda r: (-r["share"], r["increase"])):
            count = Counter(r["widths"].values())
            widths = ", ".join(f"{count[bits]} x {bits}" for bits in sorted(count))
            lines.append(
                f"| {r['share']:g} % | {r['target_bytes']} | {r['peer']} {r['versions'][r['peer']]} | {r['variant']} | "
                f"{r['increase']:+.4f} ± {r['standard_error']:.4f} | {r['whole_bytes']} | {widths} | "
                f"{r['cpu_seconds']:.1f} | {r['peak_rss_mib']:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def table(rows: list[dict]) -> str:
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for bits in (4, 3, 2):
            some = sorted((r for r in rows if r["model"] == model and r["bits"] == bits), key=lambda r: r["increase"])
            if not some:
                continue
            lines += [
                f"### {model}, {bits} bits, dense {some[0]['dense']:.4f}\n",
                "| peer | variant | loss increase | bits per weight | seconds, wall | CPU | peak RSS, MiB |",
                "|---|---|---|---|---|---|---|",
            ]
            lines += [
                f"| {r['peer']} {r['versions'][r['peer']]} | {r['variant']} | {r['increase']:+.4f} ± "
                f"{r['standard_error']:.4f} | {r['bits_per_weight']:.2f} | {r['wall_seconds']:.1f} | "
                f"{r['cpu_seconds']:.1f} | {r['peak_rss_mib']:.0f} |"
                for r in some
            ]
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--shares", type=float, nargs="*", default=[], help="percent of the bytes in 16 bits")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), help="PEER or PEER:VARIANT")
    parser.add_argument("--text", nargs=3, action="append", default=[], metavar=("MODEL", "CALIBRATION", "EVALUATION"))
    parser.add_argument("--environments", type=Path, default=Path("build/peers"))
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    args.out = args.out.resolve()

    inputs = {model: inputs_of(model, args.text, args.out, args.group_size, args.seed) for model in args.models}
    for model in args.models:
        targets = targets_of(inputs[model], args.shares)
        for asked in args.peers:
            name, _, variant = asked.partition(":")
            wanted = {str(b): ["--bits", str(b)] for b in args.bits if b in PEERS[name].bits}
            if PEERS[name].chooses:
                wanted |= {f"{share:g}pc": ["--target-bytes", str(target)] for share, target in targets.items()}
            if not wanted:
                continue
            python = python_of(name, args.environments)
            for chosen in [variant] if variant else PEERS[name].variants:
                for ending, asked_for in wanted.items():
                    cell = args.out / "cells" / Path(model).name / f"{name}-{chosen}-{ending}"
                    run_cell(python, name, chosen, asked_for, inputs[model], cell, args)
    rows = [row for model in args.models for row in rows_of(model, inputs[model], args.out)]
    failed = {
        str(path.parent.relative_to(args.out)): path.read_text().strip()
        for path in args.out.glob("cells/*/*/failed.txt")
    }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout
    facts = {
        "commit": commit.strip(), "date": time.strftime("%Y-%m-%d"), "seed": args.seed, "machine": machine(),
        "cores": os.cpu_count(), "group_size": args.group_size, "torch": torch.__version__, "failed": failed,
        "adapters": hashlib.sha256(b"".join(p.read_bytes() for p in sorted(HERE.glob("*.py")))).hexdigest()[:16],
        "rows": rows,
    }  # fmt: skip
    (args.out / "table.json").write_text(json.dumps(facts, indent=1) + "\n")
    heading = (
        f"Commit {facts['commit']}, {facts['date']}, seed {args.seed}, {facts['machine']}, group size {args.group_size}"
    )
    text = f"{heading}\n\n{table(rows)}{shares_table(rows)}"
    text += "".join(f"* {cell}: {why}\n" for cell, why in failed.items())
    (args.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
