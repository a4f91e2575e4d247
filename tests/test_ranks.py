"""Ranks of adapters: more where more was cut, in no more bytes than the same for all."""

import itertools
import random

import pytest
from tiny import tiny

from qpruner import recipe
from qpruner.decide.draft import draft
from qpruner.decide.ranks import by_cut, most, numbers, uniform
from qpruner.model import cost
from qpruner.model.discover import discover
from qpruner.plan import Format


def problem(seed: int) -> tuple[int, dict, dict]:
    draw = random.Random(seed)
    shapes = {f"l{i}": (draw.choice([96, 256, 1024]), draw.choice([96, 256, 1024])) for i in range(12)}
    return draw.choice([1, 3, 8]), shapes, {name: draw.choice([0.0, 0.2, 0.5, 0.75, 0.9]) for name in shapes}


@pytest.mark.parametrize("seed", range(20))
def test_a_deeper_cut_never_gets_less_and_nothing_takes_more_room(seed):
    asked, shapes, gone = problem(seed)
    ranks, plain = by_cut(asked, shapes, gone), uniform(asked, shapes)
    assert ranks.keys() == shapes.keys()
    assert all(1 <= ranks[name] <= most(dims) for name, dims in shapes.items())
    for a, b in itertools.permutations(shapes, 2):
        if shapes[a] == shapes[b] and gone[a] > gone[b]:
            assert ranks[a] >= ranks[b]
    assert numbers(ranks, shapes) <= numbers(plain, shapes)
    room = numbers(plain, shapes) - numbers(ranks, shapes)
    assert all(sum(dims) > room for name, dims in shapes.items() if ranks[name] < most(dims))  # none is left over


def test_ranks_follow_what_is_gone():
    shapes = dict.fromkeys("abcd", (1024, 1024))
    assert by_cut(8, shapes, dict(a=0.25, b=0.25, c=0.75, d=0.75)) == dict(a=4, b=4, c=12, d=12)
    assert by_cut(8, shapes, dict.fromkeys("abcd", 0.5)) == uniform(8, shapes)
    assert by_cut(8, shapes, dict.fromkeys("abcd", 0.0)) == uniform(8, shapes)


def planned(graph, changes: str, bits: list[int], kept: float = 1.0):
    names = list(graph.linears)
    how = f"qpruner[allocation=mutual-information,adapter_rank=2,{changes or 'rank_by=cut'}]"
    return draft(
        graph, recipe.load(how), model_name="m", model_digest="d", hidden_size=128,
        kept={n: range(max(1, int(kept * g.n_units))) for n, g in graph.groups.items()}, seed=0,
        specs={name: Format().spec(bits[i % len(bits)]) for i, name in enumerate(names)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def graph():
    sizes = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4, head_dim=64)
    return discover(tiny("llama", **sizes))


@pytest.mark.parametrize("bits", [[4], [2, 8], [3, 4, 16]])
def test_the_file_is_never_larger_than_with_one_rank_for_all(graph, bits):
    cut, plain = planned(graph, "", bits), planned(graph, "rank_by=uniform", bits)
    size = lambda plan: cost.safetensors_size(cost.adapter_tensors(graph, plan))
    assert size(cut) <= size(plain)
    assert (cut.adapter_ranks == plain.adapter_ranks) == (len(bits) == 1)


def test_where_bits_are_tried_with_adapters_beside_them_widths_alone_count(graph):
    ranks = lambda bits: planned(graph, "allocation=bayesian,bits=[2,8],rank_by=cut", bits, kept=0.5).adapter_ranks
    assert ranks([2, 8]) == ranks([8, 2]) == ranks([16])
    assert planned(graph, "", [2, 8]).adapter_ranks != planned(graph, "", [8, 2]).adapter_ranks


def test_16_bits_take_adapters_in(graph):
    adapters = lambda bits: planned(graph, f"adapters=best,steps=4,bits={bits}", bits).adapters
    assert adapters([16]) == "merged" and adapters([4, 16]) == "beside"
