import itertools

import numpy as np
import pytest

from qpruner.decide.allocate import ALLOCATORS, Choices, fill, repair, repair_rows
from qpruner.errors import BudgetError


def made(n=8, bits=(4, 8), *, share=0.4, seed=0, even=False, **changes):
    """Measurements of n units; `share` of the way from the smallest to the largest size."""
    rng = np.random.default_rng(seed)
    weights = np.full(n, 1000) if even else rng.integers(500, 2000, n)
    sizes = weights[:, None] * np.array(bits) // 8 + 32
    low, high = int(sizes[:, 0].sum()), int(sizes[:, -1].sum())
    fields = dict(
        units=tuple(f"layers.{i}" for i in range(n)),
        bits=bits,
        sizes_bytes=sizes,
        limit_bytes=low + int(share * (high - low)),
        information=rng.random(n),
        sensitivity=np.sort(rng.random((n, len(bits))), axis=1)[:, ::-1].copy(),
        seed=seed,
    )
    return Choices(**fields | changes)


def is_maximal(levels, choices):
    size = choices.size_bytes(levels)
    top = len(choices.bits) - 1
    raised = [
        size - choices.sizes_bytes[u, l] + choices.sizes_bytes[u, h]
        for u, l in enumerate(levels)
        for h in range(l + 1, top + 1)
    ]
    return size <= choices.limit_bytes and all(s > choices.limit_bytes for s in raised)


@pytest.mark.parametrize("name", ALLOCATORS)
@pytest.mark.parametrize("bits", [(4, 8), (2, 4, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.97, 1.0, 2.0])
def test_the_limit_is_met_and_no_upgrade_is_left(name, bits, share):
    choices = made(11, bits, share=share)
    levels = ALLOCATORS[name](choices)
    assert len(levels) == 11 and all(isinstance(level, int) for level in levels)
    assert is_maximal(levels, choices)
    if share >= 1:
        assert levels == (len(bits) - 1,) * 11
    assert ALLOCATORS[name](choices) == levels


@pytest.mark.parametrize("name", ["mutual-information", "sensitivity"])
def test_the_best_of_all_choices_is_found(name):
    choices = made(6, (2, 4, 8), seed=3)
    log_bits = np.log2(choices.bits)
    gain = {
        "mutual-information": lambda c: sum(choices.information[u] * log_bits[l] for u, l in enumerate(c)),
        "sensitivity": lambda c: -sum(choices.sensitivity[u, l] for u, l in enumerate(c)),
    }[name]
    fitting = [c for c in itertools.product(range(3), repeat=6) if choices.size_bytes(c) <= choices.limit_bytes]
    assert ALLOCATORS[name](choices) == max(fitting, key=gain)


def test_uniform_spreads_what_is_left_over_the_depth():
    choices = made(8, even=True, share=0.5)
    assert ALLOCATORS["uniform"](choices) == (1, 0, 1, 0, 1, 0, 1, 0)
    choices = made(16, even=True, share=0.25)
    assert np.flatnonzero(ALLOCATORS["uniform"](choices)).tolist() == [0, 4, 8, 12]


def test_uniform_starts_from_the_highest_level_that_fits_all():
    levels = ALLOCATORS["uniform"](made(8, (2, 4, 8), even=True, share=0.5))
    assert set(levels) == {1, 2}


def test_random_follows_its_seed():
    drawn = {ALLOCATORS["random"](made(16, even=True, seed=seed)) for seed in range(5)}
    assert len(drawn) == 5 and {sum(levels) for levels in drawn} == {6}


def test_units_without_information_still_take_the_bytes_that_are_left():
    choices = made(8, even=True, share=0.5, information=np.array([0, 0, 0, 0, -0.5, 0, 0, 0.1]))
    assert ALLOCATORS["mutual-information"](choices) == (1, 0, 1, 0, 1, 0, 0, 1)


def test_more_bits_are_left_out_where_they_were_measured_to_do_harm():
    choices = made(3, even=True, share=1.0, sensitivity=np.array([[0.1, 0.2], [0.3, 0.1], [0.3, 0.2]]))
    assert ALLOCATORS["sensitivity"](choices) == (0, 1, 1)


def test_permuting_units_permutes_the_measured_allocations():
    choices = made(12, (2, 4, 8))
    order = np.random.default_rng(0).permutation(12)
    permuted = made(
        12,
        (2, 4, 8),
        sizes_bytes=choices.sizes_bytes[order],
        information=choices.information[order],
        sensitivity=choices.sensitivity[order],
    )
    for name in ("mutual-information", "sensitivity"):
        assert ALLOCATORS[name](permuted) == tuple(ALLOCATORS[name](choices)[u] for u in order)


@pytest.mark.parametrize("bits", [(4, 8), (2, 4, 8)])
def test_repair_gives_what_fits_with_nothing_left(bits):
    rng = np.random.default_rng(0)
    choices = made(10, bits)
    rows = rng.integers(0, len(bits), (50, 10))
    orders = np.array([rng.permutation(10) for _ in rows])
    repaired = repair_rows(rows, choices, orders)
    for levels, order, result in zip(rows, orders, repaired.tolist(), strict=True):
        assert is_maximal(result, choices)
        assert repair(levels, choices, order) == tuple(result)
        assert repair(result, choices, order) == tuple(result)


def test_order_is_priority():
    choices = made(4, even=True, share=0.5)
    assert repair((1, 1, 1, 1), choices, (2, 0, 3, 1)) == (1, 0, 1, 0)
    assert fill((0, 0, 0, 0), choices, (2, 0, 3, 1)) == (1, 0, 1, 0)
    assert fill((0, 1, 0, 0), choices, (2, 0, 3, 1)) == (0, 1, 1, 0)


def test_a_limit_below_the_smallest_widths_is_refused():
    with pytest.raises(BudgetError, match="8 units at 4 bits take 4,256 bytes and 4,200 .* 56 bytes larger would do"):
        made(8, even=True, limit_bytes=4200)


def test_measurements_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"information has the shape \(3,\); 8 units at 2 widths need \(8,\)"):
        made(8, information=np.zeros(3))
    with pytest.raises(ValueError, match="sensitivity holds a value that is not finite"):
        made(8, sensitivity=np.full((8, 2), np.nan))
    with pytest.raises(ValueError, match="widths ascending"):
        made(8, (8, 4))
    with pytest.raises(ValueError, match="'layers.1' takes fewer bytes at more bits"):
        made(2, sizes_bytes=np.array([[3, 4], [4, 3]]))
    with pytest.raises(ValueError, match="reads information, which was not measured"):
        ALLOCATORS["mutual-information"](made(8, information=None))
