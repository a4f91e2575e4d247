"""Bayesian optimization of the level vector: try, learn what each unit is worth, try what promises most.

Every point that is proposed meets the limit and leaves no room for raising a unit, by construction (`repair`). The
surrogate is a Gaussian process over the levels, scaled to [0, 1], with a linear plus a Matern-5/2 kernel: the loss of a
rounded model is nearly the sum of its units' own, and the second term takes what is not. The next trial is the point of
largest expected improvement (in logs) among the neighbours of the best trials, the exact optima of what the surrogate
sees as additive, and random points.

A suggestion depends on nothing but the seed and the trials so far, so a run that was cut off continues from its
journal exactly as it would have gone on.
"""

import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np

from qpruner.decide.allocate import Choices, Levels, repair_rows
from qpruner.decide.surrogate import need_botorch
from qpruner.errors import BudgetError
from qpruner.math.knapsack import choose
from qpruner.math.pareto import front

N_RANDOM = 4  # random trials after the starts, before the surrogate takes over
N_INCUMBENTS = 4  # trials whose neighbours are considered
N_NEIGHBOURS = 500  # of each of them, drawn if there are more
N_SCATTERED = 500  # random points considered
ENUMERATED = 4096  # spaces of up to so many level vectors are listed whole
FIT_ITERATIONS = 25


@dataclass(frozen=True)
class Trial:
    """One evaluated point.

    origin: the name of the start, `random`, or `acquisition`.
    loss: what `evaluate` returned; not finite where the model diverged.
    """

    number: int
    origin: str
    levels: Levels
    size_bytes: int
    loss: float

    def to_json(self) -> str:
        """One line; every float comes back bit by bit."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Trial":
        fields = json.loads(line)
        return cls(**fields | {"levels": tuple(fields["levels"])})


Suggest = Callable[[Choices, Sequence[Trial], np.random.Generator], tuple[str, Levels | None]]


def search(
    choices: Choices,
    evaluate: Callable[[Levels], float],
    *,
    starts: Mapping[str, Levels],
    n_trials: int,
    seed: int,
    journal: Sequence[Trial] = (),
    on_trial: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """All trials, in order: the starts, a few random points, then those of the largest expected improvement.

    Args:
        evaluate: the loss of a level vector, smaller is better; the same each time it is asked.
        starts: plans to begin with, by name. Of equal ones the first is evaluated.
        n_trials: trials in all, those of the journal included. Fewer where no untried point is left.
        journal: the first trials of the same search, which are not evaluated again.
        on_trial: called with each new trial as soon as it is known.
    Raises:
        BudgetError: a start exceeds the limit.
        MissingExtraError: BoTorch is not installed.
        ValueError: a start or a journal does not belong to these choices.
    """
    need_botorch()  # a missing extra is better known before the first evaluation than after it
    return _run(_by_acquisition, choices, evaluate, starts, n_trials, seed, journal, on_trial)


def random_search(
    choices: Choices,
    evaluate: Callable[[Levels], float],
    *,
    starts: Mapping[str, Levels],
    n_trials: int,
    seed: int,
    journal: Sequence[Trial] = (),
    on_trial: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """The control: `search` with nothing but random points after the starts."""
    return _run(_at_random, choices, evaluate, starts, n_trials, seed, journal, on_trial)


def best(trials: Sequence[Trial]) -> Trial:
    """The smallest loss; of equals the smaller in size, then the earlier."""
    return min(trials, key=lambda t: (math.inf if math.isnan(t.loss) else t.loss, t.size_bytes, t.number))


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other matches in both size and loss and beats in one, by ascending size."""
    finite = [t for t in trials if math.isfinite(t.loss)]
    points = np.array([(t.size_bytes, t.loss) for t in finite], dtype=float).reshape(-1, 2)
    return [finite[i] for i in front(points)]


def _run(suggest: Suggest, choices, evaluate, starts, n_trials, seed, journal, on_trial) -> list[Trial]:
    for name, levels in starts.items():
        _check(choices, levels, f"the start {name!r}")
    for trial in journal:
        _check(choices, trial.levels, f"trial {trial.number} of the journal")
        if trial.size_bytes != choices.size_bytes(trial.levels):
            raise ValueError(f"trial {trial.number} of the journal has another size here; it is of another search")

    trials = list(journal[:n_trials])
    while len(trials) < n_trials:
        tried = {t.levels for t in trials}
        origin, levels = next(((o, tuple(s)) for o, s in starts.items() if tuple(s) not in tried), ("", None))
        if levels is None:
            origin, levels = suggest(choices, trials, np.random.default_rng([seed, len(trials)]))
        if levels is None:
            break
        trial = Trial(len(trials), origin, levels, choices.size_bytes(levels), float(evaluate(levels)))
        trials.append(trial)
        if on_trial:
            on_trial(trial)
    return trials


def _check(choices: Choices, levels: Sequence[int], what: str) -> None:
    if len(levels) != len(choices.units) or not all(0 <= level < len(choices.bits) for level in levels):
        raise ValueError(
            f"{what} is not one level of {len(choices.bits)} for each of {len(choices.units)} units: {tuple(levels)}"
        )
    if (size := choices.size_bytes(levels)) > choices.limit_bytes:
        raise BudgetError(f"{what} takes {size:,} bytes, and the limit is {choices.limit_bytes:,}")


# Suggestions


def _at_random(choices: Choices, trials: Sequence[Trial], rng: np.random.Generator) -> tuple[str, Levels | None]:
    pool = _untried(_scattered(choices, rng), trials)
    if not len(pool):
        pool = _untried(np.concatenate(list(_around(choices, trials, rng))), trials)
    return "random", tuple(pool[0].tolist()) if len(pool) else None


def _by_acquisition(choices: Choices, trials: Sequence[Trial], rng: np.random.Generator) -> tuple[str, Levels | None]:
    if (
        sum(t.origin == "random" for t in trials) < N_RANDOM
        or len({t.loss for t in trials if math.isfinite(t.loss)}) < 2
    ):
        return _at_random(choices, trials, rng)
    rising = sorted(trials, key=lambda t: (t.loss if math.isfinite(t.loss) else math.inf, t.number))[:N_INCUMBENTS]
    surrogate = _Surrogate(choices, trials, seed=int(rng.integers(2**31)))
    additive = np.array([_additive_optimum(surrogate, choices, t.levels) for t in rising])
    polished = repair_rows(
        additive, choices, rng.permuted(np.tile(np.arange(len(choices.units)), (len(rising), 1)), axis=1)
    )
    pool = _untried(np.concatenate((polished, _scattered(choices, rng), *_around(choices, rising, rng))), trials)
    if not len(pool):
        pool = _untried(np.concatenate(list(_around(choices, trials, rng))), trials)
    if not len(pool):
        return "acquisition", None
    return "acquisition", tuple(pool[int(np.argmax(surrogate.log_improvement(pool)))].tolist())


def _scattered(choices: Choices, rng: np.random.Generator) -> np.ndarray:
    """Random feasible and maximal points in random order; all there are, in a small space."""
    n, k = len(choices.units), len(choices.bits)
    if k**n <= ENUMERATED:
        rows = rng.permutation(np.array(list(itertools.product(range(k), repeat=n))))
        # Repair leaves alone exactly those that are feasible and maximal, whatever its order.
        return rows[(repair_rows(rows, choices, np.tile(np.arange(n), (len(rows), 1))) == rows).all(axis=1)]
    orders = rng.permuted(np.tile(np.arange(n), (N_SCATTERED, 1)), axis=1)
    return repair_rows(rng.integers(0, k, (N_SCATTERED, n)), choices, orders)


def _around(choices: Choices, trials: Sequence[Trial], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """For each trial the points that give one unit another level and pay for it with one other, or spend it on one."""
    n, k = len(choices.units), len(choices.bits)
    for trial in trials:
        here = np.array(trial.levels)
        moves = [(u, l, v) for u in range(n) for l in range(k) if l != here[u] for v in range(n) if v != u]
        if len(moves) > N_NEIGHBOURS:
            moves = [moves[i] for i in rng.choice(len(moves), N_NEIGHBOURS, replace=False)]
        if not moves:
            yield here[None]
            continue
        unit, level, other = np.array(moves).T
        each = np.arange(len(moves))
        rows = np.tile(here, (len(moves), 1))
        raised = level > here[unit]
        rows[each, unit] = level
        # The other unit goes the opposite way, one level; the limit is then restored with these two as the last resort.
        rows[each, other] = np.clip(rows[each, other] - np.where(raised, 1, -1), 0, k - 1)
        priority = rng.random(rows.shape)
        priority[each, unit] = np.where(raised, -1, 2)
        priority[each, other] = np.where(raised, 2, -1)
        yield repair_rows(rows, choices, priority.argsort(axis=1))


def _additive_optimum(surrogate: "_Surrogate", choices: Choices, levels: Levels) -> np.ndarray:
    """The exact optimum if the effects that the surrogate sees for single changes of this point just added up."""
    n, k = len(choices.units), len(choices.bits)
    rows = np.tile(np.array(levels), (n * k, 1))
    rows[np.arange(n * k), np.repeat(np.arange(n), k)] = np.tile(np.arange(k), n)
    return choose(-surrogate.mean(rows).reshape(n, k), choices.sizes_bytes, choices.limit_bytes)


def _untried(rows: np.ndarray, trials: Sequence[Trial]) -> np.ndarray:
    """The rows not tried yet, each once, in their order."""
    tried = {t.levels for t in trials}
    fresh = {row: None for row in map(tuple, rows.tolist()) if row not in tried}
    return np.array(list(fresh), dtype=np.int64).reshape(-1, rows.shape[1])


# The surrogate


class _Surrogate:
    """A Gaussian process fitted to the trials: its posterior mean, and the logarithm of the expected improvement."""

    def __init__(self, choices: Choices, trials: Sequence[Trial], *, seed: int):
        need_botorch()
        import torch
        from botorch.exceptions.errors import ModelFittingError
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from gpytorch.kernels import LinearKernel, MaternKernel, ScaleKernel
        from gpytorch.mlls import ExactMarginalLogLikelihood

        # From 0 at the lowest width to 1 at the highest, by rounding error, which halves with every bit.
        error = 2.0 ** -np.array(choices.bits, dtype=float)
        self.scaled = (error[0] - error) / (error[0] - error[-1])
        losses = np.array([t.loss for t in trials])
        # A model that diverged is bad, but how bad must not set the scale for the others.
        finite = losses[np.isfinite(losses)]
        losses = np.where(np.isfinite(losses), losses, finite.max())
        self.location, self.scale = losses.mean(), losses.std(ddof=1)
        y = torch.from_numpy((self.location - losses) / self.scale)[:, None]  # larger is better from here on
        self.model = SingleTaskGP(
            self._inputs(np.array([t.levels for t in trials])),
            y,
            covar_module=ScaleKernel(LinearKernel()) + ScaleKernel(MaternKernel(nu=2.5)),
            outcome_transform=None,
        )
        self.best = y.max()
        # Retries of a failed fit draw from the global generator, which belongs to the caller.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                fit_gpytorch_mll(
                    ExactMarginalLogLikelihood(self.model.likelihood, self.model),
                    optimizer_kwargs={"options": {"maxiter": FIT_ITERATIONS}},
                )
            except ModelFittingError:  # the prior's scales still rank points better than chance
                self.model.eval()

    def mean(self, rows: np.ndarray) -> np.ndarray:
        """Posterior mean of the loss, in its own unit."""
        import torch

        with torch.no_grad(), _quiet():
            return self.location - self.scale * self.model.posterior(self._inputs(rows)).mean[:, 0].numpy()

    def log_improvement(self, rows: np.ndarray) -> np.ndarray:
        import torch
        from botorch.acquisition import LogExpectedImprovement

        with torch.no_grad(), _quiet():
            return LogExpectedImprovement(self.model, best_f=self.best)(self._inputs(rows)[:, None]).numpy()

    def _inputs(self, rows: np.ndarray):
        import torch

        return torch.from_numpy(self.scaled[rows])


@contextmanager
def _quiet():
    """Variances that rounding leaves just below zero, where a point is all but known, are raised to zero: no news."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Negative variance values detected")
        yield
