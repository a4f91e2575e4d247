"""Candidates: made from name and seed alone, swapped without a trace, better than plain rounding."""

import pytest
import torch
from tiny import tiny

from qpruner import recipe
from qpruner.decide.draft import draft
from qpruner.do.quantize import Candidates
from qpruner.model.discover import discover
from qpruner.plan import Format

IDS = torch.arange(3, 23)[None]


def candidates(family="llama", rank=2, seed=0):
    model = tiny(family, dtype=torch.float32)
    graph = discover(model)
    plan = draft(
        graph, recipe.load(f"qpruner[adapter_rank={rank}]"), model_name="m", model_digest="d", hidden_size=16,
        kept={n: range(g.n_units) for n, g in graph.groups.items()},
        specs=dict.fromkeys(graph.linears, Format().spec(16)), seed=seed,
    )  # fmt: skip
    return model, graph, Candidates(model, graph, plan, adapter_dtype=torch.bfloat16)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_way_there_and_back_leaves_no_trace(family, rank):
    model, graph, made = candidates(family, rank)
    dense = logits(model)
    specs = lambda bits: dict.fromkeys(graph.linears, Format().spec(bits))
    made.put_(specs(4))
    four = logits(model)
    made.put_(specs(8))
    assert (logits(model) - dense).abs().max() < (four - dense).abs().max()
    made.put_(specs(4))
    assert torch.equal(logits(model), four)
    made.put_(specs(16))
    torch.testing.assert_close(logits(model), dense)


def test_the_order_of_asking_does_not_matter():
    one, graph, first = candidates()
    two, _, second = candidates()
    names = list(graph.linears)
    mixture = {name: Format().spec(4 if i % 2 else 8) for i, name in enumerate(names)}
    first.put_(mixture)
    for name in reversed(names):
        second.candidate(name, Format().spec(8))
        second.candidate(name, Format().spec(4))
    second.put_(mixture)
    assert torch.equal(logits(one), logits(two))


def test_loftq_is_below_plain_rounding_for_every_linear():
    _, graph, made = candidates()
    for bits in (4, 8):
        made.put_(dict.fromkeys(graph.linears, Format().spec(bits)))
        errors = made.errors()
        assert set(errors) == set(graph.linears)
        assert all(with_adapter < plain for plain, with_adapter in errors.values())


def test_only_adapters_are_trained():
    model, _, _ = candidates()
    assert all(("lora_" in name) == p.requires_grad for name, p in model.named_parameters())
