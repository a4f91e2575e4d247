"""Reconstruction as a stage of the main job: what ships is what was refitted, in the predicted bytes."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_folder import save, tiny_model

from qpruner import api, prepare
from qpruner.artifact.config import MODEL_TYPE
from qpruner.errors import RecipeError
from qpruner.model.graph import Graph
from qpruner.plan import Plan

QUICK = "window=64,calibration_windows=8,search_windows=4,evaluation_windows=4,width_grid=16,kept=0.5,score=magnitude"
BARE = f"llm-pruner[{QUICK},steps=0,adapter_rank=0,protect_first=0,protect_last=0"
BIASED = f"{BARE},reconstruction=least-squares,added_biases=true]"
QUANTIZED = f"qpruner[{QUICK},steps=0,allocation=mutual-information,reconstruction=least-squares,added_biases=true]"
TRAINED = f"qpruner[{QUICK},steps=2,batch_size=2,bits=[8],allocation=uniform,reconstruction=bias,added_biases=true]"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=8, num_key_value_heads=4)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return save(tiny_model("llama", **sizes, num_hidden_layers=3).to(torch.bfloat16), folder, tokenizer=True)


@pytest.fixture
def one_layer_at_a_time(monkeypatch):
    fitting = prepare.forecast_for
    monkeypatch.setattr(prepare, "forecast_for", lambda *args: dataclasses.replace(fitting(*args), resident=False))


def compress(model, out, recipe, short_text, **options) -> api.Result:
    options = dict(measure_speed=False, calibration=short_text) | options
    return api.compress(str(model), "90%", out, recipe=recipe, **options)


@pytest.fixture(scope="module")
def made_of(model, tmp_path_factory, short_text):
    """What a recipe gives with nothing else asked for, each made once; nobody writes into it."""

    @functools.cache
    def of(recipe: str, model: Path = model) -> api.Result:
        return compress(model, tmp_path_factory.mktemp("made") / "out", recipe, short_text)

    return of


def run_of(made: api.Result) -> Path:
    return made.artifact.with_name("out.run")


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


FRESH = """
import sys, json, torch, qpruner
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.arange(3, 40)[None]
print(json.dumps([type(model).__name__, model(input_ids=ids).logits.tolist()]))
"""


def test_added_biases_ship_in_the_predicted_bytes_and_load_in_a_fresh_process(made_of):
    from transformers import AutoModelForCausalLM

    made = made_of(BIASED)
    plan = Plan.read(made.artifact / "plan.json")
    assert len(plan.added_biases) == 6
    stored, refitted = load_file(made.artifact / "model.safetensors"), {}
    for path in (run_of(made) / "measurements/reconstruction").glob("*.safetensors"):
        refitted |= load_file(path)
    assert refitted.keys() >= {f"{name}.bias" for name in plan.added_biases}
    assert all(torch.equal(stored[name], tensor) for name, tensor in refitted.items())
    assert any(stored[f"{name}.bias"].any() for name in plan.added_biases)
    assert made.facts.sizes.predicted == made.facts.sizes.on_disk <= made.facts.sizes.asked
    assert json.loads((made.artifact / "config.json").read_text())["model_type"] == MODEL_TYPE
    run = subprocess.run([sys.executable, "-c", FRESH, str(made.artifact)], capture_output=True, text=True, check=True)
    name, logits = json.loads(run.stdout.splitlines()[-1])
    here = AutoModelForCausalLM.from_pretrained(made.artifact, dtype=torch.float32)
    assert name == "LlamaForCausalLM"
    torch.testing.assert_close(torch.tensor(logits), here(input_ids=torch.arange(3, 40)[None]).logits)


def test_without_added_biases_the_artifact_is_stock(model, tmp_path, short_text):
    made = compress(model, tmp_path / "out", f"{BARE},reconstruction=least-squares]", short_text)
    assert json.loads((made.artifact / "config.json").read_text())["model_type"] == "llama"


def test_nothing_is_refitted_where_nothing_is_cut(model, tmp_path, short_text):
    recipe = f"llm-pruner[{QUICK},steps=0,adapter_rank=0,kept_per_layer={{0: 1.0, 1: 1.0, 2: 1.0}},bits=[8]"
    recipe += ",reconstruction=least-squares,added_biases=true]"
    made = compress(model, tmp_path / "out", recipe, short_text)
    assert Plan.read(made.artifact / "plan.json").added_biases == ()
    assert not (tmp_path / "out.run/measurements/reconstruction").exists()


@pytest.mark.parametrize("recipe", [BIASED, QUANTIZED])
def test_layer_by_layer_ends_in_the_same_bytes(
    made_of, model, tmp_path, short_text, one_layer_at_a_time, monkeypatch, recipe
):
    made = compress(model, tmp_path / "streamed", recipe, short_text)
    assert made.facts.memory.layer_by_layer and "reconstruction" in made.facts.memory.predicted
    monkeypatch.undo()
    whole = made_of(recipe)
    assert files(made.artifact) == files(whole.artifact) and not whole.facts.memory.layer_by_layer
    kept = "measurements/reconstruction"
    assert files(tmp_path / "streamed.run" / kept) == files(run_of(whole) / kept)


def test_the_whole_model_in_memory_has_them_too(model, tmp_path, short_text):
    made = compress(model, tmp_path / "out", TRAINED, short_text)
    biases = [n for n in load_file(made.artifact / "model.safetensors") if n.endswith("o_proj.bias")]
    assert biases and {row["choice"] for row in json.loads(rows_file(tmp_path).read_text())} <= {"bias", "sliced"}


def rows_file(tmp_path: Path) -> Path:
    return tmp_path / "out.run/measurements/reconstruction/linears.json"


class Interrupted(Exception):
    pass


def test_an_interrupted_stage_goes_on_at_its_layer(
    made_of, model, tmp_path, short_text, one_layer_at_a_time, monkeypatch
):
    def stop(name: str, done: int, total: int, detail: str = "") -> None:
        if name == "reconstruction" and done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        compress(model, tmp_path / "out", BIASED, short_text, on_progress=stop)
    seen = []
    note = lambda name, done, total, detail="": seen.append((name, done))
    again = compress(model, tmp_path / "out", BIASED, short_text, on_progress=note)
    assert [done for name, done in seen if name == "reconstruction"] == [3]
    assert "importance" not in dict(seen), "a finished stage is read back"
    monkeypatch.undo()
    assert files(again.artifact) == files(made_of(BIASED).artifact)


def test_the_recipe_s_settings_reach_the_linears(model, tmp_path, short_text):
    recipe = f"{BARE},reconstruction=least-squares,dampings=[0.5],held_out=0.5]"
    compress(model, tmp_path / "out", recipe, short_text)
    rows = json.loads(rows_file(tmp_path).read_text())
    assert len(rows) == 6 and {row["damping"] for row in rows} <= {0.5, None}
    assert all(row["error"] <= row["error_sliced"] and row["tokens"] == 8 * 64 for row in rows)


def test_other_settings_in_the_same_run_folder_are_another_result(made_of, model, tmp_path, short_text):
    other = QUANTIZED.replace("least-squares", "least-squares,dampings=[10.0]")
    first = made_of(QUANTIZED)
    shutil.copytree(run_of(first), tmp_path / "out.run")
    information = lambda: json.loads((tmp_path / "out.run/stages.json").read_text())["information"]
    before, measured = files(first.artifact), information()
    again = compress(model, tmp_path / "out", other, short_text)
    assert information()["inputs"] != measured["inputs"], "what is measured of the refitted model depends on how"
    assert before != files(again.artifact) == files(compress(model, tmp_path / "new", other, short_text).artifact)


def test_models_that_cannot_walk_layer_by_layer_are_refused(model, tmp_path, short_text, monkeypatch):
    found = prepare.shape_of
    exchanging = lambda graph: Graph(**{**vars(graph), "exchanges": ("layer 1 reads keys of layer 0",)})
    monkeypatch.setattr(
        prepare, "shape_of", lambda source: (s := found(source)) and dataclasses.replace(s, graph=exchanging(s.graph))
    )
    with pytest.raises(RecipeError, match="refits linears layer by layer.*keys of layer 0.*Set reconstruction to none"):
        compress(model, tmp_path / "out", BIASED, short_text)


# --- experts ---

MIXTURE = f"llm-pruner[{QUICK},steps=0,adapter_rank=0,protect_first=0,protect_last=0"
MIXTURE += ",reconstruction=least-squares]"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    sizes = dict(hidden_size=32, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2)
    folder = tmp_path_factory.mktemp("mixture") / "tiny"
    return save(tiny_model("mixtral", **sizes).to(torch.bfloat16), folder, tokenizer=True)


def test_refitted_stacks_of_experts_ship(made_of, mixture, tmp_path, short_text):
    from transformers import AutoModelForCausalLM

    made = made_of(MIXTURE, mixture)
    refitted = {}
    for path in (run_of(made) / "measurements/reconstruction").glob("*.safetensors"):
        refitted |= load_file(path)
    stacks = [f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)]
    loaded = AutoModelForCausalLM.from_pretrained(made.artifact, dtype=torch.bfloat16).state_dict()
    assert [tuple(refitted[name].shape) for name in stacks] == [(4, 32, 16)] * 2
    assert all(torch.equal(loaded[name], refitted[name]) for name in stacks)
    plain = compress(mixture, tmp_path / "plain", MIXTURE.replace("least-squares", "none"), short_text)
    sliced = AutoModelForCausalLM.from_pretrained(plain.artifact, dtype=torch.bfloat16).state_dict()
    assert not any(torch.equal(sliced[name], refitted[name]) for name in stacks)
    rows = {row.linear: row for row in made.facts.reconstruction}
    for name in stacks:
        row = rows[name]
        assert row.choice == "least-squares" and 1 <= row.experts <= 4 and row.error < row.error_sliced
        assert row.tokens == 8 * 64 * 2, "every token is sent to two experts"
    assert made.facts.sizes.predicted == made.facts.sizes.on_disk
    assert "linears and stacks of experts were refitted" in made.report.read_text()


def test_a_mixture_layer_by_layer_ends_in_the_same_bytes(
    made_of, mixture, tmp_path, short_text, one_layer_at_a_time, monkeypatch
):
    made = compress(mixture, tmp_path / "streamed", MIXTURE, short_text)
    assert made.facts.memory.layer_by_layer
    monkeypatch.undo()
    whole = made_of(MIXTURE, mixture)
    assert files(made.artifact) == files(whole.artifact) and not whole.facts.memory.layer_by_layer
