import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tiny_folder import FAMILIES, byte_tokenizer, edit_config, edit_tensors, save, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForMaskedLM

from qpruner.errors import ModelError
from qpruner.model.load import (
    checked_digest,
    context_length,
    inspect_source,
    load_model,
    load_tokenizer,
    stored_dtype,
    weights_digest,
)
from qpruner.model.pystdlib import bundled_folder


@pytest.fixture
def folder(tmp_path):
    return save(tiny_model(), tmp_path / "tiny", tokenizer=True)


def refused(folder, *parts):
    """The one message, which has to hold every part."""
    with pytest.raises(ModelError) as caught:
        inspect_source(str(folder))
    for part in parts:
        assert part in str(caught.value)


# --- what can be served ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bundled", "pystdlib-5M", str(bundled_folder())])
def test_the_bundled_model_has_the_size_its_card_gives(name):
    source = inspect_source(name)
    assert (source.name, source.parameters, source.bytes_16bit) == ("pystdlib-5M", 5_246_208, 2 * 5_246_208)
    assert source.context_length == 512 and source.folder == bundled_folder()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saved_is_accepted_and_loads_the_same(family, tmp_path):
    model = tiny_model(family)
    source = inspect_source(save(model, tmp_path / family))
    assert source.parameters == sum(p.numel() for p in model.parameters())
    loaded = load_model(source)
    assert not loaded.training
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_configuration_alone_says_the_same_as_the_whole_folder(folder):
    whole, alone = inspect_source(folder), inspect_source(folder / "config.json")
    assert (alone.name, alone.digest, alone.parameters) == (whole.name, whole.digest, whole.parameters)
    assert alone.folder is None and not alone.tensors
    with pytest.raises(ModelError, match="a configuration without weights"):
        load_model(alone)


def test_shards_are_the_same_model_as_one_file(folder, tmp_path):
    source = inspect_source(save(tiny_model(), tmp_path / "shards", max_shard_size="8KB"))
    assert len(list(source.folder.glob("*.safetensors"))) > 1
    assert source.digest == inspect_source(folder).digest and source.tensors == inspect_source(folder).tensors
    assert all(map(torch.equal, load_model(source).parameters(), load_model(inspect_source(folder)).parameters()))


def test_a_checkpoint_without_the_decoder_prefix_is_accepted(folder):
    """As the first GPT-2 checkpoints were saved."""
    edit_tensors(folder, lambda tensors: {k.removeprefix("model."): v for k, v in tensors.items()})
    model = load_model(inspect_source(folder))
    assert all(map(torch.equal, model.parameters(), tiny_model().parameters()))


def test_buffers_of_older_checkpoints_are_passed_over(folder):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    edit_tensors(folder, lambda tensors: tensors | old)
    load_model(inspect_source(folder))


def test_the_digest_is_of_the_architecture_not_of_the_file(folder, tmp_path):
    digest = inspect_source(folder).digest
    half = save(tiny_model(seed=1).to(torch.float16), tmp_path / "renamed")
    edit_config(half, use_cache=False, transformers_version="5.0.0")
    assert inspect_source(half).digest == digest
    for changes in (dict(intermediate_size=32), dict(rms_norm_eps=1e-3), dict(num_attention_heads=2)):
        assert inspect_source(save(tiny_model(**changes), tmp_path / "changed")).digest != digest


def test_the_weights_digest_sees_one_changed_value(folder, tmp_path):
    before = weights_digest(folder)
    assert before == weights_digest(shutil.copytree(folder, tmp_path / "copy"))
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert weights_digest(folder) != before


@pytest.mark.parametrize(
    "stored, kept",
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ],
)
def test_stored_dtype_keeps_16_bit_and_narrows_the_rest(stored, kept, tmp_path):
    folder = save(tiny_model().to(stored), tmp_path / "m")
    assert stored_dtype(inspect_source(folder)) == stored_dtype(inspect_source(folder / "config.json")) == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_model_gives_the_dtype_asked_for(folder, dtype):
    assert {p.dtype for p in load_model(inspect_source(folder), dtype).parameters()} == {dtype}


def test_context_length_is_found_under_any_name():
    assert context_length(AutoConfig.for_model("gpt2", n_positions=77)) == 77
    assert context_length(AutoConfig.for_model("mpt", max_seq_len=78)) == 78
    assert context_length(AutoConfig.for_model("bloom")) is None


def test_loading_prints_and_logs_nothing(folder, capfd, caplog):
    verbosity = transformers.utils.logging.get_verbosity()
    edit_config(folder, bos_token_id=5000)  # transformers would advise against it
    load_tokenizer(inspect_source(folder))
    load_model(inspect_source(folder))
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert transformers.utils.logging.get_verbosity() == verbosity != logging.CRITICAL


# --- what cannot -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["no-such-model", "./a/b", "/nowhere/at/all", "a/b/c", ""])
def test_nothing_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(name, "there is no model at", "Accepted: a folder", "pystdlib-5M")


def test_a_hub_name_without_a_connection():
    refused("nobody/nothing", "no folder 'nobody/nothing'", "could be fetched", "Check the name and the connection")


def test_a_hub_name_is_fetched_in_two_steps_small_files_first(folder, monkeypatch):
    asked = []

    def download(name, allow_patterns, ignore_patterns):
        asked.append((name, tuple(allow_patterns)))
        return str(folder)

    monkeypatch.setattr("qpruner.model.load.snapshot_download", download)
    assert inspect_source("owner/name").name == "owner/name"
    assert [name for name, _ in asked] == ["owner/name"] * 2 and asked[1][1] == ("*.safetensors",)
    assert not any("bin" in pattern or pattern == "*" for _, patterns in asked for pattern in patterns)
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    refused("owner/name", "already quantized")
    assert len(asked) == 3, "weights are fetched only for what can be served"
    with pytest.raises(ModelError):
        inspect_source("owner/name", trust_remote_code=True)
    assert ["*.py" in patterns for _, patterns in asked] == [False] * 3 + [True], "code is fetched only when trusted"


def test_a_folder_or_file_that_is_no_model(folder, tmp_path):
    refused(tmp_path, "there is no config.json")
    refused(folder / "model.safetensors", "is a single file")
    (folder / "config.json").rename(folder / "adapter_config.json")
    refused(folder, "holds an adapter", "merge_and_unload")


@pytest.mark.parametrize(
    "content, part",
    [
        ("{", "not readable JSON"),
        ("[]", "names no model_type"),
        ("{}", "names no model_type"),
        (b"\xff\xfe", "not readable JSON"),
        ('{"model_type": "not-yet-known"}', "does not know"),
        ('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}', "--trust-remote-code"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "not valid for model_type 'llama'"),
        ('{"model_type": "llama", "num_hidden_layers": -1, "vocab_size": -5}', "describes no model"),
    ],
)
def test_a_configuration_that_cannot_be_used(content, part, folder):
    (folder / "config.json").write_bytes(content.encode() if isinstance(content, str) else content)
    refused(folder, part)


def test_an_encoder(tmp_path):
    sizes = dict(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    folder = save(BertForMaskedLM(BertConfig(**sizes)), tmp_path / "bert")
    refused(folder, "BertForMaskedLM", "Accepted: decoder language models")
    edit_config(folder, architectures=None)
    refused(folder, "model_type 'bert'", "an encoder")


@pytest.mark.parametrize(
    "config, parts",
    [
        (dict(model_type="t5", architectures=["T5ForConditionalGeneration"]), ["T5ForConditional", "encoder-decoder"]),
        (dict(model_type="bart"), ["encoder-decoder"]),
        (dict(model_type="vit", architectures=["ViTForImageClassification"]), ["ViTForImageClassification"]),
        (dict(model_type="gemma3", architectures=["Gemma3ForConditionalGeneration"]), ["vision or audio"]),
        (dict(model_type="llava"), ["vision or audio"]),
        (
            dict(model_type="llama", architectures=["LlamaForSequenceClassification"]),
            ["LlamaForSequenceClassification", "no language-model head"],
        ),
    ],
)
def test_other_kinds_of_model(config, parts, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    refused(path, *parts)


def test_an_already_quantized_model(folder):
    edit_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    refused(folder, "already quantized (awq)", "16-bit")


def test_pickles_are_not_opened(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "a config.json but no weights")
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    refused(folder, "pytorch_model.bin", "run code", "save_pretrained")


def test_damaged_weight_files(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:4], b""):
        path.write_bytes(damaged)
        refused(folder, "model.safetensors", "cut short or damaged", "Fetch it again")
        with pytest.raises(ModelError, match="cut short or damaged"):
            checked_digest(folder)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(folder, "Git LFS pointer", "git lfs pull")


def test_an_index_and_its_shards(tmp_path):
    folder = save(tiny_model(), tmp_path / "shards", max_shard_size="8KB")
    index = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("*.safetensors"))
    content = index.read_text()
    index.write_text("{")
    refused(folder, "not a readable index")
    index.unlink()
    refused(folder, shards[0].name, "neither model.safetensors nor model.safetensors.index.json")
    index.write_text(content)
    shards[0].unlink()
    refused(folder, f"1 of {len(shards)} weight file(s) that are not there", shards[0].name)


def test_weights_of_another_model(folder):
    norm, up = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"
    edit_tensors(folder, lambda t: {k: v for k, v in t.items() if k != norm} | {up: t[up][:-1], "extra": t[norm]})
    refused(folder, f"1 missing: '{norm}'", "1 unexpected: 'extra'", f"1 of another shape: '{up}: [23, 16] instead of")
    edit_config(folder, num_hidden_layers=3)
    refused(folder, "and 7 more")


def test_untied_embeddings_need_both_tensors(folder):
    edit_config(folder, tie_word_embeddings=False)
    refused(folder, "1 missing: 'lm_head.weight'")


@pytest.mark.parametrize("spoil", ["missing", "unexpected", "shape"])
def test_what_headers_cannot_show_is_found_on_loading(spoil, tmp_path):
    """Experts are fused when they are loaded: only transformers knows which stored names make up a tensor."""
    folder = save(tiny_model("mixtral"), tmp_path / "mixtral")
    norm = "model.norm.weight"
    changes = {
        "missing": lambda t: {k: v for k, v in t.items() if k != norm},
        "unexpected": lambda t: t | {"extra": torch.ones(1)},
        "shape": lambda t: t | {norm: torch.ones(3)},
    }
    load_model(inspect_source(folder))
    edit_tensors(folder, changes[spoil])
    source = inspect_source(folder)
    with pytest.raises(ModelError, match="do not match its config.json.*(norm|extra)"):
        load_model(source)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e5m2])
def test_values_that_are_not_finite_are_named(folder, value, dtype):
    checked_digest(folder)

    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = value
        return {k: v.to(dtype) for k, v in tensors.items()}

    edit_tensors(folder, spoil)
    with pytest.raises(ModelError, match=r"1 tensor\(s\) of 'tiny' .* 'model.layers.1.mlp.up_proj.weight'\."):
        checked_digest(folder)


def test_a_tokenizer_is_needed_and_has_to_fit(folder):
    assert load_tokenizer(inspect_source(folder))("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]
    source = inspect_source(save(tiny_model(vocab_size=100), folder))
    with pytest.raises(ModelError, match="has 259 tokens and the model embeds 100"):
        load_tokenizer(source)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="the tokenizer of 'tiny' cannot be read"):
        load_tokenizer(source)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="'tiny' has no tokenizer"):
        load_tokenizer(source)


@pytest.mark.shared
def test_the_shared_model_is_as_its_card_says():
    folder = Path(__file__).parents[2] / "shared" / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("the shared models are not beside this checkout")
    source = inspect_source(folder)
    assert source.parameters == 260_032 and stored_dtype(source) == torch.float16
    assert sum(p.numel() for p in load_model(source).parameters()) == 260_032
    assert isinstance(load_model(source), AutoModelForCausalLM._model_mapping[type(source.config)])
