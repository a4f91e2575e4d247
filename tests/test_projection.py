"""What is predicted of a point, and the point of least predicted loss: against every point of small spaces."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from joint_problem import limit_of, made_up, points_of
from scipy.optimize import Bounds, LinearConstraint, milp

from qpruner.decide.blocks import Blocks
from qpruner.decide.estimate import Estimate, by_information, correlation
from qpruner.decide.projection import fill, projected, projections, uniform_settings
from qpruner.decide.space import Space, Table, Variable
from qpruner.errors import BudgetError
from qpruner.math.relaxation import Problem, least, reach


def every_point(space):
    return space.canonical(np.array(list(itertools.product(*map(range, space.sizes)))))


def brute_force(space, estimate, limit):
    points = every_point(space)
    losses = np.where(space.size_bytes(points) <= limit, estimate.predict(points), np.inf)
    return losses.min()


def six_layers(seed, drop=False):
    """One linear and one width in each of six layers, or of four that may go."""
    rng, n = np.random.default_rng(seed), 4 if drop else 6
    variables, tables, single = [], [], []
    for layer in range(n):
        about = []
        if drop:
            about.append(len(variables))
            variables.append(Variable(f"m.{layer}", "layer", layer, (0, 1)))
            single.append(np.array([rng.lognormal(0, 0.5), 0.0]))
            tables.append(Table((about[0],), np.array([0, 7])))
        about += [len(variables), len(variables) + 1]
        variables.append(Variable(f"m.{layer}.g", "width", layer, (2, 4)))
        variables.append(Variable(f"m.{layer}.p", "bits", layer, (2, 3, 4)))
        single += [np.array([rng.lognormal(-1, 1), 0.0]), np.array([rng.lognormal(0, 1), rng.lognormal(-2, 1), 0.0])]
        size = np.outer((2, 4), rng.integers(5, 9) * np.array((2, 3, 4))) + rng.integers(0, 3, (2, 3))
        tables.append(Table(tuple(about), np.stack([0 * size, size]) if drop else size))
    space = Space(tuple(variables), tuple(f"m.{i}" for i in range(n)), 11, tuple(tables))
    return space, Estimate(space, tuple(single))


def with_pairs(estimate, strength, seed=0, rank=6):
    rng = np.random.default_rng(seed)
    c = np.sqrt(2 * estimate.own)[:, None] * rng.normal(size=(len(estimate.own), rank)) / rank**0.5
    return replace(estimate, interaction=strength * c @ c.T)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_projection_is_the_best_of_all_points(drop, share):
    for seed in range(3):
        space, estimate = six_layers(seed, drop)
        limit = limit_of(space, share)
        point = projected(space, estimate, limit)
        assert space.size_bytes([point])[0] <= limit
        assert estimate.predict([point])[0] == pytest.approx(brute_force(space, estimate, limit), rel=1e-9)


@pytest.mark.parametrize("drop", [False, True])
def test_with_interactions_it_is_nearly_that(drop):
    ratios = []
    for seed in range(6):
        space, estimate = six_layers(seed, drop)
        estimate = with_pairs(estimate, 0.3, seed)
        limit = limit_of(space, 0.4)
        found = estimate.predict([projected(space, estimate, limit)])[0]
        ratios.append(found / brute_force(space, estimate, limit))
        start = projected(space, estimate.without_pairs(), limit)
        assert estimate.predict([projected(space, estimate, limit, start=start)])[0] <= estimate.predict([start])[0]
    assert np.median(ratios) < 1.01 and (drop or max(ratios) < 1.05)


def test_many_layers_as_an_integer_program():
    """The same by HiGHS, with one binary for every combination of a part."""
    space, estimate = made_up(8, widths=3, specs=4, embedding=True)
    blocks = Blocks(space, estimate)
    offered = blocks.offered.ravel()
    losses, sizes = blocks.V.ravel()[offered], blocks.S.ravel()[offered]
    part = np.repeat(np.arange(len(blocks.parts)), blocks.k)[offered]
    one_each = (part == np.arange(len(blocks.parts))[:, None]).astype(float)
    for share in (0.15, 0.5):
        limit = limit_of(space, share)
        solved = milp(
            losses,
            integrality=np.ones(len(losses)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes[None], -np.inf, limit - blocks.base)],
            options={"mip_rel_gap": 1e-9},
        )
        assert estimate.predict([projected(space, estimate, limit)])[0] == pytest.approx(solved.fun, rel=1e-6)


@pytest.mark.parametrize("together", [0.0, 0.3])
def test_a_larger_budget_is_never_predicted_to_lose_more(together):
    space, estimate = made_up(6, specs=4, drop=True, together=together)
    limits = [limit_of(space, share) for share in np.linspace(0.1, 1, 12)]
    points = projections(space, estimate, limits)
    assert (np.diff(estimate.predict(points)) <= 1e-12).all()
    assert (space.size_bytes(points) <= limits).all()
    assert points[-1] == space.top


def test_parts_add_up_to_points():
    for drop, together in ((False, 0.0), (True, 0.3)):
        space, estimate = made_up(4, drop=drop, embedding=True, together=together)
        blocks = Blocks(space, estimate)
        for point in map(tuple, points_of(space, 5).tolist()):
            chosen = blocks.chosen(point)
            problem = blocks.problem(around=point)
            assert blocks.point(chosen) == point
            assert problem.total(chosen)[1] + blocks.base == space.size_bytes([point])[0]
            part = int(np.flatnonzero(chosen >= 0)[0])
            here = chosen[part]
            for k in np.flatnonzero(blocks.offered[part]):
                chosen[part] = k
                change = np.subtract(*estimate.predict([blocks.point(chosen), point]))
                assert problem.V[part, k] - problem.V[part, here] == pytest.approx(change, abs=1e-10)


def test_what_is_fixed_stays_and_uniform_is_uniform():
    space, estimate = made_up(5, drop=True, together=0.2)
    fixed = {0: 1, 1: 0, 4: 2}
    limit = limit_of(space, 0.4)
    assert all(projected(space, estimate, limit, fixed=fixed)[v] == o for v, o in fixed.items())
    space, estimate = made_up(5, together=0.0)
    point = projected(space, estimate, limit_of(space, 0.4), uniform_widths=True)
    settings = uniform_settings(space)
    assert len(settings) == 9
    each = [estimate.predict([projected(space, estimate, limit_of(space, 0.4), fixed=s)])[0] for s in settings]
    assert estimate.predict([point])[0] == pytest.approx(min(each), rel=1e-9)
    counts = {v.name.split(".")[-1]: set() for v in space.variables if v.kind == "width"}
    for v, option in zip(space.variables, point, strict=True):
        if v.kind == "width":
            counts[v.name.split(".")[-1]].add(option)
    assert all(len(options) == 1 for options in counts.values())


def test_too_small_a_budget_names_the_smallest():
    space, estimate = made_up(3)
    smallest = space.size_bytes([(0,) * len(space.sizes)])[0]
    with pytest.raises(BudgetError, match=f"takes {smallest:,} bytes"):
        projected(space, estimate, int(smallest) - 1)
    assert projected(space, estimate, int(smallest)) == (0,) * len(space.sizes)


def test_filling_spends_and_never_loses():
    space, estimate = made_up(5, drop=True, together=0.2)
    limit = limit_of(space, 0.5)
    for point in map(tuple, points_of(space, 6, seed=1).tolist()):
        if space.size_bytes([point])[0] > limit:
            continue
        full = fill(space, estimate, point, limit)
        before, after = space.size_bytes([point, full])
        assert before <= after <= limit
        assert np.subtract(*estimate.predict([full, point])) <= 1e-12


def test_no_choice_is_below_the_bound():
    rng = np.random.default_rng(0)
    for _ in range(5):
        V, S = rng.random((6, 4)), rng.integers(1, 50, (6, 4))
        without = np.array([0.9, np.inf, 1.2, np.inf])
        problem = Problem(V, S, np.array([0, 0, 1, 1, 2, 3]), without, np.zeros(4, np.int64))
        limit = int(S.min(axis=1).sum() * 1.3)
        chosen = least(problem, limit)
        loss, size = problem.total(chosen)
        assert size <= limit and reach(problem, limit) <= loss + 1e-12
        options = [range(4)] * 6
        best = np.inf
        for gone in itertools.product((False, True), (False, True)):
            for picked in itertools.product(*options):
                other = np.array(picked)
                other[:2] = -1 if gone[0] else other[:2]
                other[4] = -1 if gone[1] else other[4]
                value, taken = problem.total(other)
                best = min(best, value if taken <= limit else np.inf)
        assert loss == pytest.approx(best, rel=1e-9)


# The estimate


def test_single_options_lose_what_was_measured():
    space, estimate = made_up(3, drop=True, together=0.5)
    for v, single in enumerate(estimate.single):
        rows = np.tile(np.array(space.top), (len(single), 1))
        rows[:, v] = range(len(single))
        np.testing.assert_allclose(estimate.predict(rows), single, atol=1e-12)


def test_pairs_add_their_interaction_and_many_points_are_as_few():
    space, estimate = made_up(3, together=0.5)
    a, b = space.sizes.index(4), len(space.sizes) - 1
    point = list(space.top)
    point[a], point[b] = 1, 0
    i, j = estimate.offsets[a] + 1, estimate.offsets[b]
    expected = estimate.own[i] + estimate.own[j] + estimate.interaction[i, j]
    assert estimate.predict([point])[0] == pytest.approx(expected, rel=1e-12)
    points = points_of(space, 60)
    np.testing.assert_allclose(estimate.predict(points), [estimate.predict([p])[0] for p in points], rtol=1e-10)


def test_half_of_the_units_have_half_of_the_rounding_error():
    space, estimate = made_up(1)
    point = list(space.top)
    width, bits = 0, 1
    point[width], point[bits] = 0, 0  # four units of eight
    assert estimate.predict([point])[0] == pytest.approx(estimate.single[width][0] + estimate.single[bits][0] / 2)


def test_a_restricted_estimate_says_the_same():
    space, estimate = made_up(3, drop=True, together=0.3)
    options = {0: [1], 1: [0, 2], 2: [1, 3]}
    small = estimate.scaled(np.random.default_rng(0).lognormal(size=len(estimate.own))).restricted(options)
    points = points_of(small.space, 20)
    wide = points.copy()
    for v, kept in options.items():
        wide[:, v] = np.array(kept)[points[:, v]]
    factors = np.random.default_rng(0).lognormal(size=len(estimate.own))
    np.testing.assert_allclose(small.predict(points), estimate.scaled(factors).predict(wide), rtol=1e-10)


def test_correlations():
    x = np.exp(np.random.default_rng(0).normal(size=50))
    same = correlation(x, x**2)
    assert same.spearman == pytest.approx(1) and same.pearson == pytest.approx(1)
    assert correlation(x, 2 * x).mean_log_ratio == pytest.approx(np.log(2))
    assert correlation(x, 1 / x).spearman == pytest.approx(-1)
    assert np.isnan(correlation([1.0], [np.inf]).pearson)


def test_information_gives_bits_where_there_is_most_and_cuts_nothing_it_need_not():
    space, _ = made_up(4)
    names = [v.name for v in space.variables if v.kind == "bits"]
    nats = {name: 1.0 + i for i, name in enumerate(names)}
    estimate = by_information(space, nats)
    least = [0 if v.kind == "bits" else n - 1 for v, n in zip(space.variables, space.sizes, strict=True)]
    limit = int(space.size_bytes([tuple(least)])[0] * 1.3)
    point = projected(space, estimate, limit)
    assert all(point[i] == space.top[i] for i, v in enumerate(space.variables) if v.kind != "bits")
    bits = {v.name: v.options[o].bits for v, o in zip(space.variables, point, strict=True) if v.kind == "bits"}
    alike = [[bits[n] for n in names if n.endswith(end)] for end in {n.split(".")[-1] for n in names}]
    assert all(each == sorted(each) for each in alike)
