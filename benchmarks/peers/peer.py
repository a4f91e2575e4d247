"""What all adapters share: the command line, the clock, and the two files of a result. Runs in a peer's environment.

An adapter is a function from a `Job` to a `Quantized`; `run` does the rest. It needs torch, transformers and
safetensors alone, since each peer pins what it likes.
"""

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from safetensors.torch import load_file, save_file
from torch import LongTensor, Tensor, nn
from transformers import AutoModelForCausalLM

THREADS = 2


@dataclass
class Job:
    """What one cell asks for, and the clock that runs only while something is quantized."""

    model_folder: Path
    out: Path
    ids: LongTensor  # (windows, length): the calibration tokens, the same for every peer
    bits: int
    group_size: int
    variant: str
    seed: int
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    rss_before_mib: float = 0.0

    def load(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.model_folder, dtype=dtype).eval()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts what runs inside, children included: quantizing, neither importing nor loading nor saving."""
        self.rss_before_mib = self.rss_before_mib or peak_rss_mib()
        wall, cpu = time.perf_counter(), cpu_seconds()
        try:
            yield
        finally:
            self.wall_seconds += time.perf_counter() - wall
            self.cpu_seconds += cpu_seconds() - cpu


@dataclass
class Quantized:
    """weights: dequantized, by the names of the linears. stored_bytes: of their codes, scales and zero points.

    notes: what the peer did otherwise than it was asked.
    """

    weights: dict[str, Tensor]
    stored_bytes: int
    settings: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linears inside the decoder layers, by name: those of the largest module list, hence no head."""
    name, _ = max(
        ((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)),
        key=lambda pair: sum(p.numel() for p in pair[1].parameters()),
    )
    return {n: m for n, m in model.named_modules() if n.startswith(name + ".") and isinstance(m, nn.Linear)}


def tensor_bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def peak_rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(quantize: Callable[[Job], Quantized], packages: list[str], variants: list[str]) -> None:
    """The adapter's command line: --model DIR --inputs DIR --bits N --group-size N --variant NAME -o OUT."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True, help="folder that inputs.py wrote")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), required=True)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--variant", choices=variants, default=variants[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()

    torch.set_num_threads(THREADS)
    torch.manual_seed(args.seed)
    ids = load_file(args.inputs / "calibration.safetensors")["ids"]
    args.out.mkdir(parents=True, exist_ok=True)
    job = Job(args.model.resolve(), args.out.resolve(), ids, args.bits, args.group_size, args.variant, args.seed)
    result = quantize(job)
    peak = peak_rss_mib()  # before the dense copy below, which is ours
    n_weights, relative_error = _save_dense(job, result.weights)
    facts = {
        "peer": packages[0], "variant": args.variant, "bits": args.bits, "group_size": args.group_size,
        "seed": args.seed, "wall_seconds": job.wall_seconds, "cpu_seconds": job.cpu_seconds,
        "peak_rss_mib": peak, "rss_before_mib": job.rss_before_mib, "stored_bytes": result.stored_bytes,
        "n_weights_with_padding": n_weights, "relative_error": relative_error,
        "settings": result.settings, "notes": result.notes,
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        "versions": {p: version(p) for p in [*packages, "torch", "transformers"]},
    }  # fmt: skip
    (args.out / "peer.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts), file=sys.stderr)


def _save_dense(job: Job, weights: dict[str, Tensor]) -> tuple[int, float]:
    """A plain float32 folder with the dequantized weights in the places of the original ones.

    The number of weights, and the largest |W - Q| / |W| of a linear: near or above 1, a layout was read wrongly.
    """
    model = job.load()
    places = linears(model)
    if weights.keys() != places.keys():
        missing, unknown = sorted(places.keys() - weights.keys()), sorted(weights.keys() - places.keys())
        raise SystemExit(f"not every linear was quantized: missing {missing[:3]}, unknown {unknown[:3]}")
    errors = []
    with torch.no_grad():
        for name, weight in weights.items():
            errors.append(float((weight - places[name].weight).norm() / places[name].weight.norm()))
            if not weight.isfinite().all():
                raise SystemExit(f"{name} has values that are not finite")
            places[name].weight.copy_(weight)
    model.save_pretrained(job.out)
    return sum(m.weight.numel() for m in places.values()), max(errors)


def save_tensors(path: Path, **tensors: Tensor) -> None:
    save_file({k: t.contiguous() for k, t in tensors.items()}, path)
