import pytest
import torch

from qpruner.math import grids, loftq
from qpruner.math.salient import Rounding
from qpruner.plan import QuantSpec


def generator():
    return torch.Generator().manual_seed(0)


def rounding(bits=4, grid="normal-float", group_size=16):
    spec = QuantSpec(bits=bits, grid=grid, group_size=group_size)

    def round_to_grid(W):
        stored = grids.quantize(W, spec)
        return stored, grids.dequantize(stored, spec, W.dtype)

    return round_to_grid


def split(W, rank=4, scaling=2.0, iterations=5, dtype=torch.bfloat16, rule=None, L=None):
    return loftq.split(
        W, rule or rounding(), rank=rank, scaling=scaling, iterations=iterations, dtype=dtype, generator=generator(),
        L=L,
    )  # fmt: skip


def uneven(rand, d, n=300):
    """Inputs of which some directions carry far more than others."""
    return rand(n, d) @ (rand(d, d) * torch.logspace(1, -2, d, dtype=torch.float64))


def with_feedback(G, bits=3):
    spec = QuantSpec(bits=bits, grid="integer", group_size=16)

    def round_with_feedback(W):
        stored = Rounding.of(W, G, spec)(W)
        return stored, stored.dequantize(spec, W.dtype)

    return round_with_feedback


def imitation(result, scaling, **kw):
    kw = dict(bits=4, grid="normal-float", group_size=16) | kw
    Q = grids.dequantize(result.stored, QuantSpec(**kw), torch.float64)
    return Q + scaling * result.B.double() @ result.A.double()


@pytest.mark.parametrize("scaling", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (5, 33)])
def test_the_corrected_weight_is_closer_and_the_errors_are_true(rand, scaling, dtype, shape):
    W = rand(*shape)
    result = split(W, scaling=scaling, dtype=dtype)
    assert result.A.dtype == result.B.dtype == dtype
    assert result.error < result.plain_error
    assert result.error == pytest.approx((W - imitation(result, scaling)).norm().item())
    assert result.plain_error == pytest.approx((W - rounding()(W)[1]).norm().item())


def test_one_iteration_is_the_best_correction_of_plain_rounding(rand):
    W, r = rand(20, 30), 3
    result = split(W, rank=r, iterations=1, dtype=torch.float64)
    lost = torch.linalg.svdvals(W - rounding()(W)[1])[r:]
    assert result.error == pytest.approx(lost.norm().item())


def test_scaling_is_divided_out(rand):
    W = rand(20, 30)
    one, four = (split(W, scaling=s, iterations=1, dtype=torch.float64) for s in (1.0, 4.0))
    torch.testing.assert_close(one.B @ one.A, 4 * four.B @ four.A)
    torch.testing.assert_close(one.A.norm(), 2 * four.A.norm())  # shared evenly between the two


@pytest.mark.parametrize("iterations", [1, 5])
def test_more_rank_is_never_worse(rand, iterations):
    W = rand(24, 40)
    errors = [split(W, rank=r, iterations=iterations, dtype=torch.float64).error for r in (0, 1, 2, 4, 8, 16, 24)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-12 * errors[0]


def test_more_iterations_are_never_worse(rand):
    W = rand(24, 40)
    errors = [split(W, iterations=t).error for t in range(6)]
    assert errors == sorted(errors, reverse=True) and errors[5] < errors[1]


@pytest.mark.parametrize("kw", [dict(iterations=0), dict(rank=0), dict(rule=lambda W: ((), W.clone()))])
def test_without_a_correction_an_adapter_starts_as_lora(rand, kw):
    W = rand(24, 40)
    result = split(W, **kw)
    assert not result.B.any() and result.error == result.plain_error
    assert result.A.abs().max() <= 40**-0.5 if result.A.numel() else kw == dict(rank=0)


def test_the_same_generator_gives_the_same_split_and_the_global_one_is_left_alone(rand, monkeypatch):
    monkeypatch.setattr(loftq, "EXACT_SVD_BELOW", 0)
    W, state = rand(24, 40), torch.get_rng_state()
    a, b = split(W), split(W)
    assert torch.equal(a.A, b.A) and torch.equal(a.B, b.B) and a.error == b.error
    assert torch.equal(torch.get_rng_state(), state)


def test_subspace_iteration_finds_what_the_exact_decomposition_finds(rand, monkeypatch):
    E = rand(150, 100)
    exact = torch.linalg.svdvals(E)[:4]
    monkeypatch.setattr(loftq, "EXACT_SVD_BELOW", 0)
    U, S, Vh = loftq.leading_svd(E, 4, generator())
    torch.testing.assert_close(S, exact, rtol=1e-3, atol=0)
    assert (E - U @ torch.diag(S) @ Vh).norm().item() == pytest.approx((E.norm() ** 2 - (S**2).sum()).sqrt().item())


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-9, 1e-5, 100.0])
def test_weights_of_any_size_pass(rand, size):
    result = split(rand(24, 40) * size, dtype=torch.float16)
    assert result.error <= result.plain_error and torch.isfinite(result.A).all() and torch.isfinite(result.B).all()


def test_a_rank_that_does_not_fit_is_refused(rand):
    with pytest.raises(ValueError, match="it is at most 24"):
        split(rand(24, 40), rank=25)
    with pytest.raises(ValueError, match="scaling is 0.0"):
        split(rand(24, 40), scaling=0.0)


# --- errors that count as the inputs make them count ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("feedback", [False, True])
def test_what_comes_out_is_closer_and_the_errors_are_true(rand, dtype, shape, feedback):
    W, X = rand(*shape), uneven(rand, shape[1])
    G = X.T @ X
    result = split(W, dtype=dtype, L=loftq.weighting(G, 0.0), rule=with_feedback(G) if feedback else None)
    assert result.error < result.plain_error
    Q = result.stored.dequantize(QuantSpec(bits=3, grid="integer", group_size=16), torch.float64) if feedback else None
    stands = imitation(result, 2.0) if Q is None else Q + 2.0 * result.B.double() @ result.A.double()
    m = G.diagonal().mean().sqrt()
    assert result.error == pytest.approx((X @ (W - stands).T).norm().item() / m.item(), rel=1e-6)
    assert result.size == pytest.approx((X @ W.T).norm().item() / m.item(), rel=1e-6)


def test_one_iteration_is_the_best_correction_of_what_comes_out(rand):
    """No matrix of that rank does better: found by the singular values of X E^T, which no factor of G takes part in."""
    W, X, r = rand(20, 30), uneven(rand, 30), 3
    G = X.T @ X
    result = split(W, rank=r, iterations=1, dtype=torch.float64, L=loftq.weighting(G, 0.0))
    lost = torch.linalg.svdvals(X @ (W - rounding()(W)[1]).T)[r:].norm() / G.diagonal().mean().sqrt()
    assert result.error == pytest.approx(lost.item(), rel=1e-6)
    blind = split(W, rank=r, iterations=1, dtype=torch.float64)
    assert result.error < 0.9 * (X @ (W - imitation(blind, 2.0)).T).norm() / G.diagonal().mean().sqrt()


def test_inputs_that_are_all_alike_change_nothing(rand):
    W = rand(20, 30)
    plain, even = (
        split(W, dtype=torch.float64),
        split(W, dtype=torch.float64, L=loftq.weighting(7 * torch.eye(30), 0.0)),
    )
    torch.testing.assert_close(even.B @ even.A, plain.B @ plain.A)
    assert even.error == pytest.approx(plain.error)


def test_a_pair_of_factors_is_of_one_length(rand):
    X = uneven(rand, 30)
    result = split(rand(20, 30), dtype=torch.float64, L=loftq.weighting(X.T @ X))
    torch.testing.assert_close(result.A.norm(dim=1), result.B.norm(dim=0))


def test_dead_and_doubled_inputs_pass(rand):
    X = uneven(rand, 30)
    X[:, 3], X[:, 5] = 0, X[:, 4]
    result = split(rand(20, 30), dtype=torch.float16, L=loftq.weighting(X.T @ X))
    assert result.error < result.plain_error and torch.isfinite(result.A).all()
    assert loftq.weighting(torch.zeros(4, 4)) is None


def test_more_iterations_with_feedback_are_never_worse(rand):
    W, X = rand(24, 40), uneven(rand, 40)
    G = X.T @ X
    how = dict(L=loftq.weighting(G), rule=with_feedback(G, bits=2))
    errors = [split(W, iterations=t, **how).error for t in range(5)]
    assert errors == sorted(errors, reverse=True) and errors[1] < errors[0]
