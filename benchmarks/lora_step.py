"""Claim: a LoRA step on a packed 4-bit base takes at most 1.3 times as long as on the same base in bfloat16.

    python benchmarks/lora_step.py [--threads 1] [--shapes 1024x4 2048x2] [--batches 4x256] [--bases nf4 int4 ...]
        [--device cpu] [--checkpointing] [--rounds 7] [--out FILE.json]

Where others use the machine, the ratio of the processor time is the steadier one; both are given.

A step is what recovery does: forward and backward under bfloat16 autocast, adapters of rank 8 beside every linear in
float32, AdamW. Models are LLaMA-shaped, of HIDDEN x LAYERS, with random weights. All bases take turns, round after
round; a row gives the median over rounds of the time, and of its ratio to the dense step of the same round. The head
and the embedding are dense in all of them, of a vocabulary small enough not to hide what the layers take.
"""

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

RANK, ALPHA, DROPOUT, VOCABULARY, SEED = 8, 16.0, 0.05, 4096, 0
MIXED = ("int2", "int3", "nf4", "int8")


def specs() -> dict:
    from qpruner.plan import INT8, NF4, QuantSpec

    integer = lambda bits, group, **kw: QuantSpec(bits=bits, grid="integer", group_size=group, **kw)
    return {
        "nf4": NF4, "int2": integer(2, 64), "int3": integer(3, 64), "int4": integer(4, 64), "int8": INT8,
        "int4-asymmetric": integer(4, 128, symmetric=False),
    }  # fmt: skip


def model_of(hidden: int, layers: int, base: str) -> nn.Module:
    """With adapters, every linear of its layers in the form of the base."""
    from qpruner.model.adapters import inject_adapters_
    from qpruner.model.packed.linear import PackedLinear

    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers, vocab_size=VOCABULARY,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    for i, name in enumerate(names):
        one = MIXED[i % len(MIXED)] if base == "mixed" else base
        if one != "bf16":
            model.set_submodule(name, PackedLinear.from_weight(model.get_submodule(name).weight, None, specs()[one]))
    inject_adapters_(model, dict.fromkeys(names, RANK), alpha=ALPHA, dropout=DROPOUT)
    return model.train()


class Training:
    """A model, its optimizer and one batch."""

    def __init__(self, model: nn.Module, batch: int, length: int, device: str):
        self.model, self.device = model.to(device), device
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        generator = torch.Generator().manual_seed(SEED)
        self.ids = torch.randint(VOCABULARY, (batch, length), generator=generator).to(device)

    def step(self) -> None:
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.model(self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device == "cuda":
            torch.cuda.synchronize()


def measure(hidden: int, layers: int, batch: int, length: int, args) -> list[dict]:
    trained = {}
    for base in dict.fromkeys(["bf16", *args.bases]):
        trained[base] = Training(model_of(hidden, layers, base), batch, length, args.device)
        if args.checkpointing:
            trained[base].model.gradient_checkpointing_enable({"use_reentrant": False})
        trained[base].step()
    seconds, busy = {base: [] for base in trained}, {base: [] for base in trained}
    for _ in range(args.rounds):
        for base, training in trained.items():
            start, busy_before = time.perf_counter(), time.process_time()
            training.step()
            seconds[base].append(time.perf_counter() - start)
            busy[base].append(time.process_time() - busy_before)
    rows = []
    for base, times in seconds.items():
        ratios, of_busy = ratios_to(seconds, base), ratios_to(busy, base)
        row = dict(hidden=hidden, layers=layers, batch=batch, length=length, base=base)
        row |= dict(ms=1e3 * statistics.median(times), ratio=statistics.median(ratios), ratios=ratios)
        row |= dict(processor_ms=1e3 * statistics.median(busy[base]), processor_ratio=statistics.median(of_busy))
        print(
            f"{hidden}x{layers}, {batch}x{length} tokens  {base:16} {row['ms']:8.0f} ms  {row['ratio']:5.2f} "
            f"({ratios[0]:.2f}-{ratios[-1]:.2f}) x bf16; processor time {row['processor_ratio']:5.2f} x", flush=True,
        )  # fmt: skip
        rows.append(row)
    return rows


def ratios_to(times: dict[str, list[float]], base: str) -> list[float]:
    return sorted(t / d for t, d in zip(times[base], times["bf16"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=["1024x4", "2048x2"], help="hidden size x layers")
    parser.add_argument("--batches", nargs="+", default=["4x256"], help="windows x tokens in each")
    parser.add_argument("--bases", nargs="+", default=["nf4", "int4", "int8", "mixed"], help="see `specs`; or mixed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkpointing", action="store_true", help="layers are computed again on the way back")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pairs = lambda words: [tuple(map(int, word.split("x"))) for word in words]
    print(f"{args.threads} threads, torch {torch.__version__}, {args.device}")
    rows = [row for s in pairs(args.shapes) for b in pairs(args.batches) for row in measure(*s, *b, args)]
    if args.out:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        about = dict(commit=commit, date=time.strftime("%Y-%m-%d"), threads=args.threads, torch=torch.__version__)
        about |= dict(device=args.device, checkpointing=args.checkpointing, seed=SEED, rank=RANK)
        args.out.write_text(json.dumps(about | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
