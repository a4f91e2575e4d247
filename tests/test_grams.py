"""Gram matrices in one batch, in many, and layer by layer from disk."""

import pytest
import torch
from tiny import tiny
from tiny_stream import streamed

from qpruner.decide.columns import mean_squares
from qpruner.decide.grams import measure_grams
from qpruner.math.gram import add_gram_
from qpruner.model.discover import discover
from qpruner.model.scratch import Scratch

IDS = torch.randint(2, 61, (6, 10), generator=torch.Generator().manual_seed(0))


def test_batches_add_up_to_one_batch(rand):
    X = rand(40, 7)
    G = torch.zeros(7, 7, dtype=torch.float64)
    for part in X.split(9):
        add_gram_(G, part)
    torch.testing.assert_close(G, X.T @ X)
    assert (torch.linalg.eigvalsh(G) > -1e-12).all()


def test_mean_squares_of_inputs_are_the_diagonals():
    model = tiny("llama")
    graph = discover(model)
    grams = measure_grams(streamed(model), graph, graph.linears, IDS, scratch=Scratch())
    squares = mean_squares(streamed(model), IDS)
    assert squares.keys() == graph.linears.keys()
    for layer in grams:
        for name, G in layer.items():
            torch.testing.assert_close(squares[name], G.diagonal() / IDS.numel())


def test_products_of_half_precision_inputs_do_not_overflow():
    G = torch.zeros(2, 2, dtype=torch.float64)
    add_gram_(G, torch.full((100, 2), 300, dtype=torch.float16))
    assert (G == 100 * 300**2).all()


@pytest.mark.parametrize("batch_size", [1, 4, 6])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_streamed_gram_is_that_of_the_whole_model(family, batch_size, tmp_path):
    model = tiny(family)
    graph = discover(model)
    names = [n for g in graph.groups.values() if g.kind in ("kv_group", "channel") for n in g.consumers]
    inputs = {}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].flatten(0, -2)))
    with torch.no_grad():
        model(IDS)
    scratch = Scratch(tmp_path / "grams")
    results = measure_grams(streamed(model), graph, names, IDS, scratch=scratch, batch_size=batch_size)
    found = {name: G for layer in results for name, G in layer.items()}
    assert sorted(found) == sorted(names)
    for name, X in inputs.items():
        torch.testing.assert_close(found[name], X.T @ X)
