"""Claim: a node that is lost in the middle of a search costs its trial one more try, and nothing else.

    python benchmarks/joint_on_ray.py MODEL --out DIR [--calibration FILE] [--recipe auto[...]] [--budgets 20%,30%]

Starts a Ray cluster of a head without cores and two nodes of one core on this machine, searches there, and kills a node
once a third of the trials are known; then searches once more in this process. Prints what the driver was told, and
whether the trials are the same.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch

from qpruner import api
from qpruner import recipe as recipes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--recipe", default="auto[gate_steps=0,trials=24]")
    parser.add_argument("--budgets", default="20%,30%")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    little = dict(object_store_memory=80_000_000, include_dashboard=False)
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, **little))
    nodes = [cluster.add_node(num_cpus=1, wait=True, **little) for _ in range(2)]
    start, killed = time.monotonic(), []

    def kill(stage: str, done: int, total: int, *_) -> None:
        if stage == "trials" and done >= total // 3 and not killed:
            killed.append(round(time.monotonic() - start, 1))
            cluster.remove_node(nodes.pop(), allow_graceful=False)

    how = dict(recipe=recipes.load(args.recipe), calibration=args.calibration)
    budgets = args.budgets.split(",")
    api.search(args.model, budgets, args.out / "ray", ray=cluster.address, on_progress=kill, **how)
    print(f"searched on Ray in {time.monotonic() - start:.0f} s; a node was killed after {killed} s")
    for line in (args.out / "ray" / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "workers":
            print("  told:", event["said"])
    cluster.shutdown()
    start = time.monotonic()
    api.search(args.model, budgets, args.out / "here", **how)
    print(f"searched here in {time.monotonic() - start:.0f} s")
    ray, here = ((args.out / place / "trials.jsonl").read_text().splitlines()[1:] for place in ("ray", "here"))
    print(f"{len(ray)} trials on Ray, {len(here)} here, {sum(a == b for a, b in zip(ray, here, strict=True))} the same")


if __name__ == "__main__":
    main()
