"""Zero-shot tasks from files: JSON lines, one file per task, one row per question.

A row is `{"context", "choices", "label"}`: what the model is shown, the answers as they follow it (with the space in
front, where there is one), and the index of the right one. A `context` that is a list has one for every choice; the
choices are then all one string, as in WinoGrande. Rows with a single choice ask for the end of a text, as in LAMBADA.
"""

import gzip
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qpruner.errors import CorpusError, listed

SUFFIXES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Row:
    """One question. context: one, or one for every choice. choices: as they follow it. label: of the right one."""

    context: str | tuple[str, ...]
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class TaskRows:
    """A task that was read from a file, in the order of its lines.

    delimiter: what stands between context and answer, a space or nothing, and is no part of an answer's length.
    """

    name: str
    path: Path
    rows: tuple[Row, ...]
    delimiter: str

    @property
    def asks_for_ending(self) -> bool:
        """Whether rows have a single choice: what is asked is whether the model would go on like that."""
        return len(self.rows[0].choices) == 1

    @property
    def context_per_choice(self) -> bool:
        return not isinstance(self.rows[0].context, str)


def task_files(folder: Path) -> dict[str, Path]:
    """The tasks that a folder has files for, by name.

    Raises:
        CorpusError: there is no such folder, it has no task files, or two for one task.
    """
    if not folder.is_dir():
        raise CorpusError(
            f"there is no folder of tasks at {folder}. Give one with a file {_accepted('TASK')} per task."
        )
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
        name = path.name.removesuffix(suffix) if suffix else ""
        if not name or not path.is_file():
            continue
        if name in found:
            raise CorpusError(f"task {name!r} has two files in {folder}: {found[name].name} and {path.name}. Keep one.")
        found[name] = path
    if not found:
        raise CorpusError(f"{folder} has no task files. Accepted: {_accepted('TASK')}, one for each task.")
    return found


def chosen_files(folder: Path, names: Sequence[str] = ()) -> dict[str, Path]:
    """The files of the tasks named, in that order; of all that are there, where none is named.

    Raises:
        CorpusError: as `task_files`, or there is none of that name.
    """
    found = task_files(folder)
    missing = [name for name in names if name not in found]
    if missing:
        raise CorpusError(
            f"{folder} has no file for {listed(missing)} ({_accepted(missing[0])}). "
            f"There is: {', '.join(repr(name) for name in found)}."
        )
    return {name: found[name] for name in names} if names else found


def read_task(name: str, path: Path, *, limit: int | None = None) -> TaskRows:
    """The rows of a task's file, or the first `limit` of them.

    Raises:
        CorpusError: the file is unreadable or empty, or a row is not as it should be; the line is named.
    """
    rows: list[Row] = []
    delimiter = None
    try:
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if limit is not None and len(rows) == limit:
                    break
                if not line.strip():
                    continue
                place = f"{path}, line {number}"
                row = _row(line, place)
                delimiter = _delimiter(row, delimiter, place)
                if rows and (_kind(row) != _kind(rows[0])):
                    raise CorpusError(f"{place}: {_kind(row)}, and rows before it have {_kind(rows[0])}.")
                rows.append(row)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorpusError(f"{path} is not a whole gzip file ({error}). Fetch or compress it again.") from error
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text (after {len(rows):,} rows). Convert it first.") from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}.") from error
    if not rows:
        raise CorpusError(f"{path} has no rows. Every line must be {FIELDS}.")
    return TaskRows(name, path, tuple(rows), delimiter)


FIELDS = 'an object with "context", "choices" and "label"'


def _row(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{place}: not JSON ({error.msg}). Every line must be {FIELDS}.") from error
    if not isinstance(row, dict) or not {"context", "choices", "label"} <= row.keys():
        what = f"an object with {listed(row) or 'nothing'}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise CorpusError(f"{place}: {what}. Every line must be {FIELDS}.")
    context, choices, label = row["context"], row["choices"], row["label"]
    if not _strings(choices) or not all(choice.strip() for choice in choices):
        raise CorpusError(f"{place}: `choices` must be a list of strings that hold more than blanks.")
    if not isinstance(context, str):
        if not _strings(context) or len(context) != len(choices):
            raise CorpusError(f"{place}: `context` must be a string, or a list of one string for each choice.")
        if len(set(choices)) > 1:
            raise CorpusError(f"{place}: contexts and choices both differ. With several contexts, all choices are one.")
        context = tuple(context)
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
        raise CorpusError(f"{place}: `label` is {label!r}. Accepted: 0 to {len(choices) - 1}, the index of a choice.")
    return Row(context, tuple(choices), label)


def _strings(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _delimiter(row: Row, before: str | None, place: str) -> str:
    """The harness has one delimiter for a task, and takes it out before it counts characters."""
    spaces = {" " if choice.startswith(" ") else "" for choice in row.choices}
    found = spaces.pop()
    if spaces or (before is not None and found != before):
        raise CorpusError(
            f"{place}: some choices of this file start with a space and some do not. Accepted: all or none."
        )
    return found


def _kind(row: Row) -> str:
    choices = "one choice" if len(row.choices) == 1 else "several choices"
    return f"{choices}, {'one context' if isinstance(row.context, str) else 'a context for each'}"


def _accepted(name: str) -> str:
    return " or ".join(f"{name}{suffix}" for suffix in SUFFIXES)
