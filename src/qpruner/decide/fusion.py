"""The two scores of `hybrid` made one, by whatever way of fusing loses least (HyWIA, arXiv 2403.10799).

    fine, coarse   one of the two alone
    mean           half of each
    attention      every unit trusts the score that is surer (`math.fusion.attention_of_scores`)
    learned        a small attention, one for the whole model, trained on the loss of the gated model
    best           all of these are tried on the search text

Training moves only the attention. Its gates hold what is to stay at every step, and are hard in the forward pass, so
that what is trained is what is kept. A few of its steps are tried on the search text, since a single kv group more or
less moves the loss by more than many steps do.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qpruner.decide.saliences import UnitScores
from qpruner.decide.widths import Pool
from qpruner.math import fusion
from qpruner.model.gates import gated
from qpruner.model.graph import Graph
from qpruner.model.scratch import Scratch
from qpruner.model.whole import Streamable

WAYS = ("fine", "coarse", "mean", "attention", "learned")
KINDS = ("kv_group", "query_head", "channel", "expert", "residual")
D_K = 8
START, RATE = 0.3, 0.01  # standard deviation of the parameters at first, and Adam's learning rate
TEMPERATURES = 0.3, 0.03  # of the gates, at first and in the end
STEP_TOKENS = 512
SNAPSHOTS = 6  # of the attention, evenly over the steps

Parameters = list[Tensor]  # of the attention: Q, K
Trial = Callable[[UnitScores], float]  # the loss on the search text of what these scores keep


@dataclass(frozen=True)
class Fused:
    """scores: the fused ones. way: whose they are. losses: of every way that was tried, nats per token.

    fine: for each way, how far it trusts the fine score in each group, on the mean of its units.
    curve: the gated model's loss at every step of training.
    """

    scores: UnitScores
    way: str
    losses: dict[str, float]
    fine: dict[str, dict[str, float]]
    curve: tuple[float, ...]

    def to_tensors(self) -> dict[str, Tensor]:
        """As a run stores it."""
        wide = lambda values: torch.tensor(list(values), dtype=torch.float64)
        blends = {
            f"fine/{way}/{name}": wide([value]) for way, each in self.fine.items() for name, value in each.items()
        }
        losses = {f"loss/{way}": wide([loss]) for way, loss in self.losses.items()}
        scores = {f"score/{name}": score for name, score in self.scores.items()}
        return {"curve": wide(self.curve), "way": torch.tensor(WAYS.index(self.way))} | losses | blends | scores

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor]) -> "Fused":
        of = lambda kind: {key.removeprefix(f"{kind}/"): t for key, t in stored.items() if key.startswith(f"{kind}/")}
        fine: dict[str, dict[str, float]] = {}
        for key, value in of("fine").items():
            way, _, name = key.partition("/")
            fine.setdefault(way, {})[name] = float(value)
        losses = {way: float(loss) for way, loss in of("loss").items()}
        return cls(of("score"), WAYS[int(stored["way"])], losses, fine, tuple(stored["curve"].tolist()))


def fuse(
    hybrid: Mapping[str, Tensor],
    pools: Sequence[Pool],
    graph: Graph,
    way: str,
    train: Callable[["Blend"], tuple[list[Parameters], tuple[float, ...]]],
    trial: Trial,
    on_trial: Callable[[int, int], None],
) -> Fused:
    """One score per unit.

    Args:
        hybrid: group -> (2, n_units), fine and coarse.
        pools: units that compete with each other; all groups are in one.
        way: one of WAYS, or `best`.
        train: gives snapshots of the blend's parameters, and the loss of every step.
    """
    blend, curve = Blend(hybrid, pools, graph), ()
    candidates = [(each, blend.weights(each)) for each in WAYS if way in (each, "best") and each != "learned"]
    if way in ("learned", "best"):
        snapshots, curve = train(blend)
        for snapshot in snapshots:
            blend.parameters = snapshot
            candidates.append(("learned", blend.weights("learned")))
    best: dict[str, tuple[float, dict[str, Tensor]]] = {}  # of each way
    for i, (each, weights) in enumerate(candidates):
        loss = trial(blend.scores(weights)) if len(candidates) > 1 else 0.0
        loss = math.inf if math.isnan(loss) else loss  # of a model that broke: the worst there is
        on_trial(i + 1, len(candidates))
        if each not in best or loss < best[each][0]:
            best[each] = loss, weights
    way = min(best, key=lambda each: best[each][0])
    losses = {each: loss for each, (loss, _) in best.items()} if len(candidates) > 1 else {}
    fine = {each: {name: float(a[0].mean()) for name, a in weights.items()} for each, (_, weights) in best.items()}
    return Fused(blend.scores(best[way][1]), way, losses, fine, curve)


class Blend:
    """How far every unit trusts either score, under the parameters as they are. Final.

    The attention starts from the same numbers in every run; what a run's seed changes is the order of the texts.
    """

    def __init__(self, hybrid: Mapping[str, Tensor], pools: Sequence[Pool], graph: Graph):
        self.pools, self.graph = pools, graph
        self._sizes = {pool: [graph.groups[name].n_units for name in pool.groups] for pool in pools}
        self._R = {
            pool: fusion.comparable(torch.cat([hybrid[name] for name in pool.groups], dim=1), pool.weights)
            for pool in pools
        }
        self._X = {pool: self._features(pool) for pool in pools}
        generator = torch.Generator().manual_seed(0)
        d_x = next(iter(self._X.values())).shape[1]
        new = lambda *shape: START * torch.randn(*shape, generator=generator, dtype=torch.float64)
        self.parameters: Parameters = [new(d_x, D_K).requires_grad_(), new(2, d_x, D_K).requires_grad_()]

    def _features(self, pool: Pool) -> Tensor:
        """Both scores, the depth, the kind of unit, and a one."""
        rows = []
        for name, n in zip(pool.groups, self._sizes[pool], strict=True):
            group = self.graph.groups[name]
            depth = group.layer / max(len(self.graph.layers) - 1, 1) - 0.5 if group.layer >= 0 else 0.0
            known = [depth, *(float(group.kind == kind) for kind in KINDS), 1.0]
            rows.append(torch.tensor(known, dtype=torch.float64).expand(n, -1))
        return torch.cat([self._R[pool].log().T / 3, torch.cat(rows)], dim=1)

    def _each(self, pool: Pool, values: Tensor) -> dict[str, Tensor]:
        return dict(zip(pool.groups, values.split(self._sizes[pool], dim=-1), strict=True))

    def _of_pool(self, pool: Pool, way: str) -> Tensor:
        R = self._R[pool]
        if way == "learned":
            return fusion.attention(self._X[pool], *self.parameters)
        if way == "attention":
            return fusion.attention_of_scores(R)
        fine = {"fine": 1.0, "coarse": 0.0, "mean": 0.5}[way]
        return torch.tensor([[fine], [1 - fine]], dtype=R.dtype).expand_as(R)

    def weights(self, way: str) -> dict[str, Tensor]:
        """Group -> (2, n_units)."""
        with torch.no_grad():
            return {name: a for pool in self.pools for name, a in self._each(pool, self._of_pool(pool, way)).items()}

    def scores(self, weights: Mapping[str, Tensor]) -> UnitScores:
        """Per unit again, not per weight: whoever lets units compete divides by what they weigh."""
        found = {}
        for pool in self.pools:
            a = torch.cat([weights[name] for name in pool.groups], dim=1)
            found |= self._each(pool, (fusion.fused(self._R[pool], a) * pool.weights).float())
        return found

    def gates(self, temperature: float) -> dict[str, Tensor]:
        """Of the learned way, for all groups that are to lose units; gradients reach the parameters."""
        found = {}
        for pool in self.pools:
            if pool.target < pool.weights.sum():
                s = fusion.fused(self._R[pool], self._of_pool(pool, "learned"))
                soft = fusion.soft_gates(s, pool.weights, pool.target, temperature=temperature)
                hard = fusion.hard_gates(s.detach(), pool.weights, pool.target)
                for name, gate in self._each(pool, fusion.straight_through(hard, soft)).items():
                    found[name] = gate
        return found


def train_(
    blend: Blend,
    stream: Streamable,
    windows: Tensor,
    *,
    steps: int,
    generator: torch.Generator,
    scratch: Scratch,
    on_step: Callable[[int, int], None],
) -> tuple[list[Parameters], tuple[float, ...]]:
    """Trains the attention of a blend, in place, on the next-token loss of the gated model.

    Every step is one pass forward and back, one layer in memory at a time where the stream does so. A killed training
    goes on at the step, and in it at the layer, where it stopped.

    Args:
        windows: (n, length) token ids, taken in seeded order, again and again.
        steps: of about STEP_TOKENS tokens each.
    Returns:
        snapshots of the parameters, the last at the last step; the loss of every step.
    """
    at_once = min(max(1, STEP_TOKENS // windows.shape[1]), len(windows))
    rounds = math.ceil(steps * at_once / len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(rounds)])
    adam = torch.optim.Adam(blend.parameters, lr=RATE)
    snapshots, curve = [], []
    taken = {round(steps * (i + 1) / SNAPSHOTS) for i in range(SNAPSHOTS)}
    for step in range(steps):
        if not scratch.finished(f"step-{step}"):
            rows = windows[order[step * at_once : (step + 1) * at_once]]
            temperature = TEMPERATURES[0] * (TEMPERATURES[1] / TEMPERATURES[0]) ** (step / steps)
            loss = _step(blend, adam, stream, rows, temperature, scratch.part("pass"))
            scratch.finish(f"step-{step}", _state(blend, adam, loss))
        else:
            loss = _restore(blend, adam, scratch.result(f"step-{step}"))
        curve.append(loss)
        if step + 1 in taken:
            snapshots.append([parameter.detach().clone() for parameter in blend.parameters])
        on_step(step + 1, steps)
    return snapshots, tuple(curve)


def _step(
    blend: Blend, adam: torch.optim.Adam, stream: Streamable, rows: Tensor, temperature: float, scratch: Scratch
) -> float:
    with torch.inference_mode(False), torch.enable_grad():
        gates = blend.gates(temperature)
        leaves = {name: gate.detach().float().requires_grad_() for name, gate in gates.items()}
        with gated(stream.model, blend.graph, leaves):
            stream.backward(rows, scratch, batch_size=len(rows))
        loss = float(scratch.result("loss")["loss"].mean())
        scratch.clear()
        reached = [name for name, leaf in leaves.items() if leaf.grad is not None]
        adam.zero_grad(set_to_none=True)
        if reached:
            torch.autograd.backward(
                [gates[name] for name in reached], [leaves[name].grad.double() / len(rows) for name in reached]
            )
            adam.step()
    return loss


def _state(blend: Blend, adam: torch.optim.Adam, loss: float) -> dict[str, Tensor]:
    state = {"loss": torch.tensor(loss, dtype=torch.float64)}
    for i, parameter in enumerate(blend.parameters):
        state[f"parameter-{i}"] = parameter.detach().clone()
        for key, value in adam.state.get(parameter, {}).items():
            state[f"{key}-{i}"] = value.clone()
    return state


def _restore(blend: Blend, adam: torch.optim.Adam, state: Mapping[str, Tensor]) -> float:
    for i, parameter in enumerate(blend.parameters):
        parameter.data = state[f"parameter-{i}"]
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{key}-{i}" in state:
                adam.state[parameter][key] = state[f"{key}-{i}"]
    return float(state["loss"])
