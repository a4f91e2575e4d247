"""Channels of the hidden states: removing them is leaving them at zero, with norms that see those that stay."""

import copy

import pytest
import torch
from test_surgery import continued, everything
from tiny import tiny, tiny_config
from torch import nn

from qpruner import prepare, recipe
from qpruner import shape as shaping
from qpruner.errors import RecipeError
from qpruner.model import cost, load
from qpruner.model.discover import discover
from qpruner.model.residual import by_element
from qpruner.model.skeleton import build_skeleton
from qpruner.model.surgery import cut_tensor, cuts_of, narrow_
from qpruner.plan import DENSE, Plan
from qpruner.testing import random_kept
from qpruner.testing.tiny import tiny_config as any_config

TIED = dict(tie_word_embeddings=True)
CASES = [
    ("llama", {}),
    ("llama", TIED),
    ("qwen3", {}),
    ("gemma2", dict(head_dim=8)),  # norms behind the layers, embeddings times the root of the original width
    ("gpt_neox", {}),
    ("opt", {}),
    ("opt", dict(word_embed_proj_dim=16)),
    ("opt", dict(do_layer_norm_before=False)),
    ("gpt2", {}),
    ("bloom", {}),
    ("phi3", {}),
    ("olmo2", {}),  # a norm across all heads, as wide as the hidden states
    ("falcon", dict(multi_query=True)),
    ("cohere", TIED),
    ("mixtral", dict(num_local_experts=3, num_experts_per_tok=2)),
    ("gpt_oss", dict(num_local_experts=3, num_experts_per_tok=2, head_dim=8)),
]
KEPT = [0, 1, 2, 5, 8, 9, 13, 14, 15, 20, 22]


def masked(model, graph, kept):
    """The model with zeros in the removed channels, and norms that compute on the others alone."""
    model, group, width = copy.deepcopy(model), graph.groups["residual"], graph.groups["residual"].n_units
    kept = torch.tensor(kept["residual"])
    mask = torch.zeros(width, dtype=model.dtype)
    mask[kept] = 1
    silence = lambda module, args, output: output * mask
    norms = dict.fromkeys(n.rpartition(".")[0] for n, (dim, _) in group.tensors.items() if ".lm_head" not in f".{n}")
    for name in group.producers:
        path = name if name in graph.linears else name.rpartition(".")[0]  # what a mixture adds up
        model.get_submodule(path).register_forward_hook(silence)
    for path in norms:
        module = model.get_submodule(path)
        if ".layers." in path and "norm" not in path:  # a router, which reads what a norm left at zero
            continue
        if isinstance(module, nn.Embedding) or path.endswith("project_in"):
            module.register_forward_hook(silence)
        elif not path.endswith("project_out"):
            module.forward = on_kept(module, kept, width)
    return model


def on_kept(norm, kept, width):
    small = copy.deepcopy(norm)
    for name, p in norm.named_parameters(recurse=False):
        setattr(small, name, nn.Parameter(p.detach()[kept]))
    if hasattr(norm, "normalized_shape"):
        small.normalized_shape = (len(kept),)
    return lambda x: torch.zeros_like(x).index_copy(-1, kept, small(x[..., kept]))


@pytest.fixture
def ids():
    return torch.randint(2, 61, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family, over", CASES)
def test_removing_a_channel_is_zeroing_it_where_norms_see_the_others(family, over, ids):
    model = tiny(family, **over)
    graph = discover(model)
    for others in (everything(graph), random_kept(graph, 1)):
        kept = others | {"residual": KEPT}
        small, reference = copy.deepcopy(model), masked(model, graph, kept)
        narrow_(small, graph, kept)
        narrow_(reference, graph, others)
        with torch.no_grad():
            expected = reference(ids).logits
            torch.testing.assert_close(small(ids).logits, expected, rtol=1e-9, atol=1e-9)
            assert (model(ids).logits - expected).abs().max() > 1e-3
    assert small.config.to_dict() == model.config.to_dict()
    torch.testing.assert_close(continued(small, ids), continued(reference, ids), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family, over", CASES)
def test_what_is_stored_of_fewer_channels_is_as_predicted_and_loads_into_a_skeleton(family, over, ids):
    model = tiny(family, **over)
    graph, whole = discover(model), model.state_dict()
    kept = random_kept(graph, 2) | {"residual": KEPT}
    plan = Plan(
        model_name="tiny", model_digest="", kept={n: tuple(u) for n, u in kept.items()},
        specs=dict.fromkeys(graph.linears, DENSE),
    )  # fmt: skip
    skeleton = build_skeleton(tiny_config(family, **over))
    predicted = cost.stored_tensors(cost.named_tensors(skeleton), discover(skeleton), plan)
    narrow_(model, graph, kept)
    stored = cost.named_tensors(model)
    assert {n: shape for n, (_, shape) in predicted.items()} == {n: shape for n, (_, shape) in stored.items()}
    cuts = cuts_of(graph, kept)
    assert all(torch.equal(cut_tensor(whole[n], cuts.get(n, ())), t) for n, t in model.state_dict().items())
    narrow_(skeleton, discover(skeleton), kept)
    skeleton.load_state_dict({n: model.state_dict()[n] for n in predicted}, strict=False, assign=True)
    skeleton.to(torch.float64).tie_weights()
    skeleton.config._experts_implementation = "eager"  # the only one that knows float64
    torch.testing.assert_close(skeleton(ids).logits, model(ids).logits, rtol=1e-9, atol=1e-9)
    again = discover(model).groups["residual"]
    assert again.n_units == len(KEPT) and again.tensors.keys() == graph.groups["residual"].tensors.keys()


def test_readers_writers_and_scales_of_a_llama_are_these():
    group = discover(tiny("llama")).groups["residual"]
    part = lambda names: {n.removeprefix("model.layers.1.") for n in names if ".layers.1." in n}
    assert part(group.producers) == {"self_attn.o_proj", "mlp.down_proj"}
    assert part(group.consumers) == {f"self_attn.{x}_proj" for x in "qkv"} | {"mlp.gate_proj", "mlp.up_proj"}
    assert part(group.tensors) == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert {n: d for n, (d, _) in group.tensors.items() if ".layers." not in n} == {
        "model.embed_tokens.weight": 1,
        "model.norm.weight": 0,
        "lm_head.weight": 1,
    }
    tables = [*group.producers.values(), *group.consumers.values(), *(t for _, t in group.tensors.values())]
    assert group.layer == -1 and all(t.tolist() == [[i] for i in range(24)] for t in tables)


def test_a_norm_across_heads_is_none_of_the_hidden_states():
    names = discover(tiny("olmo2")).groups["residual"].tensors
    assert not [n for n in names if "q_norm" in n or "k_norm" in n]


def test_a_model_whose_channels_are_unclear_says_so():
    graph = discover(tiny("olmo"))
    assert "residual" not in graph.groups
    norm = "'model.layers.0.input_layernorm' is a norm without weights"
    assert graph.notes[-1] == f"channels of the hidden states: {norm}, so they are never pruned"


@pytest.mark.parametrize("n", [1, 2, 5, 16, 24])
def test_only_a_diagonal_dependence_is_by_element(n):
    generator = torch.Generator().manual_seed(0)
    vector = torch.rand(n, generator=generator).requires_grad_()
    x = torch.rand(3, n, generator=generator)
    assert by_element(x * vector + 1, vector, generator)
    assert not by_element(x.clone().requires_grad_() * vector.sum(), vector, generator) or n == 1
    if n > 1:
        assert not by_element(x * vector.roll(1), vector, generator)
        assert not by_element((x * vector).cumsum(-1), vector, generator)
        half = torch.cat([vector[:1], vector[1:].detach()])
        assert not by_element(x * half, vector, generator)


def test_code_that_insists_on_the_width_is_found_out_before_anything_is_scored(tmp_path):
    asks = recipe.load("llm-pruner[units=[residual]]")
    for family in ("longcat_flash", "llama"):
        any_config(family).save_pretrained(tmp_path / family)
        shape = shaping.shape_of(load.inspect_source(tmp_path / family / "config.json"))
        prepare.check_residual(shape, recipe.load("llm-pruner"))
        if family == "llama":
            prepare.check_residual(shape, asks)
        else:
            with pytest.raises(RecipeError, match="does not run with half of them: .* Leave 'residual' out of `units`"):
                prepare.check_residual(shape, asks)
