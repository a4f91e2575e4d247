"""What a person sees while a run works: one bar per stage, with its rate and the time left."""

import sys
from contextlib import contextmanager
from typing import Protocol


class OnProgress(Protocol):
    def __call__(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """detail: how fast, where that is known better than by counting."""


def silent(stage: str, done: int, total: int, detail: str = "") -> None:
    """Shows nothing."""


@contextmanager
def bars():
    """Progress bars on the standard error; plain lines when that is no terminal."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    rate = TextColumn("{task.fields[rate]}")
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        rate,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = {}

        def show(stage: str, done: int, total: int, detail: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total, rate="")
            task = progress.tasks[progress.task_ids.index(tasks[stage])]
            rate = detail or (f"{task.speed:.1f}/s" if task.speed else "")
            progress.update(tasks[stage], completed=done, total=total, rate=rate)

        yield show


def _lines() -> OnProgress:
    quarters: dict[str, int] = {}

    def show(stage: str, done: int, total: int, detail: str = "") -> None:
        quarter = 4 * done // max(total, 1)
        if quarter != quarters.get(stage):
            quarters[stage] = quarter
            print(f"{stage}: {done} of {total}" + (f", {detail}" if detail else ""), file=sys.stderr, flush=True)

    return show
