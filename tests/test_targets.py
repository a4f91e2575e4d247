"""What a target cannot load is said before it is made: every rule refuses what breaks it, and nothing else."""

import itertools
import re

import pytest

from qpruner import recipe
from qpruner.errors import RecipeError
from qpruner.plan import DENSE, INT8, NF4, QuantSpec
from qpruner.targets import LayerWidths, held, refused, rules_of

LLAMA = {"model_type": "llama", "hidden_act": "silu", "rope_parameters": {"rope_type": "llama3"}}
QWEN3 = {"model_type": "qwen3", "hidden_act": "silu", "layer_types": ["full_attention"] * 2}
GEMMA3 = {"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8}

WIDE, NARROW = LayerWidths(8, 4, 512), LayerWidths(4, 2, 256)
NO_ATTENTION, NO_MLP = LayerWidths(0, 0, 512), LayerWidths(8, 4, 0)


def integer(bits, group_size=64, **more):
    return QuantSpec(bits=bits, grid="integer", group_size=group_size, **more)


def sentences(target, config, widths, specs=None, *, tied=False, n_layers=None):
    return refused(rules_of(target, config, tied=tied), widths, specs or {}, n_layers=n_layers)


def test_our_own_loader_takes_everything():
    rules = rules_of("transformers", GEMMA3, tied=True)
    salient = integer(2, 48, salient=8, activation_bits=8)
    assert all(rules.accepts(spec, 100) for spec in (NF4, INT8, DENSE, salient))
    assert refused(rules, [NO_ATTENTION, NO_MLP, WIDE], {"q": (salient, 100)}, n_layers=9) == []
    assert (rules.channel_multiple, rules.head_columns_multiple, rules.kv_group_step(100)) == (1, 1, 1)


@pytest.mark.parametrize(
    "target, config, tied, layered",
    [
        ("vllm", LLAMA, False, True),
        ("vllm", MIXTRAL, False, False),
        ("gguf", LLAMA, False, True),
        ("gguf", {**LLAMA, "mlp_bias": True}, False, False),
        ("gguf", {**LLAMA, "hidden_act": "gelu"}, False, False),
        ("gguf", {**LLAMA, "rope_parameters": {"rope_type": "yarn"}}, False, False),
        ("gguf", {"model_type": "mistral", "sliding_window": 4096}, False, False),
        ("gguf", {"model_type": "mistral", "sliding_window": None}, False, True),
        ("gguf", {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False}, False, True),
        ("gguf", QWEN3, True, True),
        ("gguf", QWEN3, False, False),
        ("gguf", {**QWEN3, "attention_bias": True}, True, False),
        ("gguf", GEMMA3, True, False),
        ("any", LLAMA, False, True),
        ("any", QWEN3, False, False),
        ("any", MIXTRAL, False, False),
    ],
)
def test_widths_of_each_layer_where_the_target_has_them(target, config, tied, layered):
    assert rules_of(target, config, tied=tied).uniform_widths is not layered
    said = sentences(target, config, [WIDE, NARROW, WIDE], tied=tied)
    assert bool(said) is not layered
    assert layered or "layer 0 keeps 8 heads, 4 key/value heads, 512 channels, and layer 1 4 heads" in said[0]
    assert sentences(target, config, [NARROW, NARROW], tied=tied) == []  # all narrower is something else


def test_attention_goes_from_a_deci_layer_but_the_first_and_the_mlp_never_alone():
    assert sentences("gguf", LLAMA, [WIDE, NO_ATTENTION]) == []
    assert "takes the size of all heads from layer 0" in sentences("gguf", LLAMA, [NO_ATTENTION, WIDE])[0]
    assert "says nothing" in sentences("gguf", LLAMA, [WIDE, NO_MLP])[0]
    for target, config, tied in (("gguf", QWEN3, True), ("vllm", LLAMA, False), ("any", LLAMA, False)):
        assert "attention" in sentences(target, config, [WIDE, NO_ATTENTION], tied=tied)[0]
        assert "MLP" in sentences(target, config, [WIDE, NO_MLP], tied=tied)[0]


def test_whole_layers_go_except_where_their_number_says_what_they_are():
    for target, config in itertools.product(("transformers", "vllm", "gguf", "any"), (LLAMA, GEMMA3)):
        said = sentences(target, config, [WIDE] * 3, n_layers=4)
        alternates = config is GEMMA3 and target in ("gguf", "any")
        assert bool(said) is alternates and rules_of(target, config, tied=False).drops_layers is not alternates
    assert said[0].startswith("1 of 4 layers go, and llama.cpp takes the kind of attention")


@pytest.mark.parametrize(
    "spec, d_in, words",
    [
        (NF4, 512, "no normal-float grid"),
        (QuantSpec(bits=2, grid="ternary"), 512, "no ternary grid"),
        (integer(4, salient=8), 512, "8 channels here have 8 bits"),
        (integer(4, activation_bits=8), 512, "inputs alone"),
        (integer(4, scale_bits=6), 512, "these 6"),
        (integer(4), 96, "no whole groups of 64"),
        (integer(4, 16), 512, "groups of 32, 64 or 128"),
        (integer(3), 512, r"4 and 8 bits.*not verified"),
        (integer(8, symmetric=False), 512, r"of 8 bits with zero points.*not verified"),
        (integer(4, None), 100, "whole words"),
        (integer(4), 512, None),
        (integer(4, symmetric=False), 512, None),
        (integer(8, 128), 512, None),
        (INT8, 100, None),
        (DENSE, 99, None),
    ],
)
def test_what_vllm_stores(spec, d_in, words, match_or_none):
    match_or_none(rules_of("vllm", LLAMA, tied=False), spec, d_in, words)


@pytest.mark.parametrize(
    "spec, d_in, words",
    [
        (NF4, 512, "no normal-float grid"),
        (QuantSpec(bits=1, grid="binary"), 512, "no binary grid"),
        (integer(4, salient=8), 512, "8 channels here have 8 bits"),
        (integer(4, activation_bits=8), 512, "inputs alone"),
        *[(integer(bits), 288, "no multiple of 256") for bits in (2, 3, 6)],
        *[(integer(bits), 300, "no multiple of 32") for bits in (2, 3, 4, 5, 6, 8)],
        *[(integer(bits), 288, None) for bits in (4, 5, 8)],
        *[(integer(bits, 48, scale_bits=6), 512, None) for bits in (2, 3, 4, 5, 6, 8)],  # it has groups of its own
        (DENSE, 99, None),
    ],
)
def test_what_llama_cpp_stores(spec, d_in, words, match_or_none):
    match_or_none(rules_of("gguf", LLAMA, tied=False), spec, d_in, words)


@pytest.fixture
def match_or_none():
    def check(rules, spec, d_in, words):
        said = refused(rules, [WIDE], {"a": (spec, d_in), "b": (spec, d_in)})
        assert rules.accepts(spec, d_in) is (words is None) is (not said)
        assert words is None or re.search(f"'a', 'b': .*{words}", said[0])

    return check


SPECS = [integer(*each) for each in itertools.product((2, 3, 4, 5, 6, 8), (None, 32, 64, 128, 48))] + [NF4, DENSE]


@pytest.mark.parametrize("target", ["transformers", "vllm", "deci", "gguf", "any"])
def test_what_a_target_does_not_store_becomes_what_it_does_of_as_many_bits(target):
    odd = QuantSpec(bits=4, grid="integer", group_size=16, scale_bits=4, symmetric=False)
    eight = QuantSpec(bits=8, grid="integer", group_size=16, symmetric=False)
    offered = (NF4, odd, eight, QuantSpec(bits=2, grid="integer", group_size=64), DENSE)
    found = held(target, offered)
    rules = rules_of(target, LLAMA, tied=False)
    assert all(map(rules.accepts, found)) and DENSE in found
    assert found == tuple(spec for spec in offered if rules.accepts(spec)) or target != "transformers"
    if target in ("vllm", "deci", "any"):
        of = lambda bits, group_size, symmetric: QuantSpec(
            bits=bits, grid="integer", group_size=group_size, symmetric=symmetric
        )
        assert found == (of(4, 64, True), of(4, 32, False), of(8, 32, True), DENSE)  # and nothing of two bits


def test_a_target_is_for_a_joint_search_that_has_formats_for_it():
    assert {spec.bits for spec in recipe.load("auto[target=vllm]").formats()} == {4, 8}
    with pytest.raises(RecipeError, match="target bounds a joint search, and allocation bayesian is none"):
        recipe.load("qpruner[target=vllm]")
    with pytest.raises(RecipeError, match="target vllm has no format of 2 or 3 bits"):
        recipe.load("auto[target=vllm,bits=[2,3]]")


@pytest.mark.parametrize("offered", [SPECS, [integer(4), DENSE], [integer(4, 128)], [integer(2)], [NF4], []])
@pytest.mark.parametrize("target", ["vllm", "gguf", "any"])
def test_a_width_on_the_multiple_can_be_stored_in_all_that_is_accepted(target, offered):
    rules = rules_of(target, LLAMA, tied=False, specs=offered)
    for spec in filter(rules.accepts, offered):
        assert rules.accepts(spec, rules.channel_multiple) and rules.accepts(spec, 3 * rules.head_columns_multiple)
    for columns in (64, 96, 256, 320):
        step = rules.kv_group_step(columns)
        assert step * columns % rules.head_columns_multiple == 0
        assert all(n * columns % rules.head_columns_multiple for n in range(1, step))


def test_any_is_what_all_can():
    both = rules_of("any", LLAMA, tied=False, specs=SPECS)
    one, other = (rules_of(target, LLAMA, tied=False, specs=SPECS) for target in ("vllm", "gguf"))
    for spec, d_in in itertools.product(SPECS, (None, 32, 100, 128, 256, 288)):
        assert both.accepts(spec, d_in) is (one.accepts(spec, d_in) and other.accepts(spec, d_in))
    for config, tied, widths in itertools.product(
        (LLAMA, QWEN3, GEMMA3, MIXTRAL),
        (True, False),
        itertools.product((WIDE, NARROW, NO_ATTENTION, NO_MLP), repeat=2),
    ):
        said = [bool(sentences(target, config, widths, tied=tied, n_layers=3)) for target in ("any", "vllm", "gguf")]
        assert said[0] is (said[1] or said[2])
