"""Learned gates: a choice of everything is the model, what is taken is what is there, and training repeats itself."""

import numpy as np
import pytest
import torch
from tiny import TINY, tiny

from qpruner.decide import gates
from qpruner.decide.gates import Gates, Network, divergence, train_gates
from qpruner.decide.projection import projections
from qpruner.decide.space import space_of
from qpruner.math import grids
from qpruner.model.discover import discover
from qpruner.model.scratch import Scratch
from qpruner.plan import DENSE, QuantSpec

SPECS = (QuantSpec(bits=2, grid="integer", group_size=8), QuantSpec(bits=4, grid="integer", group_size=8), DENSE)
IDS = torch.arange(48).reshape(4, 12) % 29 + 1


class Case:
    """A tiny model, a space of it, and all that training asks for."""

    def __init__(self, family: str, specs=SPECS, dead: int | None = None):
        self.model = tiny(family, dtype=torch.float32)
        self.graph = discover(self.model)
        channels = {n: g for n, g in self.graph.groups.items() if g.kind == "channel" and g.n_blocks == 1}
        if dead is not None:
            for group in channels.values():
                for linear, table in group.consumers.items():
                    with torch.no_grad():
                        self.model.get_submodule(linear).weight[:, table[dead]] = 0
        tensors = {name: ("F16", tuple(p.shape)) for name, p in self.model.named_parameters()}
        self.space = space_of(
            self.graph, tensors, dtype="F16", specs=specs, droppable=range(1, 3),
            widths={name: (group.n_units // 2, group.n_units) for name, group in channels.items()},
        )  # fmt: skip
        self.orders = {name: torch.arange(group.n_units) for name, group in channels.items()}
        self.units = {name: gates._spaced(order) for name, order in self.orders.items()}
        self.network = Network(self.model, self.graph, self.space, self.weight)
        self.start = [np.linspace(-0.01 if v.kind == "bits" else -0.1, 0, len(v.options)) for v in self.space.variables]

    def weight(self, name, spec):
        W = self.model.get_submodule(name).weight.detach()
        W = W.T if name in self.graph.linears and self.graph.linears[name].transposed else W
        return W if spec == DENSE else grids.dequantize(grids.quantize(W, spec), spec)

    def predicting(self, window):
        with torch.no_grad():
            return self.model(input_ids=IDS[window : window + 1], use_cache=False).logits

    def logits(self, point):
        D = torch.nn.functional.one_hot(torch.tensor(point), max(self.space.sizes)).double()
        return self.network.logits(IDS, D, torch.tensor(point), self.units)

    def limits(self):
        bottom, top = self.space.size_bytes([(0,) * len(self.space.sizes), self.space.top]).tolist()
        return bottom + (top - bottom) // 4, bottom + (top - bottom) // 2

    def train(self, **over):
        how = dict(limits=self.limits(), steps=6, batch_size=2, seed=0) | over
        return train_gates(self.network, self.space, self.start, self.orders, self.predicting, IDS, **how)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def case(request):
    return Case(request.param)


def same(a: Gates, b: Gates) -> bool:
    pairs = [*zip(a.worths, b.worths, strict=True), (a.curve, b.curve)]
    return all(np.array_equal(x, y) for x, y in pairs) and all(torch.equal(a.units[n], b.units[n]) for n in a.units)


def test_the_best_of_everything_is_the_model(case):
    assert torch.equal(case.logits(case.space.top), torch.cat([case.predicting(i) for i in range(4)]))


def test_what_is_taken_is_what_is_there(case):
    """A point by gates is the model with weights changed, units zeroed and a layer left out."""
    point = list(case.space.top)
    kinds = [v.kind for v in case.space.variables]
    layer, width = kinds.index("layer"), len(kinds) - 1 - kinds[::-1].index("width")
    bits = [i for i, v in enumerate(case.space.variables) if v.kind == "bits" and v.layer == 0][:2]
    for i in (layer, width, *bits):
        point[i] = 0
    other = Case(next(f for f in TINY if f == case.model.config.model_type))
    with torch.no_grad():
        for i in bits:
            projection = next(p for p in case.graph.projections if p.name == case.space.variables[i].name)
            for name in projection.linears:
                W = case.weight(name, SPECS[0])
                weight = other.model.get_submodule(name).weight
                weight.copy_(W.T if case.graph.linears[name].transposed else W)
        group = case.graph.groups[case.space.variables[width].name]
        for name, table in group.consumers.items():
            weight = other.model.get_submodule(name).weight
            columns = table[case.space.variables[width].options[0] :].flatten()
            (weight.T if case.graph.linears[name].transposed else weight)[:, columns] = 0
        path, _, number = case.space.variables[layer].name.rpartition(".")
        layers = other.model.get_submodule(path)
        del layers[int(number)]
        other.model.config.num_hidden_layers -= 1
        expected = other.model(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(case.logits(point), expected)


def test_gradients_reach_every_variable_that_has_a_say(case):
    D = torch.nn.functional.one_hot(torch.zeros(len(case.space.sizes)).long(), max(case.space.sizes)).double()
    D[[i for i, v in enumerate(case.space.variables) if v.kind == "layer"]] = torch.tensor([0.0, 1.0, 0.0]).double()
    D.requires_grad_()
    theirs = torch.cat([case.predicting(i) for i in range(4)])
    divergence(theirs, case.network.logits(IDS, D, D.argmax(1), case.units)).backward()
    assert (D.grad.abs().amax(1) > 0).all()
    assert all(p.grad is None for p in case.model.parameters())


@pytest.mark.parametrize("way", ["table", "hypernetwork"])
def test_the_same_seed_gives_the_same_gates_and_another_others(case, way):
    first = case.train(way=way)
    assert same(first, case.train(way=way))
    assert not same(first, case.train(way=way, seed=1))


@pytest.mark.parametrize("way", ["table", "hypernetwork"])
def test_resumed_is_uninterrupted(case, way, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(done, *_):
        if done == 5:
            raise Stop

    monkeypatch.setattr(gates, "KEPT_EVERY", 2)
    with pytest.raises(Stop):
        case.train(way=way, kept=Scratch(tmp_path), on_step=stop)
    seen = []
    resumed = case.train(way=way, kept=Scratch(tmp_path), on_step=lambda done, *_: seen.append(done))
    assert seen == [5, 6]
    assert same(resumed, case.train(way=way))


def test_no_steps_leave_what_was_thought(case):
    for worth, start in zip(case.train(steps=0).worths, case.start, strict=True):
        np.testing.assert_allclose(worth, start)


def test_projections_of_worths_meet_every_budget(case):
    found = case.train()
    limits = sorted(case.limits())
    for point, limit in zip(projections(case.space, found.estimate(case.space), limits), limits, strict=True):
        assert case.space.size_bytes([point])[0] <= limit


def test_gates_read_back_are_the_same(case):
    found = case.train(steps=2)
    assert same(found, Gates.from_tensors(found.to_tensors()))


def test_training_finds_out_what_does_not_matter():
    """Two options of the same weight: whatever is thought of them, the smaller one becomes worth as much and more."""
    case = Case("llama", specs=SPECS[1:])
    case.weight = None
    rounded = case.space.variables
    first = next(i for i, v in enumerate(rounded) if v.kind == "bits")
    free = {p for q in case.graph.projections if q.name == rounded[first].name for p in q.linears}
    plain = Case("llama").weight
    case.network = Network(
        case.model, case.graph, case.space, lambda name, spec: plain(name, DENSE if name in free else spec)
    )
    found = case.train(steps=60)
    bits = [i for i, v in enumerate(rounded) if v.kind == "bits" and v.layer == 0]
    gains = [found.worths[i][-1] - found.worths[i][0] for i in bits]
    assert min(gains) == gains[0] < 0.01


def test_a_dead_unit_becomes_worth_least():
    """Its place at first is by far not the last."""
    case = Case("llama", specs=(DENSE,), dead=18)
    found = case.train(steps=60, learn_orders=True, limits=(lambda a, b: (b, b))(*case.limits()))
    for name, order in found.orders.items():
        started = case.orders[name].tolist().index(18)
        assert order.tolist().index(18) > started
