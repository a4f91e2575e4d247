import pytest
import torch
from specs import BINARY, BOUNDED, EVERY, INTEGERS, TERNARY, of_groups

from qpruner.math import grids
from qpruner.math.books import book, reach
from qpruner.plan import INT8, NF4, QuantSpec

SHAPES = [(5, 64, 16), (3, 37, 8), (4, 33, None), (2, 7, 64), (6, 10, 1), (1, 1, None)]  # rows, inputs, group size


def spread(per_group, group_size, d):
    """The slow way to one value per weight."""
    columns = torch.arange(d) // (group_size or d)
    return per_group.double()[:, columns]


def values_of(rounded, spec, d):
    """The slow way to every value that a weight could have had, (out, d, values)."""
    steps = spread(grids.decoded_scales(rounded, spec), spec.group_size, d)
    zeros = 0 if rounded.zeros is None else spread(rounded.zeros, spec.group_size, d)[..., None]
    return (book(spec) - zeros) * steps[..., None]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_float_splits_a_normal_distribution_evenly(bits):
    # QLoRA's own construction: quantiles between 1 - offset and a half, one more above zero than below, normalized.
    normal, most = torch.distributions.Normal(0.0, 1.0), 2 ** (bits - 1)
    offset = ((1 - 1 / (4 * most)) + (1 - 1 / (4 * most - 2))) / 2
    above = normal.icdf(torch.linspace(offset, 0.5, most + 1)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, most)[:-1])
    values = torch.cat([below, torch.zeros(1), above]).sort().values
    found = book(QuantSpec(bits=bits, grid="normal-float"))
    torch.testing.assert_close(found, (values / values.max()).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("spec", BOUNDED, ids=str)
@pytest.mark.parametrize("rows, d, group_size", SHAPES)
def test_codes_are_nearest_and_nothing_is_clipped(rand, spec, rows, d, group_size):
    W, spec = rand(rows, d), of_groups(spec, group_size)
    rounded = grids.quantize(W, spec)
    q = grids.dequantize(rounded, spec, torch.float64)
    n = grids.group_count(d, group_size)
    assert rounded.codes.shape == W.shape and rounded.scales.shape == (rows, n)
    assert rounded.zeros is None if spec.symmetric else rounded.zeros.shape == (rows, n)
    values = values_of(rounded, spec, d)
    widest = values.diff(dim=-1).amax(-1)
    assert ((W - q).abs() <= widest / 2 * (1 + 1e-12)).all()
    torch.testing.assert_close((W - q).abs(), (W[..., None] - values).abs().amin(-1))


def test_two_values_are_the_signs_times_the_mean(rand):
    W = rand(4, 40)
    q = grids.dequantize(grids.quantize(W, BINARY), BINARY, torch.float64)
    for group, rounded in zip(W.split(16, dim=1), q.split(16, dim=1), strict=True):
        best = (group.abs().mean(1, keepdim=True) * group.sign()).half().double()
        torch.testing.assert_close(rounded, best, rtol=0, atol=0)


@pytest.mark.parametrize("spec", [s for s in BOUNDED if s.symmetric and s.scale_bits == 16], ids=str)
def test_the_scale_is_the_smallest_half_that_holds_the_group(rand, spec):
    W = rand(50, 24)
    scales = grids.quantize(W, of_groups(spec, 8)).scales
    needed = W.unflatten(1, (3, 8)).abs().amax(-1) / reach(spec)
    one_less = (scales.view(torch.int16) - 1).view(torch.float16).double()
    assert (scales.double() >= needed).all() and (one_less < needed).all()


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("up", [True, False])
def test_scales_of_few_bits_are_as_near_as_their_step_allows(rand, bits, up):
    wanted = rand(30, 9).abs()
    wanted[3] = 0
    codes, steps = grids.stored_scales(wanted, QuantSpec(bits=3, grid="integer", scale_bits=bits), up=up)
    found = grids.decode(codes, steps).double()
    assert codes.max() == 2**bits - 1 and not found[3].any()
    error = found - wanted
    assert (error >= -1e-9).all() if up else ((-error) <= steps / 2 * (1 + 1e-9)).all()
    assert (error <= steps.double() * (1 if up else 0.5)).all()


@pytest.mark.parametrize("spec", [s for s in INTEGERS if s.symmetric] + [TERNARY], ids=str)
def test_integers_have_no_favourite_sign(rand, spec):
    turned = grids.quantize(-(W := rand(6, 50)), spec)
    expected = -grids.dequantize(grids.quantize(W, spec), spec)
    torch.testing.assert_close(grids.dequantize(turned, spec), expected, rtol=0, atol=0)


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_scaling_the_weight_scales_the_result(rand, spec):
    W = rand(6, 50)
    once, twice = grids.quantize(W, spec), grids.quantize(2 * W, spec)
    assert torch.equal(once.codes, twice.codes)
    assert torch.equal(2 * grids.decoded_scales(once, spec), grids.decoded_scales(twice, spec))


@pytest.mark.parametrize("spec", [s for s in EVERY if s.symmetric and s.scale_bits == 16], ids=str)
def test_rounding_twice_is_rounding_once(rand, spec):
    q = grids.dequantize(grids.quantize(rand(9, 40), spec), spec, torch.float64)
    again = grids.dequantize(grids.quantize(q, spec), spec, torch.float64)
    torch.testing.assert_close(again, q, rtol=2e-3, atol=0)  # an extreme code may allow a scale one bit smaller


@pytest.mark.parametrize("spec", BOUNDED, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-30, 3e-8, 1e-6, 6.5e4])
def test_extreme_groups_stay_finite(rand, spec, size):
    W, spec = rand(4, 20).clamp(-1, 1) * size / 2, of_groups(spec, 8)
    W[0] = 0
    rounded = grids.quantize(W, spec)
    q = grids.dequantize(rounded, spec, torch.float64)
    assert torch.isfinite(q).all() and not q[0].any() and not rounded.scales[0].any()
    assert ((W - q).abs() <= values_of(rounded, spec, 20).diff(dim=-1).amax(-1) / 2 * (1 + 1e-12)).all()


def test_what_a_grid_cannot_hold_is_refused():
    W, asymmetric = torch.ones(2, 4), QuantSpec(bits=2, grid="integer", symmetric=False)
    with pytest.raises(ValueError, match="beyond the largest float16"):
        grids.quantize(W * 65510, NF4)
    with pytest.raises(ValueError, match="beyond the largest float16"):
        grids.quantize(W * 65530, BINARY)
    for spec in (INT8, BINARY, asymmetric, QuantSpec(bits=4, grid="integer", scale_bits=4)):
        for bad in (torch.nan, torch.inf, -torch.inf):
            with pytest.raises(ValueError, match="not finite"):
                grids.quantize(W * bad, spec)


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_a_transposed_weight_gives_the_same_contiguous_codes(rand, spec):
    W, spec = rand(7, 12), of_groups(spec, 5)
    straight, turned = grids.quantize(W, spec), grids.quantize(W.T.contiguous().T, spec)
    for a, b in same(straight, turned):
        assert torch.equal(a, b) and b.is_contiguous()


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_tiles_do_not_matter(rand, spec, monkeypatch):
    W, spec = rand(7, 12), of_groups(spec, 5)
    whole = grids.quantize(W, spec)
    monkeypatch.setattr(grids, "TILE_WEIGHTS", 24)
    for a, b in same(whole, grids.quantize(W, spec)):
        assert torch.equal(a, b)


def same(one, other):
    """What two rounded weights store, in pairs."""
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return [(a, b) for a, b in pairs if a is not None or b is not None]


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_no_rows_are_nothing_to_round(spec):
    rounded = grids.quantize(torch.empty(0, 20), spec)
    assert {len(t) for t in vars(rounded).values() if t is not None} == {0}
    assert grids.dequantize(rounded, spec).shape == (0, 20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_of_the_weight_changes_no_code(rand, dtype):
    W = rand(8, 40).to(dtype)
    for a, b in same(grids.quantize(W, NF4), grids.quantize(W.double(), NF4)):
        assert torch.equal(a, b)
