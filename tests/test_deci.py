"""DeciLM's form: layers with MLPs of their own widths, for a class that transformers runs from the folder."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_gguf import artifact_of, folder_of
from typer.testing import CliRunner

from qpruner import exporting, recipe
from qpruner import shape as shaping
from qpruner.cli import app
from qpruner.errors import ModelError
from qpruner.exporting import fresh
from qpruner.joint import points
from qpruner.model.load import inspect_source
from qpruner.plan import QuantSpec
from qpruner.targets import LayerWidths, rules_of
from qpruner.vllm import layers_of, tensor_parallel, vllm_verdict

INT4 = QuantSpec(bits=4, grid="integer", group_size=64)
CHANNELS = (512, 256, 320)


def opened(folder: Path, dtype=torch.float32):
    """As transformers does it with trust_remote_code, here."""
    for name in ("", ".configuration_decilm", ".modeling_decilm"):
        path = folder / f"{name.removeprefix('.') or 'none'}.py"
        package = {} if name else dict(submodule_search_locations=[str(folder)])
        spec = importlib.util.spec_from_file_location(f"decilm{name}", path, **package)
        sys.modules[f"decilm{name}"] = module = importlib.util.module_from_spec(spec)
        if name:
            spec.loader.exec_module(module)
    return module.DeciLMForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture
def here(monkeypatch):
    """Exports are opened in this process."""

    def ask(folder, tokens, *, dtypes, adapter=None, own=False, code=False):
        assert code and not own
        found = {}
        for name in dtypes:
            model = opened(folder, getattr(torch, name))
            with torch.no_grad():
                found[name] = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()
        return fresh.Answer(type(model).__name__, found, False, {})

    monkeypatch.setattr(fresh, "ask", ask)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("heads", [4, 3])
def test_layers_of_their_own_widths_compute_what_the_artifact_does(family, heads, tmp_path, here):
    """Three key/value groups of 64 in a hidden size of 256: heads that do not divide it."""
    model = folder_of(family, tmp_path / "m", **({"sliding_window": None} if family == "mistral" else {}))
    artifact = artifact_of(model, tmp_path / "a", kv_groups=(heads,) * 3, channels=CHANNELS)
    made = exporting.export(artifact, "deci", tmp_path / "o")
    assert made.loaded.relative < 1e-5 and made.moved.relative == 0
    config = json.loads((tmp_path / "o/config.json").read_text())
    assert layers_of(config) == [LayerWidths(2 * heads, heads, n) for n in CHANNELS]
    assert all(verdict.holds for verdict in vllm_verdict(config))
    model = opened(tmp_path / "o")
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == [*CHANNELS]
    assert (model.model.layers[0].self_attn.q_proj.bias is not None) is (family == "qwen2")
    assert model.model.layers[0].self_attn.o_proj.bias is None
    ids = torch.arange(7)[None]
    cached = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    plain = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(cached, plain)


def test_the_folder_is_read_again_as_it_was_written(tmp_path, here):
    artifact = artifact_of(folder_of("llama", tmp_path / "m"), tmp_path / "a", channels=CHANNELS)
    exporting.export(artifact, "deci", tmp_path / "o")
    model = opened(tmp_path / "o")
    model.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again/config.json").read_text())
    assert again["block_configs"] == json.loads((tmp_path / "o/config.json").read_text())["block_configs"]


def test_codes_and_adapters_come_along_in_a_process_without_qpruner(tmp_path):
    model = folder_of("llama", tmp_path / "m", tokenizer=True)
    artifact = artifact_of(model, tmp_path / "a", channels=CHANNELS, specs=(INT4,), rank=4)
    command = ["export", str(artifact), "--to", "deci", "-o", str(tmp_path / "o")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert f"vllm serve {tmp_path / 'o'} --trust-remote-code --enable-lora" in done.output
    assert "DeciLMForCausalLM of its own" in done.output and "by the code in the folder" in done.output
    config = json.loads((tmp_path / "o/config.json").read_text())
    assert config["model_type"] == "nemotron-nas" and config["quantization_config"]["config_groups"]
    divided = tensor_parallel(config)
    assert not divided[1] and any("layer 2" in reason for reason in divided[4])  # 80 channels are no whole groups


@pytest.mark.parametrize(
    "family, over, kv_groups, said",
    [
        ("llama", {}, (4, 2, 4), "layer 0 keeps 8 heads, and layer 1 4; DeciLM has one number of query heads"),
        ("qwen3", {}, (4, 4, 4), "'qwen3' does not"),
        ("mistral", dict(sliding_window=64), (4, 4, 4), "without windows"),
        ("llama", dict(hidden_act="gelu"), (4, 4, 4), "with SiLU"),
    ],
)
def test_what_decilm_does_not_hold_is_refused_before_anything_is_written(family, over, kv_groups, said, tmp_path):
    artifact = artifact_of(folder_of(family, tmp_path / "m", **over), tmp_path / "a", kv_groups=kv_groups)
    with pytest.raises(ModelError, match=said):
        exporting.export(artifact, "deci", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_search_for_decilm_leaves_heads_whole_and_embeddings_at_16_bits(tmp_path):
    shape = shaping.shape_of(inspect_source(folder_of("llama", tmp_path / "m")))
    kinds = lambda target: {
        shape.graph.groups[v.name].kind
        for v in points.space_for(shape, recipe.load(f"auto[target={target}]")).variables
        if v.kind == "width"
    }
    about = lambda target: {v.layer for v in points.space_for(shape, recipe.load(f"auto[target={target}]")).variables}
    assert kinds("vllm") == {"kv_group", "channel"} and kinds("deci") == {"channel"}
    assert -1 in about("transformers") and -1 not in about("vllm") | about("deci") | about("any")
    with pytest.raises(ModelError, match="'gemma2' does not"):
        rules_of("deci", {"model_type": "gemma2"}, tied=True)
