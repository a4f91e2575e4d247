"""What the training scripts have in common: the texts under the rule of what is held out, the optimizers, the loop.

Text: every `--stdlib` folder (the running interpreter's by default; give several versions for more text), without the
modules of heldout_modules.json and their tests; 40-line chunks seen before are dropped. Muon for the matrices,
AdamW for the embeddings and everything else, a warm-up and a linear decay to zero. The decay follows the clock, so that
a run always ends well whatever else the machine is doing; the number of tokens it reached is written to training.json.
"""

import argparse
import hashlib
import json
import math
import random
import time
from pathlib import Path

import torch

from qpruner.model import pystdlib

BUNDLED = Path(__file__).parents[1] / "src/qpruner/bundled/pystdlib-5M"
CHUNK_LINES = 40


def training_documents(roots: list[Path], heldout: frozenset[str]) -> list[str]:
    """Training modules of every root, later roots first, each without the 40-line chunks already seen."""
    seen, documents = set(), []
    for root in reversed(roots):
        for module in pystdlib.trainable(root, heldout):
            lines = pystdlib.read(root, module).splitlines(keepends=True)
            chunks = ["".join(lines[i : i + CHUNK_LINES]) for i in range(0, len(lines), CHUNK_LINES)]
            fresh = [c for c in chunks if (d := hashlib.sha1(c.encode()).digest()) not in seen and not seen.add(d)]
            if fresh:
                documents.append("".join(fresh))
    return documents


def token_stream(documents: list[str], tokenizer) -> torch.Tensor:
    encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
    return torch.cat([torch.tensor(ids + [tokenizer.eos_token_id], dtype=torch.int16) for ids in encoded])


@torch.no_grad()
def window_loss(model, stream: torch.Tensor, bos: int, *, n_windows: int = 200, length: int = 511) -> float:
    """Nats per token over non-overlapping windows with `<s>` in front: the protocol of the model's README."""
    windows = stream[: len(stream) // length * length].view(-1, length)[:n_windows].long()
    windows = torch.cat([torch.full((len(windows), 1), bos), windows], dim=1)
    total = sum(float(model(w, labels=w).loss) * len(w) for w in windows.split(8))
    return total / len(windows)


def optimizers(model, rate: float) -> list[torch.optim.Optimizer]:
    named = dict(model.named_parameters())
    matrices = [p for n, p in named.items() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
    others = [p for n, p in named.items() if p.ndim != 2 or "embed" in n or "lm_head" in n]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(
    model, stream: torch.Tensor, bos: int, *, minutes: float, batch: int, length: int, rate: float, seed: int
) -> int:
    """Train in place until the clock says so; returns the number of tokens seen."""
    generator = torch.Generator().manual_seed(seed)
    steppers = optimizers(model, rate)
    windows = stream[: len(stream) // length * length].view(-1, length)
    order: list[int] = []
    start, n_tokens, step = time.monotonic(), 0, 0
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        if len(order) < batch:
            order += torch.randperm(len(windows), generator=generator).tolist()
        rows, order = windows[order[:batch]].long(), order[batch:]
        rows = torch.cat([torch.full((batch, 1), bos), rows], dim=1)
        factor = min((step + 1) / 50, 1.0) * (1 - done)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = rate * factor
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        n_tokens, step = n_tokens + batch * length, step + 1
        if not math.isfinite(loss.item()):
            raise SystemExit(f"loss is {loss.item()} at step {step}")
        if step % 20 == 0:
            print(f"{step:6d}  {n_tokens / 1e6:7.2f} M tokens  loss {loss.item():.4f}  {100 * done:5.1f} %", flush=True)
    return n_tokens


def arguments(description: str, *, minutes: float) -> argparse.ArgumentParser:
    """What every training script can be told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stdlib", type=Path, nargs="+", default=[pystdlib.stdlib_root()])
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def run(model, tokenizer, heldout: frozenset[str], args: argparse.Namespace, **facts) -> None:
    """Train `model` in place and save it, judged on the held-out modules of the running interpreter.

    Writes the weights in bfloat16 and training.json: `facts`, tokens seen, held-out loss before and after.
    """
    random.seed(args.seed)
    root, bos = pystdlib.stdlib_root(), tokenizer.bos_token_id
    modules = pystdlib.corpus_modules(root, heldout, "evaluation")
    evaluation = token_stream([pystdlib.read(root, m) for m in modules], tokenizer)
    before = window_loss(model.eval(), evaluation, bos)
    documents = training_documents(args.stdlib, heldout)
    random.shuffle(documents)
    stream = token_stream(documents, tokenizer)
    print(f"{len(stream) / 1e6:.1f} M distinct training tokens; held-out loss before {before:.4f}", flush=True)

    model.train()
    n_tokens = train(
        model, stream, bos, minutes=args.minutes, batch=args.batch, length=511, rate=args.rate, seed=args.seed
    )
    model.eval()
    model.to(torch.bfloat16).save_pretrained(args.out)
    after = window_loss(model.float(), evaluation, bos)
    facts |= dict(
        tokens=n_tokens, distinct_tokens=len(stream), minutes=args.minutes, batch=args.batch, rate=args.rate,
        seed=args.seed, heldout_loss_before=before, heldout_loss_after=after,
        python_versions=len(args.stdlib), torch=torch.__version__,
    )  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(facts, indent=1))
    print(json.dumps(facts, indent=1))
