import builtins
import itertools
import math

import numpy as np
import pytest
import torch

from qpruner.decide.allocate import ALLOCATORS, Choices
from qpruner.decide.search import Trial, best, pareto, random_search, search
from qpruner.errors import BudgetError, MissingExtraError


def problem(n=16, bits=(4, 8), *, seed=0, share=0.4):
    """Choices, and a loss that is nearly the sum of what each unit causes on its own."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(500, 2000, n)[:, None] * np.array(bits) // 8 + 32
    low, high = int(sizes[:, 0].sum()), int(sizes[:, -1].sum())
    own, together = rng.lognormal(0, 1, n) / n, rng.normal(size=(n, n)) * 0.15 / n**1.5
    harm = np.array([2.0 ** (bits[0] - b) for b in bits])

    def loss(levels):
        x = harm[list(levels)]
        return float(own @ x + x @ together @ x)

    choices = Choices(
        units=tuple(f"layers.{i}" for i in range(n)),
        bits=bits,
        sizes_bytes=sizes,
        limit_bytes=low + int(share * (high - low)),
        information=rng.random(n),
        seed=seed,
    )
    return choices, loss


def starts_of(choices):
    return {name: ALLOCATORS[name](choices) for name in ("uniform", "mutual-information")}


@pytest.fixture(scope="module")
def searched():
    choices, loss = problem()
    return choices, search(choices, loss, starts=starts_of(choices), n_trials=30, seed=0)


def test_the_surrogate_beats_random_search():
    gains = []
    for seed in range(3):
        choices, loss = problem(seed=seed)
        how = dict(starts=starts_of(choices), n_trials=30, seed=seed)
        gains.append(best(random_search(choices, loss, **how)).loss - best(search(choices, loss, **how)).loss)
    assert np.mean(gains) > 0.02 and min(gains) > -0.01


def test_every_trial_meets_the_limit_and_none_repeats(searched):
    choices, trials = searched
    assert [t.number for t in trials] == list(range(30))
    assert len({t.levels for t in trials}) == 30
    for trial in trials:
        assert trial.size_bytes == choices.size_bytes(trial.levels) <= choices.limit_bytes


def test_starts_come_first_and_the_best_is_no_worse(searched):
    choices, trials = searched
    starts = starts_of(choices)
    assert [(t.origin, t.levels) for t in trials[:2]] == list(starts.items())
    assert {t.origin for t in trials[2:6]} == {"random"} and {t.origin for t in trials[6:]} == {"acquisition"}
    assert best(trials).loss <= min(t.loss for t in trials[:2])


@pytest.mark.parametrize("bits", [(4, 8), (2, 4, 8)])
@pytest.mark.parametrize("cut", [1, 7])
def test_a_journal_continues_as_if_never_interrupted(bits, cut):
    choices, loss = problem(10, bits)
    how = dict(starts=starts_of(choices), n_trials=14, seed=5)
    whole = search(choices, loss, **how)
    lines = [trial.to_json() for trial in whole[:cut]]
    seen, asked = [], []

    def watched(levels):
        asked.append(levels)
        return loss(levels)

    torch.manual_seed(99)
    resumed = search(choices, watched, journal=[Trial.from_json(line) for line in lines], on_trial=seen.append, **how)
    assert resumed == whole and seen == whole[cut:] and asked == [t.levels for t in whole[cut:]]


def test_another_seed_tries_other_points(searched):
    choices, trials = searched
    _, loss = problem()
    others = search(choices, loss, starts=starts_of(choices), n_trials=8, seed=1)
    assert [t.levels for t in others[2:]] != [t.levels for t in trials[2:8]]


def test_the_callers_random_numbers_are_left_alone():
    choices, loss = problem(8)
    torch.manual_seed(3)
    np.random.seed(3)
    search(choices, loss, starts={}, n_trials=8, seed=0)
    drawn = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    assert drawn == (torch.rand(1), np.random.rand())


@pytest.mark.parametrize("method", [search, random_search])
def test_a_small_space_is_exhausted(method):
    choices, loss = problem(6, share=0.5)
    trials = method(choices, loss, starts=starts_of(choices), n_trials=64, seed=0)
    fitting = [c for c in itertools.product(range(2), repeat=6) if choices.size_bytes(c) <= choices.limit_bytes]
    maximal = {
        c
        for c in fitting
        if not any(c != other and all(a <= b for a, b in zip(c, other, strict=True)) for other in fitting)
    }
    assert {t.levels for t in trials} == maximal and len(trials) == len(maximal) < 64
    assert best(trials).loss == min(map(loss, maximal))


@pytest.mark.parametrize("share", [0.0, 2.0])
def test_nothing_to_choose_is_one_trial(share):
    choices, loss = problem(40, share=share)
    assert len(search(choices, loss, starts={}, n_trials=9, seed=0)) == 1


def test_equal_starts_are_evaluated_once():
    choices, loss = problem()
    same = ALLOCATORS["uniform"](choices)
    trials = search(choices, loss, starts={"uniform": same, "sensitivity": same}, n_trials=3, seed=0)
    assert [t.origin for t in trials] == ["uniform", "random", "random"]


def test_a_space_with_few_points_that_fit_is_walked_to_its_end():
    """Forty units of which just one can be raised: random points alone would keep repeating themselves."""
    choices, _ = problem(40)
    sizes = np.tile([100, 200], (40, 1))
    choices = Choices(choices.units, choices.bits, sizes, limit_bytes=4100)
    worth = np.random.default_rng(0).random(40)
    trials = random_search(choices, lambda levels: -float(worth @ levels), starts={}, n_trials=60, seed=0)
    assert len(trials) == 40 and best(trials).loss == -worth.max()


@pytest.mark.parametrize("odd", [math.inf, math.nan, 1e6])
def test_diverged_points_do_not_end_the_search(odd):
    choices, loss = problem(12)
    trials = search(choices, lambda l: odd if l[3] == 0 else loss(l), starts={}, n_trials=14, seed=0)
    assert len(trials) == 14 and best(trials).loss < 10
    assert best(trials).levels[3] == 1
    again = [Trial.from_json(trial.to_json()) for trial in trials]
    assert [t.to_json() for t in again] == [t.to_json() for t in trials]


@pytest.mark.parametrize("value", [0.0, 3.5, math.inf])
def test_a_constant_loss_is_no_trouble(value):
    choices, _ = problem(12)
    assert len(search(choices, lambda levels: value, starts=starts_of(choices), n_trials=9, seed=0)) == 9


def test_pareto_keeps_what_is_not_beaten_in_both():
    trials = [
        Trial(i, "random", (i,), size, loss) for i, (size, loss) in enumerate([(9, 1), (5, 2), (9, 2), (2, math.nan)])
    ]
    assert [t.number for t in pareto(trials)] == [1, 0]
    assert best(trials).number == 0
    assert best(trials[1:]).number == 1


def test_what_does_not_belong_is_refused():
    choices, loss = problem(4)
    how = dict(n_trials=9, seed=0)
    with pytest.raises(ValueError, match="the start 'mine' is not one level of 2 for each of 4 units: "):
        search(choices, loss, starts={"mine": (0, 0, 2, 0)}, **how)
    with pytest.raises(BudgetError, match="the start 'mine' takes .* bytes, and the limit is"):
        search(choices, loss, starts={"mine": (1, 1, 1, 1)}, **how)
    with pytest.raises(ValueError, match="trial 0 of the journal has another size here"):
        search(choices, loss, starts={}, journal=[Trial(0, "random", (0, 0, 0, 0), 7, 0.5)], **how)


def test_a_missing_botorch_is_named_before_any_evaluation(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "botorch":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    choices, _ = problem(4)
    with pytest.raises(MissingExtraError, match=r"pip install 'qpruner\[search\]'"):
        search(choices, lambda levels: pytest.fail("evaluated"), starts=starts_of(choices), n_trials=9, seed=0)
    assert len(random_search(choices, lambda levels: 0.0, starts=starts_of(choices), n_trials=3, seed=0)) == 3
