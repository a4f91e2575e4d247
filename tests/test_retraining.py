"""recover: any artifact is trained beside its base, goes on where it was cut off, and is whole or absent."""

import functools
import json
import shutil

import pytest
import torch
from tiny_folder import save, tiny_model
from tiny_tasks import QUESTIONS, write_rows
from transformers import AutoModelForCausalLM

from qpruner import api
from qpruner.errors import CorpusError, ModelError, RecipeError
from qpruner.model import adapters
from qpruner.retraining import stages

TEXT = "the cat sat on a mat and the dog ran to the hill where a bird sang of rain and wind in the old tree"
WORDS = TEXT.split()
LLAMA = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, initializer_range=0.25)
SHORT = (
    "steps=6,batch_size=2,window=32,validations=2,validation_windows=2,search_windows=2,evaluation_windows=3,"
    "learning_rate=0.02,adapter_dropout=0.0,warmup_steps=1"
)
COMPRESS = (
    "window=32,calibration_windows=4,evaluation_windows=3,search_windows=2,adapter_rank=0,steps=0,width_grid=8,"
    "protect_first=0,protect_last=0"
)
RECIPES = {
    "packed": f"qpruner[bits=[2],kept=0.5,allocation=uniform,{COMPRESS}]",
    "mixed": f"gptq[bits=[2,8],kept=0.5,group_size=16,salient=2,allocation=random,{COMPRESS}]",
    "16 bits": f"llm-pruner[kept=0.5,{COMPRESS}]",
    "adapters": f"qpruner[bits=[2],kept=0.5,allocation=uniform,{COMPRESS}]".replace("adapter_rank=0", "adapter_rank=4"),
}


def sentences(n: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    lines = [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (12,), generator=generator)) for _ in range(n)]
    return ".\n".join(lines)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recover")
    save(tiny_model(**LLAMA), folder / "model", tokenizer=True)
    (folder / "text.txt").write_text(sentences(500, 0))
    for name, recipe in RECIPES.items():
        api.compress(
            str(folder / "model"), "95%", folder / name, recipe=recipe, calibration=folder / "text.txt",
            measure_speed=False, measure_stages=False, measure_kl=False,
        )  # fmt: skip
    return folder


def recover(place, name, output, *, changes="", **options):
    options = dict(teacher=str(place / "model"), training=place / "text.txt") | options
    return api.recover(str(place / name), output, recipe=f"recover[{SHORT}{changes}]", **options)


@pytest.fixture(scope="module")
def recovered(place, tmp_path_factory):
    """Artifacts recovered as they are with nothing else asked for, each once: where it is, and what was found."""
    folder = tmp_path_factory.mktemp("recovered")

    @functools.cache
    def of(name):
        return folder / name, recover(place, name, folder / name)

    return of


@pytest.mark.parametrize("name", RECIPES)
def test_an_artifact_of_any_recipe_loses_less(recovered, tmp_path, name):
    output, found = recovered(name)
    facts = found.facts
    assert facts.metric("KL to the original").after < facts.metric("KL to the original").before
    assert facts.recovery.loss == "distillation" and facts.recovery.curve[-1].step == 6
    plan = json.loads((output / "plan.json").read_text())
    assert plan["adapters"] == facts.adapters and plan["adapter_ranks"]
    if name == "16 bits":  # a stock model stays one
        assert facts.adapters == "merged" and facts.size_after == facts.size_before
    model = AutoModelForCausalLM.from_pretrained(output).eval()
    assert bool(adapters.adapter_layers(model)) == (facts.adapters == "beside")
    judged = api.evaluate(str(output), text=_other(tmp_path), window=32, windows=3)
    assert judged["loss"] > 0
    assert found.report.read_text().startswith("<!doctype html>")


def _other(tmp_path):
    path = tmp_path / "other.txt"
    path.write_text(sentences(60, 7))
    return path


def test_the_better_way_ships_and_both_are_said(place, recovered, tmp_path):
    facts = recovered("packed")[1].facts
    assert set(facts.losses) == {"beside", "merged"}
    better = "merged" if facts.losses["merged"] <= facts.losses["beside"] else "beside"
    assert facts.adapters == better
    asked = recover(place, "packed", tmp_path / "asked", changes=",adapters=merged").facts
    assert asked.adapters == "merged" and asked.size_after == asked.size_before
    assert asked.losses["merged"] == facts.losses["merged"]


def test_an_interrupted_training_ends_in_the_same_bytes(place, recovered, tmp_path, monkeypatch):
    whole, _ = recovered("mixed")
    write = stages._write

    def cut(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "_write", cut)
    with pytest.raises(KeyboardInterrupt):
        recover(place, "mixed", tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(stages, "_write", write)
    seen = []
    recover(place, "mixed", tmp_path / "cut", on_progress=lambda stage, *_: seen.append(stage))
    assert "recovery" not in seen  # it was read back
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "cut") for p in (tmp_path / "cut").rglob("*") if p.is_file())
    assert all((whole / f).read_bytes() == (tmp_path / "cut" / f).read_bytes() for f in files)
    again = recover(place, "mixed", tmp_path / "cut")
    assert again.facts.size_after > again.facts.size_before or again.facts.adapters == "merged"


def test_adapters_that_an_artifact_has_are_gone_on_with(place, tmp_path):
    first = recover(place, "packed", tmp_path / "one", changes=",adapters=beside")
    second = recover(tmp_path, "one", tmp_path / "two", changes=",adapters=beside", teacher=str(place / "model"),
                     training=place / "text.txt")  # fmt: skip
    assert second.facts.size_after == second.facts.size_before == first.facts.size_after
    assert second.facts.recovery.loss_before == pytest.approx(first.facts.losses["beside"], rel=1e-3)


def test_without_a_teacher_the_next_token_is_learned_and_that_is_said(place, tmp_path):
    facts = recover(place, "packed", tmp_path / "out", teacher=None).facts
    assert facts.recovery.loss == "next-token" and facts.teacher is None
    assert any("--teacher" in note for note in facts.notes)


def test_what_is_refused(place, tmp_path):
    with pytest.raises(ModelError, match="no artifact of qpruner"):
        recover(place, "model", tmp_path / "out")
    with pytest.raises(RecipeError, match="trains nothing"):
        recover(place, "packed", tmp_path / "out", changes=",adapter_rank=0")
    save(tiny_model(**LLAMA, vocab_size=300), tmp_path / "other", tokenizer=True)
    with pytest.raises(ModelError, match="do not share a vocabulary"):
        recover(place, "packed", tmp_path / "out", teacher=str(tmp_path / "other"))
    with pytest.raises(CorpusError, match="text that this artifact was made with"):
        api.evaluate(str(place / "packed"), text=place / "text.txt", window=32)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


def test_both_models_are_scored_on_tasks(place, tmp_path):
    write_rows(tmp_path / "tasks/piqa.jsonl", QUESTIONS[:3])
    found = api.evaluate(
        str(place / "packed"), text=_other(tmp_path), window=32, windows=3, reference=str(place / "model"),
        tasks_dir=tmp_path / "tasks",
    )  # fmt: skip
    assert found["tasks"]["tasks"]["piqa"]["n"] == 3 and found["changes"]["tasks"]["piqa"]["n"] == 3
    facts = api.compress(
        str(place / "model"), "95%", tmp_path / "again", recipe=RECIPES["packed"], calibration=place / "text.txt",
        measure_speed=False, measure_stages=False, measure_kl=False, tasks_dir=tmp_path / "tasks",
    ).facts  # fmt: skip
    assert facts.metric("piqa, acc norm").after == found["tasks"]["tasks"]["piqa"]["acc_norm"]
    assert any("Zero-shot tasks" in note for note in facts.notes)
    shutil.rmtree(tmp_path / "again")


def test_processes_that_cannot_share_the_work_as_asked_are_refused_before_any_of_it(place, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RecipeError, match="a batch of 2 cannot be shared evenly by 3 processes"):
        recover(place, "packed", tmp_path / "out")
    for name, value in {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match="FSDP_OFFLOAD_PARAMS=true, which is not served"):
        recover(place, "packed", tmp_path / "out")
    assert not list(tmp_path.iterdir())
