"""A joint search as a job: from a request to a front, and from the front to artifacts of any size."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_folder import save, tiny_model
from transformers import AutoModelForCausalLM

from qpruner import api
from qpruner.errors import BudgetError, OutputError, RecipeError
from qpruner.joint.past import Past
from qpruner.plan import Plan

RECIPE = (
    "auto[window=64,calibration_windows=8,search_windows=4,sensitivity_windows=4,evaluation_windows=4,width_grid=32,"
    "width_choices=3,bits=[2,4],group_sizes=[],network_steps=0,gate_steps=4,tuning_batch=2,trials=16,finalists=2,dampings=[0.01]]"
)
BUDGETS = ("20%", "40%")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=8, num_key_value_heads=4)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    return save(tiny_model("llama", **sizes, num_hidden_layers=3).to(torch.bfloat16), folder, tokenizer=True)


def search(model, folder, text, **options):
    options = dict(recipe=RECIPE, calibration=text) | options
    return api.search(str(model), options.pop("budgets", BUDGETS), folder, **options)


def points(folder: Path, name: str = "trials") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def front(model, tmp_path_factory, short_text):
    return search(model, tmp_path_factory.mktemp("search") / "run", short_text, controls=["greedy", "random"])


def test_every_limit_gets_the_best_trial_that_fits(front):
    assert [limit.text for limit in front.facts.limits] == list(BUDGETS)
    for limit in front.facts.limits:
        inside = [t["loss"] for t in points(front.folder) if t["size_bytes"] <= limit.size_bytes]
        chosen = front.facts.trial(limit.trial)
        assert chosen.size_bytes <= limit.size_bytes and chosen.loss == min(inside)
    losses = [front.facts.trial(limit.trial).loss for limit in front.facts.limits]
    assert losses[0] > losses[1] > 0


def test_the_front_is_what_no_trial_beats(front):
    stored = json.loads((front.folder / "front.json").read_text())
    every = points(front.folder)
    for point in stored:
        assert not any(t["size_bytes"] <= point["size_bytes"] and t["loss"] < point["loss"] for t in every)
    sizes, losses = [p["size_bytes"] for p in stored], [p["loss"] for p in stored]
    assert sizes == sorted(sizes) and losses == sorted(losses, reverse=True)


def test_predictions_are_compared_with_measurements_in_every_run(front):
    assert len(front.facts.random_plans) == 20
    assert all(p.measured is not None and p.predicted > 0 for p in front.facts.random_plans)
    assert "random plan" in front.report.read_text()


def test_a_search_that_was_cut_off_goes_on_with_the_same_trials(front, model, tmp_path, short_text):
    class Stop(Exception):
        pass

    def stop(stage, done, total, *rest):
        if stage == "trials" and done > 9:
            raise Stop

    with pytest.raises(Stop):
        search(model, tmp_path / "run", short_text, on_progress=stop)
    assert 0 < len(points(tmp_path / "run")) < 16
    seen = set()
    search(model, tmp_path / "run", short_text, on_progress=lambda stage, *_: seen.add(stage))
    assert points(tmp_path / "run") == points(front.folder)
    assert "trials" in seen and not {"sensitivities", "importance", "random plans"} & seen


def test_workers_change_nothing(front, model, tmp_path, short_text):
    search(model, tmp_path / "run", short_text, workers=2)
    assert points(tmp_path / "run") == points(front.folder)


def test_any_point_is_made_without_searching(front, model, tmp_path, short_text):
    for budget in ("20%", "33%"):  # one that was asked for, and one that was not
        seen = set()
        made = api.compress(
            str(model), budget, tmp_path / f"out-{budget}", from_run=front.folder, measure_speed=False,
            on_progress=lambda stage, *_, seen=seen: seen.add(stage),
        )  # fmt: skip
        assert made.facts.sizes.on_disk <= made.facts.sizes.asked
        assert not {"trials", "sensitivities", "importance", "random plans"} & seen
        assert Plan.read(made.artifact / "plan.json").embeddings or budget == "33%"
        loaded = AutoModelForCausalLM.from_pretrained(made.artifact)
        assert torch.isfinite(loaded(input_ids=torch.arange(3, 20)[None]).logits).all()


@pytest.fixture(scope="module")
def by_itself(model, tmp_path_factory, short_text):
    """What `compress` makes by a search of its own."""
    out = tmp_path_factory.mktemp("auto") / "out"
    return api.compress(str(model), "25%", out, recipe=RECIPE, calibration=short_text, measure_speed=False)


def test_auto_searches_for_its_own_budget(by_itself, model, tmp_path, short_text):
    made = by_itself
    assert made.facts.sizes.on_disk <= made.facts.sizes.asked
    assert "random plan" in made.report.read_text()
    compared = finalists(made)
    assert len(compared) == 2 and min(compared) > 0
    again = api.compress(
        str(model), "25%", tmp_path / "again", recipe=RECIPE, calibration=short_text, measure_speed=False
    )
    assert (again.artifact / "model.safetensors").read_bytes() == (made.artifact / "model.safetensors").read_bytes()


def finalists(made) -> list[float]:
    return json.loads((made.report.parent / "measurements" / "finalists.json").read_text())


def test_of_finalists_the_nearest_to_the_original_is_taken(by_itself, model, tmp_path, short_text, monkeypatch):
    monkeypatch.setattr(sys.modules["qpruner.compress"], "min", max, raising=False)
    options = dict(recipe=RECIPE, calibration=short_text, measure_speed=False)
    farthest = api.compress(str(model), "25%", tmp_path / "out", **options)
    assert finalists(by_itself) == finalists(farthest)
    nearest, other = (Plan.read(made.artifact / "plan.json") for made in (by_itself, farthest))
    assert nearest != other


def test_a_search_whose_text_changed_or_of_another_version_is_not_read_back(model, tmp_path, short_text, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(short_text.read_text())
    recipe = RECIPE.replace("trials=16", "trials=4")
    front = search(model, tmp_path / "run", text, recipe=recipe, budgets=["30%"])
    text.write_text(short_text.read_text().replace("follows", "precedes"))
    with pytest.raises(OutputError, match="calibration text .* has changed since"):
        api.compress(str(model), "30%", tmp_path / "out", from_run=front.folder)
    monkeypatch.setattr("qpruner.joint.past.__version__", "99")
    with pytest.raises(OutputError, match="and this is 99"):
        api.compress(str(model), "30%", tmp_path / "out", from_run=front.folder)
    assert not (tmp_path / "out.run").exists()


def test_what_cannot_be_searched_is_refused_before_anything_is_written(model, tmp_path, short_text, front):
    with pytest.raises(BudgetError, match="smallest reachable"):
        search(model, tmp_path / "run", short_text, budgets=["1%"])
    with pytest.raises(RecipeError, match="a search needs joint"):
        search(model, tmp_path / "run", short_text, recipe="qpruner")
    with pytest.raises(RecipeError, match="no control 'grid'"):
        search(model, tmp_path / "run", short_text, controls=["grid"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(OutputError, match="another seed"):
        search(model, front.folder, short_text, controls=["greedy", "random"], seed=3)
    with pytest.raises(OutputError, match="brings its own seed"):
        api.compress(str(model), "30%", tmp_path / "out", from_run=front.folder, seed=3)
    other = save(tiny_model("llama", seed=1).to(torch.bfloat16), tmp_path / "other", tokenizer=True)
    with pytest.raises(OutputError, match="was of other weights than 'other'"):
        api.compress(str(other), "60%", tmp_path / "out", from_run=front.folder)
    assert not (tmp_path / "out.run").exists()
    with pytest.raises(OutputError, match="no search in"):
        Past.open(tmp_path)


def test_a_target_bounds_what_is_tried(model, tmp_path, short_text):
    recipe = RECIPE.replace("bits=[2,4]", "bits=[3,4,8],group_size=32,scale_bits=16").replace(
        "width_grid=32", "width_grid=8"
    )
    front = search(model, tmp_path / "run", short_text, recipe=recipe, budgets=["50%"], target="gguf")
    (limit,) = front.facts.limits
    specs = {row.spec for layer in limit.layers for row in layer.projections}
    assert specs and not any("int3" in spec for spec in specs)
    assert all(layer.channels_kept % 32 == 0 for layer in limit.layers)


def test_a_target_of_one_width_gets_one(tmp_path, short_text):
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=8, num_hidden_layers=2)
    model = save(tiny_model("gpt_neox", **sizes).to(torch.bfloat16), tmp_path / "neox", tokenizer=True)
    recipe = RECIPE.replace("bits=[2,4]", "bits=[4,8],group_size=32,scale_bits=16")
    front = search(model, tmp_path / "run", short_text, recipe=recipe, budgets=["30%", "60%"], target="gguf")
    for limit in front.facts.limits:
        assert len({(layer.kv_groups_kept, layer.channels_kept) for layer in limit.layers if layer.stays}) == 1
