"""What vLLM would say: every rule refuses what breaks it, and nothing else."""

import json

import pytest

from qpruner.targets import LayerWidths
from qpruner.vllm import Scheme, head_dim_of, layers_of, matches, tensor_parallel, vllm_verdict

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 1024,
}  # fmt: skip
OWN = LLAMA | {"model_type": "qpruner"}
EVERY = r"re:^model\.layers\.\d+\.(self_attn|mlp)\.\w+$"


def stored(*groups: tuple[Scheme, str], ignore=("lm_head",)) -> dict:
    found = {f"g{i}": {"targets": [target], "weights": scheme.to_json()} for i, (scheme, target) in enumerate(groups)}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": found, "ignore": [*ignore]}}


def said(config: dict, **how) -> dict[str, tuple[bool, str]]:
    return {verdict.rule: (verdict.holds, verdict.sentence) for verdict in vllm_verdict(config, **how)}


def test_a_plain_model_and_one_in_codes_of_four_bits_are_taken(tmp_path):
    for config in (LLAMA, LLAMA | stored((Scheme(4, True, 128), EVERY))):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert all(verdict.holds for verdict in vllm_verdict(tmp_path))
        assert vllm_verdict(tmp_path) == vllm_verdict(config)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 8, 32, 48, 64, 128, 256])
def test_kernels_by_bits_zero_points_and_groups(bits, symmetric, group_size):
    holds, sentence = said(LLAMA | stored((Scheme(bits, symmetric, group_size), EVERY)))["codes"]
    assert holds is (bits > 1 and group_size not in (8, 48))
    marlin = (bits, symmetric) in ((4, True), (8, True), (4, False)) and group_size in (None, 32, 64, 128)
    assert not holds or ("Humming" not in sentence) is marlin


def test_what_is_one_matrix_there_is_stored_alike():
    four, eight = Scheme(4, True, 64), Scheme(8, True, None)
    config = LLAMA | stored((eight, r"re:^model\.layers\.1\.self_attn\.k_proj$"), (four, EVERY))
    holds, sentence = said(config)["fused linears"]
    assert not holds and "layer 1 has q_proj 4 bits in groups of 64, k_proj 8 bits in whole rows" in sentence
    config = LLAMA | stored((four, EVERY), ignore=(r"re:.*layers\.2\.mlp\.up_proj$",))
    assert "layer 2 has gate_proj 4 bits in groups of 64, up_proj 16 bits" in said(config)["fused linears"][1]
    alike = LLAMA | stored((eight, r"re:^model\.layers\.1\.self_attn\.[qkv]_proj$"), (four, EVERY))
    assert said(alike)["fused linears"][0]


@pytest.mark.parametrize(
    "change, sizes, reason",
    [
        ({}, (1, 2, 4, 8), None),  # 4 key/value heads are repeated over 8
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, (1,), "layer 0 has 3 key/value heads"),
        ({"num_attention_heads": 12, "num_key_value_heads": 12}, (1, 2, 4), "layer 0 has 12 heads"),
        ({"intermediate_size": 1020}, (1, 2, 4), "layer 0 has 1020 channels"),
        (stored((Scheme(4, True, 128), EVERY)), (1, 2, 4), "64 inputs of layer 0's self_attn.o_proj are no whole"),
        (stored((Scheme(4, True, None), EVERY)), (1, 2, 4, 8), None),
        ({"intermediate_size": 1032} | stored((Scheme(8, True, None), EVERY)), (1, 2), "258 codes of 8 bits"),
        ({"intermediate_size": 1040} | stored((Scheme(3, False, None), EVERY)), (), "1040 codes of 3 bits in layer"),
        (
            {"intermediate_size": 576} | stored((Scheme(3, False, None), r"re:.*up_proj$")),
            (1, 2),
            "zero points of 144 outputs of layer 0's mlp.up_proj",
        ),
    ],
)
def test_what_many_devices_share(change, sizes, reason):
    found = tensor_parallel(LLAMA | change)
    assert tuple(size for size, reasons in found.items() if not reasons) == sizes
    assert reason is None or any(reason in one for reasons in found.values() for one in reasons)
    holds, sentence = said(LLAMA | change)["tensor parallelism"]
    assert holds is bool(sizes)
    assert all(f"{size} does not" in sentence for size in found if size not in sizes)


def test_layers_of_their_own_widths_need_code_that_builds_them():
    own = OWN | {"per_layer_config": {"1": {"intermediate_size": 512}}} | stored((Scheme(4, True, 64), EVERY))
    assert not said(own)["class"][0]
    assert said(own | {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}})["class"][0]
    holds, sentence = said(OWN)["codes"]
    assert not holds and "export --to compressed-tensors" in sentence
    assert "transformers backend" in said(LLAMA | {"architectures": ["OlmoForCausalLM"]})["class"][1]


@pytest.mark.parametrize("without", [{"skip": ["attention"]}, {"num_attention_heads": 0, "num_key_value_heads": 0}])
def test_a_layer_without_attention_is_not_taken(without):
    holds, sentence = said(LLAMA | {"per_layer_config": {"02": without}})["attention"]
    assert not holds and "layer(s) '2' have none" in sentence


def test_another_quantizer_is_not_judged():
    found = said(LLAMA | {"quantization_config": {"quant_method": "gptq"}})["codes"]
    assert found == (False, "'gptq' is not judged here.")


def test_a_target_is_a_name_or_an_expression_from_the_start():
    assert matches("lm_head", "lm_head") and not matches("lm_head_too", "lm_head")
    assert matches("a.b", r"re:a\.") and not matches("x.a.b", r"re:a\.")


def test_sizes_are_found_in_the_words_of_every_family():
    gpt2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 8, "n_embd": 64, "n_inner": 128}
    falcon = {"model_type": "falcon", "num_hidden_layers": 2, "num_attention_heads": 8, "num_kv_heads": 2}
    assert layers_of(gpt2) == [LayerWidths(8, 8, 128)] * 2 and head_dim_of(gpt2) == 8
    assert layers_of(falcon | {"ffn_hidden_size": 256}) == [LayerWidths(8, 2, 256)] * 2
    assert not tensor_parallel(gpt2)[8] and tensor_parallel(gpt2 | {"n_head": 6})[4][0] == "layer 0 has 6 heads"


def test_layers_of_their_own_widths_go_through_the_code_but_for_experts_and_linears_of_their_own():
    uneven = OWN | {"per_layer_config": {"1": {"intermediate_size": 512}}, "coded": False}
    assert not said(uneven)["class"][0]
    by_code = uneven | {"auto_map": {"AutoModel": "x"}}
    assert said(by_code)["class"][0] and "linears" not in said(by_code)
    assert not said(by_code | {"num_local_experts": 4})["class"][0]
    holds, sentence = said(by_code | {"own_linears": True})["linears"]
    assert not holds and "nn.Linear alone" in sentence
    assert "it does not read qpruner's codes" in said(by_code | {"coded": True})["codes"][1]
