"""Hidden states in another basis: the same model, wherever that is allowed, and a sentence where it is not."""

import pytest
import torch
from safetensors.torch import save_file
from test_surgery import everything
from tiny import tiny
from transformers import AutoModelForCausalLM

from qpruner.errors import ModelError
from qpruner.math import grids
from qpruner.math.rotation import Rotation, along, hadamard
from qpruner.model.discover import discover
from qpruner.model.rotate import Rotated
from qpruner.model.skeleton import build_skeleton
from qpruner.model.surgery import narrow_
from qpruner.model.tensors import Cut
from qpruner.model.turning import turn_of
from qpruner.plan import QuantSpec
from qpruner.testing import random_kept
from qpruner.testing.tiny import Held

UNTIED = dict(tie_word_embeddings=False)
EXPERTS = dict(num_local_experts=3, num_experts_per_tok=2)
CASES = [
    ("llama", {}),
    ("qwen3", {}),
    ("gemma", dict(head_dim=8)),  # stores how far its gains are from one
    ("gpt_neox", {}),
    ("opt", {}),
    ("opt", dict(word_embed_proj_dim=16)),  # projections around the hidden states
    ("gpt2", {}),  # transposed weights, learned positions
    ("phi3", {}),
    ("falcon", dict(multi_query=True)),
    ("cohere", {}),
    ("nemotron", {}),
    ("granite", {}),
    ("mixtral", EXPERTS),
    ("gpt_oss", EXPERTS | dict(head_dim=8)),
]
REFUSED = [
    ("llama", dict(tie_word_embeddings=True), "'lm_head.weight' is tied to another tensor"),
    ("gemma2", dict(head_dim=8), "'.*layers.0.post_attention_layernorm.weight' scales what is added to them"),
    ("olmo2", {}, "'.*layers.0.post_attention_layernorm.weight' scales what is added to them"),
    ("opt", dict(do_layer_norm_before=False), "scales what is added to them"),
    ("bloom", {}, "'transformer.word_embeddings_layernorm.bias' scales them before anything reads them"),
    ("olmo", {}, "'model.layers.0.input_layernorm' is a norm without weights"),
]
CLOSE = dict(rtol=1e-5, atol=2e-6)  # many norms compute in float32, whatever they are given


def untied(family, over, **more):
    return tiny(family, **(UNTIED | over | more))


def rotated(model, over, seed=5):
    return Rotated(Held(model), turn_of(build_skeleton(model.config), discover(model)), seed)


def filled(model, tensors):
    model.load_state_dict({name: tensors.read(name).to(t.dtype) for name, t in model.state_dict().items()})
    return model


@pytest.fixture
def ids():
    return torch.randint(2, 61, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("d", [1, 2, 3, 24, 64, 96, 160, 256])
def test_rotations_are_orthogonal_and_leave_ones_where_they_are(d, rand):
    rotation = Rotation.of(d, 1)
    Q, one = rotation(torch.eye(d, dtype=torch.float64)), torch.ones(d, dtype=torch.float64)
    torch.testing.assert_close(Q @ Q.T, torch.eye(d, dtype=torch.float64))
    torch.testing.assert_close(one @ Q, one)
    X = rand(3, d, 2)
    torch.testing.assert_close(along(X, rotation, 1), torch.einsum("adb,de->aeb", X, Q))


@pytest.mark.parametrize("d, largest", [(64, 0.75), (256, 0.5), (1024, 0.25), (96, 0.75)])
def test_a_single_channel_is_spread_over_all(d, largest):
    Q = Rotation.of(d, 0)(torch.eye(d, dtype=torch.float64))
    assert Q.abs().max() < largest
    assert hadamard(16).abs().unique().numel() == 1


@pytest.mark.parametrize("family, over", CASES)
def test_the_rotated_model_is_the_model(family, over, ids):
    model, other = untied(family, over), untied(family, over, seed=1)
    filled(other, tensors := rotated(model, over))
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits, **CLOSE)
        hidden = [m(ids, output_hidden_states=True).hidden_states[1] for m in (model, other)]
    torch.testing.assert_close(tensors._rotation(hidden[0]), hidden[1], **CLOSE)
    assert (hidden[0] - hidden[1]).abs().max() > 1e-2


@pytest.mark.parametrize("family, over", CASES)
def test_cutting_comes_before_or_after(family, over, ids):
    model, other = untied(family, over), untied(family, over, seed=1)
    graph = discover(model)
    kept = everything(graph) | {n: k for n, k in random_kept(graph, 1).items() if graph.groups[n].kind != "residual"}
    turn = turn_of(build_skeleton(model.config), graph)
    tensors = Rotated(Cut(Held(model), graph, kept), turn, 5)
    for each in (model, other):
        narrow_(each, graph, kept)
    filled(other, tensors)
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits, **CLOSE)


@pytest.mark.parametrize("family, over, reason", REFUSED)
def test_what_would_not_be_the_same_is_refused(family, over, reason):
    model = untied(family, over)
    with pytest.raises(ModelError, match=f" cannot be rotated: .*{reason}.* Leave 'rotate' out of transforms"):
        turn_of(build_skeleton(model.config), discover(model))


def test_what_only_running_it_shows_is_refused(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    largest = lambda self, h: self.weight * h / h.abs().amax(-1, keepdim=True)
    skeleton = build_skeleton(untied("llama", {}).config)
    turn_of(skeleton, discover(skeleton))
    monkeypatch.setattr(LlamaRMSNorm, "forward", largest)
    with pytest.raises(ModelError, match="tried on random numbers, .* was not the same afterwards"):
        turn_of(skeleton, discover(skeleton))


def test_a_gain_of_zero_with_something_added_is_refused():
    model = untied("gpt_neox", {})
    norm = model.gpt_neox.layers[0].input_layernorm
    norm.weight.data[3] = 0
    tensors = rotated(model, {})
    with pytest.raises(ModelError, match="'.*layers.0.input_layernorm.weight' is zero for 1 channel"):
        tensors.read("gpt_neox.layers.0.input_layernorm.bias")
    norm.bias.data[3] = 0
    assert rotated(model, {}).read("gpt_neox.layers.0.input_layernorm.bias").isfinite().all()


@pytest.mark.parametrize("family, one", [("llama", 1), ("gemma", 0)])
def test_it_loads_as_a_stock_model_whose_norms_do_nothing(family, one, tmp_path, ids):
    model = untied(family, {}).float()
    tensors = rotated(model, {})
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = {name: tensors.read(name) for name in model.state_dict()}
    assert {n: (t.dtype, t.shape) for n, t in state.items()} == {
        n: (t.dtype, t.shape) for n, t in model.state_dict().items()
    }
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert all((p == one).all() for n, p in loaded.named_parameters() if "norm" in n)


def test_rounding_weights_of_outlier_channels_loses_less_when_rotated(ids):
    """Channels of the hidden states that are written and read with large weights."""
    model = untied("llama", dict(hidden_size=64))
    graph = discover(model)
    for name in (*graph.groups["residual"].consumers, "lm_head"):
        model.get_submodule(name).weight.data[:, [3, 17]] *= 12
    spec = QuantSpec(bits=3, grid="integer", group_size=32)
    logits = {}
    with torch.no_grad():
        expected = model(ids).logits
        for turned in (False, True):
            tensors = rotated(model, {}) if turned else Held(model)
            other = filled(untied("llama", dict(hidden_size=64)), tensors)
            for name in graph.linears:
                weight = other.get_submodule(name).weight
                weight.copy_(grids.dequantize(grids.quantize(weight, spec), spec, weight.dtype))
            logits[turned] = (other(ids).logits - expected).square().mean()
    assert logits[True] < 0.5 * logits[False]
