"""Learned gates: which option every variable of a joint search should take, trained through the frozen network.

Every step draws a budget from the range that is asked for, prices bytes so that the expected size is that budget, takes
one option of every variable, and runs a few windows through the network that they make. Only what options are worth is
learned, from the divergence of its predictions from the original's. What is taken is hard, so what is trained is what
is kept, and the noise of the draw goes to nothing. Budgets differ only in the price, so one training serves them all,
and worths add up, as an exact projection wants it. Every budget counts the same: what falls is the loss's logarithm.

Memory: the model, its activations and the gradients of its weights; of the forms of a weight, what `weight` keeps. One
is asked for at a time, forward and back, so that forms may lie on disk or be decoded when they are needed.

Sources: TOGA (arXiv:2606.07819) trains gates of widths and bits in one space on the loss of the whole network, made by
a hypernetwork as in DISP-LLM (arXiv:2410.11988), with a penalty on the size, for one budget.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from qpruner.decide.estimate import Estimate
from qpruner.decide.hypernetwork import Hypernetwork
from qpruner.decide.space import Space
from qpruner.math.choices import Expected, Form, drawn, laid_out, one_hot, priced
from qpruner.math.fusion import hard_gates, soft_gates, straight_through
from qpruner.model.gates import gated, skippable
from qpruner.model.graph import Graph
from qpruner.model.scratch import Scratch
from qpruner.plan import QuantSpec

TABLE_RATE, UNIT_RATE = 0.1, 0.02  # Adam's
TEMPERATURES = 1.0, 0.3  # of the draws, at first and in the end
UNSURE = 0.15  # probability of other options than the likeliest, at first, on average over variables
UNIT_TEMPERATURE = 0.1  # units are told apart by worths from 1 to -1
WARMUP = 0.05  # of the steps
KEPT_EVERY = 20  # steps
STATE = "state"

Weight = Callable[[str, QuantSpec], Tensor]  # of a linear or an embedding, (d_out, d_in), float32
OnStep = Callable[[int, int, float], None]  # steps done, steps in all, loss
Worths = Sequence[Sequence[float] | np.ndarray]  # of every option of every variable, in nats per token


@dataclass(frozen=True, eq=False)
class Gates:
    """worths: of every option of every variable, in nats per token; differences within a variable mean something.

    units: group -> worth of each unit that may go, in no unit; as they were given if they were not learned.
    curve: (steps, 2) budget in bytes and loss of every step.
    """

    worths: tuple[np.ndarray, ...]
    units: dict[str, Tensor]
    curve: np.ndarray

    @property
    def orders(self) -> dict[str, Tensor]:
        """Group -> its units, best first."""
        return {name: worth.argsort(descending=True, stable=True) for name, worth in self.units.items()}

    def estimate(self, space: Space) -> Estimate:
        """What options lose by their worths, for projections. Nothing loses less than the best there is."""
        return Estimate(space, tuple(np.maximum(worth[-1] - worth, 0.0) for worth in self.worths))

    def to_tensors(self) -> dict[str, Tensor]:
        """As a run stores it."""
        found = {f"worth/{i}": torch.from_numpy(worth) for i, worth in enumerate(self.worths)}
        found |= {f"unit/{name}": worth for name, worth in self.units.items()}
        return found | {"curve": torch.from_numpy(self.curve)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Gates":
        n = sum(key.startswith("worth/") for key in tensors)
        units = {key.removeprefix("unit/"): t for key, t in tensors.items() if key.startswith("unit/")}
        return cls(tuple(tensors[f"worth/{i}"].numpy() for i in range(n)), units, tensors["curve"].numpy())


class Network:
    """A model whose weights, widths and layers are what a point of a space says, differentiable in the point. Final."""

    def __init__(self, model: nn.Module, graph: Graph, space: Space, weight: Weight):
        self.model, self._graph, self._space, self._weight = model, graph, space, weight
        linears = {p.name: p.linears for p in graph.projections}
        of_kind = lambda kind: [(i, v) for i, v in enumerate(space.variables) if v.kind == kind]
        self._bits = [(i, name) for i, v in of_kind("bits") for name in linears.get(v.name, (v.name,))]
        self._widths, self._layers = of_kind("width"), of_kind("layer")

    def logits(self, ids: Tensor, D: Tensor, chosen: Tensor, units: Mapping[str, Tensor]) -> Tensor:
        """(windows, length, vocabulary) of the network that D, one-hot at `chosen`, makes.

        units: group -> worth of each; the best stay. Gradients reach them too.
        """
        device, sizes, taken = self.model.device, self._space.sizes, chosen.tolist()
        frozen = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        made = {f"{n}.weight": Form.apply(D[i], taken[i], self._form(i, n), sizes[i]) for i, n in self._bits}
        gates = {v.name: D[i, : sizes[i]] @ _masks(units[v.name], v.options, taken[i]) for i, v in self._widths}
        layers = {v.name: D[i, 1] for i, v in self._layers}
        on_device = lambda each: {name: gate.to(device, torch.float32) for name, gate in each.items()}
        with gated(self.model, self._graph, on_device(gates)), skippable(self.model, on_device(layers)):
            return functional_call(
                self.model, frozen | made, kwargs=dict(input_ids=ids.to(device), use_cache=False)
            ).logits

    def _form(self, i: int, name: str) -> Callable[[int], Tensor]:
        options, site = self._space.variables[i].options, self._graph.linears.get(name)

        def form(s: int) -> Tensor:
            W = self._weight(name, options[s])
            return W.T if site is not None and site.transposed else W

        return form


def _masks(worth: Tensor, counts: Sequence[int], taken: int) -> Tensor:
    """(options, units) ones for the best units. Of the option that is taken, units near the edge learn."""
    ones, fixed = torch.ones_like(worth), worth.detach().exp()
    masks = [hard_gates(fixed, ones, float(n)) for n in counts]
    if worth.requires_grad and counts[taken] < len(worth):
        soft = soft_gates(worth.exp(), ones, float(counts[taken]), temperature=UNIT_TEMPERATURE)
        masks[taken] = straight_through(masks[taken], soft)
    return torch.stack(masks)


def train_gates(
    network: Network,
    space: Space,
    start: Worths,
    orders: Mapping[str, Tensor],
    predicting: Callable[[int], Tensor],
    windows: Tensor,
    *,
    limits: tuple[int, int],
    steps: int,
    batch_size: int,
    seed: int,
    way: str = "table",
    learn_orders: bool = False,
    on_step: OnStep | None = None,
    kept: Scratch | None = None,
) -> Gates:
    """
    Args:
        start: what options are thought to be worth, such as what each loses alone, negative.
        orders: group -> its units, best first, of those that may lose some.
        predicting: the original's logits for a window by its number, (1, length, vocabulary).
        windows: (n, length) token ids.
        limits: the smallest and the largest budget in bytes; those between are drawn evenly by logarithm.
        way: `table`, a number for every option; or `hypernetwork`, which makes them.
        learn_orders: whether units may change places.
        kept: where the state is kept from time to time; an interrupted process goes on from there.
    """
    size = Expected([(table.variables, table.values) for table in space.tables], max(space.sizes))
    room = [max(limit - space.fixed_bytes, 1) for limit in limits]
    conditions = [i for i, v in enumerate(space.variables) if v.kind == "layer"]
    begun = laid_out(start)
    scale = _scale(begun, size, math.sqrt(room[0] * room[1]), conditions)
    change = Hypernetwork(space, seed) if way == "hypernetwork" else Table(begun)
    units = {name: _spaced(order).requires_grad_(learn_orders) for name, order in orders.items()}
    groups = [(change.rate, list(change.parameters()))]
    groups += [(UNIT_RATE, list(units.values()))] if learn_orders and units else []
    parameters = [p for _, some in groups for p in some]
    adam = torch.optim.Adam([{"params": some, "lr": rate} for rate, some in groups], betas=(0.9, 0.99))
    total, curve = torch.zeros_like(begun), []
    if kept is not None and kept.finished(STATE):
        total, curve = _restored(kept.result(STATE), parameters, adam)
    draws = Draws(len(windows), batch_size, seed)
    for step in range(len(curve), steps):
        generator = draws.generator(step)
        target = room[0] * (room[1] / room[0]) ** float(torch.rand((), generator=generator))
        temperature = TEMPERATURES[0] * (TEMPERATURES[1] / TEMPERATURES[0]) ** (step / steps)
        with torch.inference_mode(False), torch.enable_grad():
            change_now = change.theta()
            p, _ = priced(scale * begun + change_now, size, target, temperature, conditions)
            chosen = drawn(p, generator)
            rows = draws.windows(step)
            ours = network.logits(windows[rows], one_hot(p, chosen), chosen, units)
            theirs = torch.cat([predicting(row) for row in rows.tolist()])
            loss = divergence(theirs, ours)
            adam.zero_grad()
            (loss / loss.detach().clamp_min(1e-6)).backward()
        for (rate, _), group in zip(groups, adam.param_groups, strict=True):
            group["lr"] = rate * _rate_at(step, steps)
        adam.step()
        if step >= steps // 2:  # the average over the second half wavers less than where training stops
            total += change_now.detach()
        curve.append((target + space.fixed_bytes, loss.item()))
        if kept is not None and ((step + 1) % KEPT_EVERY == 0 or step + 1 == steps):
            kept.finish(STATE, _state(total, curve, parameters, adam))
        if on_step is not None:
            on_step(step + 1, steps, loss.item())
    worths = begun + total / (scale * max(1, steps - steps // 2))
    return Gates(
        tuple(row[:n].numpy() for row, n in zip(worths, space.sizes, strict=True)),
        {name: unit.detach() for name, unit in units.items()},
        np.array(curve, dtype=np.float64).reshape(-1, 2),
    )


class Table(nn.Module):
    """A number for every option of every variable, zero at first. Final."""

    rate = TABLE_RATE

    def __init__(self, begun: Tensor):
        super().__init__()
        self.change = nn.Parameter(torch.zeros_like(begun))

    def theta(self) -> Tensor:
        return self.change


class Draws:
    """Which windows and which noise a step sees: by its number and the seed alone. Final."""

    def __init__(self, n: int, batch_size: int, seed: int):
        self._n, self._batch_size, self._seed = n, min(batch_size, n), seed

    def generator(self, step: int, what: str = "noise") -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed} {what} {step}".encode()).digest()  # torch looks at 32 bits of a seed
        return torch.Generator().manual_seed(int.from_bytes(digest[:4]))

    def windows(self, step: int) -> Tensor:
        """All of them in one order before the next begins."""
        per_round = self._n // self._batch_size
        turn, place = divmod(step, per_round)
        order = torch.randperm(self._n, generator=self.generator(turn, "order"))
        return order[place * self._batch_size : (place + 1) * self._batch_size]


def divergence(theirs: Tensor, ours: Tensor) -> Tensor:
    """Mean over predicted tokens of the divergence of our predictions from theirs, in nats. Takes logits."""
    p, q = F.log_softmax(theirs[:, :-1].float(), -1), F.log_softmax(ours[:, :-1].float(), -1)
    return F.kl_div(q.flatten(0, 1), p.flatten(0, 1), log_target=True, reduction="batchmean")


def _spaced(order: Tensor) -> Tensor:
    """Worths from 1 to -1 in an order that is given, best first."""
    return torch.empty(len(order), dtype=torch.float64).index_copy(0, order, torch.linspace(1, -1, len(order)).double())


def _scale(begun: Tensor, size: Expected, target: float, conditions: Sequence[int]) -> float:
    """Worths times this are logits that are as unsure as is good to begin with, at a middle budget."""
    low, high = -10.0, 40.0  # logarithms to base 2
    for _ in range(30):
        middle = (low + high) / 2
        p, _ = priced(begun * 2.0**middle, size, target, TEMPERATURES[0], conditions)
        low, high = (middle, high) if float((1 - p.amax(1)).mean()) > UNSURE else (low, middle)
    return 2.0**low


def _rate_at(step: int, steps: int) -> float:
    """Share of the full rate: up in a line, then down along a cosine."""
    return min(1.0, (step + 1) / max(1.0, WARMUP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2


def _state(
    total: Tensor, curve: Sequence[tuple[float, float]], parameters: Sequence[Tensor], adam: torch.optim.Adam
) -> dict[str, Tensor]:
    """All that another process needs to go on."""
    found = {"total": total, "curve": torch.tensor(curve, dtype=torch.float64)}
    for i, p in enumerate(parameters):
        found[f"{i}.parameter"] = p.detach()
        found |= {f"{i}.{key}": value for key, value in adam.state[p].items()}
    return {key: value.clone() for key, value in found.items()}


def _restored(
    state: Mapping[str, Tensor], parameters: Sequence[Tensor], adam: torch.optim.Adam
) -> tuple[Tensor, list[tuple[float, float]]]:
    for i, p in enumerate(parameters):
        p.data.copy_(state[f"{i}.parameter"])
        own = {key: state[f"{i}.{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq") if f"{i}.{key}" in state}
        if own:
            adam.state[p] = own
    return state["total"].clone(), [tuple(row) for row in state["curve"].tolist()]
