"""Codes and scales learned by gradient descent, after rounding found them.

Of one layer: its output is to be the original's, from what the compressed layers before it put out. Of the whole model:
its predictions are to be the original's (Kullback-Leibler divergence, so every token teaches as much as the vocabulary
is wide). Weights stand for what would be stored at every step (`LearnedLinear`). The last part of the windows is held
out: where learning did not help on it, everything stays as it was.

Sources: AutoRound (arXiv:2309.05516) learns rounding and ranges of a layer by signed gradients; EfficientQAT
(arXiv:2407.11062) all of a block, then scales end to end; LLM-QAT (arXiv:2305.17888) distils from the original. Adam on
latents counted in steps of their grid is ours: one rate then suits every grid and width.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qpruner.do.recover import fast_bfloat16
from qpruner.do.rounding import Tune
from qpruner.do.walk import n_fitted
from qpruner.math.straight import mean_gap
from qpruner.model.packed.learned import LearnedLinear, learnable, vectors_of
from qpruner.model.packed.split import Quantized
from qpruner.model.scratch import Scratch
from qpruner.model.skeleton import decoder_layers
from qpruner.model.stream import Step
from qpruner.plan import Plan

# Adam's. Latents in steps between values of the grid, over the number of inputs: all of them may move one way, and the
# output is then to move as far in a wide linear as in a narrow one (the rule of arXiv:2203.03466 for Adam).
LATENTS_RATE, GROWTHS_RATE, VECTORS_RATE = 1.28, 1e-3, 2e-3
STATE, KEPT_EVERY = "state", 5  # points of the curve, of which there are 50
LOGITS_AT_ONCE = 2**24  # elements, of either model
WARMUP = 0.05  # of the steps

OnStep = Callable[[int, int, float], None]  # steps done, steps in all, loss


@dataclass(frozen=True)
class Tuned:
    """What became of it. before, after: loss on held-out windows. curve: (step, loss) of what was learned from."""

    before: float
    after: float
    curve: tuple[tuple[int, float], ...]

    @property
    def helped(self) -> bool:
        return self.after < self.before


def tune_network_(
    model: nn.Module,
    predicting: Callable[[int], Tensor],
    windows: Tensor,
    *,
    steps: int,
    batch_size: int,
    held_out: float,
    seed: int,
    weights: Mapping[str, Tensor] | None = None,
    on_step: OnStep | None = None,
    kept: Scratch | None = None,
) -> Tuned:
    """Learn every packed linear of the decoder layers, and every vector besides (norms, biases), by the divergence from
    the original. An embedding or a head in codes takes part as it is.

    Args:
        predicting: the original's logits for a window by its number, (1, length, vocabulary).
        windows: (n, length) token ids, two at least.
        weights: what packed linears stand for, by name, where it is known.
        kept: where the state is kept from time to time; an interrupted process is gone on with from there.
    """
    n_learned = n_fitted(len(windows), held_out)
    at_once = max(1, LOGITS_AT_ONCE // predicting(0).numel())

    def divergence(numbers: Tensor) -> Tensor:
        """Mean over tokens; its gradient is taken of a few windows at a time where logits are large."""
        total = torch.zeros(())
        for some in numbers.split(at_once):
            with mixed_precision(model.device):
                ours = model(input_ids=windows[some].to(model.device), use_cache=False).logits
            theirs = torch.cat([predicting(window) for window in some.tolist()])
            loss = kl(theirs[:, :-1], ours[:, :-1]) * (len(some) / len(numbers))
            if loss.requires_grad:
                loss.backward()
            total += loss.detach().cpu()
        return total

    with learning(model, weights or {}, inside=tuple(f"{path}." for path in decoder_layers(model))) as learned:
        vectors = list(vectors_of(model).values())
        originals = [p.detach().clone() for p in vectors]
        tuned = _descend(
            learned, vectors, divergence, steps=steps, batch_size=batch_size, n_learned=n_learned,
            held_out=torch.arange(n_learned, len(windows)), seed=seed, on_step=on_step, kept=kept,
        )  # fmt: skip
        if not tuned.helped:
            for p, original in zip(vectors, originals, strict=True):
                p.data.copy_(original)
        learned.keep = tuned.helped
    return tuned


def tune_layer_(
    ours: Step, theirs: Step, *, steps: int, n_learned: int, seed: int, weights: Mapping[str, Tensor] | None = None
) -> Tuned:
    """Learn the packed linears of one layer; `theirs` has passed on all its batches.

    Args:
        n_learned: batches that are learned from; those behind them judge it.
        weights: what packed linears stand for, by inner name, where it is known.
    """

    def distance(numbers: Tensor) -> Tensor:
        """Squared, relative to each token's own size: what comes next sees hidden states through a norm."""
        total = torch.zeros(())
        for b in numbers.tolist():
            target = theirs.passed_on(b).float()
            found = ours.run(b, gradients=torch.is_grad_enabled()).float()
            loss = ((found - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).mean() / len(numbers)
            if loss.requires_grad:
                loss.backward()
            total += loss.detach().cpu()
        return total

    with learning(ours.layer, weights or {}) as learned:
        tuned = _descend(
            learned, [], distance, steps=steps, batch_size=1, n_learned=n_learned,
            held_out=torch.arange(n_learned, len(ours.batches)), seed=seed, on_step=None,
        )  # fmt: skip
        learned.keep = tuned.helped
    return tuned


def layer_tuner(plan: Plan, n_windows: int) -> Tune:
    """For the walk of `do/rounding.py`."""
    border = n_fitted(n_windows, plan.rounding.held_out)

    def tune(
        theirs: Step, ours: Step, layers: Mapping[str, Quantized], weights: Mapping[str, Tensor]
    ) -> Mapping[str, Quantized]:
        n_learned = sum(first < border for first, _ in ours.batches)
        steps, seed = plan.rounding.layer_steps, plan.seed + ours.index
        tune_layer_(ours, theirs, steps=steps, n_learned=n_learned, seed=seed, weights=weights)
        return {inner: ours.layer.get_submodule(inner) for inner in layers}

    return tune


class Learned:
    """The linears of a module that are being learned. keep: whether what was learned takes the place of what was."""

    def __init__(self, linears: dict[str, LearnedLinear]):
        self.linears, self.keep = linears, False


@contextmanager
def learning(module: nn.Module, weights: Mapping[str, Tensor], inside: str | tuple[str, ...] = "") -> Iterator[Learned]:
    """Within, every packed linear of the module is a learned one; afterwards they are packed again.

    inside: how the names of those that learn begin.
    """
    learned = Learned(learnable(module, weights, inside))
    packed = {name: module.get_submodule(name) for name in learned.linears}
    for name, linear in learned.linears.items():
        module.set_submodule(name, linear)
    try:
        yield learned
    finally:
        for name, linear in learned.linears.items():
            module.set_submodule(name, linear.packed() if learned.keep else packed[name])


def kl(theirs: Tensor, ours: Tensor) -> Tensor:
    """Mean over tokens of the divergence of our predictions from theirs, in nats. Takes logits."""
    p, q = F.log_softmax(theirs.float(), -1).flatten(0, -2), F.log_softmax(ours.float(), -1).flatten(0, -2)
    return F.kl_div(q, p, log_target=True, reduction="batchmean")


def mixed_precision(device: torch.device):
    """Products in bfloat16 where they are fast; everything that is learned is float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device))


def _descend(
    learned: Learned,
    vectors: list[nn.Parameter],
    loss_of: Callable[[Tensor], Tensor],
    *,
    steps: int,
    batch_size: int,
    n_learned: int,
    held_out: Tensor,
    seed: int,
    on_step: OnStep | None,
    kept: Scratch | None = None,
) -> Tuned:
    """loss_of: of so many numbers of windows or batches; calls backward itself where gradients are asked for."""
    linears = learned.linears.values()
    groups = [
        *((LATENTS_RATE * mean_gap(linear.spec) / linear.in_features, [linear.latents]) for linear in linears),
        (GROWTHS_RATE, [linear.growths for linear in linears]),
        (VECTORS_RATE, vectors),
    ]
    groups = [(rate, some) for rate, some in groups if some]
    parameters = [p for _, some in groups for p in some]
    optimizer = torch.optim.Adam([{"params": some, "lr": rate} for rate, some in groups], betas=(0.9, 0.99))
    every, curve, recent = max(1, steps // 50), [], []
    begun = 0 if kept is None else _resumed(kept, parameters, optimizer, curve)
    with torch.no_grad():
        before = float(loss_of(held_out)) if not begun else float(kept.result(STATE)["before"])
    with torch.inference_mode(False), torch.enable_grad():
        for p in parameters:
            p.requires_grad_(True)
        for step, numbers in zip(range(1, steps + 1), shuffled(n_learned, batch_size, seed), strict=False):
            if step <= begun:
                continue
            for (rate, _), group in zip(groups, optimizer.param_groups, strict=True):
                group["lr"] = rate * rate_at(step - 1, steps)
            optimizer.zero_grad()
            recent.append(float(loss_of(numbers)))
            optimizer.step()
            if step % every and step < steps:
                continue
            curve.append((step, sum(recent) / len(recent)))
            recent = []
            if kept is not None and len(curve) % KEPT_EVERY == 0:
                kept.finish(STATE, _state(parameters, optimizer, curve) | {"before": torch.tensor(before).double()})
            if on_step is not None:
                on_step(step, steps, curve[-1][1])
        for p in parameters:
            p.requires_grad_(False)
            p.grad = None
    with torch.no_grad():
        after = float(loss_of(held_out))
    return Tuned(before, after, tuple(curve))


def _state(
    parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, curve: list[tuple[int, float]]
) -> dict[str, Tensor]:
    """All that another process needs to go on."""
    found = {"curve": torch.tensor(curve, dtype=torch.float64)}
    for i, p in enumerate(parameters):
        found |= {f"{i}.{key}": value for key, value in optimizer.state[p].items()} | {f"{i}.parameter": p}
    return found


def _resumed(
    kept: Scratch, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, curve: list[tuple[int, float]]
) -> int:
    """Puts back what an earlier process had; the number of steps that it had done."""
    if not kept.finished(STATE):
        return 0
    state = kept.result(STATE)
    curve += [(int(step), loss) for step, loss in state["curve"].tolist()]
    for i, p in enumerate(parameters):
        p.data.copy_(state[f"{i}.parameter"])
        optimizer.state[p] = {key: state[f"{i}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    return curve[-1][0]


def rate_at(step: int, steps: int) -> float:
    """Share of the full rate: up in a line, then down along a cosine."""
    return min(1.0, (step + 1) / max(1.0, WARMUP * steps)) * (1 + math.cos(math.pi * min(step, steps) / steps)) / 2


def shuffled(n: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Numbers below n, `batch_size` at a time, without end; every number comes up equally often."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.long)
    while True:
        while len(waiting) < min(batch_size, n):
            waiting = torch.cat([waiting, torch.randperm(n, generator=generator)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]
