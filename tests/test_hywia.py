"""The recipe `hywia` from a model to an artifact: scores fused on the way, inputs that are gone made up for."""

import itertools
import json
from pathlib import Path

import pytest
from test_compress import QUICK, Interrupted, one_layer_at_a_time, weights  # noqa: F401

from qpruner import api
from qpruner import recipe as recipes
from qpruner.decide.fusion import WAYS
from qpruner.errors import RecipeError

PLAIN = f"{QUICK},fusion_steps=6"


@pytest.fixture(scope="module")
def model(small_llama) -> Path:
    return small_llama


@pytest.fixture
def compress(short_text):
    def run(model, out, recipe=f"hywia[{PLAIN}]", **options) -> api.Result:
        return api.compress(
            str(model), "70%", out, recipe=recipe, calibration=short_text, measure_speed=False, **options
        )

    return run


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory, short_text) -> api.Result:
    out = tmp_path_factory.mktemp("run") / "out"
    return api.compress(str(model), "70%", out, recipe=f"hywia[{PLAIN}]", calibration=short_text, measure_speed=False)


def test_what_ships_is_what_was_asked_and_predicted(finished):
    manifest = json.loads((finished.artifact / "manifest.json").read_text())
    assert manifest["bytes"]["predicted"] == manifest["bytes"]["on_disk"] <= manifest["bytes"]["asked"]
    assert manifest["bytes"]["on_disk"] > 0.9 * manifest["bytes"]["asked"]


def test_every_way_was_tried_and_the_best_is_named(finished):
    fusion = finished.facts.fusion
    assert set(fusion.losses) == set(WAYS) and fusion.way == min(fusion.losses, key=fusion.losses.get)
    assert len(fusion.curve) == 6
    learned = {b.group: b.fine for b in fusion.blend if b.way == "learned"}
    assert all(0 < fine < 1 for fine in learned.values()) and len(set(learned.values())) > 1
    assert {b.kind for b in fusion.blend} == {"kv_group", "channel"}


def test_what_was_refitted_is_reported(finished):
    rows = finished.facts.reconstruction
    assert rows and all(row.error <= row.error_sliced + 1e-9 for row in rows)
    assert "What least squares made up for" in finished.report.read_text()


def test_layer_by_layer_ends_in_the_same_bytes(compress, finished, model, tmp_path, one_layer_at_a_time):  # noqa: F811
    made = compress(model, tmp_path / "streamed")
    assert made.facts.memory.layer_by_layer
    assert weights(made.artifact) == weights(finished.artifact)


@pytest.mark.parametrize("stage", ["fusion", "trials of fusion"])
def test_an_interrupted_fusion_ends_in_the_same_bytes(compress, finished, model, tmp_path, stage):
    def stop(at: str, done: int, total: int, *rest) -> None:
        if at == stage and done == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        compress(model, tmp_path / "out", on_progress=stop)
    assert weights(compress(model, tmp_path / "out").artifact) == weights(finished.artifact)


@pytest.mark.parametrize("way, scope", [*zip(WAYS, itertools.cycle(("layer", "global"))), ("learned", "global")])
def test_a_single_way_can_be_asked_for_in_either_scope(compress, model, tmp_path, way, scope):
    """A way knows nothing of the scope: one of each is enough, and both of the last."""
    recipe = f"hywia[{PLAIN},fusion={way},scope={scope},reconstruction=none,steps=0,adapter_rank=0]"
    made = compress(model, tmp_path / "out", recipe)
    assert made.facts.fusion.way == way and not made.facts.reconstruction


def test_what_cannot_be_fused_is_refused():
    for changes, message in (
        ("layers_kept=0.5", "keeps all its layers"),
        ("worth=score", "per stored byte"),
    ):
        with pytest.raises(RecipeError, match=message):
            recipes.load(f"hywia[{changes}]")
