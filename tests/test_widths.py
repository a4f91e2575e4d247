"""Counts of kept units: LLM-Pruner's own rule gives the published sizes; budgets are met and used."""

import pytest
import torch
from transformers import LlamaConfig

from qpruner import prepare, recipe
from qpruner.decide import widths
from qpruner.errors import RecipeError
from qpruner.model import cost, load

LLAMA_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, tie_word_embeddings=False, dtype="float16", architectures=["LlamaForCausalLM"],
)  # fmt: skip


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory) -> prepare.Shape:
    """From a config.json alone: no weights anywhere."""
    folder = tmp_path_factory.mktemp("llama-7b")
    LLAMA_7B.save_pretrained(folder)
    return prepare.shape_of(load.inspect_source(folder / "config.json"))


def parameters_after(shape: prepare.Shape, counts: widths.Counts, chosen: recipe.Recipe) -> int:
    return cost.parameter_count(shape.stored(shape.plan(chosen, widths.first_units(counts), 16)))


@pytest.mark.parametrize("name, parameters", [("llm-pruner-20", 5_422_977_024), ("llm-pruner-50", 3_350_188_032)])
def test_the_published_recipes_give_the_published_sizes(llama_7b, name, parameters):
    chosen = recipe.load(name)
    counts = prepare.widths_for(llama_7b, chosen, llama_7b.source.bytes_16bit)
    assert parameters_after(llama_7b, counts, chosen) == parameters


def test_a_7b_at_four_bits_weighs_what_a_person_would_expect(llama_7b):
    chosen = recipe.load("qpruner[kept=1.0,adapter_rank=0]")
    plan = llama_7b.plan(chosen, widths.first_units(widths.counts(llama_7b.graph, chosen, 1.0)), 4)
    assert llama_7b.size(plan).linears == 32 * 202_375_168 * 17 // 32  # half a byte, and a 2-byte scale for 64 weights


@pytest.fixture(scope="module")
def bundled() -> prepare.Shape:
    return prepare.shape_of(load.inspect_source("pystdlib-5M"))


@pytest.mark.parametrize("percent", [25, 30, 40, 50, 60])
def test_a_larger_budget_never_keeps_less(bundled, percent):
    chosen = recipe.load("qpruner")
    limits = [bundled.source.bytes_16bit * p // 100 for p in (percent, percent + 5)]
    less, more = (prepare.widths_for(bundled, chosen, limit) for limit in limits)
    assert all(less[name] <= more[name] for name in less)
    assert bundled.size(bundled.plan(chosen, widths.first_units(less), 4)).total <= limits[0]


def test_widths_are_on_the_grid(bundled):
    chosen = recipe.load("qpruner[width_grid=96]")
    for fraction in (0.0, 0.3, 0.77, 1.0):
        counts = widths.counts(bundled.graph, chosen, fraction)
        assert all(n % 96 == 0 for name, n in counts.items() if bundled.graph.groups[name].kind == "channel")
        assert all(n >= 1 for n in counts.values())


def test_single_layers_can_have_their_own_width(bundled):
    chosen = recipe.load("qpruner[kept_per_layer={0: 0.5},width_grid=1]")
    counts = widths.counts(bundled.graph, chosen, 0.75)
    assert counts["model.layers.0.mlp"] == 384 and counts["model.layers.5.mlp"] == 768
    with pytest.raises(RecipeError, match="names layer 9; the model has layers 0 to 5"):
        widths.counts(bundled.graph, recipe.load("qpruner[kept_per_layer={9: 0.5}]"), 0.75)


def test_the_best_units_stay_and_ties_go_to_the_first():
    scores = {"g": torch.tensor([0.5, 2.0, 0.5, 1.0])}
    assert widths.select(scores, {"g": 3}) == {"g": (0, 1, 3)}
