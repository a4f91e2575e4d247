"""Importance from inputs: seen through hooks, equal to the formula on inputs that were taken the plain way."""

import pytest
import torch
from tiny import tiny
from tiny_stream import streamed

from qpruner.decide.scores import SCORERS
from qpruner.math.inputs import Norms, Variances, standardised
from qpruner.model.discover import discover
from qpruner.model.scratch import Scratch
from qpruner.model.whole import Whole
from qpruner.testing.tiny import Held

WINDOWS = torch.arange(60).reshape(5, 12) % 29 + 1
MOE = dict(num_local_experts=4, num_experts_per_tok=2)
CASES = [("llama", {}), ("gpt2", {}), ("gpt_neox", {}), ("qwen3", {}), ("mixtral", MOE)]
KINDS = ("wanda-sp", "flap")


def run(name: str, model, graph, windows=WINDOWS, scratch=None, **options):
    stream = streamed(model, **options)
    return SCORERS[name](stream, graph, windows, torch.Generator(), scratch or Scratch(), None)


def inputs_of(model, graph) -> dict[str, torch.Tensor]:
    """What every linear sees while the whole model runs, window by window, (tokens, d_in)."""
    seen = {name: [] for name in graph.linears}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, s=s: s.append(args[0].flatten(0, -2)))
        for name, s in seen.items()
    ]
    with torch.no_grad():
        for window in WINDOWS:
            model(window[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items() if parts}


def columns(kind: str, model, graph) -> dict[str, torch.Tensor]:
    """The formula, column by column."""
    inputs, found = inputs_of(model, graph), {}
    for name, site in graph.linears.items():
        W = model.get_submodule(name).weight.detach()
        W, X = W.T if site.transposed else W, inputs[name]
        found[name] = {
            "wanda-sp": (W.abs() * X.norm(dim=0)).sum(0),
            "flap": W.square().sum(0) * X.var(0, correction=0),
        }[kind]
    for name, stack in graph.stacks.items():
        W = model.get_parameter(name).detach()
        W = W.mT if stack.transposed else W
        found[name] = {"wanda-sp": W.abs().sum(1), "flap": W.square().sum(1)}[kind].flatten()
    if kind == "flap":
        found = {name: (x - x.mean()) / x.std() for name, x in found.items()}
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family, over", CASES)
def test_scores_are_the_formula(family, over, kind):
    model = tiny(family, **over)
    graph = discover(model)
    scores, expected = run(kind, model, graph), columns(kind, model, graph)
    assert set(scores) == set(graph.groups)
    for name, group in graph.groups.items():
        for unit in range(group.n_units):
            own = torch.cat([expected[site][table[unit]] for site, table in group.consumers.items()])
            value = own.sum() if kind == "wanda-sp" else own.mean()
            torch.testing.assert_close(scores[name][unit].double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_is_resident_is_whole_and_goes_on_where_it_was_killed(kind, tmp_path):
    model = tiny("llama", dtype=torch.float32)
    graph = discover(model)
    expected = run(kind, model, graph, resident=True)

    class Killed(Exception):
        pass

    def stop(done, total, pace):
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        SCORERS[kind](streamed(model), graph, WINDOWS, torch.Generator(), Scratch(tmp_path), stop)
    seen = []
    note = lambda done, total, pace: seen.append(done)
    found = SCORERS[kind](streamed(model), graph, WINDOWS, torch.Generator(), Scratch(tmp_path), note)
    assert seen == [3]
    skeleton = streamed(model).model
    whole = SCORERS[kind](
        Whole(skeleton, Held(model), dtype=torch.float32), graph, WINDOWS, torch.Generator(), Scratch(), None
    )
    for name in graph.groups:
        assert torch.equal(found[name], expected[name]) and torch.equal(whole[name], expected[name])


@pytest.mark.parametrize("kind", KINDS)
def test_neither_batches_nor_the_order_of_windows_matter(kind, monkeypatch):
    model = tiny("llama")
    graph = discover(model)
    expected = run(kind, model, graph)
    monkeypatch.setattr("qpruner.decide.activations.batch_of", lambda windows: 2)
    for found in (run(kind, model, graph), run(kind, model, graph, WINDOWS.flip(0))):
        assert all(torch.allclose(found[name], expected[name], rtol=1e-6, atol=1e-6) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_permuting_units_permutes_scores(kind):
    model, layer = tiny("llama"), "model.layers.1.mlp"
    graph = discover(model)
    expected = run(kind, model, graph)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        weight = model.get_submodule(f"{layer}.{name}").weight
        weight.data = weight.data.index_select(dim, order)
    found = run(kind, model, graph)
    torch.testing.assert_close(found[layer], expected[layer][order], rtol=1e-5, atol=1e-6)
    assert all(torch.allclose(found[n], expected[n], rtol=1e-5, atol=1e-6) for n in expected if n != layer)


def test_what_is_never_seen_is_worth_nothing():
    model = tiny("llama")
    graph = discover(model)
    model.get_submodule("model.layers.0.mlp.up_proj").weight.data[3] = 0  # an input of zeros
    model.get_submodule("model.layers.1.mlp.down_proj").weight.data[:, 5] = 0  # an input that nobody reads
    for kind in KINDS:
        scores = run(kind, model, graph)
        for layer, channel in ((0, 3), (1, 5)):
            own = scores[f"model.layers.{layer}.mlp"]
            assert own.argmin() == channel and (kind == "flap" or own[channel] == 0)


def test_a_linear_that_no_token_reached_is_worth_nothing():
    model = tiny("llama")
    graph = discover(model)
    stream = streamed(model)
    stream.model.get_submodule("model.layers.2.mlp").forward = torch.zeros_like
    for kind in KINDS:
        scores = SCORERS[kind](stream, graph, WINDOWS, torch.Generator(), Scratch(), None)
        assert (scores["model.layers.2.mlp"] == 0).all() and (scores["model.layers.1.mlp"] != 0).any()


# --- the formulas alone ----------------------------------------------------------------------------------------------


def test_the_mean_of_an_input_does_not_count_for_its_variance(rand):
    X, shift = rand(50, 7), torch.linspace(-1e6, 1e6, 7, dtype=torch.float64)
    X[:, 2] = 0.3  # never changes
    plain, shifted = Variances(), Variances()
    for part in X.split(9):
        plain.add(part)
        shifted.add(part + shift)
    torch.testing.assert_close(plain.factors(), X.var(0, correction=0))
    torch.testing.assert_close(shifted.factors(), plain.factors(), rtol=1e-8, atol=0)
    assert plain.factors()[2] == 0 == shifted.factors()[2]


def test_norms_of_half_precision_inputs_do_not_overflow():
    norms = Norms()
    norms.add(torch.full((100, 2), 300, dtype=torch.float16))
    assert (norms.factors() == 3000).all()


def test_nothing_added_gives_no_factors():
    for sums in (Norms(), Variances()):
        assert sums.factors() is None
    empty = Variances()
    empty.add(torch.zeros(0, 3))  # an expert that was called for no token
    assert empty.factors() is None


def test_what_is_standardised_has_mean_zero_and_deviation_one_or_is_all_alike(rand):
    x = standardised(3 + 5 * rand(40))
    torch.testing.assert_close(torch.stack([x.mean(), x.std()]), torch.tensor([0.0, 1.0], dtype=torch.float64))
    for alike in (torch.full((4,), 7.0), torch.ones(1)):
        assert (standardised(alike) == 0).all()
