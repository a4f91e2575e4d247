import math

import pytest
import torch

from qpruner.math.information import (
    binned,
    canonical,
    gaussian,
    one_hot,
    prediction_classes,
    principal_projection,
    whitened,
    with_null,
)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1)


def correlated(rand, T, rho):
    x = rand(T, 1)
    return x, rho * x + math.sqrt(1 - rho**2) * rand(T, 1)


def quantile_classes(y, n):
    return y[:, 0].argsort().argsort() * n // len(y)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.6, 0.9])
def test_both_recover_the_information_of_correlated_gaussians(rand, rho):
    x, y = correlated(rand, 20_000, rho)
    exact = -0.5 * math.log(1 - rho**2)
    spread = 4 * rho / math.sqrt(20_000) + 1e-3  # four standard errors of the estimate
    assert gaussian(x, y) == pytest.approx(exact, abs=spread)
    assert binned(x, quantile_classes(y, 16)) == pytest.approx(exact, abs=spread + 0.08 * exact)


def test_gaussian_adds_over_independent_pairs(rand):
    pairs = [correlated(rand, 20_000, rho) for rho in (0.3, 0.6, 0.8)]
    X, Y = (torch.cat(side, dim=1) for side in zip(*pairs, strict=True))
    exact = sum(-0.5 * math.log(1 - rho**2) for rho in (0.3, 0.6, 0.8))
    assert gaussian(X, Y) == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize(("p", "q", "T"), [(1, 1, 100), (8, 5, 200), (16, 31, 400)])
def test_gaussian_has_no_bias_on_independent_data(rand, p, q, T):
    estimates = torch.tensor([gaussian(rand(T, p), rand(T, q)) for _ in range(100)])
    assert abs(estimates.mean()) < 4 * estimates.std() / 10  # uncorrected, the last is pq / 2T = 0.6 nats off


def test_binned_has_no_bias_on_independent_data(rand, generator):
    """To first order: the plug-in estimate alone is (15)(31) / 2T = 0.057 nats off."""
    classes = [torch.randint(32, (4096,), generator=generator) for _ in range(20)]
    estimates = torch.tensor([binned(rand(4096, 4), y) for y in classes])
    assert abs(estimates.mean()) < 0.003


def test_gaussian_ignores_invertible_linear_maps(rand):
    X, noise = rand(500, 6), rand(500, 3)
    Y = X[:, :3] + noise
    mapped_X, mapped_Y = X @ (rand(6, 6) + 3 * torch.eye(6)) * 1e4 + 7, Y @ (rand(3, 3) + 3 * torch.eye(3)) - 1
    assert gaussian(mapped_X, mapped_Y) == pytest.approx(gaussian(X, Y), rel=1e-9)


def test_gaussian_ignores_repeated_and_constant_columns(rand):
    X, Y = rand(500, 4), rand(500, 3)
    padded = torch.cat([X, X[:, :2] * 1e3, torch.full((500, 1), 0.1)], dim=1)
    assert gaussian(padded, Y) == pytest.approx(gaussian(X, Y), rel=1e-9)
    assert gaussian(torch.ones(500, 2), Y) == 0


def test_gaussian_is_finite_when_one_side_determines_the_other(rand):
    X = rand(500, 2)
    assert 8 < gaussian(X, X @ rand(2, 2)) < 9
    with pytest.raises(ValueError, match="10 rows are too few"):
        gaussian(rand(10, 6), rand(10, 4))


@pytest.mark.parametrize("monotone", [torch.exp, lambda x: -(x**3), lambda x: 100 * x - 7])
def test_binned_ignores_monotone_maps(rand, generator, monotone):
    X = rand(1600, 3)
    y = torch.randint(5, (1600,), generator=generator)
    assert binned(monotone(X), y) == pytest.approx(binned(X, y), abs=1e-12)


def test_binned_equals_counting(rand, generator):
    """Entropies by counting, on values so few that each has a bin of its own."""
    x, y = torch.randint(3, (300,), generator=generator), torch.randint(4, (300,), generator=generator)
    y = torch.where(x == 0, 0, y)
    entropy = lambda *columns: (
        -sum(
            (n := sum(row == other for other in rows)) and math.log(n / 300) / 300
            for rows in [list(zip(*(c.tolist() for c in columns), strict=True))]
            for row in rows
        )
    )
    exact = entropy(x) + entropy(y) - entropy(x, y)
    assert binned(x.double()[:, None], y) == pytest.approx(exact - 2 * 3 / 600)


@pytest.mark.parametrize("estimator", ["binned", "gaussian"])
def test_z_tells_dependent_from_independent(rand, generator, estimator):
    estimate = {"binned": binned, "gaussian": lambda X, y: gaussian(X, one_hot(y))}[estimator]
    zs = []
    for _ in range(10):
        X, y = rand(1000, 3), quantile_classes(rand(1000, 1), 8)
        zs.append(with_null(estimate, X, y, generator=generator).z)
    assert sorted(zs)[7] < 2 and max(zs) < 5
    found = with_null(estimate, X, quantile_classes(X[:, :1] + rand(1000, 1), 8), generator=generator)
    assert found.z > 10 and found.nats > 0.05 and abs(found.null_mean) < 0.01


def test_nats_are_not_negative_and_constants_are_no_evidence(rand, generator):
    y = quantile_classes(rand(400, 1), 8)
    found = with_null(binned, torch.ones(400, 2, dtype=torch.float64), y, generator=generator)
    assert (found.nats, found.z) == (0, 0)
    assert with_null(lambda X, Y: -0.01, rand(200, 2), y[:200], generator=generator).nats == 0


def test_the_null_repeats_with_its_seed(rand):
    X, y = rand(300, 2), quantile_classes(rand(300, 1), 4)
    runs = [with_null(binned, X, y, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert runs[0] == runs[1]


def test_prediction_classes_are_the_most_frequent_ids_and_the_rest():
    ids = torch.tensor([9, 9, 9, 4, 4, 7, 7, 1, 50_000])
    assert prediction_classes(ids, n_classes=3).tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert prediction_classes(ids, n_classes=32).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 4]


def test_one_hot_drops_a_column():
    assert one_hot(torch.tensor([0, 5, 2, 0])).tolist() == [[1, 0], [0, 0], [0, 1], [1, 0]]


@pytest.mark.parametrize("T", [20, 200])
def test_principal_projection_finds_the_directions_of_variance(rand, T):
    directions = torch.linalg.qr(rand(40, 3)).Q
    X = rand(T, 3) * torch.tensor([9.0, 5.0, 2.0]) @ directions.T + 1e-3 * rand(T, 40) + 4
    P = principal_projection(X, 3)
    torch.testing.assert_close(P.T @ P, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(P @ P.T, directions @ directions.T, atol=1e-2, rtol=0)
    _, _, Vh = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    torch.testing.assert_close((P.T @ Vh[:3].T).abs(), torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(principal_projection(-X, 3), P)


def test_principal_projection_completes_a_deficient_input(rand):
    P = principal_projection(rand(10, 1) @ rand(1, 30), 4)
    torch.testing.assert_close(P.T @ P, torch.eye(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="4 principal directions cannot be read from 4 rows"):
        principal_projection(rand(4, 30), 4)


def test_shuffling_whitened_sides_is_whitening_shuffled_ones(rand):
    X, Y = rand(300, 5), rand(300, 3)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    assert canonical(whitened(X), whitened(Y)[order]) == pytest.approx(gaussian(X, Y[order]), rel=1e-9)
