"""Artifacts of one width everywhere at 16 bits are stock models: they load, and compute the same, without this package.

What cannot be said in the stock configuration, or would be another model under it, keeps our own model type.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import GQA, tiny, tiny_config
from tiny_folder import edit_config, save, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from qpruner import api, recipe
from qpruner import shape as shaping
from qpruner.artifact.save import save_artifact, weight_bytes
from qpruner.artifact.stock import computes_the_same, configuration, finds_every_name, how_to_load
from qpruner.do.quantize import Candidates
from qpruner.errors import ModelError
from qpruner.model import adapters, cost, load
from qpruner.model.graph import Group
from qpruner.model.skeleton import build_skeleton
from qpruner.model.surgery import narrow_

IDS = torch.arange(3, 23)[None]
EIGHT = GQA | dict(hidden_size=32, num_attention_heads=8, num_key_value_heads=4)
BOTH, HEADS, CHANNELS = ("kv_group", "channel"), ("kv_group",), ("channel",)

# What can be cut and still be said: heads where the class takes their width from the configuration.
STOCK = {
    "llama": (EIGHT, BOTH),
    "qwen3": (EIGHT | dict(head_dim=8), BOTH),
    "qwen3_moe": (EIGHT | dict(head_dim=8, moe_intermediate_size=16), HEADS),
    "gemma2": (EIGHT | dict(head_dim=8), BOTH),
    "gemma3_text": (EIGHT | dict(head_dim=8), BOTH),
    "phi": (EIGHT, BOTH),
    "phi3": (EIGHT, BOTH),
    "mixtral": (EIGHT, HEADS),
    "gpt_neox": ({}, CHANNELS),
    "opt": ({}, CHANNELS),
    "gpt2": (dict(n_inner=None), CHANNELS),
    "gptj": (dict(n_embd=24, n_layer=3, n_head=4, rotary_dim=2), CHANNELS),
    "falcon": (dict(multi_query=False, alibi=True, new_decoder_architecture=True, num_kv_heads=4), CHANNELS),
}


def every_other(shape, kinds) -> dict[str, list[int]]:
    return {
        name: list(range(g.n_units))[1 if g.kind in kinds and g.n_units > 1 else 0 :: 2 if g.kind in kinds else 1]
        for name, g in shape.graph.groups.items()
    }


def shape_of(family: str, folder: Path, over: dict) -> shaping.Shape:
    model = tiny(family, dtype=torch.float32, **over).to(torch.bfloat16)
    return shaping.shape_of(load.inspect_source(save(model, folder / f"{family}-source")))


def write(shape, plan, folder: Path, change_=lambda model: None):
    """Saved as compress saves it; the model as it was then."""
    model = load.load_model(shape.source)
    narrow_(model, shape.graph, plan.kept)
    change_(model)
    save_artifact(
        folder, model, shape.graph, plan, expected=shape.stored(plan), dtype=torch.bfloat16, source=shape.source
    )
    (folder / "manifest.json").write_text(json.dumps({"made_by": "qpruner 0"}))
    return model.eval()


def plan_of(shape, kept, bits: int = 16, changes: str = "adapter_rank=0"):
    return shape.plan(recipe.load(f"qpruner[{changes}]"), kept, bits)


def config_of(shape, plan):
    return configuration(
        shape.source, shape.graph, plan, expected=shape.stored(plan), architecture="Any", dtype=torch.bfloat16
    )


def model_type(shape, plan) -> str:
    return config_of(shape, plan).model_type


WITHOUT_US = """
import json, sys
sys.modules["qpruner"] = None
try:
    import qpruner
    raise SystemExit("qpruner can be imported")
except ImportError:
    pass
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
found = {}
ids = torch.arange(3, 23)[None]
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    tokens = model.generate(ids[:, :5], attention_mask=torch.ones_like(ids[:, :5]), max_new_tokens=4, do_sample=False,
                            eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        found[folder] = [type(model).__name__, model(ids).logits.tolist(), tokens.shape[1], any(info.values())]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Family -> folder, model and plan of the artifact, and what a process without qpruner made of the folder."""
    root = tmp_path_factory.mktemp("stock")
    made = {}
    for family, (over, kinds) in STOCK.items():
        shape = shape_of(family, root, over)
        plan = plan_of(shape, every_other(shape, kinds))
        made[family] = (root / family, write(shape, plan, root / family), shape, plan)
    folders = [str(folder) for folder, *_ in made.values()]
    done = subprocess.run([sys.executable, "-c", WITHOUT_US, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    return {family: (*parts, seen[str(parts[0])]) for family, parts in made.items()}


@pytest.mark.parametrize("family", STOCK)
def test_it_loads_where_qpruner_cannot_be_imported(family, written):
    folder, model, shape, plan, (name, logits, length, complaints) = written[family]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == family and config["architectures"] == [type(model).__name__] == [name]
    assert config["dtype"] == "bfloat16" and "auto_map" not in config
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(logits), model(IDS).logits, rtol=1e-5, atol=1e-5)
    assert length == 9 and not complaints
    assert weight_bytes(folder) == shape.size(plan).total
    assert any(len(plan.kept[g.name]) < g.n_units for g in shape.graph.groups.values())


def test_counts_and_the_width_of_a_head_are_stated(written):
    text = json.loads((written["llama"][0] / "config.json").read_text())
    stated = {k: text[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")}
    assert stated == dict(num_attention_heads=4, num_key_value_heads=2, head_dim=4, intermediate_size=20)
    assert json.loads((written["gpt2"][0] / "config.json").read_text())["n_inner"] == 48
    assert json.loads((written["phi3"][0] / "config.json").read_text())["head_dim"] == 4


def test_it_is_still_known_as_an_artifact(written, tmp_path):
    folder, model, *_ = written["llama"]
    source = load.inspect_source(str(folder))
    assert source.parameters is None
    with pytest.raises(ModelError, match="is an artifact of qpruner, already compressed"):
        api.inspect(str(folder), recipe="qpruner")
    with torch.no_grad():
        torch.testing.assert_close(load.load_model(source)(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)
    for other in ("[]", "{}", "not JSON", '{"made_by": 3}'):  # a stranger's manifest
        (tmp_path / "manifest.json").write_text(other)
        assert not load.is_artifact(tmp_path)


@pytest.mark.parametrize(
    "family, over, kinds",
    [
        ("bloom", {}, HEADS),  # another number of heads has other slopes, and other widths
        ("bloom", {}, CHANNELS),  # four times the hidden size, always
        ("gpt2", {}, HEADS),
        ("opt", {}, BOTH),
        ("gpt_neox", {}, HEADS),
        ("llama", EIGHT | dict(hidden_size=48, num_attention_heads=12, num_key_value_heads=6), ("odd",)),
    ],
)
def test_what_the_stock_class_cannot_say_keeps_our_type(family, over, kinds, tmp_path):
    shape = shape_of(family, tmp_path, over)
    kept = every_other(shape, kinds)
    if kinds == ("odd",):  # 10 heads, which 48 is no multiple of
        kept |= {n: range(5) for n, g in shape.graph.groups.items() if g.kind == "kv_group"}
    assert model_type(shape, plan_of(shape, kept)) == "qpruner"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return shape_of("llama", tmp_path_factory.mktemp("llama"), EIGHT)


def test_keeping_everything_at_16_bits_is_the_stock_model(llama):
    assert model_type(llama, plan_of(llama, every_other(llama, ()))) == "llama"


@pytest.mark.parametrize("kind", BOTH)
def test_widths_that_differ_keep_our_type(llama, kind):
    kept = every_other(llama, BOTH)
    one = next(g for g in llama.graph.groups.values() if g.kind == kind and g.layer == 1)
    assert model_type(llama, plan_of(llama, kept | {one.name: range(one.n_units)})) == "qpruner"
    same_number = range(len(kept[one.name]))
    assert model_type(llama, plan_of(llama, kept | {one.name: same_number})) == "llama"


@pytest.mark.parametrize("bits, changes, kind", [
    (8, "adapter_rank=0", "qpruner"),
    (16, "adapter_rank=2", "qpruner"),
    (16, "adapter_rank=2,adapters=merged", "llama"),
])  # fmt: skip
def test_packed_linears_and_adapters_beside_keep_our_type_merged_ones_do_not(llama, bits, changes, kind):
    assert model_type(llama, plan_of(llama, every_other(llama, BOTH), bits, changes)) == kind


def test_merged_adapters_are_in_the_stock_weights(llama, tmp_path):
    plan = plan_of(llama, every_other(llama, BOTH), 16, "adapter_rank=2,adapters=merged")

    def train_and_merge_(model):
        Candidates(model, llama.graph, plan, adapter_dtype=torch.bfloat16).put_(plan.specs)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        adapters.merge_adapters_(model)

    model = write(llama, plan, tmp_path / "out", train_and_merge_)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(loaded).__name__ == "LlamaForCausalLM" and loaded.config.model_type == "llama"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


def test_other_arithmetic_between_the_linears_is_another_model():
    """Of the same tensors: the slopes of other heads, another number of heads, another scale, another rotation."""
    config = tiny_config("bloom", n_head=8, hidden_size=32)
    whole = build_skeleton(config)
    assert computes_the_same(whole, build_skeleton(config))
    assert not computes_the_same(whole, build_skeleton(tiny_config("bloom", n_head=4, hidden_size=32)))
    granite = lambda **over: build_skeleton(tiny_config("granite", **(EIGHT | over)))
    assert computes_the_same(granite(), granite())
    assert not computes_the_same(granite(), granite(attention_multiplier=0.5))
    assert not computes_the_same(granite(), granite(residual_multiplier=0.5))
    assert not computes_the_same(granite(), granite(rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
    assert not computes_the_same(granite(), granite(hidden_act="gelu"))


def test_every_stored_name_has_to_find_its_place():
    """transformers renames some tensors as it loads them; what it misses stays random with no more than a warning."""
    model = build_skeleton(tiny_config("qwen3_moe", **STOCK["qwen3_moe"][0]))
    names = cost.named_tensors(model)
    assert finds_every_name(model, names)
    norm = names.pop("model.norm.weight")
    assert not finds_every_name(model, names)
    assert not finds_every_name(model, names | {"model.final.weight": norm})


def test_how_to_load_says_whether_it_needs_us(written, llama, tmp_path):
    where, lines = how_to_load(written["llama"][0], "OUT")
    assert "stock" in where and "qpruner" not in lines and "'OUT'" in lines
    write(llama, plan_of(llama, every_other(llama, CHANNELS) | {"model.layers.0.mlp": range(40)}), tmp_path / "own")
    where, lines = how_to_load(tmp_path / "own", "OUT")
    assert "once qpruner is imported" in where and lines.startswith("import qpruner\n")


def test_per_layer_config_says_what_each_layer_has_of_what_differs(llama, tmp_path):
    kept = every_other(llama, BOTH) | {"model.layers.0.mlp": range(40), "model.layers.2.self_attn": range(4)}
    write(llama, plan_of(llama, kept), tmp_path / "own")
    config = AutoConfig.from_pretrained(tmp_path / "own")
    words = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    said = [[getattr(config.per_layer_config[i], word) for word in words] for i in range(3)]
    assert said == [[4, 2, 40], [4, 2, 20], [8, 4, 20]]
    assert config.head_dim == 4 and config.hidden_size == 32 and config.num_hidden_layers == 3
    config.allow_global_per_layer_attribute_access = True
    assert [getattr(config, word) for word in words] == [8, 4, 40]


def test_per_layer_config_uses_the_words_of_the_original(tmp_path):
    shape = shape_of("opt", tmp_path, {})
    plan = plan_of(shape, every_other(shape, BOTH))
    config = config_of(shape, plan)
    assert [(c.ffn_dim, c.num_attention_heads) for c in config.per_layer_config] == [(20, 2)] * 3


def test_per_layer_config_of_widths_that_the_original_leaves_to_be_derived(tmp_path):
    shape = shape_of("gpt2", tmp_path, dict(n_inner=None))
    kept = every_other(shape, CHANNELS) | {"transformer.h.1.mlp": range(96)}
    config = config_of(shape, plan_of(shape, kept))
    assert [c.n_inner for c in config.per_layer_config] == [48, 96, 48]


def test_code_that_is_not_used_is_not_referred_to(tmp_path):
    """A folder that also brings code for older versions of transformers: the stock class is used, here and later."""
    model = tiny_model("llama").to(torch.bfloat16)
    folder = save(model, tmp_path / "both")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    shape = shaping.shape_of(load.inspect_source(folder))
    plan = plan_of(shape, every_other(shape, CHANNELS))
    config = config_of(shape, plan)
    assert config.model_type == "llama" and "auto_map" not in config.to_dict()


def test_compress_writes_a_stock_model_and_says_so(short_text, tmp_path):
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=8, num_key_value_heads=4)
    model = save(tiny_model("llama", **sizes).to(torch.bfloat16), tmp_path / "model", tokenizer=True)
    quick = "steps=2,batch_size=2,window=32,calibration_windows=4,search_windows=2,evaluation_windows=2,width_grid=16"
    everywhere = "protect_first=0,protect_last=0,adapters=merged,kept=0.5,shrink_to_fit=false"
    made = api.compress(
        str(model), "90%", tmp_path / "out", recipe=f"llm-pruner[{quick},{everywhere},layers=null,selection=grid]",
        measure_speed=False, calibration=short_text,
    )  # fmt: skip
    assert json.loads((made.artifact / "config.json").read_text())["model_type"] == "llama"
    assert made.facts.sizes.on_disk == made.facts.sizes.predicted
    assert "import qpruner" not in made.facts.snippet and "stock" in made.facts.loads_in
    (tmp_path / "other.txt").write_text(
        "".join(f"on day {i} the wind came from the {i * 37 % 360}\n" for i in range(99))
    )
    assert api.evaluate(str(made.artifact), text=tmp_path / "other.txt", window=32, windows=2)["loss"] > 0
    with pytest.raises(ModelError, match="already compressed"):
        api.compress(str(made.artifact), "50%", tmp_path / "again")


def test_groups_of_the_residual_stream_are_counted_in_the_words_for_it(llama):
    """Such groups are of no layer; the words for them are the same in every layer."""
    from qpruner.artifact.widths import counts_after

    table = torch.arange(32)[:, None]
    group = Group("residual", -1, "residual", "", {}, {"x": table})
    assert counts_after(llama.source.config, [group], {"residual": range(16)}) == {"hidden_size": 16}
