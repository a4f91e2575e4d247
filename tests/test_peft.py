"""Adapters beside a loaded artifact are PEFT's: what is written here it reads, and what it writes is read here.

And a step of training holds no dense weight.
"""

import gc
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from specs import EVERY
from test_artifact import MIXED, compressed
from tiny_taught import TEXT, by_heart
from transformers import AutoModelForCausalLM

from qpruner.do.recover import Material, train_adapters_
from qpruner.errors import ModelError
from qpruner.model import adapters
from qpruner.model.packed import split
from qpruner.plan import INT8, NF4, QuantSpec

integer = lambda bits, **how: QuantSpec(bits=bits, grid="integer", group_size=8, **how)
BASES = {
    "16 bits": (16,),
    "NF4": (NF4,),
    "int8": (INT8,),
    "1 to 8 bits, salient channels": tuple(MIXED),
    "asymmetric": (integer(4, symmetric=False), integer(3, symmetric=False)),
    "few-bit scales": (integer(4, scale_bits=6), integer(3, symmetric=False, scale_bits=4), 8),
}
IDS = torch.arange(3, 23)[None]
RANKS = {f"model.layers.{i}.{n}": 1 + i % 2 for i in range(3) for n in ("mlp.up_proj", "mlp.down_proj")}
RANKS |= {f"model.layers.{i}.self_attn.q_proj": 3 for i in range(3)}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT still asks for it


@pytest.fixture(scope="module", params=BASES)
def base(request, tmp_path_factory):
    """A folder with an artifact without adapters; linears beyond those that PEFT stands beside are packed, too."""
    return compressed("llama", tmp_path_factory.mktemp("artifact"), bits=BASES[request.param], rank=0)[0]


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def with_b(model, seed: int = 0):
    """PEFT's model with random B, which it begins at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def test_what_is_trained_here_peft_loads(base, tmp_path):
    ours = loaded(base)
    before = logits(ours)
    adapters.inject_adapters_(ours, RANKS, alpha=5.0, dropout=0.1)
    train_adapters_(ours, TEXT.model_copy(update={"steps": 2, "warmup_steps": 0}), Material(by_heart()), seed=0)
    adapters.save_adapters(ours, tmp_path / "adapter", torch.float32)
    theirs = PeftModel.from_pretrained(loaded(base), str(tmp_path / "adapter"))
    assert torch.equal(logits(theirs), logits(ours)) and not torch.allclose(logits(ours), before)


def test_what_peft_makes_loads_here(base, tmp_path):
    config = LoraConfig(r=3, lora_alpha=5, lora_dropout=0.1, target_modules=["q_proj", "down_proj"])
    theirs = with_b(get_peft_model(loaded(base), config))
    theirs.save_pretrained(str(tmp_path))
    ours = loaded(base)
    before = logits(ours)
    adapters.load_adapters_(ours, tmp_path)
    assert torch.equal(logits(ours), logits(theirs)) and not torch.allclose(logits(ours), before)
    assert len(adapters.adapter_layers(ours)) == 6


@pytest.mark.parametrize("bits", [BASES["NF4"], BASES["1 to 8 bits, salient channels"]], ids=["NF4", "mixed"])
def test_adapters_that_an_artifact_ships_are_read_by_peft_beside_its_base(bits, tmp_path):
    folder, *_ = compressed("llama", tmp_path, bits=bits, rank=2)
    shutil.move(folder / "adapter", tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(loaded(folder), str(tmp_path / "adapter"))
    bare = logits(loaded(folder))
    shutil.move(tmp_path / "adapter", folder / "adapter")
    assert torch.equal(logits(theirs), logits(loaded(folder))) and not torch.allclose(logits(theirs), bare)


PLAIN = dict(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])


@pytest.fixture(scope="module")
def nf4(tmp_path_factory):
    return compressed("llama", tmp_path_factory.mktemp("nf4"), bits=(NF4, 16), rank=0)[0]


@pytest.mark.parametrize(
    "patterns, ranks",
    [
        ({"down_proj": 1}, [3, 1, 3, 1, 3, 1]),
        ({r"layers\.[02]\.mlp\.down_proj": 2, r".*\.q_proj": 4}, [4, 2, 4, 3, 4, 2]),
        ({r"^model\.layers\.1\.self_attn\.q_proj": 1}, [3, 3, 1, 3, 3, 3]),
    ],
    ids=["the end of a name", "expressions", "one name"],
)
def test_ranks_by_pattern_scale_as_peft_scales_them(nf4, patterns, ranks, tmp_path):
    """ranks: of q_proj and down_proj, layer by layer."""
    theirs = with_b(get_peft_model(loaded(nf4), LoraConfig(**PLAIN, rank_pattern=patterns)))
    theirs.save_pretrained(str(tmp_path))
    ours = loaded(nf4)
    adapters.load_adapters_(ours, tmp_path)
    assert [len(adapters.factors(layer)[0]) for layer in adapters.adapter_layers(ours).values()] == ranks
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(alpha_pattern={r".*\.q_proj": 9}), "alpha_pattern"),
        (dict(use_rslora=True), "use_rslora"),
        (dict(lora_bias=True), "lora_bias"),
        (dict(modules_to_save=["lm_head"]), "modules_to_save"),
        (dict(alora_invocation_tokens=[3, 4]), "alora_invocation_tokens"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter .* have invalid shape")
def test_what_is_no_plain_lora_is_refused_by_its_name(nf4, fields, said, tmp_path):
    with_b(get_peft_model(loaded(nf4), LoraConfig(**PLAIN, task_type="CAUSAL_LM", **fields))).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"adapter_config\.json has {said}.* Accepted: plain LoRA"):
        adapters.load_adapters_(loaded(nf4), tmp_path)


@pytest.mark.parametrize("fields", [dict(init_lora_weights="pissa"), dict(bias="all"), dict(peft_type="LOHA")], ids=str)
def test_adapters_of_other_weights_are_refused(nf4, fields, tmp_path):
    with_b(get_peft_model(loaded(nf4), LoraConfig(**PLAIN))).save_pretrained(tmp_path)
    path = tmp_path / adapters.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    ((name, value),) = fields.items()
    with pytest.raises(ModelError, match=f"has {name} {value}"):
        adapters.load_adapters_(loaded(nf4), tmp_path)


def test_peft_s_adapters_whose_names_are_not_the_model_s_are_refused(nf4, tmp_path):
    """PEFT itself loads them with a warning at most, and nothing changes."""
    with_b(get_peft_model(loaded(nf4), LoraConfig(**PLAIN))).save_pretrained(tmp_path)
    path = tmp_path / adapters.TENSORS_FILE
    save_file({k.replace(".layers.", ".blocks."): t for k, t in load_file(path).items()}, path)
    with pytest.raises(ModelError, match="no linear of the model: 'model.blocks.0"):
        adapters.load_adapters_(loaded(nf4), tmp_path)


# --- memory ----------------------------------------------------------------------------------------------------------

D_OUT, D_IN = 96, 128
OF_PARTS = [*(spec for spec in MIXED if spec.salient), *(spec for spec in MIXED if spec.activation_bits < 16)]


EVERY_KIND = [*EVERY, *OF_PARTS]
inputs = pytest.mark.parametrize("tokens, dtype", [(4, torch.bfloat16), (80, torch.bfloat16), (80, torch.float32)])


def adapted(rand, spec):
    model = torch.nn.ModuleDict({"linear": split.packed(rand(D_OUT, D_IN), rand(D_OUT), spec)})
    adapters.inject_adapters_(model, {"linear": 2}, alpha=4.0, dropout=0.1)
    return model.train()


@inputs
@pytest.mark.parametrize("spec", EVERY_KIND, ids=str)
def test_a_step_keeps_activations_for_its_way_back_and_no_dense_weight(rand, spec, tokens, dtype):
    model, saved = adapted(rand, spec), []
    x = rand(2, tokens // 2, D_IN).to(dtype)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        for given in (x, x.clone().requires_grad_()):  # to the first layer, and to later ones
            model["linear"](given).sum().backward()
    assert saved and max(t.numel() for t in saved) < D_OUT * D_IN
    assert all(p.grad.any() for n, p in model.named_parameters() if ".lora_B." in n)


def large_floats() -> set[int]:
    """Identities of tensors in memory with as many floating-point elements as the weight."""
    found = (each for each in gc.get_objects() if issubclass(type(each), torch.Tensor))
    return {id(t) for t in found if t.is_floating_point() and t.numel() >= D_OUT * D_IN}


@inputs
def test_nor_does_anything_else_hold_one(rand, tokens, dtype):
    models = [adapted(rand, spec) for spec in EVERY_KIND]
    x = rand(2, tokens // 2, D_IN).to(dtype).requires_grad_()
    with torch.no_grad():
        for model in models:
            model["linear"](x)  # afterwards the tables of what words mean are made, and stay
    before = large_floats()
    graphs = [model["linear"](x) for model in models]
    assert large_floats() <= before
    sum(y.sum() for y in graphs).backward()
    assert large_floats() <= before
