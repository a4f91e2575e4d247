"""Mutual information of units, measured through hooks on a model."""

import pytest
import torch
from tiny import tiny
from tiny_stream import streamed

from qpruner.decide.information import bit_units, measure_information
from qpruner.model.discover import discover
from qpruner.model.scratch import Scratch

WINDOWS = torch.randint(3, 29, (12, 40), generator=torch.Generator().manual_seed(0))


def measured(model, graph, kind="projection", estimator="gaussian"):
    units = bit_units(graph, kind)
    return measure_information(
        streamed(model), units, WINDOWS, estimator=estimator, seed=0, scratch=Scratch(), on_layer=None
    )


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3", "bloom"])
@pytest.mark.parametrize("kind", ["layer", "projection"])
def test_every_linear_is_in_exactly_one_unit_and_every_unit_is_measured(family, kind):
    model = tiny(family)
    graph = discover(model)
    units = bit_units(graph, kind)
    assert sorted(n for u in units for n in u.linears) == sorted(graph.linears)
    rows = measured(model, graph, kind)
    assert [row["unit"] for row in rows] == [u.name for u in units]
    assert all(row["nats"] >= 0 for row in rows)
    assert len({row["nats"] for row in rows}) == len(rows)


@pytest.mark.parametrize("estimator", ["gaussian", "binned"])
def test_a_layer_that_adds_nothing_tells_nothing(estimator):
    model = tiny("llama")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.get_submodule(f"model.layers.0.{name}").weight.data.zero_()
    rows = measured(model, discover(model), "layer", estimator)
    assert rows[0]["nats"] == 0 and abs(rows[0]["z"]) < 2
    assert rows[1]["z"] > 2


def test_the_same_seed_gives_the_same_numbers():
    model = tiny("llama")
    graph = discover(model)
    assert measured(model, graph) == measured(model, graph)
