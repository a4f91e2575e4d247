"""A study: one cell per model, limit, recipe and seed; compared window by window; continued by the same command."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_folder import save, tiny_model
from typer.testing import CliRunner

from qpruner import api, matrix
from qpruner.cli import app
from qpruner.errors import RecipeError, StudyError
from qpruner.model import cost, load
from qpruner.recipe import split_recipes
from qpruner.report.study import drawings, markdown, sections
from qpruner.shape import Room, shape_of

QUICK = dict(
    steps=0,
    adapter_rank=0,
    protect_first=0,
    protect_last=0,
    window=64,
    calibration_windows=4,
    search_windows=2,
    evaluation_windows=4,
)
SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
RECIPES = {
    "magnitude": "qpruner[score=magnitude,width_grid=8]",
    "magnitude + fine": "qpruner[score=magnitude,width_grid=1]",
    "random": "qpruner[score=random,width_grid=8]",
    "impossible": "qpruner[score=random,layers=[0,9]]",
}
CELLS = 3 * 2 * 2  # recipes that can be done, kept fractions, seeds


def test_recipes_are_apart_at_spaces_and_commas_outside_brackets():
    assert split_recipes(["a,b[x=1,y=[4, 8]] c", "d"]) == ["a", "b[x=1,y=[4, 8]]", "c", "d"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory, short_text) -> dict:
    folder = tmp_path_factory.mktemp("study")
    model = save(tiny_model("llama", **SIZES).to(torch.bfloat16), folder / "tiny", tokenizer=True)
    return dict(
        models=[str(model)], recipes=RECIPES, kept=["80%", 0.5], seeds=2, changes=QUICK, calibration=short_text
    )  # fmt: skip


@pytest.fixture(scope="module")
def study(asked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serial") / "out"
    return api.study(**asked, output=folder, keep_artifacts=True), folder


@pytest.fixture(scope="module")
def half(asked, tmp_path_factory):
    """The second half of its cells, by two processes."""
    folder = tmp_path_factory.mktemp("half") / "out"
    return api.study(**asked | {"kept": ["50%"]}, output=folder, keep_artifacts=True, processes=2), folder


def rows_of(found: dict, recipe: str) -> list[dict]:
    return [row for row in found["rows"] if row["recipe"] == recipe]


def artifacts(folder):
    return {f.name: f for f in (folder / "runs").iterdir() if (f / "manifest.json").is_file()}


def test_there_is_a_row_for_every_place(study):
    found, folder = study
    assert [(row["limit"], row["recipe"]) for row in found["rows"]] == [
        (limit, recipe) for limit in ("80% kept", "50% kept") for recipe in RECIPES
    ]
    assert found == json.loads((folder / "study.json").read_text())
    assert len(found["cells"]) == 2 * 2 * len(RECIPES)


def test_numbers_are_those_of_the_artifacts(study):
    found, folder = study
    made = artifacts(folder)
    assert len(made) == CELLS
    for row in (row for row in found["rows"] if row["seeds"]):
        slugs = [json.loads(f.read_text()) for f in sorted((folder / "cells").iterdir())]
        assert row["loss"] == pytest.approx(sum(row["loss_by_seed"]) / 2)
        assert row["loss_increase"] == pytest.approx(row["loss"] - row["original_loss"])
        assert any(row["bytes"] == cell["bytes"] for cell in slugs)
    in_table = sorted(loss for row in found["rows"] if row["seeds"] for loss in row["loss_by_seed"])
    manifests = [json.loads((f / "manifest.json").read_text()) for f in made.values()]
    assert in_table == pytest.approx(sorted(m["evaluation"]["artifact"]["loss"] for m in manifests))
    assert all(
        set(m["evaluation"]) == {"original", "artifact"} for m in manifests
    )  # how far predictions moved is not asked


def test_differences_are_paired_with_the_baseline(study):
    found, _ = study
    assert found["baseline"] == "magnitude"
    for row, reference in zip(rows_of(found, "random"), rows_of(found, "magnitude"), strict=True):
        assert row["against_baseline"] == pytest.approx(row["loss"] - reference["loss"])
        losses = lambda cells, recipe, limit: torch.tensor(
            [c["losses"] for c in cells if (c["recipe"], c["limit"]) == (recipe, limit)], dtype=torch.float64
        ).mean(0)
        ours, theirs = (losses(found["cells"], recipe, row["limit"]) for recipe in ("random", "magnitude"))
        assert row["against_baseline_error"] == pytest.approx(float((ours - theirs).std() / 2))  # of four windows
        spread = torch.tensor(row["loss_increase_by_seed"], dtype=torch.float64).std()
        assert row["seed_spread"] == pytest.approx(float(spread))


def test_a_cell_that_fails_costs_itself_and_says_why(study):
    found, _ = study
    for row in rows_of(found, "impossible"):
        assert row["seeds"] == 0 and set(row["failed"]) == {"0", "1"}
        assert "prunes layers 0 to 8; the model has layers 0 to 3" in row["failed"]["0"]
    assert "failed: impossible, seed 1: recipe 'impossible' prunes layers" in markdown(found)


def test_kept_is_a_fraction_of_what_kv_groups_and_channels_hold(study, asked):
    shape = shape_of(load.inspect_source(asked["models"][0]))
    room = Room.of(shape)
    hidden, channels, heads, head_dim, layers = 64, 128, 8, 8, 4
    by_hand = layers * (3 * hidden * channels + 2 * hidden * heads * head_dim + 2 * hidden * (heads // 2) * head_dim)
    assert room.parameters == by_hand and room.size_bytes == 2 * by_hand
    header = cost.header_bytes(shape.tensors)
    others = shape.source.bytes_16bit - 2 * by_hand
    assert room.limit_bytes(0.5) == others + header + by_hand
    found, folder = study
    for row, kept in zip(rows_of(found, "magnitude + fine"), (0.8, 0.5), strict=True):
        assert row["bytes"] <= room.limit_bytes(kept) and kept - 0.1 < row["kept"] <= kept
        assert row["kept"] == pytest.approx(1 - (row["parameters_before"] - row["parameters"]) / by_hand)
    manifests = [json.loads((f / "manifest.json").read_text()) for f in artifacts(folder).values()]
    assert {m["bytes"]["asked"] for m in manifests} == {room.limit_bytes(0.8), room.limit_bytes(0.5)}


def test_recipes_get_the_same_bytes_to_spend_on_units(asked):
    chosen = matrix.of(asked["models"], recipes=["qpruner[kept=0.3,bits=[4,8]]"], kept=["80%"])
    recipe = chosen.recipe(chosen.reference, None)
    assert (recipe.kept, recipe.shrink_to_fit, recipe.bits, recipe.adapters) == (1, True, (16,), "merged")


def test_what_cells_have_in_common_is_measured_once(study):
    _, folder = study
    stages = [json.loads((f / "stages.json").read_text()) for f in folder.glob("runs/*.run") if "magnitude" in f.name]
    assert len({s["original"]["inputs"] for s in stages}) == 1
    assert len({s["importance"]["inputs"] for s in stages}) == 2  # seeds


class Killed(BaseException):
    pass


def test_a_killed_study_goes_on_and_keeps_numbers_alone(half, asked, tmp_path, monkeypatch):
    whole, folder = half
    asked, n_cells = asked | {"kept": ["50%"]}, CELLS // 2
    out, calls = tmp_path / "out", []
    compress = api.compress

    def dies(*args, **kwargs):
        calls.append(args)
        if len(calls) > 3:
            raise Killed
        return compress(*args, **kwargs)

    monkeypatch.setattr(api, "compress", dies)
    with pytest.raises(Killed):
        api.study(**asked, output=out)
    done = {f.name: f.stat().st_mtime_ns for f in (out / "cells").iterdir()}
    assert 0 < len(done) < n_cells
    calls.clear()
    monkeypatch.setattr(api, "compress", lambda *args, **kwargs: calls.append(args) or compress(*args, **kwargs))
    found = api.study(**asked, output=out)
    assert {name: (out / "cells" / name).stat().st_mtime_ns for name in done} == done
    assert len(calls) == n_cells + 2 - len(done)  # what failed is tried again
    assert markdown(found) == markdown(whole)
    assert not list(out.rglob("*.safetensors")) or {f.parent.name for f in out.rglob("*.safetensors")} == {"common"}
    assert (out / "table.md").read_text() == (folder / "table.md").read_text()


def test_processes_make_the_same_bytes(study, half):
    (found, folder), (parallel, out) = study, half
    without_seconds = lambda cells: [{k: v for k, v in cell.items() if k != "seconds"} for cell in cells]
    serial = [cell for cell in found["cells"] if cell["limit"] == "50% kept"]
    assert without_seconds(parallel["cells"]) == without_seconds(serial)
    made = artifacts(out)
    assert len(made) == CELLS / 2
    for name, ours in made.items():
        for file in ours.iterdir():
            assert file.read_bytes() == (folder / "runs" / name / file.name).read_bytes()


def test_a_changed_recipe_is_another_cell(study, asked, tmp_path):
    _, serial = study
    shutil.copytree(serial, tmp_path / "out")
    changed = asked | {"recipes": {"magnitude": "qpruner[score=magnitude,width_grid=4]"}, "seeds": 1, "kept": ["50%"]}
    found = api.study(**changed, output=tmp_path / "out")
    assert len(list((tmp_path / "out/cells").iterdir())) == CELLS + 1
    assert [row["recipe"] for row in found["rows"]] == ["magnitude"]


# --- what a study may say ---------------------------------------------------------------------------------------------


def test_a_file_says_what_options_say(asked, tmp_path):
    file = tmp_path / "study.yaml"
    written = asked | {"calibration": str(asked["calibration"]), "kept": ["80%", "50%"]}
    file.write_text(json.dumps(written))  # which is YAML
    assert matrix.of(str(file)) == matrix.of(**asked)
    assert matrix.of(file, seeds=7).seeds == 7


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[1] / "benchmarks").glob("*.yaml")), ids=lambda f: f.stem
)
def test_the_studies_beside_the_benchmarks_can_be_read(file):
    chosen = matrix.read(file)
    assert chosen.reference in chosen.recipes and chosen.limits


def test_texts_of_a_model_stand_before_those_of_all(tmp_path):
    chosen = matrix.of(
        ["a", {"model": "x/b", "name": "c", "evaluation": "own.txt"}], recipes=["qpruner"], evaluation="all.txt"
    )
    assert [(s.name, str(s.evaluation)) for s in chosen.subjects] == [("a", "all.txt"), ("c", "own.txt")]


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"recipe": ["qpruner"]}, StudyError, r"unknown key\(s\): 'recipe'. Accepted: .*recipes"),
        ({"models": [{"model": "a", "text": "b"}]}, StudyError, r"models.0.text: Extra inputs"),
        ({"baseline": "vector"}, StudyError, "'vector' is none of the study's recipes: magnitude"),
        ({"kept": ["120%"]}, StudyError, "'120%' is no kept fraction. Accepted: 80%"),
        ({"budgets": ["50%"]}, StudyError, "not both"),
        ({"models": ["x/a", "y/a"]}, StudyError, "two models have the same name"),
        ({"changes": {"stepps": 1}}, RecipeError, "unknown key"),
        ({"recipes": ["qpruner", "qpruner[evaluation_windows=3]"], "changes": {}}, StudyError, "different windows"),
        ({"vary": {"window": [64], "steps": [1]}}, StudyError, "vary"),
    ],
)
def test_what_cannot_be_meant_is_refused(asked, changed, error, match):
    with pytest.raises(error, match=match):
        matrix.of(**(asked | changed))


def test_the_command_line_says_what_a_call_says(monkeypatch, tmp_path):
    said = {}
    monkeypatch.setattr(api, "study", lambda models, output, on_progress, **given: said.update(given) or {"rows": []})
    words = ["study", "a", "b", "--recipes", "qpruner vector", "--kept", "80%", "--kept", "0.5", "--seeds", "2"]
    words += ["--vary", "steps=1,2", "--changes", "bits=[4,8],window=64", "--processes", "3", "-o", str(tmp_path)]
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 0, ended.output
    assert said == dict(
        recipes=["qpruner vector"], kept=["80%", "0.5"], seeds=2, vary={"steps": [1, 2]}, processes=3,
        changes={"bits": [4, 8], "window": 64},
    )  # fmt: skip
    refused = CliRunner().invoke(app, ["study", "a", "--recipes", "qpruner", "--vary", "steps"])
    assert refused.exit_code == 2 and "does not say what varies" in refused.output


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_every_dot_is_a_row_with_its_error(study):
    found, folder = study
    drawn = {name: figure for name, _, _, figure, _ in drawings(found)}
    assert set(drawn) == {"loss_increase-0", "against_baseline-0"}
    for name, key in (("loss_increase-0", "loss_increase"), ("against_baseline-0", "against_baseline")):
        of = [t for t in drawn[name].data if t.error_x.array is not None]
        dots = [(x, e) for t in of for x, e in zip(t.x, t.error_x.array, strict=True)]
        rows = [r for r in found["rows"] if r["seeds"] and (key == "loss_increase" or r["recipe"] != "magnitude")]
        assert sorted(dots) == sorted((r[key], r[f"{key}_error"]) for r in rows)
    page = (folder / "study.html").read_text()
    assert all(section.title in page for section in sections(found))


def test_a_key_that_varies_is_drawn_against_the_loss(asked, tmp_path):
    few = asked | {"recipes": {"random": RECIPES["random"]}, "seeds": 1, "kept": ["50%"]}
    found = api.study(**few, output=tmp_path / "out", vary={"calibration_windows": [4, 5]})
    assert [row["value"] for row in found["rows"]] == [4, 5]
    ((name, _, _, figure, _),) = drawings(found)
    assert name == "varied-0" and list(figure.data[0].x) == [4, 5]
    assert list(figure.data[0].y) == [row["loss_increase"] for row in found["rows"]]
    assert "| random | 5 |" in markdown(found)
