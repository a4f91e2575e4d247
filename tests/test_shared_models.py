"""The main job on a real model of another make, where the shared models are at hand."""

import json
from pathlib import Path

import pytest

from qpruner import api

SHARED = Path(__file__).parents[2] / "shared"
STORIES = SHARED / "models/stories260K"
TEXT = SHARED / "data/tinystories/train.jsonl.gz"

pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason="the shared models are not beside this checkout")


def test_stories260k_goes_through_the_main_job(tmp_path):
    recipe = "qpruner[trials=10,steps=20,calibration_windows=16,search_windows=8,evaluation_windows=20]"
    made = api.compress(str(STORIES), "60%", tmp_path / "out", recipe=recipe, calibration=TEXT, measure_speed=False)
    manifest = json.loads((made.artifact / "manifest.json").read_text())
    assert manifest["bytes"]["on_disk"] == manifest["bytes"]["predicted"] <= manifest["bytes"]["asked"]
    loss = manifest["evaluation"]
    # Stories one after the other in a window, which the model was not trained on; chance would be 6.2.
    assert loss["original"]["loss"] < 2.4
    assert loss["artifact"]["loss"] < 3.5
    found = api.evaluate(str(made.artifact), text=SHARED / "data/tinystories/dev.jsonl.gz", windows=10)
    assert found["loss"] < 3.5
