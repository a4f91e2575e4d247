"""Standard errors of ratios: the bootstrap agrees with what is known, and its draws are the seed's."""

import math

import numpy as np
import pytest
import torch

from qpruner.math import bootstrap
from qpruner.math.bootstrap import bootstrap_errors, linear_error, resampled


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_draws_are_of_as_many_documents_with_replacement(rand, monkeypatch):
    S = rand(7, 3)
    drawn = resampled(S, generator=seeded(), resamples=50)
    picks = torch.randint(7, (50, 7), generator=seeded())
    torch.testing.assert_close(drawn, S[picks].sum(1))
    monkeypatch.setattr(bootstrap, "CHUNK_ELEMENTS", 7 * 8)  # eight resamples at a time
    torch.testing.assert_close(resampled(S, generator=seeded(), resamples=50), drawn)


def test_documents_of_equal_size_have_the_standard_error_of_a_mean(rand):
    A, B = 3 + rand(40, 2), torch.full((40, 2), 5.0, dtype=torch.float64)
    expected = (A / 5).std(dim=0) / math.sqrt(40)
    torch.testing.assert_close(bootstrap_errors(A, B, generator=seeded()), expected)
    # and so do draws, up to their own error
    drawn = resampled(torch.cat([A, B], dim=1), generator=seeded(), resamples=4000)
    spread = (drawn[:, :2] / drawn[:, 2:]).std(dim=0) * math.sqrt(40 / 39)
    torch.testing.assert_close(spread, expected, rtol=0.05, atol=0)


def test_the_error_is_the_spread_over_texts(rand):
    """Texts of 30 documents of chance lengths: the error found in one is how much the ratio varies between them."""
    generator = np.random.default_rng(0)
    found, errors = [], []
    for _ in range(300):
        tokens = generator.integers(20, 400, 30)
        nats = tokens * (3 + generator.normal(size=30) * 0.5) + generator.normal(size=30)
        A, B = torch.tensor(nats)[:, None], torch.tensor(tokens)[:, None].double()
        found.append((A.sum() / B.sum()).item())
        errors.append(bootstrap_errors(A, B, generator=seeded(), resamples=300).item())
        assert linear_error(A[:, 0], B[:, 0]) == pytest.approx(errors[-1], rel=0.25)
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.1)


def test_tokens_of_a_document_are_not_independent():
    """Ten documents, each of one loss: as many tokens as one likes tell no more."""
    losses = torch.linspace(1, 2, 10, dtype=torch.float64)[:, None]
    few, many = (bootstrap_errors(losses * n, torch.full_like(losses, n), generator=seeded()) for n in (10.0, 10_000.0))
    torch.testing.assert_close(few, many)


def test_what_has_no_spread_is_not_a_number():
    one = torch.ones(1, 1, dtype=torch.float64)
    assert bootstrap_errors(one, one, generator=seeded()).isnan().all()
    nothing = bootstrap_errors(torch.zeros(4, 1).double(), torch.zeros(4, 1).double(), generator=seeded())
    assert nothing.isnan().all()
    assert math.isnan(linear_error(one[0], one[0]))


def test_the_same_seed_draws_the_same(rand):
    A, B = rand(20, 1), rand(20, 1).abs()
    assert torch.equal(*(bootstrap_errors(A, B, generator=seeded()) for _ in range(2)))
    assert not torch.equal(*(bootstrap_errors(A, B, generator=seeded(s)) for s in range(2)))
