"""Least squares, then rounding: what the strength may cost, and what channels at more bits give."""

import math

import pytest
import torch

from qpruner.math import propagation
from qpruner.math.gptq import Feedback
from qpruner.math.least_squares import Moments
from qpruner.math.salient import Rounding
from qpruner.plan import QuantSpec

INT3 = QuantSpec(bits=3, grid="integer", group_size=8, symmetric=False)
SALIENT = QuantSpec(bits=2, grid="integer", group_size=8, salient=3)
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)


def parts_of(X, Y, n: int) -> list[Moments]:
    found = []
    for rows in (slice(0, n), slice(n, None)):
        moments = Moments(X.shape[1], Y.shape[1])
        moments.add_(X[rows], Y[rows])
        found.append(moments)
    return found


def correlated(rand, d: int, tokens: int = 400):
    return rand(tokens, d) @ rand(d, d) / d**0.5


@pytest.mark.parametrize("spec", [INT3, SALIENT], ids=str)
def test_without_propagated_error_it_is_gptq(rand, spec):
    W, X = rand(6, 24), correlated(rand, 24)
    found = propagation.propagated(W, None, *parts_of(X, X @ W.T, 300), spec, "mse", DAMPINGS)
    plain = propagation.gptq(W, X.T @ X, spec, "mse")
    torch.testing.assert_close(found.parts.dequantize(spec, W.dtype), plain.parts.dequantize(spec, W.dtype))


@pytest.mark.parametrize("spec", [INT3, SALIENT], ids=str)
def test_what_is_off_in_the_inputs_is_made_up_for(rand, spec):
    W, clean = rand(32, 24), correlated(rand, 24, 2000)
    X = clean @ (torch.eye(24) + 0.1 * rand(24, 24))
    Y = clean @ W.T
    error = lambda found: (X[1500:] @ found.parts.dequantize(spec, W.dtype).T - Y[1500:]).square().mean()
    found = propagation.propagated(W, None, *parts_of(X[:1500], Y[:1500], 1000), spec, "mse", DAMPINGS)
    assert found.damping < math.inf and found.condition > 1
    assert error(found) < 0.7 * error(propagation.gptq(W, X[:1500].T @ X[:1500], spec, "mse"))


def test_noise_is_not_followed(rand):
    """Targets that have nothing to do with inputs: the weight stays."""
    W, X = rand(6, 24), correlated(rand, 24, 40)
    found = propagation.propagated(W, None, *parts_of(X, X @ W.T + 30 * rand(40, 6), 30), INT3, "mse", (1e-6,))
    assert found.damping == math.inf and found.condition == 1


def test_a_bias_makes_up_for_the_mean(rand):
    W, b, X = rand(6, 24), rand(6), correlated(rand, 24) + 3
    found = propagation.propagated(W, b, *parts_of(X, X @ W.T + b, 300), INT3, "mse", DAMPINGS)
    Q = found.parts.dequantize(INT3, W.dtype)
    torch.testing.assert_close((X @ Q.T + found.b).mean(0), (X @ W.T + b).mean(0))


def test_how_many_candidates_are_rounded_together_does_not_matter(rand, monkeypatch):
    W, X = rand(6, 24), correlated(rand, 24)
    Y = X @ (W + 0.05 * rand(6, 24)).T
    found = []
    for size in (1, 300, 10**6):
        monkeypatch.setattr(propagation, "STACKED_WEIGHTS", size)
        found.append(propagation.propagated(W, None, *parts_of(X, Y, 300), INT3, "mse", DAMPINGS))
    assert len({(one.damping, one.error) for one in found}) == 1
    assert all(torch.equal(one.parts.rest.codes, found[0].parts.rest.codes) for one in found)


# --- salient channels ---


def test_channels_that_would_lose_most_are_salient(rand):
    W, X = rand(6, 24), rand(200, 24)
    X[:, [5, 17]] *= 30
    assert {5, 17} < set(Rounding.of(W, X.T @ X, SALIENT).salient.tolist())
    W[:, 5] = 0
    assert 5 not in Rounding.of(W, X.T @ X, SALIENT).salient


def test_the_others_make_up_for_what_salient_channels_lose(rand):
    """The rest is the least-squares answer to them, found through the factor or directly."""
    W, G = rand(6, 24), (X := correlated(rand, 24)).T @ X
    first, rest = torch.tensor([2, 9, 20]), torch.tensor([i for i in range(24) if i not in (2, 9, 20)])
    q = W[:, first] + 0.1 * rand(6, 3)
    H = G + 0.01 * G.diagonal().mean() * torch.eye(24)
    expected = W[:, rest] + (W[:, first] - q) @ H[first][:, rest] @ torch.linalg.inv(H[rest][:, rest])
    torch.testing.assert_close(Feedback.of(G, first=first.tolist()).made_up(W, q), expected)


def test_salient_channels_are_better_spent_than_left(rand):
    W, G = rand(32, 24), (X := correlated(rand, 24)).T @ X
    salient, plain = (propagation.gptq(W, G, spec, "mse") for spec in (SALIENT, SALIENT.rest))
    assert salient.error < plain.error < plain.error_nearest
