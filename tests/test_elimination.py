"""Units that go one by one while the rest is refitted: against refitting anew, and the laws of doubles."""

import pytest
import torch
from tiny import tiny
from tiny_stream import streamed

from qpruner.decide.scores import SCORERS
from qpruner.math.elimination import Reader, elimination_scores
from qpruner.model.discover import discover
from qpruner.model.scratch import Scratch

WINDOWS = torch.arange(60).reshape(5, 12) % 29 + 1
TINY = 1e-10  # damping


def error_without(X, W, gone):
    """Squared error of the best refit, by lstsq and nothing else."""
    stay = [j for j in range(X.shape[1]) if j not in gone]
    V = torch.linalg.lstsq(X[:, stay], X @ W.T).solution
    return float((X @ W.T - X[:, stay] @ V).square().sum())


@pytest.mark.parametrize("k", [1, 3])
def test_the_error_of_a_unit_is_that_of_the_best_refit_without_it(rand, k):
    X, W = rand(80, 12), rand(5, 12)
    units = torch.arange(12).view(-1, k)
    found = Reader.of(W, X.T @ X, units, TINY).errors(torch.arange(len(units)))
    expected = [error_without(X, W, columns.tolist()) for columns in units]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("at_once", [1, 3, 32])
def test_units_go_in_the_order_of_a_greedy_search(rand, at_once):
    X, W = rand(80, 10) @ rand(10, 10), rand(4, 10)
    scores = elimination_scores([(W, X.T @ X, torch.arange(10)[:, None])], damping=TINY, at_once=at_once)
    gone, order, before = [], [], 0.0
    for _ in range(9):
        costs = {j: error_without(X, W, [*gone, j]) for j in range(10) if j not in gone}
        cheapest = min(costs, key=costs.get)
        gone.append(cheapest)
        order.append(costs[cheapest] - before)
        before = costs[cheapest]
    if at_once != 3:  # in rounds, the order is exact only among the cheapest few
        assert scores.argsort().tolist()[:9] == gone
    steps = torch.tensor(order, dtype=torch.float64).cummax(0).values / float((X @ W.T).square().sum())
    if at_once == 1:
        torch.testing.assert_close(scores.sort().values[:9], steps, rtol=1e-3, atol=1e-9)


def test_of_two_units_that_say_the_same_one_is_free(rand):
    half = rand(90, 6)
    X, W = torch.cat([half, half], dim=1), rand(4, 12)
    scores = elimination_scores([(W, X.T @ X, torch.arange(12)[:, None])], damping=1e-9)
    pairs = torch.stack([scores[:6], scores[6:]]).sort(0).values
    assert (pairs[0] < 1e-6).all() and (pairs[1] > 1e-3).all()


def test_a_unit_is_scored_by_all_that_read_it(rand):
    X, W, Y, V = rand(80, 8), rand(4, 8), rand(80, 8), rand(3, 8)
    units = torch.arange(8)[:, None]
    one = elimination_scores([(W, X.T @ X, units)], at_once=8)
    both = elimination_scores([(W, X.T @ X, units), (torch.zeros_like(V), Y.T @ Y, units)], at_once=8)
    torch.testing.assert_close(one, both)
    assert not torch.equal(one, elimination_scores([(W, X.T @ X, units), (V, Y.T @ Y, units)], at_once=8))


def test_units_that_nothing_comes_through_are_worth_nothing(rand):
    scores = elimination_scores([(rand(4, 6), torch.zeros(6, 6, dtype=torch.float64), torch.arange(6)[:, None])])
    assert (scores == 0).all()


def test_permuting_units_permutes_scores(rand):
    X, W = rand(80, 10) @ rand(10, 10), rand(4, 10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(2))
    units = torch.arange(10)[:, None]
    scores = elimination_scores([(W, X.T @ X, units)])
    moved = elimination_scores([(W[:, order], (X.T @ X)[order][:, order], units)])
    torch.testing.assert_close(moved, scores[order], rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_every_unit_of_a_model_has_a_score_resident_or_streamed(family, tmp_path):
    model = tiny(family)
    graph = discover(model)
    run = lambda scratch, **options: SCORERS["brain-surgeon"](
        streamed(model, **options), graph, WINDOWS, torch.Generator(), scratch, None
    )
    scores, again = run(Scratch(), resident=True), run(Scratch(tmp_path / "pass"))
    assert set(scores) == set(graph.groups)
    for name, group in graph.groups.items():
        assert scores[name].shape == (group.n_units,) and (scores[name] >= 0).all() and scores[name].max() > 0
        assert torch.equal(scores[name], again[name])
