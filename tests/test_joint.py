"""The joint search: where it may go, what it depends on, and that it is worth its trials."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from joint_problem import limit_of, made_up

from qpruner.decide import controls
from qpruner.decide.acquisition import lengths, log_h, log_improvement, stretches
from qpruner.decide.joint import Observed, Trial, bar, best, pareto, point_for, search
from qpruner.decide.projection import projections
from qpruner.decide.repair import Repair
from qpruner.decide.surrogate import Features, Surrogate
from qpruner.errors import BudgetError
from qpruner.math.pareto import hypervolume


def problem(n_layers=5, *, seed=0, drop=False, shares=(0.3, 0.6)):
    """A space, an estimate that misses what two choices cause together and how it all saturates, and the true loss."""
    space, truth = made_up(n_layers, drop=drop, seed=seed, together=0.3)
    limits = [limit_of(space, share) for share in shares]
    off = np.exp(np.random.default_rng([seed, 1]).normal(0, 0.3, len(truth.own)))
    loss = lambda points: 4 * (1 - np.exp(-truth.scaled(off).predict(points) / 4))
    asked = []

    def evaluate(points, bars):
        asked.append((list(points), list(bars)))
        return [Observed(float(x), 0.003 * float(x), 32) for x in loss(points)]

    estimate = truth.without_pairs()
    starts = {f"projection {i}": p for i, p in enumerate(projections(space, estimate, limits))}
    how = dict(starts=starts, limits=limits, estimate=estimate, at_once=3, seed=seed)
    return space, evaluate, how, asked


METHODS = {
    "search": search,
    "random": controls.random_search,
    "genetic": controls.genetic,
    "greedy": controls.greedy,
    "prune then allocate": controls.prune_then_allocate,
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("drop", [False, True])
def test_every_trial_meets_a_limit_and_none_repeats(name, drop):
    space, evaluate, how, _ = problem(4, drop=drop)
    trials = METHODS[name](space, evaluate, n_trials=14, **how)
    assert [t.number for t in trials] == list(range(len(trials)))
    assert len(trials) == 14 or name == "greedy"
    for t in trials:
        assert t.size_bytes == space.size_bytes([t.point])[0] <= how["limits"][-1]
        assert tuple(space.canonical([t.point])[0].tolist()) == t.point
    if name != "prune then allocate":  # there, limits are searched one by one
        assert len({t.point for t in trials}) == len(trials)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("cut", [1, 7, 9])
def test_a_journal_continues_as_if_never_interrupted(name, cut):
    space, evaluate, how, asked = problem(3)
    whole = METHODS[name](space, evaluate, n_trials=11, **how)
    lines = [t.to_json() for t in whole[:cut]]
    asked.clear()
    torch.manual_seed(99)
    np.random.seed(99)
    seen = []
    journal = [Trial.from_json(line) for line in lines]
    again = METHODS[name](space, evaluate, n_trials=11, journal=journal, on_trial=seen.append, **how)
    assert again == whole and seen == whole[cut:]
    if name != "prune then allocate":
        assert [p for points, _ in asked for p in points] == [t.point for t in whole[cut:]]


def test_a_search_goes_on_where_a_shorter_one_ended():
    space, evaluate, how, _ = problem(3)
    short = search(space, evaluate, n_trials=7, **how)
    assert search(space, evaluate, n_trials=10, journal=short, **how) == search(space, evaluate, n_trials=10, **how)


def test_another_seed_tries_other_points_and_the_callers_random_numbers_are_left_alone():
    space, evaluate, how, _ = problem(3)
    torch.manual_seed(3)
    np.random.seed(3)
    first = search(space, evaluate, n_trials=8, **how)
    drawn = torch.rand(1), np.random.rand()
    other = search(space, evaluate, n_trials=8, **how | {"seed": 5})
    assert [t.point for t in first[2:]] != [t.point for t in other[2:]]
    torch.manual_seed(3)
    np.random.seed(3)
    assert drawn == (torch.rand(1), np.random.rand())


def volume(trials, limits, worst):
    points = np.array([(math.log(t.size_bytes), math.log(t.loss)) for t in trials])
    return hypervolume(points, (math.log(limits[-1]) + 1e-6, math.log(worst)))


def test_it_beats_the_controls_at_equal_trials():
    gains = []
    for seed in range(3):
        space, evaluate, how, _ = problem(4, seed=seed)
        trials = {n: METHODS[n](space, evaluate, n_trials=20, **how) for n in ("search", "random", "genetic")}
        worst = 2 * max(t.loss for t in trials["search"][:2])
        volumes = {n: volume(t, how["limits"], worst) for n, t in trials.items()}
        gains.append([volumes["search"] - volumes["random"], volumes["search"] - volumes["genetic"]])
        for limit in how["limits"]:
            assert best(trials["search"], limit).loss <= best(trials["random"], limit).loss
    assert np.min(gains) > 0 and np.mean(gains) > 0.01


def test_bars_are_what_has_to_be_beaten():
    space, evaluate, how, asked = problem(3)
    trials = search(space, evaluate, n_trials=8, **how)
    points, bars = asked[-1]
    before = trials[: 8 - len(points)]
    low, high = how["limits"]
    for point, b in zip(points, bars, strict=True):
        within = low if space.size_bytes([point])[0] <= low else high
        assert b == min(t.loss for t in before if t.size_bytes <= within)
    assert asked[0][1] == [math.inf] * len(asked[0][0]) and bar(space, points[0], [], [low, high]) == math.inf


@pytest.mark.parametrize("odd", [math.inf, math.nan, None])
def test_diverged_and_lost_trials_do_not_end_the_search(odd):
    space, evaluate, how, _ = problem(4)
    calls = []

    def sometimes(points, bars):
        found = evaluate(points, bars)
        calls.append(len(points))
        return [replace(f, loss=odd) if len(calls) > 1 and i == 0 else f for i, f in enumerate(found)]

    for name in ("search", "genetic"):
        calls.clear()
        trials = METHODS[name](space, sometimes, n_trials=12, **how)
        assert len(trials) == 12 and sum(not t.counts for t in trials) >= 3
        assert all(t.counts for t in pareto(trials))
        assert str(Trial.from_json(trials[2].to_json())) == str(trials[2])


def test_patience_ends_a_search_that_has_nothing_to_find():
    """All losses are as predicted and the starts are optimal: nothing better is expected for long."""
    space, estimate = made_up(3)
    limits = [limit_of(space, 0.4)]
    evaluate = lambda points, bars: [Observed(float(x), 0.1 * float(x), 8) for x in estimate.predict(points)]
    starts = {"projection": projections(space, estimate, limits)[0]}
    how = dict(starts=starts, limits=limits, at_once=3, estimate=estimate, seed=0, patience=2)
    trials = search(space, evaluate, n_trials=60, **how)
    assert len(trials) < 60
    assert search(space, evaluate, n_trials=60, journal=trials[:-2], **how) == trials
    assert search(space, evaluate, n_trials=60, journal=trials, **how) == trials


def test_a_small_space_is_walked_to_its_end():
    space, estimate = made_up(1, widths=1, specs=3)
    evaluate = lambda points, bars: [Observed(float(x)) for x in estimate.predict(points)]
    trials = search(
        space, evaluate, starts={}, limits=[limit_of(space, 0.7)], n_trials=200, at_once=4, estimate=estimate, seed=0
    )
    assert len(trials) < 81 and len({t.point for t in trials}) == len(trials)
    assert best(trials).loss == estimate.predict(projections(space, estimate, [limit_of(space, 0.7)]))[0]


def test_what_does_not_belong_is_refused():
    space, evaluate, how, _ = problem(3)
    trials = search(space, evaluate, n_trials=2, **how)
    with pytest.raises(BudgetError, match="the largest limit"):
        search(space, evaluate, n_trials=2, **how | {"starts": {"top": space.top}})
    with pytest.raises(ValueError, match="another size"):
        search(space, evaluate, n_trials=3, journal=[replace(trials[0], size_bytes=7)], **how)
    with pytest.raises(ValueError, match="not one option"):
        search(space, evaluate, n_trials=3, **how | {"starts": {"odd": space.top[1:]}})


def test_widths_come_first_where_they_are_said_to():
    space, evaluate, how, _ = problem(4)
    trials = controls.prune_then_allocate(space, evaluate, n_trials=8, mean_bits=3.0, **how)
    for limit in how["limits"]:
        of_limit = [t for t in trials if t.origin.endswith(f" at {limit}")]
        widths = [i for i, v in enumerate(space.variables) if v.kind == "width"]
        assert len(of_limit) == 4 and len({tuple(t.point[i] for i in widths) for t in of_limit}) == 1


def test_points_of_bits_alone_are_points_of_the_whole():
    space, estimate = made_up(3, drop=True, embedding=True)
    options = controls.unpruned(space)
    small = space.restricted(options)
    rng = np.random.default_rng(0)
    points = [tuple(p) for p in small.canonical(rng.integers(0, small.sizes, (8, len(small.sizes)))).tolist()]
    wide = controls.widened(points, options)
    assert controls.narrowed(wide, options) == points
    assert (small.size_bytes(points) == space.size_bytes(wide)).all()
    for point in wide:
        selection = space.selection(point)
        assert len(selection.layers) == 3 and all(n == 8 for n in selection.kept.values())


def test_bits_alone_are_searched_from_the_uniform_points():
    space, evaluate, how, _ = problem(4)
    trials = controls.bits_only(space, evaluate, n_trials=12, **how)
    for limit, trial in zip(sorted(how["limits"]), trials, strict=False):
        assert trial.origin == f"uniform at {limit}" and trial.point == controls.uniform(space, limit)
    top = space.top
    assert all(t.point[i] == top[i] for t in trials for i, v in enumerate(space.variables) if v.kind != "bits")
    cut = controls.bits_only(space, evaluate, n_trials=12, journal=trials[:7], **how)
    assert cut == trials


def test_uniform_is_even_and_meets_the_limit():
    space, _ = made_up(4, embedding=True)
    for share in (0.3, 0.5, 0.9):
        limit = limit_of(space, share)
        point = controls.uniform(space, limit)
        if point is None:
            continue
        bits = [point[i] for i, v in enumerate(space.variables) if v.kind == "bits"]
        assert space.size_bytes([point])[0] <= limit and max(bits) - min(bits) <= 1


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("blind", [False, True])
def test_repaired_points_meet_limits_and_leave_no_room(drop, blind):
    space, estimate = made_up(4, drop=drop)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, space.sizes, (40, len(space.sizes)))
    limits = np.array([limit_of(space, share) for share in rng.random(40)])
    repaired = Repair(estimate, blind=blind)(rows, limits, rng)
    sizes = space.size_bytes(repaired)
    assert (sizes <= limits).all()
    for row, size, limit in zip(repaired, sizes, limits, strict=True):
        for v in range(len(row)):
            up = row.copy()
            up[v] = min(up[v] + 1, space.top[v])
            grown = space.size_bytes(space.canonical(up))[0]
            assert grown <= size or grown > limit


# The acquisition


def test_log_h_is_botorchs():
    from botorch.acquisition.analytic import _log_ei_helper

    u = np.concatenate((np.linspace(-40, 10, 301), -np.logspace(2, 8, 40)))
    np.testing.assert_allclose(log_h(u), _log_ei_helper(torch.from_numpy(u)).numpy(), rtol=1e-6, atol=1e-6)


def test_the_expected_hypervolume_is_what_draws_give():
    rng = np.random.default_rng(0)
    sizes, losses = np.array([1.0, 1.5, 2.2]), np.array([0.5, 0.1, -0.4])
    low, high, worst = 0.5, 3.0, 1.0
    begins, ends, front = stretches(sizes, losses, low, high, worst)
    for size, mean, deviation in ((0.7, 0.4, 0.3), (1.2, 0.2, 0.2), (1.9, -0.1, 0.4), (2.7, -0.6, 0.1)):
        weight = lengths(np.array([size]), begins, ends)
        closed = np.exp(log_improvement(np.array([mean]), np.array([deviation]), front, weight))[0]
        before = hypervolume(np.stack((sizes, losses), axis=1), (high, worst))
        drawn = [
            hypervolume(np.stack((np.append(sizes, size), np.append(losses, y)), axis=1), (high, worst)) - before
            for y in rng.normal(mean, deviation, 3000)
        ]
        assert closed == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / len(drawn) ** 0.5 + 1e-6)


def test_the_surrogate_is_botorchs_posterior_and_learns():
    space, estimate = made_up(4)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, space.sizes, (50, len(space.sizes)))
    rows = Repair(estimate)(rows, np.full(50, limit_of(space, 0.5)), rng)
    points = list(dict.fromkeys(map(tuple, rows.tolist())))
    off = np.exp(rng.normal(0, 0.5, len(estimate.own)))
    losses = 1.5 * estimate.scaled(off).predict(points)
    known, rest = slice(0, 30), slice(30, None)
    surrogate = Surrogate(Features(estimate), points[known], losses[known], 1e-3 * losses[known], seed=0)
    expected = surrogate.expects(points[rest])
    error = expected.mean - np.log(losses[rest])
    plain = np.log(1.5 * estimate.predict(points[rest])) - np.log(losses[rest])
    assert np.abs(error).mean() < 0.7 * np.abs(plain).mean()
    log_predicted, *inputs = surrogate.features(points[rest])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A not p.d., added jitter")
        posterior = surrogate.model.posterior(torch.from_numpy(surrogate._inputs(*inputs)))
        mean, variance = posterior.mean[:, 0].numpy(), posterior.variance[:, 0].numpy()
    np.testing.assert_allclose(expected.mean, log_predicted + mean, atol=1e-4)
    np.testing.assert_allclose(expected.variance, variance, atol=1e-4)


def test_believing_a_point_is_having_tried_it():
    space, estimate = made_up(4)
    points = [tuple(p) for p in np.random.default_rng(0).integers(0, space.sizes, (12, len(space.sizes))).tolist()]
    losses = 1.2 * estimate.predict(points)
    known = Surrogate(Features(estimate), points[:8], losses[:8], 0.01 * losses[:8], seed=0)
    expected = known.expects(points[8:])
    first = expected.variance.copy()
    expected.believe(0)
    assert expected.variance[0] < 0.1 * first[0] and (expected.variance <= first + 1e-12).all()


def test_a_point_for_any_budget_is_no_worse_than_what_was_tried():
    space, evaluate, how, _ = problem(4)
    trials = search(space, evaluate, n_trials=24, **how)
    smallest, largest = space.size_bytes([(0,) * len(space.sizes), space.top])
    for limit in np.linspace(smallest, largest, 6).astype(int).tolist():
        point = point_for(space, how["estimate"], trials, limit)
        tried = best(trials, limit)
        assert space.size_bytes([point])[0] <= limit
        assert tried is None or evaluate([point], [math.inf])[0].loss <= 1.02 * tried.loss
