"""Zero-shot accuracy on multiple-choice tasks, scored by lm-evaluation-harness; by name, or from local files.

An answer is the choice with the highest sum of log-probabilities over its tokens (`acc`), or of that sum divided by the
choice's number of characters (`acc_norm`: characters, not bytes or tokens, without the space in front). Where the end
of a text is asked for, it counts if each of its tokens is the likeliest; perplexity is per ending, not per token.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

from torch import nn
from transformers import PreTrainedTokenizerBase

from qpruner.errors import CorpusError, MemoryLimitError, MissingExtraError
from qpruner.judge.task_files import chosen_files, read_task
from qpruner.model import memory
from qpruner.model.checkpoint import Header
from qpruner.model.load import quiet
from qpruner.progress import OnProgress, silent

PAPERS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")  # LLM-Pruner's seven
NAMED = (*PAPERS, "lambada_openai")
PLAIN = ("boolq", "winogrande")  # for which the harness, and papers after it, name acc alone


@dataclass(frozen=True)
class Asked:
    """Which tasks a model is to be scored on; the meaning of `zero_shot`'s parameters."""

    names: tuple[str, ...] = ()
    folder: Path | None = None
    limit: int | None = None

    @classmethod
    def of(cls, names: Sequence[str], folder: str | Path | None, limit: int | None) -> "Asked | None":
        """None where no task is asked for; what cannot be served is refused."""
        if not names and folder is None:
            return None
        asked = cls(tuple(names), None if folder is None else Path(folder), limit)
        require(asked.names, folder=asked.folder, limit=limit)
        return asked


@dataclass(frozen=True)
class TaskScore:
    """What a model answered, question by question.

    labels: index of the right choice. answers: of the chosen one; where endings are asked for 0 if the model would go
    on like that, else -1. answers_norm: chosen by log-probability per character; None where endings are asked for.
    logprobs: nats, of the right ending; None elsewhere. cut: questions that were too long, whose beginning the model
    did not see. rows_digest: of the texts that were scored, and the labels.
    """

    name: str
    rows_digest: str
    labels: tuple[int, ...]
    answers: tuple[int, ...]
    answers_norm: tuple[int, ...] | None
    logprobs: tuple[float, ...] | None
    cut: int

    @property
    def n(self) -> int:
        return len(self.labels)

    @property
    def metric(self) -> str:
        """The one that tables print: acc_norm where the harness's definition of the task names it."""
        return "acc" if self.answers_norm is None or self.name in PLAIN else "acc_norm"

    def chosen(self, metric: str | None = None) -> tuple[int, ...]:
        """Answers by a metric, `acc` or `acc_norm`; by the task's own if none is given."""
        wanted = metric or self.metric
        if wanted not in ("acc", "acc_norm"):
            raise ValueError(f"metric {wanted!r} is unknown. Accepted: 'acc', 'acc_norm'")
        return self.answers_norm if wanted == "acc_norm" and self.answers_norm is not None else self.answers

    def right(self, metric: str | None = None) -> tuple[bool, ...]:
        return tuple(a == label for a, label in zip(self.chosen(metric), self.labels, strict=True))

    def accuracy(self, metric: str | None = None) -> tuple[float, float]:
        """Share of right answers, and its standard error; NaN for a single question."""
        return mean_and_error([float(hit) for hit in self.right(metric)])

    @property
    def perplexity(self) -> tuple[float, float] | None:
        """Of the endings, and its standard error, by the delta method from that of the mean log-probability."""
        if self.logprobs is None:
            return None
        mean, error = mean_and_error(self.logprobs)
        value = math.exp(-mean) if mean > -700 else math.inf
        return value, value * error

    def to_dict(self, *, rows: bool = False) -> dict:
        """As JSON: numbers, and with `rows` what is needed to pair this with another model's."""
        found = {"n": self.n, "metric": self.metric, "rows_digest": self.rows_digest, "cut": self.cut}
        found |= _measured("acc", self.accuracy("acc"))
        if self.answers_norm is not None:
            found |= _measured("acc_norm", self.accuracy("acc_norm"))
        if self.perplexity is not None:
            found |= _measured("perplexity", self.perplexity)
        kept = ("labels", "answers", "answers_norm", "logprobs")
        return found | ({key: value for key, value in asdict(self).items() if key in kept} if rows else {})

    def __str__(self) -> str:
        (value, error), (metric, perplexity) = self.accuracy(), (self.metric, self.perplexity)
        ending = f", perplexity {perplexity[0]:.2f} ± {perplexity[1]:.2f}" if perplexity else ""
        return f"{self.name}: {metric} {value:.4f} ± {error:.4f}{ending} [{self.n} questions, zero-shot]"


@dataclass(frozen=True)
class TaskReport:
    """Zero-shot scores of one model. origin: the folder of the rows, or `online`. harness: name and version."""

    scores: tuple[TaskScore, ...]
    origin: str
    harness: str

    @property
    def mean(self) -> tuple[float, float]:
        """Mean accuracy over tasks, each by its own metric and of equal weight, and its standard error."""
        return mean_over_tasks([score.accuracy() for score in self.scores])

    def to_dict(self, *, rows: bool = False) -> dict:
        tasks = {score.name: score.to_dict(rows=rows) for score in self.scores}
        return {"harness": self.harness, "origin": self.origin, "shots": 0, "tasks": tasks} | _measured(
            "mean", self.mean
        )

    @classmethod
    def from_dict(cls, content: dict) -> "TaskReport":
        """What `to_dict(rows=True)` gave."""
        sequence = lambda value: value if value is None else tuple(value)
        kept = ("labels", "answers", "answers_norm", "logprobs")
        scores = (
            TaskScore(name, task["rows_digest"], cut=task["cut"], **{key: sequence(task[key]) for key in kept})
            for name, task in content["tasks"].items()
        )
        return cls(tuple(scores), content["origin"], content["harness"])


def zero_shot(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str] = (),
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    on_progress: OnProgress = silent,
) -> TaskReport:
    """Score a loaded model through lm-evaluation-harness. The model and the tokenizer are not changed.

    Args:
        names: of tasks; with a folder, all that are there if none is named.
        folder: local files, see `task_files`; nothing is then asked of the network. Without one the harness's own
            definitions are used, and their data is fetched from the Hugging Face Hub or its cache.
        limit: questions of each task, from the start.
    Raises:
        CorpusError: a task is unknown, its file or its rows cannot be used, or its data cannot be fetched.
        MissingExtraError: lm-evaluation-harness is not installed.
    """
    wanted = require(names, folder=folder, limit=limit)
    with quiet():
        from qpruner.judge import harness

    with harness.unheard(), harness.Scorer(model, tokenizer, on_progress) as scorer:
        if folder is None:
            tasks = harness.named_tasks(wanted)
        else:  # one after the other: the next is read when its turn comes
            files = chosen_files(Path(folder), wanted).items()
            tasks = (harness.task_of(read_task(name, path, limit=limit)) for name, path in files)
        scores = tuple(TaskScore(**scorer.score(task, limit=limit)) for task in tasks)
    return TaskReport(scores, "online" if folder is None else str(folder), harness.VERSION)


def require(names: Sequence[str] = (), *, folder: str | Path | None = None, limit: int | None = None) -> list[str]:
    """The tasks that will be scored. What can be refused before a model is loaded is refused here.

    Raises:
        as `zero_shot`; names without a folder are looked at when they are fetched.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            "zero-shot tasks need lm-evaluation-harness, which is not installed: pip install 'qpruner[eval]'"
        ) from None
    if limit is not None and limit < 1:
        raise CorpusError(f"{limit} questions of each task are too few. Accepted: 1 or more, or no limit.")
    wanted = list(dict.fromkeys(names))
    if folder is not None:
        return list(chosen_files(Path(folder), wanted))
    if not wanted:
        raise CorpusError(f"no task is named. Accepted: {', '.join(NAMED)}; or a folder of task files (--tasks-dir).")
    return wanted


def require_room(tensors: Mapping[str, Header], limit: int | None = None) -> None:
    """The harness runs a model whole: refuse one that does not fit. What `evaluate` streams has no scores on tasks.

    Args:
        tensors: of the model, as in `Source`.
        limit: bytes for the whole process; without one, nine tenths of what is free on the machine.
    Raises:
        MemoryLimitError: it takes more, with numbers.
    """
    if not memory.fits(tensors, limit):
        needed, allowed = memory.whole_bytes(tensors), memory.allowed_bytes(limit)
        raise MemoryLimitError(
            f"zero-shot tasks need the whole model in memory in float32: about {needed / 2**30:.2f} GiB, and "
            f"{allowed / 2**30:.2f} GiB are allowed. Raise the limit, or leave tasks out: loss and KL are measured "
            "layer by layer."
        )


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean of independent values, and its standard error; NaN for a single one."""
    n = len(values)
    return fmean(values), stdev(values) / math.sqrt(n) if n > 1 else math.nan


def mean_over_tasks(measured: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean of several means whose rows have nothing to do with each other, and its standard error."""
    errors = [error for _, error in measured]
    return fmean(value for value, _ in measured), math.hypot(*errors) / len(errors)


def _measured(name: str, measured: tuple[float, float]) -> dict[str, float | None]:
    value, error = (number if math.isfinite(number) else None for number in measured)
    return {name: value, f"{name}_error": error}
