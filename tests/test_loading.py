"""What is said of where a model loads is so; what serving takes is counted from what is there; text comes out."""

import json

import pytest
import torch
from test_artifact import compressed
from tiny import tiny
from tiny_folder import byte_tokenizer, save, tiny_model
from tiny_gguf import artifact_of, folder_of
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qpruner import api, recipe
from qpruner import shape as shaping
from qpruner.body import body_of, body_of_plan
from qpruner.chat import Speaker
from qpruner.cli import app
from qpruner.errors import CorpusError
from qpruner.loading import TARGETS, loading
from qpruner.model.load import inspect_source
from qpruner.plan import INT8, NF4, QuantSpec
from qpruner.serving import serve_check

INT4 = QuantSpec(bits=4, grid="integer", group_size=64)
EVERYWHERE = [True, True, True, True, False, True, False]  # of `TARGETS`, where a stock model loads as it is


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return folder_of("llama", tmp_path_factory.mktemp("llama") / "model", tokenizer=True)


def made(llama, path, **how):
    return inspect_source(artifact_of(llama, path, **how))


def rows(source) -> dict:
    return {row.target: row for row in loading(body_of(source), "OUT")}


def test_one_width_at_16_bits_is_a_stock_model_everywhere(llama, tmp_path):
    found = rows(made(llama, tmp_path / "a", kv_groups=(2, 2, 2), channels=(256,) * 3))
    assert [found[t].loads for t in TARGETS] == EVERYWHERE
    assert "import qpruner" not in found[TARGETS[0]].command
    assert "'llama'" in found[TARGETS[4]].sentence


def test_codes_and_widths_of_each_layer_say_which_export_helps(llama, tmp_path):
    found = rows(made(llama, tmp_path / "a", kv_groups=(2, 2, 2), channels=(256,) * 3, specs=(INT4, INT8)))
    assert found[TARGETS[1]].command == "qpruner export OUT --to hf" and not found[TARGETS[1]].loads
    assert "compressed-tensors" in found[TARGETS[3]].command
    uneven = rows(made(llama, tmp_path / "b", kv_groups=(4, 1, 3), channels=(512, 256, 320), specs=(NF4,), rank=2))
    assert "layer 1 2 heads, 1 key/value heads, 256 channels" in uneven[TARGETS[1]].sentence
    assert uneven[TARGETS[1]].command.endswith("--padded") and uneven[TARGETS[2]].command.endswith("--with-code")
    assert "normal-float" in uneven[TARGETS[3]].sentence and not uneven[TARGETS[3]].command
    assert "'deci'" in uneven[TARGETS[4]].sentence
    assert found[TARGETS[5]].command == "qpruner export OUT --to compressed-tensors"
    assert "values of nf4 are none" in uneven[TARGETS[5]].sentence
    assert uneven[TARGETS[5]].command.endswith("--round-again")


def test_no_export_is_named_that_would_be_refused(tmp_path):
    """Slopes of the heads that stayed are in no code; zeros do not stand for experts that went."""
    bloom, *_ = compressed("bloom", tmp_path / "bloom", bits=(4,), rank=0)
    row = rows(inspect_source(bloom))[TARGETS[2]]
    assert "(alibi)" in row.sentence and not row.command
    mixtral, *_ = compressed("mixtral", tmp_path / "mixtral", bits=(16,), rank=0)
    row = rows(inspect_source(mixtral))[TARGETS[1]]
    assert "one of zeros would still be sent tokens" in row.sentence and not row.command


def test_linears_that_multiply_in_their_own_way_ask_for_us_in_compressed_tensors(tmp_path):
    for family, ours in (("gpt2", True), ("gpt_neox", False)):
        model = save(tiny(family, dtype=torch.float32).to(torch.bfloat16), tmp_path / family)
        shape = shaping.shape_of(inspect_source(model))
        kept = {name: list(range(group.n_units)) for name, group in shape.graph.groups.items()}
        plan = shape.plan(recipe.load("qpruner[adapter_rank=0,grid=integer]"), kept, 4)
        row = loading(body_of_plan(shape.source, shape.source.config, shape.graph, plan), "OUT")[5]
        assert row.command and ("qpruner imported" in row.sentence) is ours


def test_heads_that_only_go_together_are_counted_as_the_configuration_does(tmp_path):
    model = folder_of("olmo2", tmp_path / "model", num_hidden_layers=2)
    assert [str(layer) for layer in body_of(inspect_source(model)).widths] == [
        "8 heads, 4 key/value heads, 512 channels"
    ] * 2


def test_what_is_predicted_is_what_the_artifact_then_says(small_llama, short_text, tmp_path):
    quick = "qpruner[bits=[16],allocation=uniform,kept=0.5,protect_first=0,protect_last=0,adapter_rank=0,steps=0,"
    quick += "calibration_windows=4,evaluation_windows=4,window=32]"
    predicted = api.inspect(str(small_llama), recipe=quick, budget="90%")["predicted"]["loads_in"]
    result = api.compress(
        str(small_llama), "90%", tmp_path / "OUT", recipe=quick, calibration=short_text, measure_speed=False
    )
    found = api.inspect(str(result.artifact))["loads_in"]
    assert [row["loads"] for row in predicted] == [row["loads"] for row in found] == EVERYWHERE
    assert [place.loads for place in result.facts.places] == [row["loads"] for row in found]


def test_the_cache_is_what_a_running_model_fills(llama, tmp_path):
    source = made(llama, tmp_path / "a", kv_groups=(4, 1, 3), channels=(512, 256, 320), specs=(NF4,))
    serving = serve_check(source, context=100, batch=2)
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.bfloat16)
    with torch.no_grad():
        cache = model(input_ids=torch.arange(3, 13)[None], use_cache=True).past_key_values
    bytes_of = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert serving.cache_bytes_per_token == bytes_of // 10
    assert [layer.kv_heads for layer in serving.cache] == [4, 1, 3]
    assert serving.cache_bytes == 200 * serving.cache_bytes_per_token
    assert serving.devices == (1,) and "layer 2 has 6 heads, 3 key/value heads" in serving.reason


def test_a_window_bounds_the_cache_and_groups_bound_the_devices(llama, tmp_path):
    gemma = folder_of(
        "gemma3_text", tmp_path / "gemma", sliding_window=16, layer_types=["sliding_attention"] * 2 + ["full_attention"]
    )
    serving = serve_check(inspect_source(gemma), context=100)
    assert [layer.at(100) // layer.bytes_per_token for layer in serving.cache] == [16, 16, 100]
    whole = made(llama, tmp_path / "a", specs=(QuantSpec(bits=4, grid="integer", group_size=128),))
    assert serve_check(whole).devices == (1, 2, 4)
    assert serve_check(inspect_source(llama)).devices == (1, 2, 4, 8)


def test_serve_check_prints_commands(llama):
    done = CliRunner().invoke(app, ["serve-check", str(llama), "--context", "100", "--json"])
    found = json.loads(done.stdout)
    assert found["total_bytes"] == found["weight_bytes"] + found["cache_bytes"]
    assert any("vllm serve" in place["command"] for place in found["places"])


# --- chat ------------------------------------------------------------------------------------------------------------


def test_chat_writes_what_the_model_generates_piece_by_piece(llama):
    speaker, pieces = Speaker(str(llama)), []
    answer = speaker.say("some words, ", pieces.append, max_new_tokens=8)
    ids = speaker.tokenizer("some words, ", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        tokens = speaker.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=1
        )
    assert "".join(pieces) == answer == speaker.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_seed_repeats_and_leaves_the_random_state_alone(llama):
    before = torch.get_rng_state()
    draw = lambda seed: Speaker(str(llama), seed=seed).say("words", lambda text: None, max_new_tokens=12)
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(before, torch.get_rng_state())


def test_a_template_makes_a_conversation_and_a_full_context_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
    folder = save(tiny_model("llama", max_position_embeddings=128), tmp_path / "model")
    tokenizer.save_pretrained(folder)
    speaker = Speaker(str(folder))
    answer = speaker.say("hi", lambda text: None, max_new_tokens=2)
    assert speaker.tokenizer.decode(speaker._ids("you")[0]) == f"u:hi;a:{answer};u:you;a:"
    with pytest.raises(CorpusError, match="takes 1 to 127 before"):
        speaker.say("x" * 200, lambda text: None, max_new_tokens=2)


def test_chat_from_the_command_line_ends_after_a_prompt(llama):
    done = CliRunner().invoke(app, ["chat", str(llama), "--prompt", "words", "--max-new-tokens", "3"])
    assert done.exit_code == 0, done.output
