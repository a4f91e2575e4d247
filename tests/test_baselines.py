"""The published baselines as recipes: each goes from a model and a size to an artifact of at most that size."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_compress import QUICK, SMALL, Interrupted, one_layer_at_a_time, weights  # noqa: F401

from qpruner import api
from qpruner.errors import BudgetError
from qpruner.plan import Plan

PLAIN = f"{QUICK},steps=0,adapter_rank=0,reconstruction=none,added_biases=false"
NAMES = ("wanda-sp", "flap", "shortgpt", "magnitude")


@pytest.fixture(scope="module")
def model(small_llama) -> Path:
    return small_llama


@pytest.fixture
def compress(short_text):
    def run(model, out, **options) -> api.Result:
        return api.compress(
            str(model), options.pop("budget"), out, calibration=short_text, measure_speed=False, **options
        )

    return run


@pytest.mark.parametrize("name", NAMES)
def test_what_ships_is_what_was_asked_and_predicted(compress, model, tmp_path, name):
    made = compress(model, tmp_path / "out", budget="70%", recipe=f"{name}[{PLAIN}]")
    manifest = json.loads((made.artifact / "manifest.json").read_text())
    assert manifest["bytes"]["predicted"] == manifest["bytes"]["on_disk"] <= manifest["bytes"]["asked"]
    plan = Plan.read(made.artifact / "plan.json")
    predicted = api.inspect(str(model), recipe=f"{name}[{PLAIN}]", budget="70%")["predicted"]
    if name == "shortgpt":
        assert plan.layers is not None and all(len(units) in (4, 8, 128, 64) for units in plan.kept.values())
        assert (predicted["bytes"], predicted["layers"]) == (manifest["bytes"]["on_disk"], len(plan.layers))
    else:
        assert plan.layers is None and min(len(units) for n, units in plan.kept.items() if n.endswith("mlp")) < 128
        assert manifest["bytes"]["on_disk"] > 0.9 * manifest["bytes"]["asked"]
    if name in ("wanda-sp", "magnitude"):
        assert predicted["kept"] == {n: len(units) for n, units in plan.kept.items()}


@pytest.mark.parametrize("name", ["wanda-sp", "flap", "shortgpt"])
def test_layer_by_layer_ends_in_the_same_bytes(compress, model, tmp_path, one_layer_at_a_time, monkeypatch, name):  # noqa: F811
    made = compress(model, tmp_path / "streamed", budget="70%", recipe=f"{name}[{PLAIN}]")
    monkeypatch.undo()
    whole = compress(model, tmp_path / "whole", budget="70%", recipe=f"{name}[{PLAIN}]")
    assert made.facts.memory.layer_by_layer and not whole.facts.memory.layer_by_layer
    assert weights(made.artifact) == weights(whole.artifact)


def test_layers_of_least_influence_go_and_a_killed_pass_goes_on(compress, model, tmp_path, one_layer_at_a_time):  # noqa: F811
    """Two of the layers do nothing at all: they go, whatever their weights."""
    idle = tmp_path / "idle"
    idle.mkdir()
    for path in model.iterdir():
        (idle / path.name).write_bytes(path.read_bytes())
    tensors = {k: v.clone() for k, v in load_file(idle / "model.safetensors").items()}
    for layer in (1, 2):
        for linear in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{linear}.weight"] *= 0
        tensors[f"model.layers.{layer}.mlp.gate_proj.weight"] *= 100
    save_file(tensors, idle / "model.safetensors", metadata={"format": "pt"})

    def stop(name: str, done: int, total: int, detail: str = "") -> None:
        if name == "block influence" and done == 2:
            raise Interrupted

    recipe = f"shortgpt[{PLAIN}]"
    with pytest.raises(Interrupted):
        compress(idle, tmp_path / "out", budget="70%", recipe=recipe, on_progress=stop)
    seen = []
    note = lambda name, done, total, detail="": seen.append(done) if name == "block influence" else None
    made = compress(idle, tmp_path / "out", budget="70%", recipe=recipe, on_progress=note)
    assert seen == [3, 4] and Plan.read(made.artifact / "plan.json").layers == (0, 3)
    by_weight = compress(idle, tmp_path / "by weight", budget="70%", recipe=f"shortgpt[{PLAIN},layer_score=units]")
    assert Plan.read(by_weight.artifact / "plan.json").layers == (1, 2)
    losses = [json.loads((r.artifact / "manifest.json").read_text())["evaluation"] for r in (made, by_weight)]
    assert losses[0]["artifact"]["loss"] == pytest.approx(losses[0]["original"]["loss"], abs=1e-6)
    assert abs(losses[1]["artifact"]["loss"] - losses[1]["original"]["loss"]) > 1e-3


def test_a_budget_that_not_even_one_layer_meets_is_refused_before_anything_is_read(compress, model, tmp_path):
    with pytest.raises(BudgetError, match="are stored with 1 of 4 decoder layers"):
        compress(model, tmp_path / "out", budget="10%", recipe=f"shortgpt[{PLAIN}]")
    assert list(tmp_path.iterdir()) == []


def test_depth_and_width_can_shrink_together(compress, model, tmp_path):
    recipe = f"shortgpt[{PLAIN},score=wanda-sp,kept=0.75]"
    made = compress(model, tmp_path / "out", budget="75%", recipe=recipe)
    plan = Plan.read(made.artifact / "plan.json")
    whole = compress(model, tmp_path / "whole", budget="75%", recipe=f"shortgpt[{PLAIN}]")
    assert len(plan.layers) > len(Plan.read(whole.artifact / "plan.json").layers)
    assert {len(units) for n, units in plan.kept.items() if n.endswith("mlp")} == {96}
    assert made.facts.sizes.on_disk <= made.facts.sizes.asked


def test_what_needs_no_gradient_is_forecast_to_take_less_memory():
    peak = lambda score: api.inspect("pystdlib-5M", recipe=f"llm-pruner[score={score},steps=0,adapter_rank=0]")[
        "predicted"
    ]["memory_bytes"]["importance"]
    assert peak("magnitude") < peak("wanda-sp") < peak("vector") < peak("element-first") < peak("element-mixed")
    stages = api.inspect("pystdlib-5M", recipe="shortgpt", budget="80%")["predicted"]["memory_bytes"]
    assert "block influence" in stages
