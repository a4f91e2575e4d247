import copy
import pickle
from dataclasses import replace

import pytest
import torch
from tiny import TINY, tiny, tiny_config
from transformers import LlamaConfig

from qpruner.errors import ModelError, PlanError
from qpruner.model.check import check_kept, check_plan
from qpruner.model.discover import discover
from qpruner.model.skeleton import build_skeleton
from qpruner.model.surgery import narrow_, remaining
from qpruner.plan import DENSE, Plan
from qpruner.testing import random_kept, zeroed

# Beyond the families of TINY, what differs in how values per head, heads or channels are handed around.
CASES = [
    *((family, {}) for family in TINY),
    ("falcon", dict(multi_query=False, alibi=True, parallel_attn=False, bias=True, num_kv_heads=4)),
    ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2)),
    ("gemma2", dict(head_dim=8)),
    ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2, num_attention_heads=6, alibi=True, hidden_size=36)),
    ("falcon", dict(multi_query=True)),
    ("gpt_bigcode", dict(n_embd=24, n_layer=3, n_head=4, multi_query=True)),
    ("gptj", dict(n_embd=24, n_layer=3, n_head=4, rotary_dim=2)),
    ("olmo2", {}),
    ("codegen", dict(hidden_size=32, num_attention_heads=8, rotary_dim=2)),
    ("mixtral", dict(num_local_experts=3, num_experts_per_tok=2)),
    ("gpt_oss", dict(num_local_experts=3, num_experts_per_tok=2, head_dim=8)),
]
# These multiply queries with keys in float32 whatever the model's dtype, where another order of the same sum moves the
# last of 24 bits; on some processors narrower matrices are summed in another order.
IN_FLOAT32 = {"gptj", "codegen"}


def bound(family: str, exact: float) -> dict[str, float]:
    return dict.fromkeys(("rtol", "atol"), 1e-5 if family in IN_FLOAT32 else exact)


def everything(graph) -> dict[str, range]:
    return {name: range(g.n_units) for name, g in graph.groups.items()}


def left(graph, kept) -> dict[str, int]:
    """Units of a narrowed model: query heads go with their kv group; one that is alone in it is no unit."""
    counts = {name: len(units) for name, units in kept.items()}
    for name, g in graph.groups.items():
        if g.kind == "query_head":
            per_group = counts.pop(name) // g.n_blocks
            if per_group > 1:
                counts[name] = per_group * counts[name.removesuffix(".query_heads")]
    return counts


def narrowed(model, graph, kept):
    model = copy.deepcopy(model)
    narrow_(model, graph, kept)
    return model


@pytest.fixture
def ids():
    return torch.randint(2, 61, (2, 9), generator=torch.Generator().manual_seed(1))


def continued(model, ids, **options):
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None,
        output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return torch.stack(out.logits)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family, over", CASES)
def test_removing_a_unit_is_zeroing_it(family, over, seed, ids):
    model = tiny(family, **over)
    graph = discover(model)
    kept = random_kept(graph, seed)
    small, reference = narrowed(model, graph, kept), zeroed(model, graph, kept)
    assert small.num_parameters() < model.num_parameters()
    with torch.no_grad():
        expected = reference(ids).logits
        torch.testing.assert_close(small(ids).logits, expected, **bound(family, 1e-12))
        assert (model(ids).logits - expected).abs().max() > 1e-3
        padding = torch.ones_like(ids)
        padding[0, -3:] = 0
        torch.testing.assert_close(
            small(ids, attention_mask=padding).logits, reference(ids, attention_mask=padding).logits,
            **bound(family, 1e-12),
        )  # fmt: skip


@pytest.mark.parametrize("family, over", CASES)
def test_a_narrowed_model_generates_with_and_without_a_cache(family, over, ids):
    model = tiny(family, **over)
    graph = discover(model)
    kept = random_kept(graph, 2)
    small = narrowed(model, graph, kept)
    with_cache = continued(small, ids)
    torch.testing.assert_close(with_cache, continued(small, ids, use_cache=False), **bound(family, 1e-6))
    torch.testing.assert_close(with_cache, continued(zeroed(model, graph, kept), ids), **bound(family, 1e-9))


@pytest.mark.parametrize("family, over", CASES)
def test_keeping_everything_leaves_everything_as_it_is(family, over, ids):
    model = tiny(family, **over)
    expected = model(ids).logits
    parameters, modules = dict(model.named_parameters()), {n: dict(vars(m)) for n, m in model.named_modules()}
    graph = discover(model)
    narrow_(model, graph, everything(graph))
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(vars(m) == modules[name] for name, m in model.named_modules())
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("family, over", CASES)
def test_a_narrowed_model_is_discovered_copied_pickled_and_rebuilt_on_meta(family, over, ids):
    model = tiny(family, **over)
    graph = discover(model)
    kept = random_kept(graph, 3)
    small = narrowed(model, graph, kept)
    again = discover(small)
    assert {name: g.n_units for name, g in again.groups.items()} == left(graph, kept)
    expected = small(ids).logits
    assert torch.equal(copy.deepcopy(small)(ids).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(small))(ids).logits, expected)
    skeleton = build_skeleton(tiny_config(family, **over))
    skeleton.config._experts_implementation = model.config._experts_implementation
    narrow_(skeleton, discover(skeleton), kept)
    skeleton.load_state_dict(small.state_dict(), assign=True)
    skeleton.to(torch.float64).tie_weights()
    torch.testing.assert_close(skeleton(ids).logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "bloom", "phi3"])
def test_cutting_twice_is_cutting_once(family, ids):
    heads = dict(num_attention_heads=18, num_key_value_heads=6, head_dim=4, hidden_size=36)
    model = tiny(family, **(dict(n_head=6) if family == "bloom" else heads))
    graph = discover(model)
    first, half, both = {}, {}, {}
    for name, g in graph.groups.items():
        if g.kind == "query_head":  # 0 and 2 of the three in every kv group, and then 2 alone; one kv group went
            first[name] = [u for u in range(18) if u % 3 != 1]
            half[name], both[name] = range(1, 10, 2), range(2, 18, 3)
        elif g.kind == "residual":
            first[name] = half[name] = both[name] = range(g.n_units)
        else:  # units 1, 3, 4, ... of the original
            first[name], half[name] = range(1, g.n_units), [0, *range(2, g.n_units - 1)]
            both[name] = [first[name][u] for u in half[name]]
    twice = narrowed(model, graph, first)
    narrow_(twice, discover(twice), half)
    once = narrowed(model, graph, both)
    assert torch.equal(twice(ids).logits, once(ids).logits)


def test_every_unit_but_its_own_is_unaffected_by_a_cut():
    model = tiny("llama")
    graph = discover(model)
    kept = everything(graph) | {"model.layers.1.mlp": [0, 2, 39], "model.layers.2.self_attn": [1]}
    cuts = {name: (rows.tolist(), columns.tolist()) for name, (rows, columns) in remaining(graph, kept).items()}
    mlp, attention, hidden = "model.layers.1.mlp", "model.layers.2.self_attn", list(range(24))
    assert cuts == {
        f"{mlp}.gate_proj": ([0, 2, 39], hidden),
        f"{mlp}.up_proj": ([0, 2, 39], hidden),
        f"{mlp}.down_proj": (hidden, [0, 2, 39]),
        f"{attention}.q_proj": (list(range(12, 24)), hidden),
        f"{attention}.k_proj": (list(range(6, 12)), hidden),
        f"{attention}.v_proj": (list(range(6, 12)), hidden),
        f"{attention}.o_proj": (hidden, list(range(12, 24))),
    }
    before = dict(model.named_parameters())
    narrow_(model, graph, kept)
    changed = {name.removesuffix(".weight") for name, p in model.named_parameters() if p is not before[name]}
    assert changed == cuts.keys()


@pytest.mark.parametrize("family", TINY)
def test_widths_and_counts_follow_and_the_configuration_stays(family):
    model = tiny(family)
    graph = discover(model)
    config = model.config.to_dict()
    kept = random_kept(graph, 4)
    for p in model.parameters():
        p.requires_grad_(False)
    narrow_(model, graph, kept)
    assert model.config.to_dict() == config
    assert not any(p.requires_grad for p in model.parameters())
    for name, site in graph.linears.items():
        module = model.get_submodule(name)
        d_out, d_in = (module.nf, module.nx) if site.transposed else (module.out_features, module.in_features)
        assert tuple(module.weight.shape) == ((d_in, d_out) if site.transposed else (d_out, d_in))
        assert module.bias is None or module.bias.shape == (d_out,)


def test_a_narrowed_layer_follows_later_changes_of_the_configuration(ids):
    model = tiny("phi3")
    graph = discover(model)
    narrow_(model, graph, everything(graph) | {"model.layers.0.self_attn": [1]})
    layer = model.model.layers[0].self_attn
    sdpa = model(ids).logits
    assert layer.config.num_attention_heads == 2 and model.config.num_attention_heads == 4
    model.set_attn_implementation("eager")
    assert layer.config._attn_implementation == "eager"
    torch.testing.assert_close(model(ids).logits, sdpa, rtol=1e-5, atol=1e-5)


# Sizes after pruning of two published configurations of LLaMA-7B, counted by hand from its 6 738 415 616 parameters.
@pytest.mark.parametrize(
    "layers, heads, channels, parameters",
    [
        (range(0), 32, 11008, 6_738_415_616),
        (range(4, 30), 24, 8256, 5_422_977_024),
        (range(3, 31), 13, 4403, 3_350_188_032),
    ],
)
def test_the_parameters_of_a_pruned_llama_7b(layers, heads, channels, parameters):
    model = build_skeleton(
        LlamaConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
        )
    )
    graph = discover(model)
    units = {"kv_group": range(heads), "channel": range(channels)}
    kept = everything(graph) | {n: units[g.kind] for n, g in graph.groups.items() if g.layer in layers}
    narrow_(model, graph, kept)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_model_that_is_not_the_one_of_the_graph_is_refused_untouched():
    model = tiny("llama")
    graph = discover(model)
    kept = random_kept(graph, 6)
    narrow_(model, graph, kept)
    before = dict(model.named_parameters())
    with pytest.raises(
        ModelError, match="'model.layers.0.self_attn.q_proj' is not the 24 x 24 linear layer of the graph"
    ):
        narrow_(model, graph, kept)
    assert all(p is before[name] for name, p in model.named_parameters())


@pytest.fixture(scope="module")
def graph():
    return discover(tiny("llama"))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"a": [0], "b": [0], "c": [0], "d": [0]},
            "names 4 group.s. the model does not have: 'a', 'b', 'c' and 1 more. Was",
        ),
        ({"model.layers.0.mlp": None}, "leaves out 1 group.s. of the model: 'model.layers.0.mlp'. Each needs its kept"),
        ({"model.layers.0.mlp": []}, "group 'model.layers.0.mlp': keeps no unit. At least one of its 40 has to stay"),
        ({"model.layers.0.mlp": [0, 40]}, "keeps unit.s. '40', but the units are numbered 0 to 39"),
        ({"model.layers.0.mlp": [-1, 3]}, "keeps unit.s. '-1', but the units are numbered 0 to 39"),
        ({"model.layers.0.mlp": [3, 2]}, "are not in ascending order, each once"),
        ({"model.layers.0.mlp": [3, 3]}, "are not in ascending order, each once"),
    ],
)
def test_kept_units_that_do_not_fit_the_graph_are_refused(graph, change, message):
    kept = {name: units for name, units in (everything(graph) | change).items() if units is not None}
    with pytest.raises(PlanError, match=message):
        check_kept(graph, kept)


def test_a_group_in_blocks_keeps_equally_many_in_every_block(graph):
    name = "model.layers.0.mlp"
    blocks = replace(graph, groups=graph.groups | {name: replace(graph.groups[name], n_blocks=4)})
    check_kept(blocks, everything(graph) | {name: [0, 5, 12, 19, 21, 29, 30, 39]})
    for units, found in (([0, 10, 20], "0 and 1"), ([0, 1, 10, 20, 30], "1 and 2")):
        with pytest.raises(
            PlanError, match=f"40 units come in 4 blocks of 10, .* equally many. Kept are between {found}"
        ):
            check_kept(blocks, everything(graph) | {name: units})


def plan_for(graph, **fields) -> Plan:
    kept = {name: tuple(units) for name, units in everything(graph).items()}
    complete = dict(model_name="toy", model_digest="", kept=kept, specs=dict.fromkeys(graph.linears, DENSE))
    return Plan(**complete | fields)


def test_a_complete_plan_passes(graph):
    q_proj = "model.layers.0.self_attn.q_proj"
    check_plan(plan_for(graph), graph)
    check_plan(plan_for(graph, adapter_ranks={q_proj: 4}), graph)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(kept={}), "plan for 'toy' leaves out 10 group.s. of the model"),
        (dict(specs={}), "plan for 'toy' leaves out 21 linear.s. of the model: .* and 18 more. Each needs a spec"),
        (
            dict(adapter_ranks={"lm_head": 8}),
            "plan for 'toy' names 1 linear.s. the model does not have: 'lm_head'. Was it",
        ),
        (
            dict(adapter_ranks={"model.layers.0.mlp.up_proj": 0}),
            "rank below 1 to 'model.layers.0.mlp.up_proj'. Ranks start",
        ),
    ],
)
def test_a_plan_that_does_not_fit_the_graph_is_refused(graph, fields, message):
    with pytest.raises(PlanError, match=message):
        check_plan(plan_for(graph, **fields), graph)
