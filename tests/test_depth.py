"""Whole layers: the shorter model is the original with identities in place of what went."""

import copy

import pytest
import torch
from test_discover import as_values
from test_surgery import continued, everything
from tiny import tiny, tiny_config

from qpruner.errors import ModelError, PlanError
from qpruner.model.depth import check_depth, shortened, shortened_config, tensor_names
from qpruner.model.discover import discover
from qpruner.model.skeleton import build_skeleton, decoder_layers
from qpruner.model.surgery import narrow_
from qpruner.testing import random_kept

FIVE = dict(num_hidden_layers=5)
TYPES = ("sliding", "full", "sliding", "full", "full")
CASES = [
    ("llama", FIVE),
    ("qwen3", FIVE),
    ("gpt_neox", FIVE),
    ("bloom", dict(n_layer=5)),
    ("gpt2", dict(n_layer=5)),
    ("opt", FIVE),
    ("gemma2", FIVE | dict(head_dim=8, sliding_window=4)),  # every other layer sees a window
    ("gemma3_text", FIVE | dict(head_dim=8, sliding_window=4, layer_types=[f"{t}_attention" for t in TYPES])),
    ("smollm3", FIVE | dict(no_rope_layers=[1, 0, 1, 0, 0], pad_token_id=0)),
]  # fmt: skip


def with_layers(model, graph, layers):
    """The model of these layers, which shares its tensors with the whole one."""
    short = build_skeleton(shortened_config(model.config, layers))
    state = model.state_dict(keep_vars=True)
    names = tensor_names(graph, layers, state)
    short.load_state_dict({new: state[old] for new, old in names.items()}, assign=True)
    short.tie_weights()
    return short


LAYERS = (0, 3, 4)


@pytest.fixture
def ids():
    return torch.randint(2, 61, (2, 9), generator=torch.Generator().manual_seed(1))


def with_identities(model, layers):
    """The original, whose other layers hand on what they get."""
    model = copy.deepcopy(model)
    for i, path in enumerate(decoder_layers(model)):
        if i not in layers:
            parent, _, number = path.rpartition(".")
            whole = model.get_submodule(path)
            whole.forward = passing_on(whole)
    return model


def passing_on(layer):
    forward = layer.forward

    def identity(hidden_states, *args, **kwargs):
        out = forward(hidden_states, *args, **kwargs)  # fills the cache, as a layer that is there does
        return (hidden_states, *out[1:]) if isinstance(out, tuple) else hidden_states

    return identity


@pytest.mark.parametrize("family, over", CASES)
def test_a_shorter_model_is_the_original_with_identities(family, over, ids):
    model = tiny(family, **over)
    check_depth(model.config, LAYERS)
    short, reference = with_layers(model, discover(model), LAYERS).to(torch.float64), with_identities(model, LAYERS)
    assert len(decoder_layers(short)) == 3 and type(short) is type(model) and model.config.num_hidden_layers == 5
    with torch.no_grad():
        torch.testing.assert_close(short(ids).logits, reference(ids).logits, rtol=1e-9, atol=1e-9)
        assert (short(ids).logits - model(ids).logits).abs().max() > 1e-3
    torch.testing.assert_close(continued(short, ids), continued(reference, ids), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family, over", CASES)
def test_the_graph_of_a_shorter_model_is_what_is_discovered_in_it(family, over):
    config = tiny_config(family, **over)
    whole = discover(build_skeleton(config))
    short = build_skeleton(shortened_config(config, LAYERS))
    assert as_values(shortened(whole, LAYERS))[:-1] == as_values(discover(short))[:-1]
    names = tensor_names(whole, LAYERS, build_skeleton(config).state_dict())
    assert list(names) == list(short.state_dict())


def test_layers_go_first_and_units_of_what_stays_after_them(ids):
    model = tiny("llama", **FIVE)
    graph = discover(model)
    kept = random_kept(shortened(graph, LAYERS), 1)
    short = with_layers(model, graph, LAYERS)
    narrow_(short, shortened(graph, LAYERS), kept)
    units_first, original = copy.deepcopy(model), {str(new): str(old) for new, old in enumerate(LAYERS)}
    whole = everything(graph) | {
        ".".join(original[part] if part in original else part for part in name.split(".")): units
        for name, units in kept.items()
    }
    narrow_(units_first, graph, whole)
    expected = with_identities(units_first, LAYERS)(ids).logits
    torch.testing.assert_close(short.to(torch.float64)(ids).logits, expected, rtol=1e-9, atol=1e-9)


def test_fields_that_speak_of_layers_follow():
    config = tiny_config(
        "qwen3_moe", **FIVE, mlp_only_layers=[0, 2, 3], max_window_layers=4, eos_token_id=[1, 2, 3, 4, 5]
    )
    short = shortened_config(config, (1, 3, 4))
    assert (short.num_hidden_layers, short.mlp_only_layers, short.max_window_layers) == (3, [1], 2)
    assert short.eos_token_id == [1, 2, 3, 4, 5] and config.mlp_only_layers == [0, 2, 3]
    assert shortened_config(config, None).to_dict() == config.to_dict()


@pytest.mark.parametrize("layers", [(), (1, 1), (2, 1), (-1, 2), (0, 5)])
def test_layers_that_the_model_does_not_have_are_refused(layers):
    model = build_skeleton(tiny_config("llama", **FIVE))
    for attempt in (lambda: shortened_config(model.config, layers), lambda: shortened(discover(model), layers)):
        with pytest.raises(PlanError, match="keeps the decoder layers .* Accepted: at least one of 0 to 4"):
            attempt()


def test_layers_that_depend_on_their_number_are_refused():
    experts = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, decoder_sparse_step=2)
    with pytest.raises(ModelError, match="decoder layer 3 of this 'qwen3_moe' would be another one as layer 2 of 3"):
        check_depth(tiny_config("qwen3_moe", **FIVE, **experts), (0, 1, 3))
    with pytest.raises(ModelError, match="depend on their number .scale_attn_by_inverse_layer_idx."):
        check_depth(tiny_config("gpt2", n_layer=5, scale_attn_by_inverse_layer_idx=True), LAYERS)
    with pytest.raises(ModelError, match="'diffllama' would be another one .*lambda_init differs"):
        check_depth(tiny_config("diffllama", **FIVE), LAYERS)
