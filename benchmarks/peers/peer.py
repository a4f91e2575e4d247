"""What all adapters share: the command line, the clock, and the two files of a result. Runs in a peer's environment.

An adapter is a function from a `Job` to a `Quantized`; `run` does the rest. It needs torch, transformers and
safetensors alone, since each peer pins what it likes. A job asks for one width everywhere (`bits`), or for widths of
the peer's own choice that fit in so many bytes (`target_bytes`).
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


@dataclass
class Job:
    """What one cell asks for, and the clock that runs only while something is quantized.

    target_bytes: of the whole model, where the peer chooses widths; then there are no bits.
    shared: a folder of the model's, for what the peer measures once and uses for every target.
    """

    model_folder: Path
    inputs: Path
    out: Path
    ids: LongTensor  # (windows, length): the calibration tokens, the same for every peer
    bits: int | None
    target_bytes: int | None
    shared: Path
    group_size: int
    variant: str
    seed: int
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    rss_before_mib: float = 0.0
    rss_elsewhere_mib: float = 0.0  # the peak of an earlier cell, whose measurements were read back

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

    @contextmanager
    def measuring(self, kept: Path) -> Iterator[None]:
        """Around what cells share: the first leaves what it spent; `spent_elsewhere` adds that to the others."""
        before = cpu_seconds()
        yield
        kept.write_text(json.dumps({"cpu_seconds": cpu_seconds() - before, "peak_rss_mib": peak_rss_mib()}))

    def spent_elsewhere(self, kept: Path) -> None:
        spent = json.loads(kept.read_text())
        self.cpu_seconds += spent["cpu_seconds"]
        self.rss_elsewhere_mib = max(self.rss_elsewhere_mib, spent["peak_rss_mib"])


@dataclass
class Quantized:
    """weights: dequantized, by the names of the linears. stored_bytes: of their codes, scales and zero points.

    notes: what the peer did otherwise than it was asked.
    whole_bytes, widths: of the model, as `Sizes` counts it, and bits of every linear, where there was a target.
    """

    weights: dict[str, Tensor]
    stored_bytes: int
    settings: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    whole_bytes: int | None = None
    widths: dict[str, int] = field(default_factory=dict)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linears inside the decoder layers, by name: those of the largest module list, hence no head."""
    name, _ = max(
        ((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)),
        key=lambda pair: sum(p.numel() for p in pair[1].parameters()),
    )
    return {n: m for n, m in model.named_modules() if n.startswith(name + ".") and isinstance(m, nn.Linear)}


@dataclass(frozen=True)
class Sizes:
    """What a target in bytes is compared with: the model before padding, and in 16 bits all that is not a linear.

    Channels of zeros are our doing, so the peer does not pay for them. A shorter last group has a scale as well.
    """

    rest_bytes: int
    shapes: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, model: nn.Module, inputs: Path) -> "Sizes":
        more = json.loads((inputs / "inputs.json").read_text())["padded_channels"]
        width = model.config.intermediate_size
        layers = linears(model)
        shapes = {
            name: tuple(n - more if n == width else n for n in layer.weight.shape) for name, layer in layers.items()
        }
        n_rest = sum(p.numel() for p in model.parameters()) - sum(m.weight.numel() for m in layers.values())
        n_rest -= sum(more for m in layers.values() if m.bias is not None and m.out_features == width)
        return cls(2 * n_rest, shapes)

    @property
    def dense_bytes(self) -> int:
        return self.rest_bytes + sum(2 * rows * columns for rows, columns in self.shapes.values())

    def whole_bytes(self, cost: Callable[[str, int, int], int]) -> int:
        """cost: bytes of a linear from its name, outputs and inputs."""
        return self.rest_bytes + sum(cost(name, *shape) for name, shape in self.shapes.items())


def out_of_reach(smallest: int, target: int, dense: int) -> SystemExit:
    return SystemExit(f"out of reach: the smallest is {smallest} bytes ({smallest / dense:.1%}), {target} were asked")


def linear_bytes(rows: int, columns: int, bits: int, group_size: int, per_group_bits: int) -> int:
    """Codes without gaps, and per_group_bits for every group of inputs: its scale, and a zero point if there is one."""
    return -(-(rows * columns * bits + rows * -(-columns // group_size) * per_group_bits) // 8)


def tensor_bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def peak_rss_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(quantize: Callable[[Job], Quantized], packages: list[str], variants: list[str]) -> None:
    """The adapter's command line: --inputs DIR --bits N | --target-bytes N --group-size N --variant NAME -o OUT."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True, help="folder that inputs.py wrote")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--bits", type=int, choices=(2, 3, 4))
    asked.add_argument("--target-bytes", type=int, help="of the whole model; the peer chooses the widths")
    parser.add_argument("--shared", type=Path, default=None, help="kept for other targets of the same model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--variant", choices=variants, default=variants[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    ids = load_file(args.inputs / "calibration.safetensors")["ids"]
    args.out.mkdir(parents=True, exist_ok=True)
    job = Job(
        args.model.resolve(), args.inputs.resolve(), args.out.resolve(), ids, args.bits, args.target_bytes,
        (args.shared or args.out).resolve(), args.group_size, args.variant, args.seed,
    )  # fmt: skip
    result = quantize(job)
    peak = max(peak_rss_mib(), job.rss_elsewhere_mib)  # before the dense copy below, which is ours
    n_weights, relative_error = _save_dense(job, result.weights)
    facts = {
        "peer": packages[0], "variant": args.variant, "bits": args.bits, "group_size": args.group_size,
        "seed": args.seed, "wall_seconds": job.wall_seconds, "cpu_seconds": job.cpu_seconds,
        "peak_rss_mib": peak, "rss_before_mib": job.rss_before_mib, "stored_bytes": result.stored_bytes,
        "target_bytes": args.target_bytes, "whole_bytes": result.whole_bytes, "widths": result.widths,
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
