"""Rounding with text as a stage of the main job: what ships are its codes, in the predicted bytes."""

import dataclasses
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
from qpruner.do import tune
from qpruner.errors import RecipeError
from qpruner.model.graph import Graph
from qpruner.plan import Plan

QUICK = "window=64,calibration_windows=8,search_windows=4,evaluation_windows=4,width_grid=16"
GPTAQ = f"gptaq[{QUICK},bits=[3],group_size=16]"
PRUNED = f"gptaq[{QUICK},bits=[3],group_size=16,kept=0.5,reconstruction=least-squares,added_biases=true]"
NARROW = f"gptaq[{QUICK},bits=[2],group_size=16,salient=2,precision=bfloat16]"
TRAINED = f"gptq[{QUICK},steps=2,batch_size=2,adapter_rank=4,adapters=beside,loftq_iterations=0]"
STARTED = f"gptaq[{QUICK},bits=[3],group_size=16,adapter_rank=4,adapters=beside]"
MIXED = f"gptq[{QUICK},bits=[2,4],group_size=16,symmetric=true,salient=2,allocation=mutual-information]"


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
def made_of(model, each_once, short_text):
    """What a recipe gives with nothing else asked for."""
    return each_once(lambda folder, recipe: compress(model, folder, recipe, short_text))


def run_of(made: api.Result) -> Path:
    return made.artifact.with_name(made.artifact.name + ".run")


def copied(made: api.Result, place: Path) -> Path:
    """The artifact, with its run folder beside it, where a test may change both."""
    for folder in (made.artifact, run_of(made)):
        shutil.copytree(folder, place / folder.name)
    return place / made.artifact.name


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def found_in(run: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in (run / "measurements/rounding").glob("*.safetensors") for n, t in load_file(path).items()}


FRESH = """
import sys, json, torch, qpruner
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.arange(3, 40)[None]
print(json.dumps([type(model).__name__, model(input_ids=ids).logits.tolist()]))
"""


@pytest.mark.parametrize("recipe", [GPTAQ, PRUNED, MIXED, NARROW], ids=["gptaq", "pruned", "mixed", "bfloat16"])
def test_the_codes_ship_in_the_predicted_bytes(made_of, recipe):
    made = made_of(recipe)
    stored, found = load_file(made.artifact / "model.safetensors"), found_in(run_of(made))
    assert sum(name.endswith(".codes") for name in found) >= 21
    assert all(torch.equal(stored[name], tensor) for name, tensor in found.items())
    assert made.facts.sizes.predicted == made.facts.sizes.on_disk <= made.facts.sizes.asked
    rows = json.loads((run_of(made) / "measurements/rounding/linears.json").read_text())
    assert len(rows) == 21 and all(row["tokens"] == 8 * 64 for row in rows)
    assert "rounding" in made.facts.memory.predicted


def test_it_loads_in_a_fresh_process(made_of):
    from transformers import AutoModelForCausalLM

    made = made_of(GPTAQ)
    run = subprocess.run([sys.executable, "-c", FRESH, str(made.artifact)], capture_output=True, text=True, check=True)
    name, logits = json.loads(run.stdout.splitlines()[-1])
    here = AutoModelForCausalLM.from_pretrained(made.artifact, dtype=torch.float32)
    assert name == "LlamaForCausalLM"
    torch.testing.assert_close(torch.tensor(logits), here(input_ids=torch.arange(3, 40)[None]).logits)


@pytest.mark.parametrize("recipe", [GPTAQ, PRUNED], ids=["gptaq", "pruned"])
def test_layer_by_layer_ends_in_the_same_bytes(
    made_of, model, tmp_path, short_text, one_layer_at_a_time, monkeypatch, recipe
):
    made = compress(model, tmp_path / "streamed", recipe, short_text)
    monkeypatch.undo()
    whole = made_of(recipe)
    assert made.facts.memory.layer_by_layer and not whole.facts.memory.layer_by_layer
    assert files(made.artifact) == files(whole.artifact)


def test_adapters_are_trained_beside_the_codes(model, tmp_path, short_text):
    made = compress(model, tmp_path / "out", TRAINED, short_text)
    stored, found = load_file(made.artifact / "model.safetensors"), found_in(tmp_path / "out.run")
    assert found and all(torch.equal(stored[name], tensor) for name, tensor in found.items())
    trained = load_file(next(made.artifact.rglob("adapter_model.safetensors")))
    assert any(tensor.any() for name, tensor in trained.items() if "lora_B" in name)


@pytest.mark.parametrize("recipe", [STARTED, STARTED.replace("gptaq[", "gptq[rounding=nearest,loftq_weighting=gram,")])
def test_adapters_start_with_the_codes(made_of, recipe):
    made = made_of(recipe)
    found = found_in(run_of(made))
    adapters = load_file(next(made.artifact.rglob("adapter_model.safetensors")))
    stored = load_file(made.artifact / "model.safetensors")
    assert adapters and all(torch.equal(tensor, found[name]) for name, tensor in adapters.items())
    assert all(torch.equal(stored[name], found[name]) for name in stored.keys() & found.keys())
    starts = made.facts.recovery.starts
    assert len(starts) == 21 and all(start.loftq < start.plain for start in starts)
    assert made.facts.sizes.predicted == made.facts.sizes.on_disk


def test_starts_in_memory_are_those_of_layer_by_layer(made_of, model, tmp_path, short_text):
    """Training that changes nothing leaves the adapters where they started."""
    streamed = made_of(STARTED)
    trained = STARTED.replace("[", "[steps=1,validations=0,batch_size=2,learning_rate=1e-30,", 1)
    whole = compress(model, tmp_path / "whole", trained, short_text)
    weights = lambda made: {n: b for n, b in files(made.artifact).items() if n.endswith(".safetensors")}
    assert weights(streamed) == weights(whole)


MERGED = ["bits=[3],group_size=16", "bits=[2,4],group_size=16,symmetric=true,salient=2,allocation=mutual-information"]
MERGED = [f"gptq[{each},{QUICK},steps=2,batch_size=2,adapter_rank=4,loftq_iterations=1" for each in MERGED]


@pytest.mark.parametrize("recipe", MERGED, ids=["alike", "mixed"])
def test_the_better_of_merged_and_beside_ships(made_of, model, tmp_path, short_text, recipe):
    made = compress(model, tmp_path / "out", f"{recipe},adapters=best]", short_text)
    found, plan = made.facts.recovery, Plan.read(made.artifact / "plan.json")
    assert plan == Plan.read(tmp_path / "out.run/plan.json")
    assert plan.adapters == found.ships == ("merged" if found.loss_merged <= found.loss_after else "beside")
    assert (made.artifact / "adapter").exists() == (found.ships == "beside")
    for how in ("merged", "beside") if recipe == MERGED[0] else (found.ships,):
        one = made_of(f"{recipe},adapters={how}]")
        assert one.facts.sizes.predicted == one.facts.sizes.on_disk <= one.facts.sizes.asked
        alike = Plan.read(one.artifact / "plan.json").specs == plan.specs  # merged adapters leave more room for bits
        assert alike or how == "merged"
        if alike and how == found.ships:
            same = [n for n in files(one.artifact) if n.endswith(".safetensors")]
            assert all(files(one.artifact)[n] == files(made.artifact)[n] for n in same)


def test_a_merge_is_rounded_with_feedback_and_goes_on_where_it_was(made_of, model, tmp_path, short_text):
    merged = made_of(f"{MERGED[0]},adapters=merged]")
    out = copied(merged, tmp_path)
    stored, before = load_file(out / "model.safetensors"), found_in(tmp_path / "out.run")
    again = tmp_path / "out.run/measurements/merging"
    found = {n: t for path in again.glob("*.safetensors") for n, t in load_file(path).items()}
    codes = [name for name in found if name.endswith(".codes")]
    assert len(codes) == 21 and all(torch.equal(stored[name], found[name]) for name in found)
    assert any(not torch.equal(before[name], found[name]) for name in codes)
    first = files(out)
    shutil.rmtree(out)
    assert files(compress(model, tmp_path / "out", f"{MERGED[0]},adapters=merged]", short_text).artifact) == first


def test_other_settings_in_the_same_run_folder_are_another_result(made_of, model, tmp_path, short_text):
    before = files(made_of(GPTAQ).artifact)
    shutil.rmtree(copied(made_of(GPTAQ), tmp_path))
    again = compress(model, tmp_path / "out", GPTAQ.replace("gptaq[", "gptaq[propagation=false,"), short_text)
    assert before != files(again.artifact)
    new = compress(model, tmp_path / "new", GPTAQ.replace("gptaq[", "gptaq[propagation=false,"), short_text)
    assert files(again.artifact) == files(new.artifact)


def test_ranges_alone_need_no_text(model, tmp_path, short_text):
    recipe = GPTAQ.replace("gptaq[", "gptq[rounding=nearest,")
    mse = compress(model, tmp_path / "mse", recipe, short_text)
    absmax = compress(model, tmp_path / "absmax", recipe.replace("[", "[ranges=absmax,", 1), short_text)
    assert not (tmp_path / "mse.run/measurements/rounding").exists()
    assert (mse.artifact / "model.safetensors").read_bytes() != (absmax.artifact / "model.safetensors").read_bytes()


def test_what_cannot_be_done_is_refused(model, tmp_path, short_text, monkeypatch):
    with pytest.raises(RecipeError, match="codes that are learned afterwards would undo that.*loftq_iterations to 0"):
        compress(model, tmp_path / "out", TRAINED.replace("loftq_iterations=0", "network_steps=2"), short_text)
    found = prepare.shape_of
    exchanging = lambda graph: Graph(**{**vars(graph), "exchanges": ("layer 1 reads keys of layer 0",)})
    monkeypatch.setattr(
        prepare, "shape_of", lambda source: (s := found(source)) and dataclasses.replace(s, graph=exchanging(s.graph))
    )
    with pytest.raises(RecipeError, match="rounds linears layer by layer.*keys of layer 0.*Set rounding to nearest"):
        compress(model, tmp_path / "out", GPTAQ, short_text)


def test_codes_are_learned_from_predictions_and_ship(model, tmp_path, short_text):
    recipe = GPTAQ.replace("gptaq[", "gptaq[bits=[2],group_size=8,network_steps=6,tuning_batch=2,")
    made = compress(model, tmp_path / "out", recipe, short_text)
    stored, learned = load_file(made.artifact / "model.safetensors"), tmp_path / "out.run/measurements/tuning"
    found = load_file(learned / "tuned.safetensors")
    assert sum(name.endswith(".codes") for name in found) == 21
    assert all(torch.equal(stored[name], tensor.to(stored[name].dtype)) for name, tensor in found.items())
    before = found_in(tmp_path / "out.run")
    tuned = json.loads((learned / "tuning.json").read_text())
    changed = any(not torch.equal(before[name], found[name]) for name in before)
    assert changed == (tuned["after"] < tuned["before"]) and len(tuned["curve"]) == 6


def test_codes_are_learned_layer_by_layer(made_of, model, tmp_path, short_text, one_layer_at_a_time, monkeypatch):
    monkeypatch.setattr(tune.Tuned, "helped", property(lambda tuned: True))  # on so little text it may not
    recipe = GPTAQ.replace("gptaq[", "gptaq[layer_steps=40,")
    compress(model, tmp_path / "tuned", recipe, short_text)
    tuned, plain = found_in(tmp_path / "tuned.run"), found_in(run_of(made_of(GPTAQ)))
    assert tuned.keys() == plain.keys() and any(not torch.equal(tuned[name], plain[name]) for name in plain)
