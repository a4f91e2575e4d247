"""Saving and loading: the same logits for every family, through transformers' own `from_pretrained`."""

import itertools
import json
import random
import shutil

import pytest
import torch
from tiny import TINY, tiny
from tiny_folder import save
from transformers import AutoConfig, AutoModelForCausalLM

from qpruner import recipe
from qpruner import shape as shaping
from qpruner.artifact.opened import artifact_digest
from qpruner.artifact.save import save_artifact, weight_bytes
from qpruner.do.quantize import Candidates
from qpruner.errors import ModelError
from qpruner.model import adapters, checkpoint, load
from qpruner.model.surgery import narrow_
from qpruner.plan import Format, QuantSpec

IDS = torch.arange(3, 23)[None]
MIXED = [
    QuantSpec(bits=2, grid="integer", group_size=8, salient=2),
    QuantSpec(bits=3, grid="integer", group_size=8, symmetric=False),
    QuantSpec(bits=4, grid="integer", activation_bits=8),
    QuantSpec(bits=1, grid="binary", group_size=8, salient=3, salient_bits=4, activation_bits=4),
    QuantSpec(bits=2, grid="ternary", group_size=5, scale_bits=6),
    QuantSpec(bits=8, grid="integer", activation_bits=8),
]


def compressed(family: str, folder, *, bits: tuple[int, ...], rank: int = 2):
    """A tiny random model, cut at random and stored with a mixture of bits; the folder, the model and its plan."""
    source_folder = save(tiny(family, dtype=torch.float32).to(torch.bfloat16), folder / "source")
    source = load.inspect_source(source_folder)
    shape = shaping.shape_of(source)
    draw = random.Random(1)
    kept = {}
    for name, g in shape.graph.groups.items():
        size = g.n_units // g.n_blocks
        n = max(1, size * (2 + g.layer % 2) // 4)
        kept[name] = [b * size + u for b in range(g.n_blocks) for u in sorted(draw.sample(range(size), n))]
    drawn = itertools.cycle(draw.sample(bits, len(bits)))
    mixture = {name: b for p, b in zip(shape.graph.projections, drawn, strict=False) for name in p.linears}
    plan = shape.plan(recipe.load(f"qpruner[adapter_rank={rank}]"), kept, dict.fromkeys(mixture, 16))
    specs = {name: Format().spec(b) if isinstance(b, int) else b for name, b in mixture.items()}
    plan = plan.model_copy(update={"specs": specs})
    model = load.load_model(source)
    narrow_(model, shape.graph, plan.kept)
    Candidates(model, shape.graph, plan, adapter_dtype=torch.bfloat16).put_(plan.specs)
    save_artifact(
        folder / "out", model, shape.graph, plan, expected=shape.stored(plan), dtype=torch.bfloat16, source=source
    )
    return folder / "out", model, plan, shape


@pytest.mark.parametrize("family", sorted(TINY))
@pytest.mark.parametrize("bits", [(16,), (4, 8, 16)])
def test_save_and_load_give_the_same_logits(family, bits, tmp_path):
    folder, model, plan, shape = compressed(family, tmp_path, bits=bits, rank=0 if bits == (16,) else 2)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(loaded) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits, rtol=0, atol=1e-6)
    assert weight_bytes(folder) == shape.size(plan).total


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_grid_in_one_model_loads_bit_equal(family, tmp_path):
    folder, model, plan, shape = compressed(family, tmp_path, bits=tuple(MIXED))
    assert set(plan.specs.values()) == set(MIXED)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
    assert weight_bytes(folder) == shape.size(plan).total


def test_the_configuration_says_what_each_layer_has(tmp_path):
    folder, *_ = compressed("llama", tmp_path, bits=(4, 8))
    config = AutoConfig.from_pretrained(folder)
    plan = json.loads((folder / "plan.json").read_text())
    for layer in range(config.num_hidden_layers):
        assert config.per_layer_config[layer].num_key_value_heads == len(
            plan["kept"][f"model.layers.{layer}.self_attn"]
        )
        assert config.per_layer_config[layer].intermediate_size == len(plan["kept"][f"model.layers.{layer}.mlp"])


def test_scales_keep_their_precision_whatever_dtype_is_asked_for(tmp_path):
    folder, *_ = compressed("llama", tmp_path, bits=(4,))
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert {b.dtype for n, b in model.named_buffers() if n.endswith("scales")} == {torch.float16}
        assert model.get_input_embeddings().weight.dtype == dtype


def test_the_digest_of_an_artifact_has_its_adapters_in_it(tmp_path):
    folder, *_ = compressed("llama", tmp_path, bits=(4, 8))
    found = [artifact_digest(folder)]
    file = folder / "adapter" / adapters.TENSORS_FILE
    adapters.save_file({name: 2 * t for name, t in adapters.load_file(file).items()}, file)
    found.append(artifact_digest(folder))
    shutil.rmtree(folder / "adapter")
    found.append(artifact_digest(folder))
    assert len(set(found)) == 3 and found[2] == checkpoint.weights_digest(folder)
    assert artifact_digest(folder, weights="known") == "known"


def test_a_changed_folder_is_refused(tmp_path):
    folder, *_ = compressed("llama", tmp_path, bits=(4, 8))
    plan = json.loads((folder / "plan.json").read_text())
    name = next(n for n, s in plan["specs"].items() if s["bits"] < 16 and n.endswith("o_proj"))  # not fused with others
    plan["specs"][name] = Format().spec(16).model_dump()
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ModelError, match="does not fit its plan"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_artifact_without_the_package_is_an_error_not_random_weights(tmp_path):
    import subprocess
    import sys

    folder, *_ = compressed("llama", tmp_path, bits=(4,))
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode and "qpruner" in found.stderr
