"""The main job on a tiny model: what ships is what was predicted, judged, and asked for."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_folder import save, tiny_model

from qpruner import api, prepare
from qpruner.errors import BudgetError, CorpusError, MemoryLimitError, ModelError, OutputError, RecipeError
from qpruner.loading import TARGETS
from qpruner.plan import Plan

SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
QUICK = "steps=4,batch_size=2,window=64,calibration_windows=8,search_windows=4,evaluation_windows=4,width_grid=16"
RECIPE = f"qpruner[{QUICK},trials=12]"


@pytest.fixture(scope="module")
def model(small_llama) -> Path:
    return small_llama


class Interrupted(Exception):
    pass


def compress(model, out, **options) -> api.Result:
    defaults = dict(recipe=RECIPE, measure_speed=False)
    return api.compress(str(model), options.pop("budget", "50%"), out, **(defaults | options))


@pytest.fixture(scope="module")
def made_of(model, tmp_path_factory):
    """What a recipe gives with nothing else asked for, each made once."""

    @functools.cache
    def of(recipe: str, budget: str) -> api.Result:
        return compress(model, tmp_path_factory.mktemp("run") / "out", recipe=recipe, budget=budget)

    return lambda recipe, budget="50%": of(recipe, budget)


@pytest.fixture(scope="module")
def result(made_of) -> api.Result:
    return made_of(RECIPE)


def weights(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_sizes_are_as_asked_and_predicted(result):
    manifest = json.loads((result.artifact / "manifest.json").read_text())
    on_disk = sum(p.stat().st_size for p in result.artifact.rglob("*.safetensors"))
    assert manifest["bytes"]["predicted"] == manifest["bytes"]["on_disk"] == on_disk <= manifest["bytes"]["asked"]
    assert manifest["recipe"]["trials"] == 12 and manifest["seed"] == 0


def test_the_budget_is_used(result):
    """What is left over is less than what one more upgraded projection would take."""
    manifest = json.loads((result.artifact / "manifest.json").read_text())
    plan = Plan.read(result.artifact / "plan.json")
    assert {s.bits for s in plan.specs.values()} == {4, 8}
    assert manifest["bytes"]["on_disk"] > 0.95 * manifest["bytes"]["asked"]


def test_protected_layers_are_whole_and_others_cut(result):
    kept = Plan.read(result.artifact / "plan.json").kept
    assert [len(kept[f"model.layers.{i}.mlp"]) for i in range(4)] == [128, 96, 96, 128]
    assert [len(kept[f"model.layers.{i}.self_attn"]) for i in range(4)] == [4, 3, 3, 4]


def test_every_kind_of_unit_goes_together_and_what_is_loaded_is_what_was_judged(model, tmp_path):
    units = "units=[kv_group,query_head,channel],scope=global,layers_kept=0.75"
    result = compress(
        model,
        tmp_path / "out",
        recipe=f"qpruner[{QUICK},{units},allocation=mutual-information]",
    )
    manifest, plan = (
        json.loads((result.artifact / "manifest.json").read_text()),
        Plan.read(result.artifact / "plan.json"),
    )
    assert manifest["bytes"]["predicted"] == manifest["bytes"]["on_disk"] <= manifest["bytes"]["asked"]
    assert len(plan.layers) == 3 and {0, 3} < set(plan.layers) and len(result.facts.layers) == 3
    assert {n for n, units in plan.kept.items() if n.endswith("mlp") and len(units) < 128} == {"model.layers.1.mlp"}
    loss = api.evaluate(str(result.artifact), window=64, windows=4)["loss"]
    assert loss == pytest.approx(manifest["evaluation"]["artifact"]["loss"], abs=1e-6)


FRESH = """
import sys, json, torch, qpruner
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.arange(3, 40)[None]
for dtype in ({"dtype": torch.float32}, {}):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **dtype)
    loss = model(input_ids=ids, labels=ids).loss.item()
    tokens = model.generate(ids[:, :5], max_new_tokens=6, do_sample=False)
    print(json.dumps([type(model).__name__, str(model.dtype), loss, tokens.tolist()]), flush=True)
"""


@pytest.fixture(scope="module")
def fresh(result) -> subprocess.CompletedProcess:
    """The artifact in another process, in float32 and then as it is stored."""
    command = [sys.executable, "-c", FRESH, str(result.artifact)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_artifact_loads_in_a_fresh_process_as_its_original_class(result, fresh):
    name, dtype, loss, tokens = json.loads(fresh.stdout.splitlines()[-2])
    assert name == "LlamaForCausalLM" and dtype == "torch.float32"
    assert len(tokens[0]) == 11
    from transformers import AutoModelForCausalLM

    here = AutoModelForCausalLM.from_pretrained(result.artifact, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    assert here(input_ids=ids, labels=ids).loss.item() == pytest.approx(loss, abs=1e-6)


def test_the_reported_loss_is_that_of_the_files(result):
    manifest = json.loads((result.artifact / "manifest.json").read_text())
    found = api.evaluate(str(result.artifact), window=64, windows=4)
    assert found["loss"] == pytest.approx(manifest["evaluation"]["artifact"]["loss"], abs=1e-6)


def test_other_adapters_beside_the_same_base_are_judged_anew(model, tmp_path):
    """Runs that have stages in common find the base's digest, and must not take it for the artifact's."""
    common = dict(shared=tmp_path / "common")
    recipe = f"qpruner[{QUICK},allocation=uniform,adapters=beside,learning_rate=%s]"
    slow, fast = (compress(model, tmp_path / rate, recipe=recipe % rate, **common) for rate in ("0.0001", "0.05"))
    ours, theirs = weights(slow.artifact), weights(fast.artifact)
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert ours["adapter/adapter_model.safetensors"] != theirs["adapter/adapter_model.safetensors"]
    for result in (slow, fast):
        loss = api.evaluate(str(result.artifact), window=64, windows=4)["loss"]
        assert result.facts.metric("loss").after == pytest.approx(loss, abs=1e-6)
    for name in ("loss", "KL to the original"):
        assert abs(slow.facts.metric(name).after - fast.facts.metric(name).after) > 1e-3
    one, other = (result.facts.damage.stages[-1] for result in (slow, fast))
    assert one.stage == other.stage == "recovered" and abs(one.loss - other.loss) > 1e-3


def test_training_that_only_did_harm_is_warned_of(model, tmp_path):
    changes = "allocation=uniform,loftq_iterations=0,loss=distillation,validations=2,learning_rate=0.5"
    recipe = f"qpruner[{QUICK},{changes}]"
    facts = compress(model, tmp_path / "out", recipe=recipe, measure_stages=False).facts
    assert facts.recovery.best_step > 0
    assert any(warning.startswith("No step of the training did as well") for warning in facts.warnings)


def test_it_generates_in_its_stored_dtype_in_a_fresh_process(fresh):
    """One token at a time in bfloat16, the default: where a kernel of torch once read past the end of a weight."""
    assert fresh.returncode == 0, fresh.stderr
    _, dtype, _, tokens = json.loads(fresh.stdout.splitlines()[-1])
    assert dtype == "torch.bfloat16" and len(tokens[0]) == 11


def test_adapters_are_applied_without_being_asked(result, tmp_path):
    from transformers import AutoModelForCausalLM

    bare = tmp_path / "bare"
    shutil.copytree(result.artifact, bare)
    shutil.rmtree(bare / "adapter")
    ids = torch.arange(3, 40)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(input_ids=ids).logits
        for f in (result.artifact, bare)
    ]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_no_dense_copy_is_kept_in_memory(result):
    from transformers import AutoModelForCausalLM

    from qpruner.judge.speed import tensor_bytes

    model = AutoModelForCausalLM.from_pretrained(result.artifact)
    stored = sum(t.nbytes for f in result.artifact.rglob("*.safetensors") for t in load_file(f).values())
    rotary = sum(b.nbytes for n, b in model.named_buffers() if "inv_freq" in n)
    adapters = sum(t.nbytes for t in load_file(result.artifact / "adapter/adapter_model.safetensors").values())
    assert tensor_bytes(model) <= stored + adapters + rotary  # adapters are float32 in memory


def test_the_same_request_gives_the_same_bytes(model, result, tmp_path):
    again = compress(model, tmp_path / "out")
    assert weights(again.artifact) == weights(result.artifact)


def test_another_seed_gives_another_artifact(model, result, tmp_path):
    other = compress(model, tmp_path / "out", seed=1)
    assert weights(other.artifact)["model.safetensors"] != weights(result.artifact)["model.safetensors"]


def test_a_finished_run_is_not_run_again(model, result):
    before = weights(result.artifact)
    seen = []
    again = compress(model, result.artifact, on_progress=lambda *stage: seen.append(stage))
    assert not seen and weights(again.artifact) == before and again.facts == result.facts


def test_another_request_does_not_overwrite(model, result):
    with pytest.raises(OutputError, match="holds an artifact of another request"):
        compress(model, result.artifact, seed=5)


@pytest.mark.parametrize("stage", ["importance", "sensitivity", "search", "recovery", "judging the artifact"])
def test_an_interrupted_run_ends_in_the_same_bytes(model, result, tmp_path, stage):
    def stop(name: str, done: int, total: int, detail: str = "") -> None:
        if name == stage and done >= min(2, total):
            raise Interrupted

    with pytest.raises(Interrupted):
        compress(model, tmp_path / "out", on_progress=stop)
    assert not (tmp_path / "out").exists()
    seen = set()
    again = compress(model, tmp_path / "out", on_progress=lambda name, *_: seen.add(name))
    assert weights(again.artifact) == weights(result.artifact)
    assert ("importance" in seen) == (stage == "importance"), "finished stages are read back, not computed again"


def test_a_killed_run_continues(model, result, tmp_path):
    """SIGKILL in the middle of the search; nothing is cleaned up."""
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from qpruner import api\n"
        f"api.compress({str(model)!r}, '50%', {str(tmp_path / 'out')!r}, recipe={RECIPE!r}, measure_speed=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    trials = tmp_path / "out.run/trials.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if trials.is_file() and len(trials.read_text().splitlines()) > 4:
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert weights(compress(model, tmp_path / "out").artifact) == weights(result.artifact)


@pytest.mark.parametrize("allocation", ["uniform", "random", "mutual-information", "sensitivity"])
def test_every_allocation_meets_the_budget(model, tmp_path, allocation):
    made = compress(model, tmp_path / "out", recipe=f"qpruner[{QUICK},allocation={allocation}]")
    assert made.facts.sizes.on_disk <= made.facts.sizes.asked
    assert made.facts.search is None


@pytest.mark.parametrize(
    "changes",
    ["adapters=merged", "adapter_rank=0,steps=0", "loftq_iterations=0,steps=0", "bit_unit=layer,information=binned"],
)
def test_other_choices_of_the_recipe(model, tmp_path, changes):
    made = compress(model, tmp_path / "out", recipe=f"qpruner[{QUICK},allocation=uniform,{changes}]")
    assert made.facts.sizes.on_disk <= made.facts.sizes.asked
    assert (made.artifact / "adapter").exists() == (changes.startswith("bit_unit"))


def test_llm_pruner_stays_at_16_bits(model, tmp_path):
    made = compress(model, tmp_path / "out", budget="80%", recipe=f"llm-pruner[{QUICK}]")
    plan = Plan.read(made.artifact / "plan.json")
    assert {s.bits for s in plan.specs.values()} == {16}
    assert made.facts.sizes.on_disk <= made.facts.sizes.asked


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "opt", "phi3"])
def test_other_families_go_through(family, tmp_path):
    sizes = {k: v for k, v in SMALL.items() if k != "num_key_value_heads" or family == "phi3"}
    if family == "gpt2":
        sizes = dict(n_embd=64, n_layer=4, n_head=8)
    if family == "opt":
        sizes = sizes | dict(ffn_dim=128, word_embed_proj_dim=64)
    folder = save(tiny_model(family, **sizes).to(torch.bfloat16), tmp_path / family, tokenizer=True)
    made = compress(folder, tmp_path / "out", recipe=f"qpruner[{QUICK},allocation=mutual-information]")
    assert made.facts.sizes.on_disk <= made.facts.sizes.asked < made.facts.sizes.original_16bit
    assert made.facts.parameters_after < made.facts.parameters_before


def test_a_user_s_own_text_is_split_in_three(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i} says that {i * 37 % 101} follows {i % 13}" for i in range(4000)))
    made = compress(model, tmp_path / "out", recipe=f"qpruner[{QUICK},allocation=uniform]", calibration=text)
    assert "text.txt" in made.facts.protocol
    digests = json.loads((made.artifact / "manifest.json").read_text())["digests"]["texts"]
    assert len(set(digests.values())) == 3


# --- a model that does not fit in memory ---


@pytest.fixture
def one_layer_at_a_time(monkeypatch):
    """As if there were room for one layer: the package itself takes a thousand times the memory of a tiny model."""
    fitting = prepare.forecast_for
    tight = lambda *args: dataclasses.replace(fitting(*args), resident=False)
    monkeypatch.setattr(prepare, "forecast_for", tight)


STREAMABLE = ["qpruner[{},allocation=mutual-information,steps=0]", "llm-pruner[{},score=vector,steps=0,adapter_rank=0]"]


EVERY_UNIT = "units=[kv_group, query_head, channel, residual],scope=global,layers_kept=0.75"
ALL_CUT = f"llm-pruner[{QUICK},steps=0,adapter_rank=0,{EVERY_UNIT}]"


@pytest.mark.parametrize("recipe", [RECIPE, *(r.format(QUICK) for r in STREAMABLE), ALL_CUT])
def test_layer_by_layer_ends_in_the_same_bytes(made_of, model, tmp_path, one_layer_at_a_time, monkeypatch, recipe):
    budget = "80%" if recipe.startswith("llm-pruner") else "50%"
    made = compress(model, tmp_path / "streamed", budget=budget, recipe=recipe)
    assert made.facts.memory.layer_by_layer
    assert not (tmp_path / "streamed.run" / "passes").exists(), "nothing is left of the passes"
    monkeypatch.undo()
    whole = made_of(recipe, budget)
    assert not whole.facts.memory.layer_by_layer
    assert weights(made.artifact) == weights(whole.artifact)


@pytest.mark.parametrize("stage", ["judging the original", "importance", "mutual information", "writing"])
def test_a_killed_pass_goes_on_at_the_layer_where_it_stopped(
    made_of, model, tmp_path, one_layer_at_a_time, monkeypatch, stage
):
    recipe = STREAMABLE[0].format(QUICK)

    def stop(name: str, done: int, total: int, detail: str = "") -> None:
        if name == stage and done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        compress(model, tmp_path / "out", recipe=recipe, on_progress=stop)
    seen = []
    note = lambda name, done, total, detail="": seen.append(done) if name == stage else None
    again = compress(model, tmp_path / "out", recipe=recipe, on_progress=note)
    assert seen[0] == 3 and again.facts.memory.layer_by_layer
    monkeypatch.undo()
    assert weights(again.artifact) == weights(made_of(recipe).artifact)


def test_a_limit_that_cannot_be_kept_is_refused_with_numbers(model, tmp_path):
    with pytest.raises(MemoryLimitError, match=r"takes about [\d.]+ GiB, and 0.05 GiB are allowed"):
        compress(model, tmp_path / "out", recipe=STREAMABLE[0].format(QUICK), memory_limit="50MiB")
    with pytest.raises(BudgetError, match="memory limit '50%' is no size"):
        compress(model, tmp_path / "out", memory_limit="50%")
    assert list(tmp_path.iterdir()) == []


# --- what cannot be served leaves nothing behind ---


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(budget="1%"), BudgetError, r"smallest reachable is [\d,]+ bytes \(.*embeddings"),
        (dict(budget="150%"), BudgetError, "Nothing needs to be compressed"),
        (dict(budget="lots"), BudgetError, "cannot be read"),
        (dict(recipe="qpruner[colour=blue]"), RecipeError, "colour"),
        (dict(recipe="llm-pruner-20"), RecipeError, "prunes layers 4 to 29; the model has layers 0 to 3"),
        (dict(recipe="llm-pruner[allocation=bayesian]"), RecipeError, "one choice of bits"),
        (dict(calibration="nowhere.txt"), CorpusError, "nowhere.txt"),
    ],
)
def test_refusals_write_nothing(model, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        compress(model, tmp_path / "sub" / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_artifact_is_no_model_to_compress(result, tmp_path):
    with pytest.raises(ModelError, match="already compressed"):
        compress(result.artifact, tmp_path / "again")
    with pytest.raises(ModelError, match="Name the original model"):
        api.inspect(str(result.artifact), budget="50%")
    found = api.inspect(str(result.artifact))
    assert [layer["channels"] for layer in found["layers"]] == [128, 96, 96, 128]
    assert [row["loads"] for row in found["loads_in"]] == [True] + [False] * (len(TARGETS) - 1)


def test_a_folder_with_something_else_is_left_alone(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="no artifact of qpruner"):
        compress(model, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "thesis.tex"]


def test_a_full_disk_is_noticed_before_the_work(model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OutputError, match="0 bytes free"):
        compress(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
