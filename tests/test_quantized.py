"""Salient channels apart, and inputs that are rounded: the product is that of the dequantized weight."""

import copy

import pytest
import torch
from safetensors.torch import save
from specs import EVERY
from torch import nn

from qpruner.errors import PlanError
from qpruner.model import adapters, cost
from qpruner.model.check import check_fused, check_salient
from qpruner.model.graph import Graph, LinearSite, Projection
from qpruner.model.packed import split as quantized
from qpruner.model.packed.linear import PackedLinear
from qpruner.model.packed.products import integer_arithmetic, rounded_tokens
from qpruner.model.packed.split import SplitLinear, packed
from qpruner.plan import INT8, NF4, QuantSpec

SALIENT = [s.model_copy(update={"salient": 3, "salient_bits": 4 if s.bits < 4 else 8}) for s in EVERY if s.bits < 8]


def dense_twin(layer):
    twin = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=torch.float64)
    twin.weight.data = layer.dequantize(torch.float64)
    if layer.bias is not None:
        twin.bias.data = layer.bias.data.double()
    return twin


@pytest.mark.parametrize("spec", SALIENT, ids=str)
@pytest.mark.parametrize("d_out, d_in", [(12, 70), (5, 33), (1, 4)])
def test_product_and_gradients_are_those_of_the_dense_layer(rand, spec, d_out, d_in):
    layer = packed(rand(d_out, d_in), rand(d_out), spec)
    assert type(layer) is SplitLinear
    layer.requires_grad_(True)
    x, seen, results = rand(2, 3, d_in).requires_grad_(), rand(2, 3, d_out), []
    for each in (layer, dense_twin(layer)):
        x.grad = None
        y = each(x)
        (y * seen).sum().backward()
        results.append([y, x.grad, each.bias.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("spec", SALIENT, ids=str)
def test_each_part_is_rounded_as_if_alone(rand, spec):
    W, salient = rand(6, 40), [31, 2, 7]
    found = packed(W, None, spec, torch.tensor(salient)).dequantize(torch.float64)
    for channels, of_part in ((sorted(salient), spec.high), (sorted({*range(40)} - {*salient}), spec.rest)):
        alone = PackedLinear.from_weight(W[:, channels], None, of_part)
        assert torch.equal(found[:, channels], alone.dequantize(torch.float64))


def test_the_largest_columns_are_salient_unless_others_are_named(rand):
    W = rand(5, 20)
    W[:, [4, 17]] *= 10
    spec = QuantSpec(bits=1, grid="binary", salient=2)
    assert packed(W, None, spec).salient.tolist() == [4, 17]
    assert packed(W, None, spec, torch.tensor([9, 1])).salient.tolist() == [1, 9]
    with pytest.raises(ValueError, match="2 different channels"):
        packed(W, None, spec, torch.tensor([3, 3]))
    with pytest.raises(ValueError, match="2 of 2 input channels"):
        packed(W[:, :2], None, spec)


def test_more_salient_channels_lose_less(rand):
    W = rand(8, 64)
    specs = [QuantSpec(bits=2, grid="integer", salient=n) for n in (0, 1, 4, 16, 63)]
    lost = [(W - packed(W, None, spec).dequantize(torch.float64)).norm().item() for spec in specs]
    assert lost == sorted(lost, reverse=True)


@pytest.mark.parametrize("spec", SALIENT + EVERY, ids=str)
@pytest.mark.parametrize("d_out, d_in", [(12, 70), (5, 33)])
def test_stored_bytes_are_those_predicted(rand, spec, d_out, d_in):
    layer = packed(rand(d_out, d_in), None, spec)
    state, predicted = layer.state_dict(), cost.weight_tensors(d_out, d_in, spec, "BF16")
    assert {n: (cost.TORCH_NAMES[t.dtype], tuple(t.shape)) for n, t in state.items()} == predicted
    assert len(save(state, {"format": "pt"})) == cost.safetensors_size(predicted)
    assert sum(t.nbytes for t in state.values()) == cost.linear_bytes(d_out, d_in, spec)


@pytest.mark.parametrize("spec", SALIENT[::3], ids=str)
def test_an_empty_layer_loads_the_state_of_a_full_one(rand, spec):
    full = packed(rand(5, 33), rand(5), spec)
    meta = quantized.empty(5, 33, True, spec)
    meta.load_state_dict(full.state_dict(), assign=True)
    x = rand(2, 33)
    assert torch.equal(meta(x), full(x)) and torch.equal(copy.deepcopy(full)(x), full(x))


@pytest.mark.parametrize("spec", SALIENT[::3], ids=str)
def test_moving_to_another_dtype_leaves_the_weight_alone(rand, spec):
    layer = packed(rand(5, 33), rand(5), spec)
    W = layer.dequantize(torch.float64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        moved = copy.deepcopy(nn.Sequential(layer)).to(dtype)
        assert torch.equal(moved[0].dequantize(torch.float64), W) and moved[0].bias.dtype == dtype
        assert moved(rand(3, 33).to(dtype)).dtype == dtype


def test_a_correction_keeps_the_salient_channels(rand):
    spec = QuantSpec(bits=2, grid="integer", salient=2)
    layer = packed(rand(6, 20), rand(6), spec, torch.tensor([3, 5]))
    merged = adapters.merged(layer, 10 * rand(6, 20))
    assert merged.spec == spec and merged.salient.tolist() == [3, 5] and torch.equal(merged.bias, layer.bias)


def rounded(x, bits):
    """The slow way."""
    steps = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (x / steps).round() * steps


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("weight", [INT8, NF4, QuantSpec(bits=3, grid="integer"), SALIENT[3], SALIENT[-1]], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(9, 70), (2, 3, 70), (70,), (0, 70)])
def test_rounded_inputs_times_the_dequantized_weight(rand, bits, weight, dtype, tolerance, shape):
    spec = weight.model_copy(update={"activation_bits": bits})
    layer, x = packed(rand(12, 70), rand(12), spec), rand(*shape).to(dtype)
    wide, seen = x.to(torch.promote_types(dtype, torch.float32)), torch.empty(shape, dtype=torch.float64)
    high = layer.salient.tolist() if spec.salient else []
    for channels, of_part in ((high, max(bits, spec.salient_bits)), ([j for j in range(70) if j not in high], bits)):
        if channels:
            seen[..., channels] = rounded(wide[..., channels], of_part).double()
    y, expected = layer(x), dense_twin(layer)(seen)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 12)
    scale = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_inputs_loses_half_a_step_at_most_and_gradients_pass_through(rand, bits):
    x = rand(5, 40)
    x[2] = 0
    counts, steps = rounded_tokens(x, bits)
    assert ((x - counts * steps).abs() <= steps / 2 * (1 + 1e-12)).all() and counts.abs().max() == 2 ** (bits - 1) - 1
    layer = packed(rand(6, 40), None, INT8.model_copy(update={"activation_bits": bits}))
    x.requires_grad_()
    y, seen = layer(x), rand(5, 6)
    (y * seen).sum().backward()
    torch.testing.assert_close(x.grad, seen @ layer.dequantize(torch.float64))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 33, 7), (40, 130, 65)])
def test_integer_arithmetic_is_exact(rand, bits, shape):
    tokens, d_in, d_out = shape
    spec = QuantSpec(bits=bits, grid="integer", activation_bits=8)
    layer, x = packed(rand(d_out, d_in), None, spec), rand(tokens, d_in).float()
    assert integer_arithmetic(x, spec) and not integer_arithmetic(x.double(), spec)
    expected = rounded(x, 8).double() @ layer.dequantize(torch.float64).T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    integers = layer.integers_of(slice(None)).double() * layer.scales.double()
    assert torch.equal(integers, layer.dequantize(torch.float64))


def graph_of(d_in=8):
    names = [f"l.attn.{n}_proj" for n in "qkv"]
    linears = {name: LinearSite(name, 0, 4, d_in, False) for name in names}
    return Graph(("l",), linears, {}, (Projection("l.attn.qkv", 0, tuple(names)),))


def test_fused_linears_share_a_spec():
    graph = graph_of()
    specs = dict.fromkeys(graph.linears, NF4)
    check_fused(specs, graph)
    with pytest.raises(PlanError, match="'l.attn.qkv'.*k_proj int8.*share a spec"):
        check_fused(specs | {"l.attn.k_proj": INT8}, graph)


def test_all_channels_cannot_be_salient():
    spec = QuantSpec(bits=2, grid="integer", salient=8)
    check_salient({"a": spec}, {"a": (4, 9)})
    with pytest.raises(PlanError, match="'a' has 8 inputs"):
        check_salient({"a": spec}, {"a": (4, 8)})
