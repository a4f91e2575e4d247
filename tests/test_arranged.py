"""Products in torch's 4-bit order: as the dense ones, and nothing else about a layer changes."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qpruner.model.packed import arranged
from qpruner.model.packed import products as packed_products
from qpruner.model.packed.arranged import Arranged
from qpruner.model.packed.linear import PackedLinear
from qpruner.plan import INT8, NF4, QuantSpec

INTEGERS = [
    QuantSpec(bits=bits, grid="integer", group_size=group_size, symmetric=symmetric)
    for bits in (2, 3, 4)
    for symmetric in (True, False)
    for group_size in (32, None)
]
DOUBLE = [
    QuantSpec(bits=4, grid="integer", group_size=32, scale_bits=6),
    QuantSpec(bits=3, grid="integer", group_size=32, symmetric=False, scale_bits=8),
]
BINARY = [QuantSpec(bits=1, grid="binary", group_size=64), QuantSpec(bits=1, grid="binary")]
ORDERED = [*INTEGERS, *DOUBLE, *BINARY]
SHAPES = [(512, 128), (1000, 250)]  # the second is filled up with zeros

needs_kernel = pytest.mark.skipif(not arranged.supported(), reason="torch's 4-bit product wants AVX2 or AVX-512")


@pytest.fixture(autouse=True)
def any_padding(monkeypatch):
    monkeypatch.setattr(arranged, "PADDING", 0.1)


def layer_of(rand, spec, d_out, d_in):
    return PackedLinear.from_weight(0.02 * rand(d_out, d_in), rand(d_out).bfloat16(), spec)


def error(y, exact):
    return ((y.double() - exact).norm() / exact.norm()).item()


@needs_kernel
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("d_out, d_in", SHAPES)
@pytest.mark.parametrize("spec", ORDERED, ids=str)
def test_product_errs_as_the_dense_one_does(rand, spec, d_out, d_in, shift):
    """Both round to bfloat16: scales, zeros and results here, weights and results there."""
    layer = layer_of(rand, spec, d_out, d_in)
    x = (rand(2, 3, d_in) + shift).bfloat16()
    exact = x.double() @ layer.dequantize(torch.float64).T + layer.bias.double()
    dense = x @ layer.dequantize(torch.bfloat16).T + layer.bias
    y = layer(x)
    assert layer.arranged() and y.dtype == torch.bfloat16 and y.shape == exact.shape
    assert error(y, exact) < 1.3 * error(dense, exact) < 0.01


@needs_kernel
@pytest.mark.parametrize("spec", ORDERED, ids=str)
def test_order_changes_nothing_else(rand, spec):
    d_out, d_in = 1000, 250
    layer = layer_of(rand, spec, d_out, d_in)
    untouched = copy.deepcopy(layer)
    use = lambda: layer(rand(1, d_in).bfloat16()) is not None and layer.arranged() is not None
    assert use()
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(layer.dequantize(dtype), untouched.dequantize(dtype))
    x = rand(3, d_in).requires_grad_()
    layer(x).sum().backward()
    assert layer.arranged()  # neither of these needs the stored order
    torch.testing.assert_close(x.grad, untouched.dequantize(torch.float64).sum(0).expand(3, -1))
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    assert use()
    copies.append(layer.to(torch.float32))
    assert use()
    restored = PackedLinear.empty(d_out, d_in, True, spec, device="cpu", dtype=torch.bfloat16)
    restored.load_state_dict(layer.state_dict())
    assert use()
    for other in (*copies, restored, layer):
        for name in ("codes", "scales", "steps", "zeros"):
            stored = getattr(untouched, name)
            assert (getattr(other, name) is None) if stored is None else torch.equal(getattr(other, name), stored)


@needs_kernel
def test_codes_put_in_its_place_are_used(rand):
    spec = ORDERED[0]
    layer, other = layer_of(rand, spec, 256, 64), layer_of(lambda *s: rand(*s) - 1, spec, 256, 64)
    x = rand(1, 64).bfloat16()
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    layer.codes.zero_()
    assert not torch.equal(layer(x), other(x))
    for name in ("codes", "scales"):  # as when layers come and go one by one
        layer._buffers[name] = getattr(other, name)
    assert torch.equal(layer(x), other(x))


@needs_kernel
@pytest.mark.parametrize("spec", [s for s in ORDERED if s.group_size], ids=str)
def test_order_takes_no_memory_of_its_own(rand, spec):
    size = lambda: sum(b.untyped_storage().nbytes() for b in layer.buffers())
    layer = layer_of(rand, spec, 1024, 256)
    before = size()
    layer(rand(1, 256).bfloat16())
    # Zeros and scales of few bits have a byte each.
    assert layer.arranged() and before <= size() < 1.08 * before


@needs_kernel
def test_made_in_inference_mode_a_layer_can_still_be_loaded(rand):
    layer = layer_of(rand, ORDERED[0], 256, 64)
    with torch.inference_mode():
        layer(rand(1, 64).bfloat16())
        state = layer.state_dict()
    layer.load_state_dict(state)


def test_what_does_not_fit_stays_in_its_order(rand, monkeypatch):
    fits = lambda spec, d_out, d_in: layer_of(rand, spec, d_out, d_in).arranged(make=True) is not None
    spec = QuantSpec(bits=4, grid="integer", group_size=32)
    assert not fits(NF4, 256, 64) and not fits(spec.model_copy(update={"group_size": 16}), 256, 64)
    monkeypatch.setattr(arranged, "PADDING", 0.0)
    assert fits(spec, 256, 64) and not fits(spec, 250, 64) and not fits(spec, 256, 70)
    tiny = PackedLinear.from_weight(1e-5 * rand(256, 64), None, spec)  # scales that bfloat16_of would round more
    assert tiny.arranged(make=True) is None


@needs_kernel
@pytest.mark.parametrize("factor", [1.0, 0.125])
def test_scales_are_rounded_to_nearest(factor):
    halves = torch.arange(0x0400, 0x7C00, dtype=torch.int16).view(torch.float16)
    halves = torch.cat([torch.zeros(1, dtype=torch.float16), halves])
    found = arranged.bfloat16_of(halves, factor)
    spacing = torch.finfo(torch.bfloat16).eps * 2.0 ** torch.floor(torch.log2(halves.double()))
    assert ((found.double() / factor - halves.double()).abs() <= spacing.nan_to_num(0) / 2).all()


def test_a_layer_is_still_a_linear_of_frozen_bytes(rand):
    layer = layer_of(rand, ORDERED[0], 256, 64)
    layer(rand(1, 64).bfloat16())
    assert isinstance(layer, nn.Linear) and layer.weight.dtype == torch.uint8 and layer.weight.dim() == 1


@needs_kernel
@pytest.mark.parametrize("n", [1, 3, 8, 9])
@pytest.mark.parametrize("d_in", [64, 70])  # torch's product reads 16 at a time
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_whole_bytes_and_integers_err_as_the_dense_product(rand, n, d_in, activation_bits):
    layer = PackedLinear.from_weight(
        rand(130, d_in), None, QuantSpec(bits=8, grid="integer", activation_bits=activation_bits)
    )
    x = rand(n, d_in).bfloat16()
    exact = x.double() @ layer.dequantize(torch.float64).T
    assert error(layer(x), exact) < (0.006 if activation_bits == 16 else 0.02)


@needs_kernel
def test_each_kind_of_input_gets_its_product(rand, monkeypatch):
    used = []
    for name in ("product_of_codes", "product_of_values"):
        own = getattr(packed_products, name)
        monkeypatch.setattr(packed_products, name, lambda *a, own=own, name=name: used.append(name) or own(*a))
    monkeypatch.setattr(Arranged, "product", lambda *a, own=Arranged.product: used.append("order") or own(*a))

    def by(spec, n, d_in=64, dtype=torch.bfloat16):
        used.clear()
        PackedLinear.from_weight(rand(128, d_in), None, spec)(rand(n, d_in).to(dtype))
        return used[0]

    int4 = QuantSpec(bits=4, grid="integer", group_size=32)
    assert by(int4, 1) == by(int4, 32) == "order" and by(int4, 33) == by(int4, 1, dtype=torch.float32)
    assert by(INT8, 8) == by(INT8, 1, d_in=72) == "product_of_codes"
    assert by(NF4, 1) == "product_of_values"
