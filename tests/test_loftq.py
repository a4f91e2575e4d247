import pytest
import torch

from qpruner.math import grids, loftq
from qpruner.plan import QuantSpec


def generator():
    return torch.Generator().manual_seed(0)


def rounding(bits=4, grid="normal-float", group_size=16):
    spec = QuantSpec(bits=bits, grid=grid, group_size=group_size)

    def round_to_grid(W):
        stored = grids.quantize(W, spec)
        return stored, grids.dequantize(stored, spec, W.dtype)

    return round_to_grid


def split(W, rank=4, scaling=2.0, iterations=5, dtype=torch.bfloat16, rule=None):
    return loftq.split(
        W, rule or rounding(), rank=rank, scaling=scaling, iterations=iterations, dtype=dtype, generator=generator()
    )


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
