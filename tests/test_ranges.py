"""Fitted ranges: never worse than absmax in their own measure, and as good as a search that takes its time."""

import pytest
import torch
from specs import BINARY, EVERY, TERNARY

from qpruner.math import grids
from qpruner.math.books import book
from qpruner.math.ranges import POWER, RANGES
from qpruner.plan import QuantSpec

HALVES = [spec for spec in EVERY if spec.scale_bits == 16]


def errors(W, spec, ranges, weight=None):
    q = grids.dequantize(grids.quantize(W, spec, ranges, weight), spec, torch.float64)
    groups = [group for group, _ in grids.by_group((W - q).double(), spec.group_size)]
    return groups


def squares(W, spec, ranges, weight=None, counts=None):
    """Weighted squared error of every group."""
    counts = torch.ones(1, W.shape[1]) if counts is None else counts
    pairs = zip(errors(W, spec, ranges, weight), grids.by_group(counts.double(), spec.group_size), strict=True)
    return torch.cat([(e.square() * h).sum(-1) for e, (h, _) in pairs], dim=1)


@pytest.mark.parametrize("spec", HALVES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_search_is_never_worse_than_absmax_in_any_group(rand, spec, dtype):
    W, h = rand(20, 70).to(dtype), rand(1, 70).exp().to(dtype)
    for weight in (None, h, h.expand(20, 70) * rand(20, 1).exp().to(dtype)):
        found, plain = (squares(W, spec, r, weight, weight) for r in ("mse", "absmax"))
        assert (found <= plain * (1 + 1e-5)).all()
        if spec.bits < 8 and spec.grid != "binary":
            assert found.sum() < plain.sum()


@pytest.mark.parametrize("spec", [s for s in HALVES if s.bits <= 3], ids=str)
def test_a_search_finds_nearly_the_best_range_there_is(rand, spec):
    W = rand(30, 16)
    found = squares(W, spec, "mse")[:, 0]
    zeros = range(2**spec.bits) if not spec.symmetric else [0]
    best = torch.full_like(found, torch.inf)
    largest = W.abs().amax(1, keepdim=True)
    for scale in torch.linspace(0.02, 1.2, 400):
        for sign in (1, -1):
            for zero in zeros:
                grid = (book(spec) - zero) * sign * scale
                nearest = (W[..., None] - grid * largest[..., None]).abs().amin(-1)
                best = torch.minimum(best, nearest.square().sum(1))
    assert (found.sum() <= best.sum() * 1.02) and (found <= best * 1.5).all()


@pytest.mark.parametrize("spec", [s for s in HALVES if s.bits in (2, 4)], ids=str)
def test_what_counts_little_is_given_up(rand, spec):
    W, h = rand(16, 32), torch.tensor([1.0, 1e-6] * 16, dtype=torch.float64)[None]
    counted = squares(W, spec, "mse", h, h).sum()
    assert counted < 0.9 * squares(W, spec, "mse", None, h).sum()
    assert squares(W, spec, "mse", torch.ones_like(h)).sum() == squares(W, spec, "mse").sum()


@pytest.mark.parametrize("spec", [s for s in HALVES if s.grid != "binary"], ids=str)
def test_half_quadratic_is_never_worse_than_absmax_in_its_own_norm(rand, spec):
    W = rand(20, 64)
    found, plain = (
        torch.cat([e.abs().pow(POWER).sum(-1) for e in errors(W, spec, r)], dim=1) for r in ("half-quadratic", "absmax")
    )
    assert (found <= plain * (1 + 1e-5)).all()
    if spec.bits < 8:
        assert found.sum() < plain.sum()


@pytest.mark.parametrize("ranges", sorted(RANGES))
@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_scaling_the_weight_scales_the_range(rand, spec, ranges):
    W = rand(6, 50)
    once, twice = (grids.quantize(factor * W, spec, ranges) for factor in (1, 2))
    assert torch.equal(once.codes, twice.codes)
    assert torch.equal(2 * grids.decoded_scales(once, spec), grids.decoded_scales(twice, spec))


@pytest.mark.parametrize("ranges", sorted(RANGES))
@pytest.mark.parametrize("spec", EVERY, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-30, 3e-8, 1e3])
def test_zeros_and_tiny_groups_stay_finite(rand, spec, ranges, size):
    W = rand(4, 20) * size
    W[0] = 0
    q = grids.dequantize(grids.quantize(W, spec, ranges), spec)
    assert torch.isfinite(q).all() and not q[0].any()


@pytest.mark.parametrize("ranges", sorted(RANGES))
def test_weights_that_are_not_finite_are_refused(ranges):
    for spec in (QuantSpec(bits=3, grid="integer", symmetric=False), QuantSpec(bits=2, grid="integer"), BINARY):
        for bad in (torch.nan, torch.inf):
            with pytest.raises(ValueError, match="not finite"):
                grids.quantize(torch.full((2, 4), bad), spec, ranges)


@pytest.mark.parametrize("ranges", sorted(RANGES))
@pytest.mark.parametrize("spec", [QuantSpec(bits=3, grid="integer", group_size=16, symmetric=False), TERNARY], ids=str)
def test_parts_and_tiles_do_not_matter(rand, spec, ranges, monkeypatch):
    W, weight = rand(7, 48), rand(7, 48).exp()
    whole = grids.quantize(W, spec, ranges, weight)
    monkeypatch.setattr("qpruner.math.ranges.PART_WEIGHTS", 100)
    monkeypatch.setattr(grids, "TILE_WEIGHTS", 150)
    parts = grids.quantize(W, spec, ranges, weight)
    assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.scales, parts.scales)
