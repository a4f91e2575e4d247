"""Compiled products: as the dense ones in float32, and nothing where they cannot be made."""

import pytest
import torch
from specs import EVERY

from qpruner.model.packed import native
from qpruner.model.packed.linear import PackedLinear
from qpruner.plan import NF4, QuantSpec

SPECS = [
    NF4,
    QuantSpec(bits=4, grid="normal-float"),
    QuantSpec(bits=4, grid="integer", group_size=32),
    QuantSpec(bits=4, grid="integer", group_size=96, symmetric=False),
]

needs_compiler = pytest.mark.skipif(native.library() is None, reason="wants AVX-512 and a C compiler")


@needs_compiler
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("d_out, d_in", [(130, 192), (3, 70), (1, 1)])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_product_is_the_dense_one_to_float32(rand, spec, d_out, d_in, n):
    layer, x = PackedLinear.from_weight(rand(d_out, d_in), None, spec), rand(n, d_in).float()
    y = native.product(x, layer.codes, layer.scales, layer.zeros_of(slice(None)), spec)
    exact = x.double() @ layer.dequantize(torch.float64).T
    size = x.double().abs() @ layer.dequantize(torch.float64).abs().T
    assert y.dtype == torch.float32 and ((y - exact).abs() <= 1e-5 * size).all()


@needs_compiler
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_layers_use_it_and_keep_their_gradient(rand, monkeypatch, dtype, rtol):
    calls = []
    monkeypatch.setattr(native, "SMALLEST", 0)
    monkeypatch.setattr(native, "product", lambda *args, own=native.product: calls.append(1) or own(*args))
    layer = PackedLinear.from_weight(rand(40, 70), rand(40), NF4)
    x, W = rand(2, 3, 70).to(dtype).requires_grad_(), layer.dequantize(torch.float64)
    y = layer(x)
    y.sum().backward()
    assert calls and y.dtype == dtype
    torch.testing.assert_close(y.double(), x.double() @ W.T + layer.bias, rtol=rtol, atol=20 * rtol)
    torch.testing.assert_close(x.grad.double(), W.sum(0).expand(2, 3, -1), rtol=rtol, atol=20 * rtol)


@needs_compiler
@pytest.mark.parametrize("d_out, d_in", [(5, 192), (3, 70), (2, 17), (1, 1)])
@pytest.mark.parametrize("spec", [s for s in EVERY if native.decodes(s)], ids=str)
def test_decoded_weights_are_those_of_torch_to_the_bit(rand, monkeypatch, spec, d_out, d_in):
    layer = PackedLinear.from_weight(rand(d_out, d_in), None, spec)
    expected = layer.dequantize(torch.bfloat16)
    calls = []
    monkeypatch.setattr(native, "SMALLEST", 0)
    monkeypatch.setattr(native, "decode", lambda *args, own=native.decode: calls.append(1) or own(*args))
    assert torch.equal(layer.dequantize(torch.bfloat16), expected)
    assert torch.equal(layer.dequantize_rows(slice(1, 3), torch.bfloat16), expected[1:3])
    assert calls


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.library.__wrapped__() is None


def test_without_a_compiler_nothing_is_made(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert native.library.__wrapped__() is None
    monkeypatch.setenv("CC", "false")  # there, but fails
    assert native.library.__wrapped__() is None
