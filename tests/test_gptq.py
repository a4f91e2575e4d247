"""Rounding with feedback: one answer however it is computed, and never behind plain rounding on what it was told of."""

import pytest
import torch
from specs import BINARY, DOUBLE, EVERY, of_groups

from qpruner.math import gptq as module
from qpruner.math import grids
from qpruner.math.books import book
from qpruner.math.gptq import Feedback, gptq, hessian_factor, quantize
from qpruner.math.ranges import RANGES
from qpruner.plan import QuantSpec

INT3 = QuantSpec(bits=3, grid="integer", group_size=16, symmetric=False)


def gram(rand, d: int, tokens: int = 200):
    X = rand(tokens, d) @ rand(d, d)
    return X.T @ X


def ranges_of(W, spec):
    wanted, zeros = grids.fit_ranges(W, spec, RANGES["absmax"])
    return grids.decode(*grids.stored_scales(wanted, spec, up=spec.grid != "binary")), zeros


def column_by_column(W, G, damping, order, scales, zeros, spec):
    """By the formula, with the inverse of what is left taken anew for every input."""
    W, codes, values = W.clone(), torch.zeros(W.shape, dtype=torch.uint8), book(spec)
    H = G + damping * G.diagonal().mean() * torch.eye(len(G), dtype=G.dtype)
    for i, k in enumerate(order):
        left = order[i:]
        inverse = torch.linalg.inv(H[left][:, left])
        group = k // (spec.group_size or len(G))
        s, z = scales[:, group].to(W.dtype), 0 if zeros is None else zeros[:, group, None].to(W.dtype)
        points = (values - z) * s[:, None]
        codes[:, k] = (W[:, k, None] - points).abs().argmin(1)
        error = W[:, k] - points.expand(len(W), -1).gather(1, codes[:, k, None].long())[:, 0]
        W[:, left] -= torch.outer(error, inverse[0] / inverse[0, 0])
    return codes


@pytest.mark.parametrize("spec", EVERY, ids=str)
@pytest.mark.parametrize("d, group_size", [(40, 16), (37, 8), (21, None)])
def test_lazy_updates_equal_column_by_column(rand, spec, d, group_size):
    spec, W, G = of_groups(spec, group_size), rand(6, d), gram(rand, d)
    feedback, ranges = Feedback.of(G), ranges_of(W, spec)
    slow = column_by_column(W, G, 0.01, feedback.order.tolist(), *ranges, spec)
    assert torch.equal(gptq(W, feedback, *ranges, spec), slow)


def test_how_many_rows_are_worked_on_at_a_time_does_not_matter(rand, monkeypatch):
    W, feedback = rand(9, 40), Feedback.of(gram(rand, 40))
    whole = gptq(W, feedback, *ranges_of(W, INT3), INT3)
    monkeypatch.setattr(module, "TILE_WEIGHTS", 80)
    assert torch.equal(gptq(W, feedback, *ranges_of(W, INT3), INT3), whole)


@pytest.mark.parametrize("spec", EVERY, ids=str)
@pytest.mark.parametrize("ranges", RANGES)
def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_to_nearest(rand, spec, ranges):
    W, weight = rand(5, 40), rand(40).square()
    rounded = quantize(W, weight.diag(), Feedback.of(weight.diag()), spec, ranges)
    plain = grids.quantize(W, spec, ranges, weight[None])
    for name in ("codes", "scales", "steps", "zeros"):
        one, other = getattr(rounded, name), getattr(plain, name)
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("spec", EVERY, ids=str)
@pytest.mark.parametrize("ranges", RANGES)
def test_outputs_are_closer_than_by_plain_rounding(rand, spec, ranges):
    W, G = rand(64, 48), gram(rand, 48)
    error = lambda rounded: (D := grids.dequantize(rounded, spec, torch.float64) - W) @ G @ D.T
    plain = grids.quantize(W, spec, ranges, G.diagonal()[None])
    fed = quantize(W, G, Feedback.of(G), spec, ranges)
    assert error(fed).trace() < error(plain).trace()


def test_errors_are_of_the_weights_as_they_had_become(rand):
    """|w - q| <= scale / 2 for w with all that earlier inputs left to it: replayed from the codes alone."""
    W, G, spec = rand(6, 40), gram(rand, 40), QuantSpec(bits=8, grid="integer", group_size=8)
    wide = spec.model_copy(update={"group_size": None})
    scales = torch.full((6, 1), 0.1)  # nothing is clipped
    feedback = Feedback.of(G)
    q = 0.1 * (gptq(W, feedback, scales, None, wide).double() - 128)
    left = W[:, feedback.order].clone()
    for k, place in enumerate(feedback.order.tolist()):
        error = left[:, k] - q[:, place]
        assert error.abs().max() <= 0.05 + 1e-7
        left -= torch.outer(error, feedback.R[k].where(torch.arange(40) > k, 0))


def test_inputs_in_another_order_have_the_same_codes(rand):
    """Within groups: groups stay together."""
    W, G = rand(6, 48), gram(rand, 48)
    order = torch.cat([16 * g + torch.randperm(16, generator=torch.Generator().manual_seed(g)) for g in (2, 0, 1)])
    codes = quantize(W, G, Feedback.of(G), INT3).codes
    G = G[order][:, order]
    assert torch.equal(quantize(W[:, order], G, Feedback.of(G), INT3).codes, codes[:, order])


def test_stacked_rows_have_the_codes_of_each(rand):
    parts, G = [rand(4, 40), rand(7, 40)], gram(rand, 40)
    alone = [quantize(W, G, Feedback.of(G), INT3, "mse") for W in parts]
    together = quantize(torch.cat(parts), G, Feedback.of(G), INT3, "mse")
    assert torch.equal(together.codes, torch.cat([part.codes for part in alone]))
    assert torch.equal(together.scales, torch.cat([part.scales for part in alone]))


@pytest.mark.parametrize("spec", [INT3, BINARY, DOUBLE[0]], ids=str)
def test_float32_agrees_with_float64(rand, spec):
    W, G = rand(64, 48).float(), gram(rand, 48)
    narrow, wide = (quantize(w, G, Feedback.of(G), spec) for w in (W, W.double()))
    assert (narrow.codes != wide.codes).float().mean() < 0.01


# --- the factor ---


def test_the_factor_is_that_of_the_damped_inverse(rand):
    G = gram(rand, 20)
    U = hessian_factor(G, 0.01)
    assert torch.equal(U, U.triu())
    torch.testing.assert_close(U.T @ U @ (G + 0.01 * G.diagonal().mean() * torch.eye(20)), torch.eye(20).double())


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_inputs_that_never_came_and_doubles_are_no_obstacle(rand, damping):
    W, X = rand(6, 24), rand(200, 24)
    X[:, 3:6], X[:, 7] = 0, X[:, 8]
    feedback = Feedback.of(X.T @ X, damping)
    assert set(feedback.order[-3:].tolist()) == {3, 4, 5}
    codes, plain = (quantize(W, X.T @ X, feedback, INT3).codes, grids.quantize(W, INT3).codes)
    assert torch.equal(codes[:, 3:6], plain[:, 3:6]) and not torch.equal(codes, plain)
    assert torch.equal(hessian_factor(torch.zeros(3, 3), damping), torch.eye(3).double())


def test_what_is_named_first_is_visited_first(rand):
    G = gram(rand, 24)
    assert Feedback.of(G, first=[5, 2]).order[:2].tolist() == [2, 5]
    assert torch.equal(Feedback.of(G, by_size=False).order, torch.arange(24))
