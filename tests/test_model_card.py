"""The card of an artifact: what hubs read of it, what is carried over, and that it depends on nothing else."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard

from qpruner import api

ORIGINAL = """---
license: apache-2.0
language: [en, de]
tags: [stories]
pipeline_tag: text-generation
---
# The original
"""
QUICK = "qpruner[bits=[4,8],allocation=uniform,adapter_rank=2,steps=0,calibration_windows=4,search_windows=4,"
QUICK += "evaluation_windows=4,window=32]"


@pytest.fixture(scope="module")
def results(small_llama, short_text, tmp_path_factory):
    """With a card of the original, and without; in folders of different names."""
    root = tmp_path_factory.mktemp("cards")
    made = []
    for name in ("with", "without"):
        folder = root / name / "tiny"
        shutil.copytree(small_llama, folder)
        if name == "with":
            (folder / "README.md").write_text(ORIGINAL)
            (folder / "LICENSE").write_text("as is")
        out = root / f"out-{name}"
        made.append(api.compress(str(folder), "50%", out, recipe=QUICK, calibration=short_text, measure_speed=False))
    return made


def test_hubs_read_it_and_the_licence_is_carried_over(results):
    card = ModelCard.load(results[0].artifact / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["language"], data["base_model"]) == ("apache-2.0", ["en", "de"], "tiny")
    assert data["tags"] == ["stories", "qpruner", "pruned", "quantized"]
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert (results[0].artifact / "LICENSE").read_text() == "as is"


def test_what_the_original_does_not_state_is_said_to_be_so(results):
    card = ModelCard.load(results[1].artifact / "README.md")
    assert "license" not in card.data.to_dict()
    assert "License of the original: not stated. Language: not stated." in card.text


def test_numbers_are_those_of_the_manifest_and_every_place_has_its_command(results):
    text = (results[0].artifact / "README.md").read_text()
    manifest = json.loads((results[0].artifact / "manifest.json").read_text())
    for key in ("asked", "predicted", "on_disk", "original_16bit"):
        assert f"{manifest['bytes'][key]:,}" in text
    assert f"{manifest['evaluation']['artifact']['loss']:.2f}" in text and "±" in text
    for layer in api.inspect(str(results[0].artifact))["layers"]:
        assert f"| {layer['heads']} | {layer['kv_heads']} | {layer['channels']} |" in text
    ranks = json.loads((results[0].artifact / "plan.json").read_text())["adapter_ranks"]
    assert f"{len(ranks)} adapters of rank " in text and "beside the weights, in `adapter/`" in text
    for command in ("import qpruner; from transformers", "--to hf --padded", "--to hf --with-code", "--seed 0 -o OUT"):
        assert command in text


def test_it_depends_on_nothing_but_the_artifact(results):
    """Not on where it was made: what differs is what was carried over."""
    with_card, without = ((r.artifact / "README.md").read_text() for r in results)
    after = lambda text: text[text.index("## What was done") :]
    assert after(with_card) == after(without)
    assert str(results[0].artifact.parent) not in with_card
