"""Which stage did the damage, and what is said of it."""

import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest
import torch
from tiny_folder import save, tiny_model
from transformers import AutoModelForCausalLM

from qpruner import api
from qpruner.damage import StageLosses
from qpruner.judge import loss as judge
from qpruner.judge.damage import dense_parameters, rise_when_smaller, rises, unigram_loss
from qpruner.judge.divergence import kl_to
from qpruner.model import corpus
from qpruner.model.load import inspect_source, load_model, load_tokenizer
from qpruner.plan import Plan
from qpruner.report import text_table
from qpruner.report.damage import Damage, StageLoss, sentences

QUICK = "steps=4,batch_size=2,window=64,calibration_windows=8,search_windows=6,evaluation_windows=4,width_grid=16"
SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_steps_add_up_to_the_whole():
    losses = [2.0, 3.5, 2.5, 2.75]
    assert rises(losses) == (1.5, -1.0, 0.25) and sum(rises(losses)) == losses[-1] - losses[0]
    assert rises([1.0]) == rises([]) == ()


def test_the_law_gives_the_losses_of_its_source():
    """L(70e9, inf) and L(280e9, inf) of arXiv:2203.15556 with A = 406.4, alpha = 0.34, by hand."""
    loss = lambda n: 1.69 + 406.4 / n**0.34
    assert loss(70e9) == pytest.approx(1.7735, abs=1e-4)
    assert rise_when_smaller(280_000_000_000, 70_000_000_000) == pytest.approx(loss(70e9) - loss(280e9), abs=1e-12)


def test_fewer_parameters_never_do_better_by_the_law():
    found = [rise_when_smaller(10**7, n) for n in (10**4, 10**5, 10**6, 10**7)]
    assert found == sorted(found, reverse=True) and found[-1] == 0.0
    parts = rise_when_smaller(10**9, 10**8) + rise_when_smaller(10**8, 10**7)
    assert rise_when_smaller(10**9, 10**7) == pytest.approx(parts)
    with pytest.raises(ValueError, match="0 parameters"):
        rise_when_smaller(10, 0)
    assert dense_parameters(1001) == 500


def test_frequencies_alone_lose_what_a_fitted_unigram_model_loses():
    ids = torch.randint(0, 50, (2000,), generator=torch.Generator().manual_seed(0)) ** 2 % 37
    counts = ids.bincount()
    logits = counts.double().log()
    fitted = torch.nn.functional.cross_entropy(logits.expand(len(ids), -1), ids).item()
    assert unigram_loss(counts.tolist()) == pytest.approx(fitted)
    assert unigram_loss([5] * 8) == pytest.approx(math.log(8)) and unigram_loss([7]) == unigram_loss([]) == 0.0


# --- words -----------------------------------------------------------------------------------------------------------


def damage(*losses: float, tolerance: float = 0.5, unigram: float = 6.0) -> Damage:
    names = ("original", "cut", "refitted", "rounded", "recovered")
    stages = tuple(StageLoss(stage=name, loss=loss, kl=0.0) for name, loss in zip(names, losses, strict=False))
    return Damage(stages=stages, windows=8, tolerance=tolerance, unigram=unigram)


def said(found: Damage, before: float, after: float, size_bytes: int = 7 * 10**9) -> list[str]:
    return list(sentences(found, before, after, parameters=7 * 10**9, size_bytes=size_bytes))


def test_a_small_rise_is_no_warning():
    assert said(damage(2.0, 2.1, 2.05), 2.0, 2.04) == []
    assert said(damage(2.0, 2.1, 2.05), 2.0, 1.9) == []


def test_a_large_rise_names_the_stage_that_did_most():
    (text, _) = said(damage(2.0, 2.2, 2.1, 3.0, 2.8), 2.1, 2.75)
    assert text == (
        "The loss rose by 0.65 nats per token, from 2.10 to 2.75; up to 0.5 is tolerated. Most of that came with "
        "rounding: +0.90, of +0.80 by all stages together, on 8 windows of the search text."
    )
    assert not any("tolerated" in text for text in said(damage(tolerance=0.7), 2.1, 2.75))
    assert said(damage(), 2.1, 2.75)[0].endswith("up to 0.5 is tolerated."), "stages were not measured"


def test_a_smaller_dense_model_is_held_against_it_with_both_numbers():
    allowed = rise_when_smaller(7 * 10**9, 3_500_000_000)
    assert said(damage(), 2.0, 2.0 + 0.99 * allowed) == []
    (text,) = said(damage(), 2.0, 2.0 + 2 * allowed)
    for part in ("3,500,000,000 of 7,000,000,000", f"would lose {allowed:.3f}", f"lost {2 * allowed:.3f}", "estimate"):
        assert part in text
    assert said(damage(), 2.0, 2.4, size_bytes=14 * 10**9) == [], "it is no smaller"


def test_a_model_that_is_beyond_use_is_said_to_be():
    first = said(damage(unigram=5.0), 2.0, 5.5)[0]
    assert first.startswith("The model predicts worse than token frequencies alone: its loss of 5.50")
    assert "So does the original (5.20)." in said(damage(unigram=5.0), 5.2, 5.5)[0]
    assert said(damage(2.0, math.inf), 2.0, math.nan) == [
        "The loss is nan: the model is broken. Most of that came with the cuts, before anything was refitted: +inf, of "
        "+inf by all stages together, on 8 windows of the search text."
    ]


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    made = tiny_model("llama", **SIZES).to(torch.bfloat16)
    return save(made, tmp_path_factory.mktemp("model") / "tiny", tokenizer=True)


def compress(model, out, text, recipe: str, budget: str = "60%", **options) -> api.Result:
    return api.compress(str(model), budget, out, recipe=recipe, calibration=text, measure_speed=False, **options)


UNIFORM = f"qpruner[{QUICK},allocation=uniform]"
REFITTED = f"qpruner[{QUICK},allocation=uniform,steps=0,reconstruction=least-squares]"
LEARNED = "bits=[4],rounding=gptq,network_steps=2,steps=0,loftq_iterations=0,embedding_bits=8"
STAGES = {
    f"llm-pruner[{QUICK}]": ["original", "cut", "recovered"],
    REFITTED: ["original", "cut", "refitted", "rounded"],
    f"qpruner[{QUICK},allocation=uniform,bits=[4],kept=1,steps=0]": ["original", "rounded"],
    f"qpruner[{QUICK},allocation=uniform,{LEARNED}]": [
        "original", "cut", "embeddings rounded", "rounded", "tuned", "as shipped",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def made(model, tmp_path_factory, short_text):
    """What a recipe gives, each made once."""

    @functools.cache
    def of(recipe: str) -> api.Result:
        budget = "80%" if recipe.startswith("llm-pruner") else "60%"
        return compress(model, tmp_path_factory.mktemp("made") / "out", short_text, recipe, budget)

    return of


@pytest.mark.parametrize("recipe", STAGES)
def test_stages_of_the_recipe_are_measured_and_no_others(made, recipe):
    result = made(recipe)
    stages = result.facts.damage.stages
    assert [s.stage for s in stages] == STAGES[recipe]
    assert stages[0].kl == 0.0 and all(s.kl > 0 for s in stages[1:])


def test_first_and_last_are_the_original_and_the_files(model, made, short_text):
    result = made(UNIFORM)
    source = inspect_source(str(model))
    parts = corpus.split_corpus(corpus.read_corpus(short_text, "calibration"))
    windows = corpus.token_windows(
        parts["search"], load_tokenizer(source), length=64, n_windows=6, fewest=2, seed=0
    )  # fmt: skip
    dense = load_model(source).float()
    written = AutoModelForCausalLM.from_pretrained(result.artifact, dtype=torch.float32)
    stages = result.facts.damage.stages
    assert stages[0].loss == pytest.approx(judge.evaluate_loss(dense, windows).loss, abs=1e-5)
    assert stages[-1].stage == "recovered"
    assert stages[-1].loss == pytest.approx(judge.evaluate_loss(written, windows).loss, abs=1e-5)
    assert stages[-1].kl == pytest.approx(kl_to(written, dense, windows).kl, abs=1e-5)


def test_layer_by_layer_measures_the_same(model, made, tmp_path, short_text, monkeypatch):
    from qpruner.model import memory

    whole = made(REFITTED).facts
    monkeypatch.setattr(memory, "fits", lambda *_: False)
    forecast = memory.forecast
    monkeypatch.setattr(
        "qpruner.shape.memory.forecast",
        lambda *args, **kw: dataclasses.replace(forecast(*args, **kw), resident=False),
    )
    parts = compress(model, tmp_path / "parts", short_text, REFITTED).facts
    assert parts.memory.layer_by_layer and not whole.memory.layer_by_layer and parts.damage == whole.damage


def test_nothing_is_measured_if_not_asked_for_and_the_artifact_is_the_same(model, made, tmp_path, short_text):
    both = made(UNIFORM), compress(model, tmp_path / "out", short_text, UNIFORM, measure_stages=False)
    assert both[1].facts.damage.stages == () and both[0].facts.damage.stages
    manifests = [(each.artifact / "manifest.json").read_bytes() for each in both]
    weights = [(each.artifact / "model.safetensors").read_bytes() for each in both]
    assert manifests[0] == manifests[1] and weights[0] == weights[1]
    assert set(json.loads(manifests[0])["fingerprints"]) == {"calibration", "search"}


def test_an_interrupted_run_measures_the_stages_once(model, made, tmp_path, short_text, monkeypatch):
    class Interrupted(Exception):
        pass

    def stop(job, folder, plan, *, trained):
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(StageLosses, "shipped", lambda self, *args, **kw: stop(*args, **kw))
        compress(model, tmp_path / "out", short_text, UNIFORM)
    shown = set()
    result = compress(model, tmp_path / "out", short_text, UNIFORM, on_progress=lambda name, *_: shown.add(name))
    assert not shown & {"loss, original", "loss, cut", "loss, rounded"} and "loss, recovered" in shown
    assert result.facts.damage == made(UNIFORM).facts.damage


def test_a_warning_reaches_the_table_the_page_and_a_second_call(model, tmp_path, short_text):
    recipe = UNIFORM.replace("steps=4", "steps=0")
    result = compress(model, tmp_path / "out", short_text, recipe, tolerance=-10.0)
    again = compress(model, tmp_path / "out", short_text, recipe, tolerance=-9.0)
    quiet = compress(model, tmp_path / "out", short_text, recipe)
    assert "up to -10 is tolerated" in text_table(result.facts).caption.plain
    assert "up to -10 is tolerated" in result.report.read_text()
    assert "up to -9 is tolerated" in text_table(again.facts).caption.plain
    assert "tolerated" not in text_table(quiet.facts).caption.plain
    assert "worse than token frequencies alone" in text_table(quiet.facts).caption.plain  # its weights are random
    assert Plan.read(result.artifact / "plan.json")
