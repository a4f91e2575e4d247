"""Counts of kept units: LLM-Pruner's own rule gives the published sizes; budgets are met and used."""

import pytest
import torch
import yaml
from transformers import LlamaConfig

from qpruner import recipe
from qpruner import shape as shaping
from qpruner.decide import widths
from qpruner.errors import BudgetError, RecipeError
from qpruner.model import cost, load
from qpruner.model.check import check_kept

LLAMA_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, tie_word_embeddings=False, dtype="float16", architectures=["LlamaForCausalLM"],
)  # fmt: skip


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory) -> shaping.Shape:
    """From a config.json alone: no weights anywhere."""
    folder = tmp_path_factory.mktemp("llama-7b")
    LLAMA_7B.save_pretrained(folder)
    return shaping.shape_of(load.inspect_source(folder / "config.json"))


def parameters_after(shape: shaping.Shape, counts: widths.Counts, chosen: recipe.Recipe) -> int:
    return cost.parameter_count(shape.stored(shape.plan(chosen, widths.first_units(shape.graph, counts), 16)))


@pytest.mark.parametrize("name, parameters", [("llm-pruner-20", 5_422_977_024), ("llm-pruner-50", 3_350_188_032)])
def test_the_published_recipes_give_the_published_sizes(llama_7b, name, parameters):
    chosen = recipe.load(name)
    counts = shaping.widths_for(llama_7b, chosen, llama_7b.source.bytes_16bit)
    assert parameters_after(llama_7b, counts, chosen) == parameters


def test_a_7b_at_four_bits_weighs_what_a_person_would_expect(llama_7b):
    chosen = recipe.load("qpruner[kept=1.0,adapter_rank=0]")
    plan = llama_7b.plan(chosen, widths.first_units(llama_7b.graph, widths.counts(llama_7b.graph, chosen, 1.0)), 4)
    assert llama_7b.size(plan).linears == 32 * 202_375_168 * 17 // 32  # half a byte, and a 2-byte scale for 64 weights


@pytest.fixture(scope="module")
def bundled() -> shaping.Shape:
    return shaping.shape_of(load.inspect_source("pystdlib-5M"))


@pytest.mark.parametrize("percent", [25, 30, 40, 50, 60])
def test_a_larger_budget_never_keeps_less(bundled, percent):
    chosen = recipe.load("qpruner")
    limits = [bundled.source.bytes_16bit * p // 100 for p in (percent, percent + 5)]
    less, more = (shaping.widths_for(bundled, chosen, limit) for limit in limits)
    assert all(less[name] <= more[name] for name in less)
    assert bundled.size(bundled.plan(chosen, widths.first_units(bundled.graph, less), 4)).total <= limits[0]


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


def test_the_best_units_stay_and_ties_go_to_the_first(bundled):
    name, scores = "model.layers.0.self_attn", torch.tensor([0.5, 2.0, 0.5, 1.0])
    assert bundled.graph.groups[name].n_units == 4
    assert widths.select(bundled.graph, {name: scores}, {name: 3}) == {name: (0, 1, 3)}


def test_the_best_units_of_every_block_stay(bundled):
    name = "model.layers.0.self_attn.query_heads"
    assert bundled.graph.groups[name].n_blocks == 4 and bundled.graph.groups[name].n_units == 8
    scores = {name: torch.tensor([0.0, 1.0, 9.0, 8.0, 3.0, 3.0, 0.0, 0.5])}
    assert widths.select(bundled.graph, scores, {name: 4}) == {name: (1, 2, 4, 7)}


def test_what_a_recipe_does_not_name_stays_whole(bundled, llama_7b):
    graph = bundled.graph
    for units in (("kv_group",), ("query_head", "channel"), ("channel",)):
        counts = widths.counts(graph, recipe.load("qpruner").but({"units": units}), 0.3)
        cut = {graph.groups[name].kind for name, n in counts.items() if n < graph.groups[name].n_units}
        assert cut == set(units)
    with pytest.raises(
        RecipeError, match="kind 'query_head', and the model has none: no key/value head of it is shared"
    ):
        widths.counts(llama_7b.graph, recipe.load("qpruner[units=[query_head]]"), 0.3)
    for units in ("[]", "[channel,channel]", "[neuron]"):
        with pytest.raises(RecipeError, match="units"):
            recipe.load(f"qpruner[units={units}]")


# --- scope: global ---------------------------------------------------------------------------------------------------

EVERYWHERE = "qpruner[scope=global,mean_bits=16,bits=[16],adapter_rank=0,kept=1.0,protect_first=0,protect_last=0]"
ALL_KINDS = {"units": ("kv_group", "query_head", "channel")}


def random_scores(graph, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(g.n_units, generator=generator) for name, g in graph.groups.items()}


def chosen(shape, recipe_, scores, percent: float) -> widths.Kept:
    sizes = shaping.stored_sizes(shape, recipe_)
    return widths.choose(shape.graph, recipe_, scores, {}, sizes, shape.source.bytes_16bit * percent / 100)


@pytest.mark.parametrize("units", [("channel",), ("kv_group", "query_head", "channel")])
def test_a_larger_budget_keeps_all_that_a_smaller_one_keeps_and_fills_itself(bundled, units):
    everywhere, scores, less = recipe.load(EVERYWHERE).but({"units": units}), random_scores(bundled.graph), None
    for percent in (45, 75, 95):
        kept = chosen(bundled, everywhere, scores, percent)
        check_kept(bundled.graph, kept)
        limit = bundled.source.bytes_16bit * percent / 100
        assert 0.97 * limit < bundled.size(bundled.plan(everywhere, kept, 16)).total <= limit
        assert less is None or all(set(less[name]) <= set(kept[name]) for name in kept)
        less = kept


def test_everything_stays_where_the_budget_allows_it_and_what_is_protected_always(bundled):
    whole = {name: tuple(range(g.n_units)) for name, g in bundled.graph.groups.items()}
    everywhere = recipe.load(EVERYWHERE).but(ALL_KINDS)
    assert chosen(bundled, everywhere, random_scores(bundled.graph), 105) == whole
    protected = chosen(
        bundled, everywhere.but({"protect_first": 0.2, "protect_last": 0.1}), random_scores(bundled.graph), 80
    )
    cut = {bundled.graph.groups[name].layer for name, units in protected.items() if units != whole[name]}
    assert cut == {2, 3, 4}
    own = chosen(bundled, everywhere.but({"kept_per_layer": {1: 0.5}}), random_scores(bundled.graph), 105)
    assert {name for name in whole if own[name] != whole[name]} == {
        n for n, g in bundled.graph.groups.items() if g.layer == 1
    }


def test_equal_scores_per_byte_are_pruned_evenly_as_with_one_fraction_for_all(bundled):
    for units, step in ((("channel",), 64), (("kv_group",), 1)):
        everywhere = recipe.load(EVERYWHERE).but({"units": units})
        scores = {name: torch.full((g.n_units,), 0.1) for name, g in bundled.graph.groups.items()}
        for percent in (85, 95):
            kept = chosen(bundled, everywhere, scores, percent)
            even = shaping.widths_for(bundled, everywhere, int(bundled.source.bytes_16bit * percent / 100))
            assert all(abs(len(kept[name]) - n) <= step for name, n in even.items())
            widths_ = [len(kept[n]) for n, g in bundled.graph.groups.items() if g.kind in units]
            assert max(widths_) - min(widths_) <= step


def test_a_head_is_not_worth_one_channel(bundled):
    """Of equal scores the unit with more bytes goes first; of unequal ones that with the lower score per byte."""
    everywhere = recipe.load(EVERYWHERE)
    graph = bundled.graph
    equal = {name: torch.ones(g.n_units) for name, g in graph.groups.items()}
    kept = chosen(bundled, everywhere, equal, 90)
    assert {g.kind for n, g in graph.groups.items() if len(kept[n]) < g.n_units} == {"kv_group"}
    size = shaping.stored_sizes(bundled, everywhere)[0]
    widest, narrowest = (widths.counts(graph, everywhere, f) for f in (1.0, 0.0))
    weight = widths.unit_bytes(graph, widest, narrowest, size)
    a, b = weight["model.layers.0.self_attn"], weight["model.layers.0.mlp"]
    d = graph.linears["model.layers.0.self_attn.q_proj"]
    assert b == pytest.approx(3 * 2 * d.d_in, rel=0.01) and a == pytest.approx(2 * 6 * d.d_in * d.d_out / 8, rel=0.01)
    for factor, first in ((0.9, "kv_group"), (1.1, "channel")):
        worth = {"kv_group": factor * a, "channel": b}
        kept = chosen(bundled, everywhere, {n: s * worth.get(graph.groups[n].kind, 0) for n, s in equal.items()}, 95)
        assert {g.kind for n, g in graph.groups.items() if len(kept[n]) < g.n_units} == {first}


def test_by_the_bare_score_the_lowest_go_whatever_they_weigh(bundled):
    """Scores may be negative; a head stays before a channel that scores less, though it weighs as much as many."""
    bare = recipe.load(EVERYWHERE).but({"worth": "score", "width_grid": 1})
    generator = torch.Generator().manual_seed(2)
    scores = {n: torch.randn(g.n_units, generator=generator) for n, g in bundled.graph.groups.items()}
    competing = [n for n, g in bundled.graph.groups.items() if g.kind in bare.units]
    less = None
    for percent in (55, 75, 95):
        kept, limit = chosen(bundled, bare, scores, percent), bundled.source.bytes_16bit * percent / 100
        check_kept(bundled.graph, kept)
        assert 0.97 * limit < bundled.size(bundled.plan(bare, kept, 16)).total <= limit
        gone = [float(scores[n][u]) for n in competing for u in range(len(scores[n])) if u not in kept[n]]
        left = [float(scores[n][u]) for n in competing for u in kept[n] if len(kept[n]) > 1]
        assert max(gone) < min(left)
        assert less is None or all(set(less[name]) <= set(kept[name]) for name in kept)
        less = kept
    shifted = chosen(bundled, bare, {name: s - 10 for name, s in scores.items()}, 75)
    assert shifted == chosen(bundled, bare, scores, 75)


def test_groups_of_one_unit_and_groups_of_equals_can_compete(bundled):
    bare = recipe.load(EVERYWHERE).but({"worth": "score", "width_grid": 1})
    for value in (0.0, -1.0):
        scores = {name: torch.full((g.n_units,), value) for name, g in bundled.graph.groups.items()}
        kept = chosen(bundled, bare, scores, 80)
        fractions = [len(kept[n]) / g.n_units for n, g in bundled.graph.groups.items() if g.kind in bare.units]
        assert max(fractions) - min(fractions) <= 0.25  # a step of the coarsest group: equals go evenly


def test_units_in_another_order_are_chosen_in_that_order(bundled):
    everywhere, scores = recipe.load(EVERYWHERE).but({"units": ("kv_group", "channel")}), random_scores(bundled.graph)
    generator = torch.Generator().manual_seed(1)
    order = {name: torch.randperm(len(s), generator=generator) for name, s in scores.items()}
    kept = chosen(bundled, everywhere, scores, 60)
    moved = chosen(bundled, everywhere, {name: s[order[name]] for name, s in scores.items()}, 60)
    for name in kept:
        if bundled.graph.groups[name].kind in everywhere.units:
            assert sorted(order[name][list(moved[name])].tolist()) == list(kept[name])


def test_the_lots_of_a_group_are_steps_of_the_grid_the_worst_first(bundled):
    group = bundled.graph.groups["model.layers.0.mlp"]
    scores = torch.arange(group.n_units).float()
    lots = widths.lots_of(group, recipe.load("qpruner[width_grid=300]"), scores, 300, {group.name: 2.0})
    n = group.n_units
    assert [lot.left for lot in lots] == [left for left in range(300 * ((n - 1) // 300), 0, -300)]
    assert lots[1].worth == pytest.approx((n - lots[0].left + 299 / 2 + 0) / 2)
    assert [lot.worth for lot in lots] == sorted(lot.worth for lot in lots)


def test_kept_is_a_fraction_of_the_bytes_that_compete(bundled):
    everywhere = recipe.load(EVERYWHERE).but({"units": ("channel",), "kept": 0.5, "width_grid": 1})
    for shrink in (True, False):
        kept = chosen(bundled, everywhere.but({"shrink_to_fit": shrink}), random_scores(bundled.graph), 105)
        mlps = [name for name, g in bundled.graph.groups.items() if g.kind == "channel"]
        half = sum(bundled.graph.groups[n].n_units for n in mlps) // 2
        assert half - 1 <= sum(len(kept[n]) for n in mlps) <= half
    with pytest.raises(BudgetError, match="leaves more than .* Give a smaller `kept`"):
        chosen(bundled, everywhere.but({"shrink_to_fit": False}), random_scores(bundled.graph), 30)
    with pytest.raises(RecipeError, match="llm-pruner counts the units of each layer, which scope global does not"):
        recipe.load("llm-pruner-20[scope=global]")


def test_the_layers_that_are_worth_least_go_and_protected_ones_stay(bundled):
    fewer = recipe.load("qpruner[layers_kept=0.6]")  # of six, of which the first and the last are protected
    worth = [0.0, 3.0, 1.0, 2.0, 1.0, 0.0]
    assert widths.keep_layers(bundled.graph, fewer, worth) == (0, 1, 3, 5)
    assert widths.keep_layers(bundled.graph, fewer, [0.0] * 6) == (0, 1, 2, 5)
    assert widths.keep_layers(bundled.graph, fewer, worth, 3) == (0, 1, 5)
    assert widths.keep_layers(bundled.graph, recipe.load("qpruner"), worth) is None
    with pytest.raises(RecipeError, match="keeps 1 of 6 decoder layers and protects 2"):
        widths.keep_layers(bundled.graph, recipe.load("qpruner[layers_kept=0.1]"), worth)
    for how in ("layers_kept=0.5", "fit_by=depth"):
        with pytest.raises(RecipeError, match=f"which {how.split('=')[0]}.* numbers anew"):
            recipe.load(f"qpruner[{how},kept_per_layer={{1: 0.5}}]")


def test_the_worth_of_a_layer_is_that_of_its_weights_each_counted_once(bundled):
    worth = [0.0, 3.0, 1.0, 2.0, 1.0, 0.0]
    scores = {n: torch.full((g.n_units,), worth[g.layer] / g.n_units) for n, g in bundled.graph.groups.items()}
    heads = {n: 100 + s if bundled.graph.groups[n].kind == "query_head" else s for n, s in scores.items()}
    for given in (scores, heads):
        assert widths.layer_worth(bundled.graph, given) == pytest.approx([2 * w for w in worth])


# --- fit_by: depth ---------------------------------------------------------------------------------------------------

DEPTH = "shortgpt[steps=0,adapter_rank=0]"


@pytest.mark.parametrize(
    "changes", ["kept=1.0", "kept=0.5,width_grid=1", "protect_first=0.3", "bits=[4,8],mean_bits=6"]
)
@pytest.mark.parametrize("percent", [45, 60, 80, 105])
def test_as_many_layers_stay_as_fit(bundled, changes, percent):
    by_depth, limit = recipe.load(DEPTH).but(recipe.changes_of(changes)), bundled.source.bytes_16bit * percent // 100
    worth = [5.0, 1.0, 4.0, 0.0, 3.0, 2.0]
    layers = shaping.layers_for(bundled, by_depth, limit, worth) or tuple(range(6))

    def fits(layers) -> bool:
        short = bundled.of_layers(layers)
        kept = widths.first_units(short.graph, widths.counts(short.graph, by_depth, by_depth.kept))
        return shaping.stored_sizes(short, by_depth)[0](kept) <= limit

    assert fits(layers)
    assert len(layers) == 6 or not fits(widths.keep_layers(bundled.graph, by_depth, worth, len(layers) + 1))
    whole = shaping.widths_for(bundled.of_layers(layers), by_depth, limit)
    assert whole == widths.counts(bundled.of_layers(layers).graph, by_depth, by_depth.kept)


def test_the_best_layers_stay_whatever_the_number(bundled):
    by_depth, worth, less = recipe.load(DEPTH), [5.0, 1.0, 4.0, 0.0, 3.0, 2.0], set()
    for percent in (35, 60, 80, 105):
        layers = shaping.layers_for(bundled, by_depth, bundled.source.bytes_16bit * percent // 100, worth)
        assert less <= set(layers or range(6))
        less = set(layers or range(6))
    assert less == set(range(6))


def test_a_budget_below_one_layer_is_refused_with_numbers(bundled):
    for changes, fewest in (("{}", 1), ("{protect_first: 0.5}", 3)):
        by_depth = recipe.load(DEPTH).but(yaml.safe_load(changes))
        with pytest.raises(BudgetError, match=rf"[\d,]+ are stored with {fewest} of 6 decoder layers"):
            shaping.layers_for(bundled, by_depth, bundled.source.bytes_16bit // 10, [0.0] * 6)
    with pytest.raises(RecipeError, match="finds the number of layers that layers_kept would set"):
        recipe.load("shortgpt[layers_kept=0.5]")


def test_a_shorter_shape_is_that_of_the_shorter_model(bundled):
    fewer = bundled.of_layers((0, 2, 5))
    whole = fewer.size(fewer.plan(recipe.load("qpruner"), widths.first_units(fewer.graph, whole_counts(fewer)), 16))
    layers = cost.parameter_count({n: t for n, t in bundled.tensors.items() if n.startswith("model.layers.")})
    assert cost.parameter_count(fewer.tensors) == bundled.source.parameters - layers // 2
    assert (
        whole.linears
        == bundled.size(
            bundled.plan(recipe.load("qpruner"), widths.first_units(bundled.graph, whole_counts(bundled)), 16)
        ).linears
        // 2
    )


def whole_counts(shape) -> widths.Counts:
    return {name: group.n_units for name, group in shape.graph.groups.items()}
