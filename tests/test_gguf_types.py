"""Types of tensors in GGUF files: which one a spec gets, and that codes which have a type are not rounded again."""

import pytest
import torch
from specs import EVERY, of_groups

from qpruner.artifact.gguf.codes import LARGE, SMALL, bytes_as_coded, exact_type
from qpruner.artifact.gguf.types import INSTEAD, OF_BITS, bytes_in, shape_in, type_of
from qpruner.errors import ModelError
from qpruner.model.packed.linear import PackedLinear
from qpruner.plan import DENSE, NF4, QuantSpec

gguf = pytest.importorskip("gguf")

FEW_BITS = [
    QuantSpec(bits=bits, grid=grid, scale_bits=min(most, scale_bits))
    for (grid, bits), (_, most, *_) in LARGE.items()
    for scale_bits in (4, 6)
]
SYMMETRIC = [QuantSpec(bits=bits, grid="integer") for bits, symmetric in SMALL if symmetric]
ONE_OF_THREE = [QuantSpec(bits=2, grid="ternary", group_size=256), QuantSpec(bits=1, grid="binary", group_size=512)]


def decode(data, name: str) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType[name]))


def layer_of(spec: QuantSpec, d_in: int = 512) -> PackedLinear:
    W = torch.randn(6, d_in, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 6)[:, None]
    W[0, :32] = 0
    return PackedLinear.from_weight(W, None, spec)


@pytest.mark.parametrize("group_size", [32, 64, 256, None])
@pytest.mark.parametrize("spec", [*FEW_BITS, *SYMMETRIC], ids=str)
def test_codes_are_taken_over_bit_by_bit(spec, group_size):
    layer = layer_of(of_groups(spec, group_size))
    name = exact_type(layer.spec, 512)
    assert name is not None
    assert torch.equal(decode(bytes_as_coded(layer), name), layer.dequantize())


@pytest.mark.parametrize("spec", ONE_OF_THREE, ids=str)
def test_ternary_and_binary_groups_of_whole_blocks_too(spec):
    layer = layer_of(spec)
    assert exact_type(spec, 512) == "TQ1_0"
    assert torch.equal(decode(bytes_as_coded(layer), "TQ1_0"), layer.dequantize())


@pytest.mark.parametrize("bits", [4, 5])
def test_of_zero_points_nothing_is_lost_but_in_rounding_the_minimum(bits):
    layer = layer_of(QuantSpec(bits=bits, grid="integer", group_size=32, symmetric=False))
    W, rounded = layer.dequantize(), layer.rounded()
    minima = (rounded.scales.float() * rounded.zeros).abs().repeat_interleave(32, 1)
    q = decode(bytes_as_coded(layer), exact_type(layer.spec, 512))
    assert ((q - W).abs() <= 2**-11 * minima + 1e-7).all()


def test_groups_that_do_not_end_where_blocks_do_have_no_exact_type():
    for spec in (*FEW_BITS, *SYMMETRIC):
        assert exact_type(of_groups(spec, 24), 512) is None
        assert exact_type(of_groups(spec, 32), 528) is None
        assert exact_type(spec.model_copy(update={"salient": 3, "salient_bits": 8}), 512) is None
    assert exact_type(of_groups(ONE_OF_THREE[0], 128), 512) is None
    assert exact_type(NF4, 512) is None and exact_type(DENSE, 512) is None


@pytest.mark.parametrize("spec", [*EVERY, DENSE], ids=str)
@pytest.mark.parametrize("d_in", [256, 96, 44])
def test_every_spec_has_a_type_for_rows_of_any_length(spec, d_in):
    of = type_of(spec, d_in)
    assert (of.wanted or of.name) == OF_BITS[spec.bits] and not of.exact
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[of.name]][0]
    assert d_in % block == 0
    W = torch.randn(4, d_in, generator=torch.Generator().manual_seed(0))
    data = bytes_in(W, of.name)
    assert (data.shape, data.dtype) == shape_in(of.name, (4, d_in))
    # the type instead has no fewer bits
    if of.wanted:
        bits = lambda name: (lambda n, size: 8 * size / n)(*gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]])
        assert bits(of.name) >= bits(of.wanted)
    assert type_of(spec, 256 * d_in, as_coded=True).wanted is None


def test_blocks_instead_are_those_that_llama_cpp_takes():
    assert INSTEAD == {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def test_what_float16_does_not_hold_is_refused():
    with pytest.raises(ModelError, match="a weight of 70000 is beyond float16"):
        bytes_in(torch.full((1, 4), 7e4), "F16")
