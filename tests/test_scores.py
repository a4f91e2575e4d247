"""Importance of units: measured through hooks, equal to the formula on gradients taken the plain way."""

import pytest
import torch
from tiny import tiny
from tiny_stream import streamed

from qpruner.decide.scores import SCORERS, scorer_of
from qpruner.model.discover import discover
from qpruner.model.scratch import Scratch
from qpruner.recipe import Recipe

FAMILIES = ("llama", "gpt2", "gpt_neox")
WINDOWS = torch.arange(48).reshape(4, 12) % 29 + 1


def run(name: str, model, graph, **options):
    return SCORERS[name](streamed(model, **options), graph, WINDOWS, torch.Generator().manual_seed(0), Scratch(), None)


def gradients(model, graph):
    """Every weight's gradient for each window, by autograd and nothing else."""
    found = {name: [] for name in graph.linears}
    weights = [model.get_submodule(name).weight for name in graph.linears]
    for window in WINDOWS:
        loss = model(input_ids=window[None], labels=window[None]).loss
        for name, g in zip(found, torch.autograd.grad(loss, weights), strict=True):
            found[name].append(g)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["vector", "element-first", "element-second", "element-mixed"])
def test_scores_are_the_formula(family, kind):
    model = tiny(family)
    graph = discover(model)
    expected_gradients = gradients(model, graph)
    scores = run(kind, model, graph)
    for name, group in graph.groups.items():
        expected = torch.zeros(group.n_units, dtype=torch.float64)
        for tables, dim in ((group.producers, 1), (group.consumers, 0)):
            for linear, table in tables.items():
                turn = (lambda t: t.T) if graph.linears[linear].transposed else (lambda t: t)
                W = turn(model.get_submodule(linear).weight.detach())
                samples = torch.stack([turn(g) for g in expected_gradients[linear]])
                first, second = W * samples.mean(0), W.square() * samples.square().mean(0)
                vector = {
                    "vector": first.sum(dim).abs(),
                    "element-first": first.abs().sum(dim),
                    "element-second": second.sum(dim),
                    "element-mixed": (first - 0.5 * second).abs().sum(dim),
                }[kind]
                expected += vector[table].sum(1)
        torch.testing.assert_close(scores[name].double(), expected, rtol=1e-4, atol=1e-9)


def unit_sums(model, graph, group):
    """sum of w g over all weights of every unit, for each window."""
    found = torch.zeros(len(WINDOWS), group.n_units, dtype=torch.float64)
    for linear, each in gradients(model, graph).items():
        turn = (lambda t: t.T) if graph.linears[linear].transposed else (lambda t: t)
        W = turn(model.get_submodule(linear).weight.detach())
        for window, g in enumerate(each):
            if linear in group.producers:
                found[window] += (W * turn(g)).sum(1)[group.producers[linear]].sum(1)
            if linear in group.consumers:
                found[window] += (W * turn(g)).sum(0)[group.consumers[linear]].sum(1)
    return found


@pytest.mark.parametrize("fisher", ["window", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_coarse_score_is_of_whole_units_window_by_window(family, fisher):
    model = tiny(family)
    graph = discover(model)
    recipe = Recipe(name="coarse", score="coarse", fisher=fisher)
    scorer = scorer_of(recipe, WINDOWS.shape[1])
    scores = scorer(streamed(model), graph, WINDOWS, torch.Generator(), Scratch(), None)
    factor = 0.5 * (WINDOWS.shape[1] if fisher == "token" else 1)
    for name, group in graph.groups.items():
        u = unit_sums(model, graph, group)
        expected = (u.mean(0) - factor * u.square().mean(0)).abs()
        torch.testing.assert_close(scores[name].double(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_hybrid_is_both_scores_in_one_pass(family):
    model = tiny(family)
    graph = discover(model)
    both = run("hybrid", model, graph)
    for row, kind in enumerate(("element-mixed", "coarse")):
        alone = run(kind, model, graph)
        for name in alone:
            torch.testing.assert_close(both[name][row], alone[name], rtol=1e-3, atol=1e-9)


def test_a_quadratic_term_that_is_not_there_cannot_be_scaled():
    with pytest.raises(ValueError, match="has none to scale"):
        Recipe(name="x", score="vector", fisher="token")


def test_measuring_leaves_the_model_alone():
    model = tiny("llama")
    stream = streamed(model, resident=True)
    SCORERS["element-mixed"](stream, discover(model), WINDOWS, torch.Generator(), Scratch(), None)
    measured = stream.loaded()
    assert all(p.grad is None and not p.requires_grad and not p._backward_hooks for p in measured.parameters())
    assert all(torch.equal(value, measured.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_dead_channel_has_no_importance():
    model = tiny("llama")
    model.get_submodule("model.layers.0.mlp.down_proj").weight.data[:, 3] = 0
    model.get_submodule("model.layers.0.mlp.up_proj").weight.data[3] = 0
    graph = discover(model)
    for kind in ("vector", "element-first", "element-second", "element-mixed"):
        assert run(kind, model, graph)["model.layers.0.mlp"][3] == 0


def test_random_scores_depend_on_the_seed_alone():
    graph = discover(tiny("llama"))
    draw = lambda seed: SCORERS["random"](None, graph, WINDOWS, torch.Generator().manual_seed(seed), None, None)
    one, same, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)
