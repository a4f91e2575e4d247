"""Embeddings in codes as part of the main job: counted, judged and shipped in every path alike."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_folder import save, tiny_model
from transformers import AutoModelForCausalLM

from qpruner import api, prepare
from qpruner.errors import BudgetError, RecipeError
from qpruner.model.packed.embedding import PackedEmbedding
from qpruner.plan import Plan, QuantSpec

QUICK = "window=64,calibration_windows=8,search_windows=4,evaluation_windows=4,width_grid=16"
CODES = "group_size=16,symmetric=false,scale_bits=4,ranges=mse"
ALONE = f"llm-pruner[{QUICK},{CODES},kept=1,shrink_to_fit=false,adapter_rank=0,steps=0,embedding_bits=4]"
PRUNED = (
    f"gptaq[{QUICK},{CODES},bits=[3],embedding_bits=4,kept=0.5,units=[channel,residual],"
    "reconstruction=least-squares,protect_first=0,protect_last=0]"
)
TURNED = f"gptq[{QUICK},bits=[3],group_size=16,embedding_bits=3,kept=0.75,transforms=[rotate],steps=0,adapter_rank=0]"
SEARCHED = f"qpruner[{QUICK},{CODES},embedding_bits=8,steps=2,batch_size=2,bits=[3,4],trials=4,adapter_rank=2]"
LEARNED = f"gptq[{QUICK},{CODES},bits=[3],embedding_bits=2,kept=1,layer_steps=3,network_steps=4,tuning_batch=2]"

SIZES = dict(hidden_size=48, intermediate_size=96, num_attention_heads=8, num_hidden_layers=3)
FAMILIES = {
    "llama tied": ("llama", SIZES | dict(num_key_value_heads=4)),
    "llama": ("llama", SIZES | dict(num_key_value_heads=4, tie_word_embeddings=False)),
    "gpt_neox": ("gpt_neox", SIZES | dict(tie_word_embeddings=False)),
    "gpt2": ("gpt2", dict(n_embd=48, n_layer=3, n_head=8)),
    "opt projected": ("opt", SIZES | dict(ffn_dim=96, word_embed_proj_dim=32)),
    "gemma3": ("gemma3_text", SIZES | dict(num_key_value_heads=4, head_dim=8)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(case: str) -> Path:
        if case not in made:
            family, over = FAMILIES[case]
            made[case] = save(
                tiny_model(family, **over).to(torch.bfloat16), tmp_path_factory.mktemp("model") / "m", tokenizer=True
            )
        return made[case]

    return folder


def compress(model, out, recipe, short_text, budget="100%") -> api.Result:
    return api.compress(str(model), budget, out, recipe=recipe, measure_speed=False, calibration=short_text)


@pytest.fixture(scope="module")
def made_of(folders, tmp_path_factory, short_text):
    """What a recipe makes of a model with nothing else asked for, each made once; nobody writes into it."""

    @functools.cache
    def of(case: str, recipe: str) -> api.Result:
        return compress(folders(case), tmp_path_factory.mktemp("made") / "out", recipe, short_text)

    return of


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def manifest(result) -> dict:
    return json.loads((result.artifact / "manifest.json").read_text())


FRESH = """
import sys, torch, qpruner
from transformers import AutoModelForCausalLM
ids, seen = torch.arange(3, 40)[None], {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        tokens = model.generate(ids[:, :5], max_new_tokens=6, do_sample=False)
        seen[folder] = [model(input_ids=ids).logits, tokens]
torch.save(seen, sys.argv[1])
"""


@pytest.mark.parametrize("case", ["llama tied", "gpt_neox", "gpt2", "opt projected", "gemma3"])
def test_nothing_but_the_embeddings_changes_and_the_files_are_as_predicted(case, folders, made_of):
    result = made_of(case, ALONE)
    plan, sizes = Plan.read(result.artifact / "plan.json"), manifest(result)["bytes"]
    told = {row.name: row for row in result.facts.embeddings}
    assert told.keys() == plan.embeddings.keys() and {row.bits for row in told.values()} == {4}
    on_disk = sum(p.stat().st_size for p in result.artifact.rglob("*.safetensors"))
    assert sizes["predicted"] == sizes["on_disk"] == on_disk
    assert set(plan.embeddings.values()) == {QuantSpec(bits=4, grid="normal-float", group_size=16, scale_bits=4)}
    assert len(plan.embeddings) == (2 if case == "gpt_neox" else 1)
    stored, before = (load_file(f / "model.safetensors") for f in (result.artifact, folders(case)))
    before = {name.replace("embed_out", "lm_head"): tensor for name, tensor in before.items()}  # as transformers does
    parts = {f"{name}.{part}" for name in plan.embeddings for part in ("codes", "scales", "steps")}
    assert stored.keys() == before.keys() - {f"{name}.weight" for name in plan.embeddings} | parts
    assert all(torch.equal(stored[name], before[name]) for name in stored.keys() & before.keys())
    assert sum(row.size_bytes for row in told.values()) == sum(stored[part].nbytes for part in parts)


def test_sixteen_bits_are_as_if_nobody_had_asked(folders, tmp_path, short_text):
    recipe = ALONE.replace(",embedding_bits=4", ",bits=[4]")
    one = compress(folders("llama tied"), tmp_path / "one", recipe, short_text)
    two = compress(folders("llama tied"), tmp_path / "two", recipe[:-1] + ",embedding_bits=16]", short_text)
    name = "model.safetensors"
    assert (one.artifact / name).read_bytes() == (two.artifact / name).read_bytes()
    assert Plan.read(one.artifact / "plan.json").embeddings == {}


@pytest.mark.parametrize(
    "case, recipe",
    [("llama tied", ALONE), ("llama", PRUNED), ("gpt2", PRUNED), ("gpt_neox", TURNED), ("opt projected", ALONE)],
)
def test_one_layer_at_a_time_ends_in_the_same_bytes(case, recipe, folders, made_of, tmp_path, short_text, monkeypatch):
    whole = made_of(case, recipe)
    fitting = prepare.forecast_for
    monkeypatch.setattr(prepare, "forecast_for", lambda *args: dataclasses.replace(fitting(*args), resident=False))
    streamed = compress(folders(case), tmp_path / "streamed", recipe, short_text)
    assert files(streamed.artifact) == files(whole.artifact)
    assert manifest(whole)["bytes"]["predicted"] == manifest(whole)["bytes"]["on_disk"]


CHANGED_LATER = {"searched and trained": ("llama tied", SEARCHED), "learned": ("llama", LEARNED)}


@pytest.fixture(scope="module")
def seen(made_of, tmp_path_factory) -> dict:
    """Logits and generated tokens of both, in one fresh process."""
    path = tmp_path_factory.mktemp("fresh") / "seen"
    folders = [str(made_of(*asked).artifact) for asked in CHANGED_LATER.values()]
    subprocess.run([sys.executable, "-c", FRESH, str(path), *folders], check=True)
    return torch.load(path)


@pytest.mark.parametrize("which", CHANGED_LATER)
def test_what_loads_in_a_fresh_process_is_what_was_tried_and_judged(which, made_of, seen):
    result = made_of(*CHANGED_LATER[which])
    assert manifest(result)["bytes"]["predicted"] == manifest(result)["bytes"]["on_disk"]
    stored = load_file(result.artifact / "model.safetensors")
    codes = load_file(result.artifact.with_name("out.run") / "measurements/embeddings/codes.safetensors")
    assert codes and all(torch.equal(stored[name], tensor) for name, tensor in codes.items())
    ids, model = torch.arange(3, 40)[None], AutoModelForCausalLM.from_pretrained(result.artifact, dtype=torch.float32)
    for name in Plan.read(result.artifact / "plan.json").embeddings:
        assert torch.equal(model.get_submodule(name).codes, stored[f"{name}.codes"])
    logits, tokens = seen[str(result.artifact)]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits) and tokens.shape[1] > 5


def test_what_an_interrupted_run_of_other_bits_left_is_not_taken(folders, made_of, tmp_path, short_text):
    class Interrupted(Exception):
        pass

    def stop(name: str, *rest) -> None:
        if name == "rounding":
            raise Interrupted

    whole = made_of("llama", PRUNED)
    how = dict(measure_speed=False, calibration=short_text, on_progress=stop)
    for bits in (2, 4):
        recipe = PRUNED.replace("embedding_bits=4", f"embedding_bits={bits}")
        with pytest.raises(Interrupted):
            api.compress(str(folders("llama")), "100%", tmp_path / "out", recipe=recipe, **how)
    again = compress(folders("llama"), tmp_path / "out", PRUNED, short_text)
    assert files(again.artifact) == files(whole.artifact)


def test_a_budget_that_needs_the_embedding_in_codes_is_kept(folders, tmp_path, short_text):
    """A third of this model at 16 bits is its two matrices of 259 rows."""
    recipe = f"llm-pruner[{QUICK},{CODES},bits=[3],adapter_rank=0,steps=0,protect_first=0,protect_last=0]"
    model = str(folders("llama"))
    at = {bits: api.inspect(model, recipe=f"{recipe[:-1]},embedding_bits={bits}]", budget="40%") for bits in (16, 3)}
    kept = {bits: sum(found["predicted"]["kept"].values()) for bits, found in at.items()}
    assert kept[3] > kept[16]
    with pytest.raises(BudgetError, match="embeddings"):
        compress(model, tmp_path / "no", recipe, short_text, budget="30%")
    result = compress(model, tmp_path / "out", f"{recipe[:-1]},embedding_bits=3]", short_text, budget="30%")
    assert manifest(result)["bytes"]["on_disk"] <= manifest(result)["bytes"]["asked"]


def test_an_embedding_that_does_more_is_refused_before_anything_is_made(folders, tmp_path, short_text, monkeypatch):
    from qpruner.model import embeddings

    monkeypatch.setattr(embeddings, "scale_of", lambda module: None)
    with pytest.raises(RecipeError, match="none that can be: 'model.embed_tokens': Embedding does more.*_bits to 16"):
        compress(folders("llama tied"), tmp_path / "out", ALONE, short_text)
    monkeypatch.undo()
    read_whole = lambda self, ids: self.weight.view(self.num_embeddings, self.embedding_dim)[ids]
    monkeypatch.setattr(PackedEmbedding, "forward", read_whole)  # as code does that knows of no codes
    with pytest.raises(RecipeError, match="'m' does not run so: shape .* is invalid.*Set embedding_bits to 16"):
        compress(folders("llama tied"), tmp_path / "out", ALONE, short_text)
    assert not (tmp_path / "out.run").exists()
