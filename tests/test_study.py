"""A study: one cell per recipe, budget and seed; compared window by window; continued by the same command."""

import json

import pytest
import torch
from tiny_folder import save, tiny_model

from qpruner import api
from qpruner.errors import RecipeError
from qpruner.study import split_recipes

QUICK = "steps=2,batch_size=2,window=64,calibration_windows=4,search_windows=2,evaluation_windows=4"
SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)


def test_recipes_are_apart_at_spaces_and_commas_outside_brackets():
    assert split_recipes(["a,b[x=1,y=[4, 8]] c", "d"]) == ["a", "b[x=1,y=[4, 8]]", "c", "d"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    model = save(tiny_model("llama", **SIZES).to(torch.bfloat16), folder / "tiny", tokenizer=True)
    recipes = [f"qpruner[allocation={a},{QUICK}]" for a in ("uniform", "random")]
    again = lambda **options: api.study(str(model), recipes, folder / "out", budgets=["50%"], seeds=2, **options)
    return again, again(), recipes, folder / "out"


def test_there_is_a_row_for_every_recipe(study):
    _, found, recipes, folder = study
    assert [row["recipe"] for row in found["rows"]] == recipes
    assert all(row["seeds"] == 2 == len(row["loss_by_seed"]) for row in found["rows"])
    assert found == json.loads((folder / "study.json").read_text())
    assert len((folder / "table.md").read_text().splitlines()) == 4


def test_numbers_are_those_of_the_artifacts(study):
    _, found, _, folder = study
    for row in found["rows"]:
        losses = []
        for seed in (0, 1):
            slug = next(
                f
                for f in folder.iterdir()
                if row["recipe"][:22].split("[")[1] in f.name and f.name.endswith(f"seed{seed}")
            )
            losses.append(json.loads((slug / "manifest.json").read_text())["evaluation"]["artifact"]["loss"])
        assert row["loss_by_seed"] == pytest.approx(losses)
        assert row["loss"] == pytest.approx(sum(losses) / 2)
    first, second = found["rows"]
    assert first["against_baseline"] == 0
    assert second["against_baseline"] == pytest.approx(second["loss"] - first["loss"])


def test_what_cells_have_in_common_is_measured_once(study):
    *_, folder = study
    stages = [json.loads((f / "stages.json").read_text()) for f in folder.glob("*seed0.run")]
    assert len({s["importance"]["digest"] for s in stages}) == 1
    assert len({s["importance"]["inputs"] for s in stages}) == 1


def test_the_same_command_continues(study):
    again, found, *_ = study
    assert again() == found


def test_a_baseline_that_is_not_in_the_study_is_refused(study):
    again, *_ = study
    with pytest.raises(RecipeError, match="none of the study's recipes"):
        again(baseline="magnitude")
