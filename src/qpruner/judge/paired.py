"""Two models on the same questions: what changed, and whether by more than chance.

Accuracy hides damage: a compressed model may lose as many right answers as it finds by luck. Flips count both ways
(arXiv:2407.09141), and the paired standard error is smaller than that of two separate accuracies, because what both
find hard cancels.
"""

import math
from dataclasses import asdict, dataclass
from math import comb

from qpruner.errors import CorpusError, listed
from qpruner.judge.tasks import TaskReport, TaskScore, mean_and_error, mean_over_tasks


@dataclass(frozen=True)
class TaskChange:
    """One task before and after, by one metric.

    difference: of accuracies, after less before; standard_error: of it, paired question by question.
    p_value: exact two-sided McNemar test, that a flip is as likely one way as the other.
    lost: right before, wrong after. gained: wrong before, right after. changed: another answer, right or wrong.
    """

    name: str
    metric: str
    n: int
    before: float
    after: float
    difference: float
    standard_error: float
    p_value: float
    lost: int
    gained: int
    changed: int

    @property
    def flips(self) -> float:
        """Share of questions whose answer went from right to wrong or back."""
        return (self.lost + self.gained) / self.n

    def to_dict(self) -> dict:
        return _finite(asdict(self) | {"flips": self.flips})

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.metric} {self.before:.4f} to {self.after:.4f}, "
            f"{self.difference:+.4f} ± {self.standard_error:.4f} (p {self.p_value:.3f}), "
            f"{self.lost} lost and {self.gained} gained of {self.n}"
        )


@dataclass(frozen=True)
class TaskComparison:
    """Two models on the same tasks. All means weigh tasks equally."""

    tasks: tuple[TaskChange, ...]

    @property
    def difference(self) -> tuple[float, float]:
        """Mean difference in accuracy, after less before, and its standard error."""
        return mean_over_tasks([(task.difference, task.standard_error) for task in self.tasks])

    @property
    def flips(self) -> float:
        return sum(task.flips for task in self.tasks) / len(self.tasks)

    @property
    def p_value(self) -> float:
        """McNemar's, all questions of all tasks together."""
        return mcnemar(sum(task.lost for task in self.tasks), sum(task.gained for task in self.tasks))

    def to_dict(self) -> dict:
        difference, error = self.difference
        tasks = {task.name: task.to_dict() for task in self.tasks}
        found = dict(difference=difference, standard_error=error, flips=self.flips, p_value=self.p_value)
        return {"tasks": tasks} | _finite(found)

    def __str__(self) -> str:
        difference, error = self.difference
        return f"{len(self.tasks)} task(s): {difference:+.4f} ± {error:.4f} accuracy, flips {self.flips:.1%}"


def compare(before: TaskReport, after: TaskReport, *, metric: str | None = None) -> TaskComparison:
    """What changed from one model to another, question by question.

    Args:
        metric: `acc` or `acc_norm` for every task; each task's own if none is given.
    Raises:
        CorpusError: the reports are of other tasks, or of other questions.
    """
    ours, theirs = ({score.name: score for score in report.scores} for report in (before, after))
    alone = sorted(ours.keys() ^ theirs.keys())
    if alone:
        raise CorpusError(f"{listed(alone)} was scored for one of two models only. Score both on the same tasks.")
    return TaskComparison(tuple(_change(score, theirs[name], metric) for name, score in ours.items()))


def _change(before: TaskScore, after: TaskScore, metric: str | None) -> TaskChange:
    if before.rows_digest != after.rows_digest:
        raise CorpusError(
            f"task {before.name!r}: {before.n} and {after.n} questions that are not the same ones in the same order. "
            "Score both models on the same rows, with the same limit."
        )
    then, now = before.right(metric), after.right(metric)
    difference, error = mean_and_error([float(b) - float(a) for a, b in zip(then, now, strict=True)])
    lost = sum(a and not b for a, b in zip(then, now, strict=True))
    gained = sum(b and not a for a, b in zip(then, now, strict=True))
    answers = zip(before.chosen(metric), after.chosen(metric), strict=True)
    return TaskChange(
        name=before.name,
        metric=metric or before.metric,
        n=before.n,
        before=before.accuracy(metric)[0],
        after=after.accuracy(metric)[0],
        difference=difference,
        standard_error=error,
        p_value=mcnemar(lost, gained),
        lost=lost,
        gained=gained,
        changed=sum(a != b for a, b in answers),
    )


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided probability of a split of flips at least this uneven if both ways are equally likely; 1 without flips.

    Source: McNemar, Psychometrika 12 (1947); the exact binomial form.
    """
    n = lost + gained
    tail = sum(comb(n, k) for k in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**n)


def _finite(content: dict) -> dict:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
