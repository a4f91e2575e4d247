import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qpruner.math import knapsack
from qpruner.math.knapsack import choose
from qpruner.math.pareto import front, hypervolume


def brute_force(values, sizes, limit):
    """Every choice, the most valuable first, of equals the smallest."""
    n, k = values.shape
    rows = np.arange(n)
    fitting = [c for c in itertools.product(range(k), repeat=n) if sizes[rows, c].sum() <= limit]
    return min(fitting, key=lambda c: (-round(values[rows, c].sum(), 9), sizes[rows, c].sum()))


def totals(chosen, values, sizes):
    rows = np.arange(len(chosen))
    return values[rows, chosen].sum(), int(sizes[rows, chosen].sum())


@pytest.mark.parametrize("seed", range(40))
def test_six_items_equal_brute_force(seed):
    rng = np.random.default_rng(seed)
    k = 2 + seed % 3
    if seed % 2:  # real measurements
        values, sizes = rng.standard_normal((6, k)), rng.integers(0, 10**11, (6, k))
    else:  # small integers: many ties
        values, sizes = rng.integers(0, 4, (6, k)).astype(float), rng.integers(0, 5, (6, k))
    limit = int(rng.integers(sizes.min(1).sum(), sizes.max(1).sum() + 1))
    expected = brute_force(values, sizes, limit)
    chosen = choose(values, sizes, limit)
    assert totals(chosen, values, sizes)[1] <= limit
    assert totals(chosen, values, sizes) == pytest.approx(totals(np.array(expected), values, sizes), abs=1e-9)


@pytest.mark.parametrize(("n", "k"), [(80, 2), (200, 3), (96, 4)])
@pytest.mark.parametrize("correlation", ["none", "strong", "sizes of a model"])
def test_many_items_are_quick(n, k, correlation):
    rng = np.random.default_rng(n + k)
    sizes = np.sort(rng.integers(10**8, 10**9, (n, k)), axis=1)
    values = rng.random((n, k))
    if correlation == "strong":
        values = sizes / 1e9 + 0.1
        values[:, 0] = 0
    if correlation == "sizes of a model":
        sizes = np.array([10**7 + 3, 4 * 10**7 + 7, 10**7 + 3])[np.arange(n) % 3][:, None] * np.arange(1, k + 1)
        values = rng.random((n, 1)) * np.log2(np.arange(2, k + 2))
    limit = int(sizes.mean(axis=1).sum())
    begin = time.process_time()
    chosen = choose(values, sizes, limit)
    assert time.process_time() - begin < 5
    assert totals(chosen, values, sizes)[1] <= limit


def test_narrow_lists_of_states_are_widened_until_the_answer_is_proven(monkeypatch):
    rng = np.random.default_rng(0)
    sizes = np.sort(rng.integers(10**8, 10**9, (40, 3)), axis=1)
    values = sizes / 1e9 + rng.random((40, 3)) / 10
    limit = int(sizes.mean(axis=1).sum())
    wide = choose(values, sizes, limit)
    monkeypatch.setattr(knapsack, "WIDTH", 1)
    assert totals(choose(values, sizes, limit), values, sizes)[0] == pytest.approx(totals(wide, values, sizes)[0])


def test_of_equal_values_the_smaller_size_wins():
    values = np.array([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    sizes = np.array([[1, 5, 3], [4, 2, 2]])
    assert choose(values, sizes, 100).tolist() == [2, 1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 4), st.integers(0, 100), st.integers(0, 100))
def test_a_larger_limit_is_never_worse(seed, n, k, room, more):
    rng = np.random.default_rng(seed)
    values, sizes = rng.standard_normal((n, k)), rng.integers(0, 40, (n, k))
    limit = int(sizes.min(axis=1).sum()) + room
    tight, loose = choose(values, sizes, limit), choose(values, sizes, limit + more)
    assert totals(tight, values, sizes)[0] <= totals(loose, values, sizes)[0] + 1e-9


def test_the_order_of_items_does_not_matter():
    rng = np.random.default_rng(1)
    values, sizes = rng.random((30, 3)), rng.integers(1, 10**6, (30, 3))
    limit, shuffled = int(sizes.mean(axis=1).sum()), rng.permutation(30)
    assert choose(values[shuffled], sizes[shuffled], limit).tolist() == choose(values, sizes, limit)[shuffled].tolist()


def test_what_cannot_be_solved_is_refused():
    values, sizes = np.zeros((2, 2)), np.array([[3, 5], [4, 6]])
    assert choose(values, sizes, 7).tolist() == [0, 0]
    with pytest.raises(ValueError, match="together take 7, more than the limit of 6"):
        choose(values, sizes, 6)
    with pytest.raises(ValueError, match="negative"):
        choose(values, -sizes, 7)
    with pytest.raises(ValueError, match="not finite"):
        choose(values + np.nan, sizes, 7)


def test_the_front_equals_comparing_every_pair():
    points = np.random.default_rng(0).integers(0, 12, (60, 2)).astype(float)
    beaten = [any((q <= p).all() and (q < p).any() for q in points) for p in points]
    found = front(points)
    assert set(map(tuple, points[found])) == {tuple(p) for p, b in zip(points, beaten, strict=True) if not b}
    assert len({tuple(p) for p in points[found]}) == len(found)
    assert (np.diff(points[found, 0]) > 0).all() and (np.diff(points[found, 1]) < 0).all()


def test_the_first_of_equal_points_is_named():
    assert front(np.array([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0], [2.0, 2.0]])).tolist() == [1, 0]
    assert front(np.zeros((0, 2))).tolist() == []


def test_hypervolume_counts_the_dominated_cells():
    points = np.random.default_rng(0).integers(0, 12, (15, 2))
    cells = sum((points <= (x, y)).all(1).any() for x in range(10) for y in range(9))
    assert hypervolume(points, (10, 9)) == cells
    assert hypervolume(points[:0], (10, 9)) == 0
