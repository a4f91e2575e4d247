"""Repair of linear maps that lost inputs: against `lstsq`, against slicing, and where it has to cost nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpruner.math.least_squares import Moments, Pairs, condition_number, repair, squared_error

DAMPINGS = st.floats(0, 1e6) | st.just(math.inf)


def moments_of(X, Y, batch: int | None = None) -> Moments:
    moments = Moments(X.shape[1], Y.shape[1])
    for part in zip(X.split(batch or len(X)), Y.split(batch or len(Y)), strict=True):
        moments.add_(*part)
    return moments


def case(rand, tokens=60, d_in=9, d_out=5, kept=(0, 2, 3, 5, 8)):
    """Inputs that depend on each other, as those of a model do; the whole map's outputs; the sliced map."""
    Z, W, b = rand(tokens, d_in) @ rand(d_in, d_in) + rand(d_in), rand(d_out, d_in), rand(d_out)
    return Z, W, b, Z[:, list(kept)], W[:, list(kept)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.5])
def test_it_is_lstsq_of_the_stacked_problem(rand, damping, bias):
    Z, W, b, X, sliced = case(rand)
    Y = Z @ W.T + b * bias
    found = repair(sliced, moments_of(X, Y), damping, bias=bias)
    centre = lambda T: T - T.mean(0) if bias else T
    strength = (damping * centre(X).square().sum(0).mean()).sqrt()
    rows = torch.cat([centre(X), strength * torch.eye(X.shape[1], dtype=X.dtype)])
    V = torch.linalg.lstsq(rows, torch.cat([centre(Y), strength * sliced.T])).solution.T
    torch.testing.assert_close(found.V, V)
    if bias:
        torch.testing.assert_close(found.b, (Y - X @ V.T).mean(0))
    else:
        assert found.b is None


@settings(max_examples=60, deadline=None)
@given(damping=DAMPINGS, bias=st.booleans(), seed=st.integers(0, 10**6), tokens=st.integers(1, 30))
def test_no_damping_makes_it_worse_than_slicing(damping, bias, seed, tokens):
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    Z, W, b, X, sliced = case(rand, tokens)
    Y = Z @ W.T + b * bias
    found = repair(sliced, moments_of(X, Y), damping, bias=bias)
    error = lambda V, b: (X @ V.T + (0 if b is None else b) - Y).square().sum()
    assert error(found.V, found.b) <= error(sliced, b if bias else None) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("bias", [False, True])
def test_the_error_is_that_of_the_tokens(rand, bias):
    Z, W, b, X, sliced = case(rand)
    Y, b = Z @ W.T + b, b if bias else None
    expected = (X @ sliced.T + (0 if b is None else b) - Y).square().sum().item()
    assert squared_error(sliced, b, moments_of(X, Y)) == pytest.approx(expected)


def test_batches_and_parts_add_up_to_one_batch(rand):
    Z, W, b, X, sliced = case(rand)
    Y = Z @ W.T + b
    whole, parts = repair(sliced, moments_of(X, Y), 0.1, bias=True), moments_of(X[:20], Y[:20], batch=7)
    parts.join_(moments_of(X[20:], Y[20:], batch=3))
    assert parts.n == 60
    found = repair(sliced, parts, 0.1, bias=True)
    torch.testing.assert_close(found.V, whole.V)
    torch.testing.assert_close(found.b, whole.b)


def test_infinite_damping_is_slicing_to_the_bit(rand):
    Z, W, b, X, sliced = case(rand)
    found = repair(sliced, moments_of(X, Z @ W.T), math.inf, bias=False)
    assert torch.equal(found.V, sliced) and found.b is None and found.damping == math.inf


def test_with_a_bias_infinite_damping_is_flap(rand):
    """Its formula: the new bias is the old one and what the mean of the inputs that go put out."""
    Z, W, b, X, sliced = case(rand)
    gone = [1, 4, 6, 7]
    found = repair(sliced, moments_of(X, Z @ W.T + b), math.inf, bias=True)
    assert torch.equal(found.V, sliced)
    torch.testing.assert_close(found.b, b + W[:, gone] @ Z[:, gone].mean(0))


def test_what_can_be_told_from_other_inputs_goes_at_no_loss(rand):
    """Inputs 1, 4, 6 and 7 are made of those that stay; one that stays is dead, two are equal."""
    Z, W, b, _, _ = case(rand)
    kept, gone = [0, 2, 3, 5, 8], [1, 4, 6, 7]
    Z[:, 8], Z[:, 5] = 0, Z[:, 3]
    Z[:, gone] = Z[:, kept] @ rand(5, 4)
    moments = moments_of(Z[:, kept], Z @ W.T)
    found = repair(W[:, kept], moments, 0.0, bias=False)
    assert 0 < found.damping < 1e-5, "no Cholesky factor without damping"
    assert squared_error(found.V, None, moments) < 1e-9 * moments.yy
    assert torch.equal(found.V[:, 4], W[:, 8]), "nothing is known of a dead input: its weights stay"


@pytest.mark.parametrize("X", [torch.zeros(8, 3), torch.full((8, 3), math.inf)])
@pytest.mark.parametrize("bias", [False, True])
def test_inputs_that_say_nothing_leave_the_weights_alone(X, bias):
    W = torch.ones(2, 3, dtype=torch.float64)
    assert torch.equal(repair(W, moments_of(X, torch.ones(8, 2)), 1e-2, bias=bias).V, W)
    assert torch.equal(repair(W, Moments(3, 2), 1e-2, bias=bias).V, W)


@pytest.mark.parametrize("k, decay", [(3, 0.0), (40, 0.2), (200, 0.05), (200, 0.0)])
def test_condition_numbers_within_a_factor_of_two(rand, k, decay):
    Q, _ = torch.linalg.qr(rand(k, k))
    B = Q * torch.exp(-decay * torch.arange(k)) @ Q.T + 1e-6 * torch.eye(k, dtype=torch.float64)
    B = (B + B.T) / 2
    expected = torch.linalg.cond(B).item()
    assert expected / 2 <= condition_number(B, torch.linalg.cholesky(B)) <= expected * (1 + 1e-9)


@pytest.mark.parametrize("bias", [False, True])
def test_moments_from_inputs_alone(rand, bias):
    X, Z, W, b = rand(50, 7), rand(50, 5), rand(4, 5), rand(4) if bias else None
    whole, pairs = Moments(7, 4), Pairs(7, 5)
    for rows in (slice(0, 20), slice(20, 50)):
        whole.add_(X[rows], Z[rows] @ W.T + (0 if b is None else b))
        pairs.add_(X[rows], Z[rows])
    found = pairs.moments(W, b)
    assert found.n == whole.n
    for name in ("XX", "XY", "x", "y", "yy"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name))
