"""Changes of basis and scale as part of the main job: nothing but the rounding is different."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_folder import save, tiny_model

from qpruner import api, prepare
from qpruner.errors import ModelError, RecipeError

QUICK = "window=64,calibration_windows=8,search_windows=4,evaluation_windows=8,width_grid=16"
EVEN = "kept=0.5,protect_first=0,protect_last=0,shrink_to_fit=false,units=[channel]"
DENSE = f"llm-pruner[{QUICK},{EVEN},transforms=[rotate],adapter_rank=0,steps=0]"
PRUNED = (
    f"gptaq[{QUICK},bits=[3],group_size=16,kept=0.5,reconstruction=least-squares,added_biases=true,transforms=[rotate]]"
)


def untied(family: str, folder: Path) -> Path:
    sizes = dict(hidden_size=48, intermediate_size=96, num_attention_heads=8, num_hidden_layers=3)
    model = tiny_model(family, **sizes, tie_word_embeddings=False)
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight"):
            parameter.data[::8] *= 10  # channels that are larger than others
    return save(model.to(torch.bfloat16), folder, tokenizer=True)


RESCALED = f"gptaq[{QUICK},bits=[3],group_size=16,ranges=absmax,kept=0.5,transforms=[rotate,rescale]]"
TRAINED = f"gptq[{QUICK},transforms=[rescale],steps=2,batch_size=2,adapter_rank=4,loftq_iterations=0,ranges=absmax]"


@pytest.fixture(scope="module")
def neox(tmp_path_factory) -> Path:
    return untied("gpt_neox", tmp_path_factory.mktemp("model") / "neox")


def compress(model, out, recipe, short_text, budget="90%") -> api.Result:
    return api.compress(str(model), budget, out, recipe=recipe, measure_speed=False, calibration=short_text)


@pytest.fixture(scope="module")
def made_of(neox, each_once, short_text):
    """What a recipe gives with nothing else asked for."""
    return each_once(lambda folder, recipe: compress(neox, folder, recipe, short_text))


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_rotated_model_is_stock_and_predicts_as_before(neox, tmp_path, short_text):
    plain = compress(neox, tmp_path / "plain", DENSE.replace(",transforms=[rotate]", ""), short_text)
    made = compress(neox, tmp_path / "out", DENSE, short_text)
    stored, before = (load_file(each.artifact / "model.safetensors") for each in (made, plain))
    assert json.loads((made.artifact / "config.json").read_text())["model_type"] == "gpt_neox"
    assert {n: (t.dtype, t.shape) for n, t in stored.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    assert all((t == 1).all() for n, t in stored.items() if "norm" in n and n.endswith("weight"))
    assert not torch.equal(stored["gpt_neox.embed_in.weight"], before["gpt_neox.embed_in.weight"])
    losses = [
        json.loads((tmp_path / f"{run}.run/measurements/artifact.json").read_text())["loss"]["loss"]
        for run in ("out", "plain")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)  # all weights were rounded to bfloat16 once more


@pytest.mark.parametrize("recipe", [PRUNED, RESCALED], ids=["rotated", "rescaled"])
def test_all_of_it_in_one_layer_at_a_time_ends_in_the_same_bytes(
    made_of, neox, tmp_path, short_text, monkeypatch, recipe
):
    whole = made_of(recipe)
    fitting = prepare.forecast_for
    monkeypatch.setattr(prepare, "forecast_for", lambda *args: dataclasses.replace(fitting(*args), resident=False))
    streamed = compress(neox, tmp_path / "streamed", recipe, short_text)
    assert files(streamed.artifact) == files(whole.artifact)


@pytest.mark.parametrize("recipe", [RESCALED, TRAINED], ids=["rotated too", "adapters beside"])
def test_rescaled_norms_and_biases_ship_with_the_codes(made_of, recipe):
    made = made_of(recipe)
    stored = load_file(made.artifact / "model.safetensors")
    folder = made.artifact.with_name("out.run") / "measurements/rounding"
    found = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    assert any("layernorm.weight" in name for name in found) and any(name.endswith("dense.codes") for name in found)
    assert all(torch.equal(stored[name], tensor) for name, tensor in found.items())
    assert made.facts.sizes.predicted == made.facts.sizes.on_disk


def test_another_transform_in_the_same_run_folder_is_another_result(made_of, neox, tmp_path, short_text):
    shutil.copytree(made_of(PRUNED).artifact.with_name("out.run"), tmp_path / "out.run")
    plain = PRUNED.replace(",transforms=[rotate]", "")
    again, new = (compress(neox, tmp_path / name, plain, short_text) for name in ("out", "new"))
    assert files(again.artifact) == files(new.artifact)


def test_what_cannot_be_rotated_is_refused_before_anything_is_made(tmp_path, small_llama, neox, short_text):
    tied = save(tiny_model("llama", tie_word_embeddings=True).to(torch.bfloat16), tmp_path / "tied", tokenizer=True)
    with pytest.raises(ModelError, match="of LlamaForCausalLM cannot be rotated: 'lm_head.weight' is tied"):
        compress(tied, tmp_path / "out", DENSE, short_text)
    with pytest.raises(RecipeError, match="rotate turns the hidden states as a whole: leave residual out"):
        compress(neox, tmp_path / "out", DENSE.replace("units=[channel]", "units=[residual]"), short_text)
    assert not (tmp_path / "out.run").exists()
