import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qpruner.math import grids
from qpruner.math.packing import pack, pair_table, unpack, unpack_values

GRIDS = [(4, "normal-float"), (4, "integer"), (8, "integer")]
SHAPES = [(5, 64, 16), (3, 37, 8), (4, 33, None), (2, 7, 64), (6, 10, 1), (1, 1, None)]  # rows, inputs, group size


def spread(scales, group_size, d):
    """The slow way to one scale per weight."""
    columns = torch.arange(d) // (group_size or d)
    return scales.double()[:, columns]


def widest_gap(bits, grid):
    return 1.0 if grid == "integer" else grids.book(bits, grid).diff().max().item()


def test_normal_float_splits_a_normal_distribution_evenly():
    # QLoRA's own construction: quantiles between 1 - offset and a half, 9 above zero and 8 below, normalized.
    normal, offset = torch.distributions.Normal(0, 1), 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    values = torch.cat([below, torch.zeros(1), above]).sort().values
    torch.testing.assert_close(grids.book(4, "normal-float"), (values / values.max()).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits, grid", GRIDS)
@pytest.mark.parametrize("rows, d, group_size", SHAPES)
def test_codes_are_nearest_and_nothing_is_clipped(rand, bits, grid, rows, d, group_size):
    W = rand(rows, d)
    kw = dict(bits=bits, grid=grid, group_size=group_size)
    codes, scales = grids.quantize(W, **kw)
    q = grids.dequantize(codes, scales, dtype=torch.float64, **kw)
    steps = spread(scales, group_size, d)
    assert codes.shape == W.shape and scales.shape == (rows, grids.group_count(d, group_size))
    assert ((W - q).abs() <= steps * widest_gap(bits, grid) / 2 * (1 + 1e-12)).all()
    values = grids.book(bits, grid) if bits == 4 else torch.arange(-127.0, 128.0, dtype=torch.float64)
    every = (W[..., None] - values * steps[..., None]).abs().amin(-1)
    torch.testing.assert_close((W - q).abs(), every)


@pytest.mark.parametrize("bits, grid", GRIDS)
def test_the_scale_is_the_smallest_half_that_holds_the_group(rand, bits, grid):
    W = rand(50, 24)
    _, scales = grids.quantize(W, bits=bits, grid=grid, group_size=8)
    needed = W.unflatten(1, (3, 8)).abs().amax(-1) / grids.LARGEST[bits, grid]
    one_less = (scales.view(torch.int16) - 1).view(torch.float16).double()
    assert (scales.double() >= needed).all() and (one_less < needed).all()


@pytest.mark.parametrize("bits, grid", [(4, "integer"), (8, "integer")])
def test_integers_have_no_favourite_sign(rand, bits, grid):
    W, kw = rand(6, 50), dict(bits=bits, grid=grid, group_size=16)
    torch.testing.assert_close(
        grids.dequantize(*grids.quantize(-W, **kw), **kw),
        -grids.dequantize(*grids.quantize(W, **kw), **kw),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("bits, grid", GRIDS)
def test_scaling_the_weight_scales_the_result(rand, bits, grid):
    W, kw = rand(6, 50), dict(bits=bits, grid=grid, group_size=16)
    codes, scales = grids.quantize(W, **kw)
    doubled, twice = grids.quantize(2 * W, **kw)
    assert torch.equal(codes, doubled) and torch.equal(2 * scales, twice)


@pytest.mark.parametrize("bits, grid", GRIDS)
def test_rounding_twice_is_rounding_once(rand, bits, grid):
    kw = dict(bits=bits, grid=grid, group_size=16)
    q = grids.dequantize(*grids.quantize(rand(9, 40), **kw), dtype=torch.float64, **kw)
    again = grids.dequantize(*grids.quantize(q, **kw), dtype=torch.float64, **kw)
    torch.testing.assert_close(again, q, rtol=1e-3, atol=0)  # an extreme code may allow a scale one bit smaller


@pytest.mark.parametrize("bits, grid", GRIDS)
@pytest.mark.parametrize("size", [0.0, 1e-30, 3e-8, 1e-6, 6.5e4])
def test_extreme_groups_stay_finite(rand, bits, grid, size):
    W = rand(4, 20).clamp(-1, 1) * size
    W[0] = 0
    kw = dict(bits=bits, grid=grid, group_size=8)
    codes, scales = grids.quantize(W, **kw)
    q = grids.dequantize(codes, scales, dtype=torch.float64, **kw)
    zero = {"normal-float": 7, "integer": 8 if bits == 4 else 0}[grid]
    assert torch.isfinite(q).all() and (codes[0] == zero).all() and not scales[0].any()
    assert ((W - q).abs() <= spread(scales, 8, 20) * widest_gap(bits, grid) / 2 * (1 + 1e-12)).all()


def test_what_a_grid_cannot_hold_is_refused():
    W = torch.ones(2, 4)
    with pytest.raises(ValueError, match="beyond the largest float16"):
        grids.quantize(W * 65510, bits=4, grid="normal-float")
    with pytest.raises(ValueError, match="not finite"):
        grids.quantize(W * torch.nan, bits=8, grid="integer")
    with pytest.raises(ValueError, match="not finite"):
        grids.quantize(W * torch.inf, bits=8, grid="integer")
    with pytest.raises(ValueError, match="there is no 8-bit normal-float grid"):
        grids.quantize(W, bits=8, grid="normal-float")
    with pytest.raises(ValueError, match="group_size is 0"):
        grids.quantize(W, bits=8, grid="integer", group_size=0)


@pytest.mark.parametrize("bits, grid", GRIDS)
def test_a_transposed_weight_gives_the_same_contiguous_codes(rand, bits, grid):
    W, kw = rand(7, 12), dict(bits=bits, grid=grid, group_size=5)
    for straight, turned in zip(grids.quantize(W, **kw), grids.quantize(W.T.contiguous().T, **kw), strict=True):
        assert torch.equal(straight, turned) and turned.is_contiguous()


@pytest.mark.parametrize("bits, grid", GRIDS)
def test_tiles_do_not_matter(rand, bits, grid, monkeypatch):
    W, kw = rand(7, 12), dict(bits=bits, grid=grid, group_size=5)
    whole = grids.quantize(W, **kw)
    monkeypatch.setattr(grids, "TILE_WEIGHTS", 24)
    for a, b in zip(whole, grids.quantize(W, **kw), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_of_the_weight_changes_no_code(rand, dtype):
    W, kw = rand(8, 40).to(dtype), dict(bits=4, grid="normal-float", group_size=16)
    codes, scales = grids.quantize(W, **kw)
    exact, same_scales = grids.quantize(W.double(), **kw)
    assert torch.equal(scales, same_scales) and torch.equal(codes, exact)


@given(rows=st.integers(0, 5), d=st.integers(1, 17), seed=st.integers(0, 2**31))
def test_packing_keeps_every_code(rows, d, seed):
    codes = torch.randint(0, 16, (rows, d), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == (rows, (d + 1) // 2)
    assert torch.equal(unpack(packed, d), codes)
    values = grids.book(4, "normal-float")
    assert torch.equal(unpack_values(packed, pair_table(values), d), values[codes.int()])


def test_the_first_code_of_a_byte_is_its_low_half():
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8)).tolist() == [[0x21, 0x03]]


def test_a_code_of_more_than_four_bits_is_refused():
    with pytest.raises(ValueError, match="0..15, not 16"):
        pack(torch.tensor([[16]], dtype=torch.uint8))
