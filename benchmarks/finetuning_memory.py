"""Claim: fine-tuning a model pruned by 20 % on a packed base takes at least 30 % less memory than on its 16-bit base.

    python benchmarks/finetuning_memory.py [--shape 1024x8] [--batch 4x256] [--steps 20] [--bases nf4 mixed int8]
        [--vocabulary 8000] [--threads 1] [--checkpointing] [--device cpu|cuda] [--only-predict] [--out FILE.json]
    python benchmarks/finetuning_memory.py --shape 4096x32 --vocabulary 32000 --only-predict        # LLaMA-7B
    python benchmarks/finetuning_memory.py --batch 1x256       # a quarter of its widths and of its tokens: its balance

Models are LLaMA-shaped with random weights, pruned as LLM-Pruner does: the first four thirty-seconds of the layers and
the last two are whole, the others keep three quarters of their heads and channels. Adapters of rank 8 stand beside
every linear of the layers; the embedding and the head stay 16-bit. `mixed` has 4 and 8 bits in turn, layer by layer.

Each base is trained by `train_adapters_`, as recovery does it, in a process of its own. On a GPU the peak is what torch
allocated. On a CPU it is the most that the process held, less what it held before there was a model and after another
of three layers was trained and given back: libraries come into memory as they are used. The allocator is told to give
back whatever is freed. Both stand beside what `step_memory` predicts from shapes.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

RANK, ALPHA, DROPOUT, SEED = 8, 16.0, 0.05, 0
KEPT, WHOLE_FIRST, WHOLE_LAST = 0.75, 4, 2  # of 32 layers
WARM_LAYERS = 3  # which has a pruned layer between two whole ones
DENSE, MIXED = "bf16", ("nf4", "int8")
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def pruned(hidden: int, layers: int, vocabulary: int, *, empty: bool) -> nn.Module:
    """empty: on the meta device."""
    from qpruner.model.discover import discover
    from qpruner.model.skeleton import build_skeleton
    from qpruner.model.surgery import narrow_

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers, vocab_size=vocabulary,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128, use_cache=False,
    )  # fmt: skip
    first, last = max(1, layers * WHOLE_FIRST // 32), max(1, layers * WHOLE_LAST // 32)
    skeleton = build_skeleton(config)
    graph = discover(skeleton)
    left = {name: g.n_units if not first <= g.layer < layers - last else int(KEPT * g.n_units)
            for name, g in graph.groups.items()}  # fmt: skip
    model = (skeleton if empty else LlamaForCausalLM(config)).to(torch.bfloat16)
    narrow_(model, graph, {name: tuple(range(n)) for name, n in left.items()})
    return model


def model_of(base: str, hidden: int, layers: int, vocabulary: int, *, empty: bool = False) -> nn.Module:
    """With adapters, the linears of its layers in the form of the base."""
    from qpruner.model.adapters import inject_adapters_
    from qpruner.model.packed.linear import PackedLinear
    from qpruner.plan import INT8, NF4

    torch.manual_seed(SEED)
    model = pruned(hidden, layers, vocabulary, empty=empty)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    for name in names if base != DENSE else ():
        one = MIXED[int(name.split(".")[2]) % 2] if base == "mixed" else base
        W, spec = model.get_submodule(name).weight, {"nf4": NF4, "int8": INT8}[one]
        packed = PackedLinear.empty(*W.shape, False, spec) if empty else PackedLinear.from_weight(W, None, spec)
        model.set_submodule(name, packed)
    inject_adapters_(model, dict.fromkeys(names, RANK), alpha=ALPHA, dropout=DROPOUT)
    return model.train()


def predict(base: str, args, device: str = "cpu") -> dict:
    from qpruner.do.recover import recomputing
    from qpruner.model.training_memory import step_memory

    model = model_of(base, *args.sizes, empty=True)
    with recomputing(model, args.checkpointing):
        found = step_memory(model, *args.tokens, device=device)
    return dict(
        predicted=found.peak, base=found.base, adapters=found.adapters, moments=found.moments, kept=found.kept,
        passing=found.passing,
    )  # fmt: skip


def train(model: nn.Module, vocabulary: int, steps: int, args) -> None:
    from qpruner.do.recover import Material, train_adapters_
    from qpruner.model.examples import Examples
    from qpruner.plan import Recovery

    batch, length = args.tokens
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(vocabulary, (steps * batch, length), generator=generator)
    predicted = torch.ones_like(ids, dtype=torch.bool)
    predicted[:, 0] = False
    recovery = Recovery(
        loss="next-token", steps=steps, batch_size=batch, validations=0, gradient_checkpointing=args.checkpointing
    )
    train_adapters_(model, recovery, Material(Examples(ids, predicted)), seed=SEED)


def measure(base: str, args) -> dict:
    from qpruner.model.packed import native
    from qpruner.model.residence import give_back_memory

    hidden, layers, vocabulary = args.sizes
    train(model_of(base, hidden, min(layers, WARM_LAYERS), vocabulary), vocabulary, 2, args)
    if args.device == "cuda":
        model = model_of(base, *args.sizes).to("cuda")
        torch.cuda.reset_peak_memory_stats()
        train(model, vocabulary, args.steps, args)
        return dict(measured=torch.cuda.max_memory_allocated())
    native.library()
    gc.collect()  # the model that was trained is held by a ring of references
    give_back_memory()
    before = held("VmRSS")
    model = model_of(base, *args.sizes)
    gc.collect()
    give_back_memory()
    loaded = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    train(model, vocabulary, args.steps, args)
    return dict(measured=held("VmHWM") - before, loaded=loaded - before, before=before)


def held(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def apart(base: str, argv: list[str]) -> dict:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, *argv, "--measure", base]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | GIVES_BACK)
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1024x8", help="hidden size x layers")
    parser.add_argument("--batch", default="4x256", help="windows x tokens in each")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bases", nargs="+", default=["nf4", "mixed", "int8"])
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpointing", action="store_true", help="layers are computed again on the way back")
    parser.add_argument("--only-predict", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.sizes = (*map(int, args.shape.split("x")), args.vocabulary)
    args.tokens = tuple(map(int, args.batch.split("x")))
    if args.measure:
        print(json.dumps(measure(args.measure, args)))
        return
    rows = []
    for base in dict.fromkeys([DENSE, *args.bases]):
        row = dict(base=base) | predict(base, args, args.device)
        if not args.only_predict:
            row |= apart(base, sys.argv[1:])
        rows.append(row)
        words = [f"{base:6}"]
        for what in ("measured", "predicted"):
            if what in row:
                less = 1 - row[what] / rows[0][what]
                words.append(f"{what} {row[what] / 2**20:9.1f} MiB, {less:5.1%} less than {DENSE}")
        if "measured" in row:
            words.append(f"predicted {row['predicted'] / row['measured'] - 1:+.1%} off")
        print("  ".join(words), flush=True)
    if args.out:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        about = dict(commit=commit, date=time.strftime("%Y-%m-%d"), torch=torch.__version__, seed=SEED, rank=RANK)
        about |= {n: getattr(args, n) for n in ("shape", "batch", "steps", "vocabulary", "threads", "device")}
        about |= dict(checkpointing=args.checkpointing)
        args.out.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
