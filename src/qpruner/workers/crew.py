"""Who works on what, and what a death costs, wherever the workers are.

A crew keeps as many workers as its place has room for. Each was made once and answers one item at a time. An item whose
worker dies is tried again on another one; a result is never asked for twice.
"""

import pickle
import traceback
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qpruner.errors import WorkersError

Make = Callable[..., Callable[[Any], Any]]  # builds a worker, once for each process
OnEvent = Callable[[str], None]  # is told in a sentence what a person may want to know

TRIES_OF_A_PLACE = 2  # workers that die before they are ready, until there is to be one fewer


@dataclass(frozen=True)
class Ready:
    """It is made and has nothing to do."""


@dataclass(frozen=True)
class Done:
    result: Any


@dataclass(frozen=True)
class Raised:
    error: Exception


@dataclass(frozen=True)
class Died:
    """reason: continues a sentence about the worker. begun: whether the item it had, if any, can have to do with it."""

    reason: str
    begun: bool = True


Message = Ready | Done | Raised | Died


@dataclass(frozen=True)
class Lost:
    """In place of a result: every worker that had the item died. reason: a sentence."""

    reason: str


class Deserted(Exception):
    """The place has had no worker for so long that those who wait should go on elsewhere."""


class Place(Protocol):
    """Where workers are. What `start` returns stands for one of them."""

    size: int  # workers at once

    def start(self) -> Hashable:
        """Begin to make a worker; it says `Ready`, or what kept it from that."""

    def give(self, worker: Hashable, item: Any) -> None:
        """An item for a worker that has none."""

    def wait(self) -> list[tuple[Hashable, Message]]:
        """What workers say, sooner or later; perhaps nothing yet."""

    def end(self, worker: Hashable, *, at_once: bool) -> None:
        """at_once: whatever it is doing; otherwise it has nothing to do, and may tidy up."""

    def close(self) -> None:
        """After every worker was ended."""


class Crew:
    def __init__(self, place: Place, on_event: OnEvent):
        self._place, self._on_event = place, on_event
        self._workers: list[Hashable] = []
        self._idle: list[Hashable] = []
        self._in_vain = 0  # deaths since a worker last became ready, of workers that never did

    def each(
        self,
        items: Sequence,
        *,
        attempts: int,
        choose: Callable[[Sequence[int], Sequence[int]], int] = lambda waiting, working: waiting[0],
    ) -> Iterator[tuple[int, Any]]:
        """Every item's index and result, as each is done; `Lost` for what `attempts` workers died of.

        Args:
            choose: the index to begin next, of those that wait, beside those that are worked on.
        Raises:
            WorkersError: no worker lives long enough to be ready.
        """
        waiting, working, deaths = list(range(len(items))), {}, Counter()
        try:
            while waiting or working:
                self._recruit(len(waiting) + len(working))
                while waiting and self._idle:
                    worker, index = self._idle.pop(0), choose(waiting, list(working.values()))
                    waiting.remove(index)
                    working[worker] = index
                    self._place.give(worker, items[index])
                for worker, message in self._place.wait():
                    index = working.pop(worker, None)
                    match message:
                        case Ready():
                            self._in_vain = 0
                            self._idle.append(worker)
                        case Done(result):
                            self._idle.append(worker)
                            yield index, result
                        case Raised(error):
                            if index is not None:
                                self._idle.append(worker)
                            raise error
                        case Died(reason, begun):
                            self._bury(worker, reason, index)
                            if index is None:
                                continue
                            deaths[index] += begun
                            if deaths[index] < attempts:
                                waiting.insert(0, index)
                            else:
                                yield index, Lost(f"all {attempts} workers that tried it died; the last one {reason}.")
        except BaseException:  # also when whoever asked stops asking: late answers must not meet the next items
            self._end(busy_only=True)
            raise

    def close(self) -> None:
        try:
            self._end()
        finally:
            self._place.close()

    def _recruit(self, n_items: int) -> None:
        room = self._place.size - self._in_vain // TRIES_OF_A_PLACE
        if room <= 0 and not self._workers:
            raise WorkersError(f"no worker could be made in {self._in_vain} tries; the last one {self._reason}.")
        while len(self._workers) < min(room, n_items):
            self._workers.append(self._place.start())

    def _bury(self, worker: Hashable, reason: str, index: int | None) -> None:
        self._workers.remove(worker)
        doing = "" if index is None else f", at item {index}"
        if worker in self._idle:
            self._idle.remove(worker)
        elif index is None:
            self._in_vain += 1
            self._reason = reason
            doing = " before it was ready"
        self._on_event(f"a worker {reason}{doing}")

    def _end(self, *, busy_only: bool = False) -> None:
        for worker in [w for w in self._workers if not (busy_only and w in self._idle)]:
            self._place.end(worker, at_once=worker not in self._idle)
            self._workers.remove(worker)
            if worker in self._idle:
                self._idle.remove(worker)


class Here:
    """This process as a place: one worker, made when there is something for it to do, and once."""

    size = 1

    def __init__(self, make: Make, arguments: tuple):
        self._make = lambda: make(*arguments)
        self._work = self._item = None
        self._started = False

    def start(self) -> str:
        self._started = True
        return "here"

    def give(self, worker: str, item: Any) -> None:
        self._item = item

    def wait(self) -> list[tuple[str, Message]]:
        if self._started:
            self._started = False
            self._work = self._work or self._make()
            return [("here", Ready())]
        return [("here", Done(self._work(self._item)))]

    def end(self, worker: str, *, at_once: bool) -> None:
        """It has no life of its own, and what was made serves the next items too."""

    def close(self) -> None:
        self._work = None


def attempt(function: Callable, *arguments) -> Done | Raised:
    """In a worker: the result, or the error in a form that reaches the one who asked, and where it arose."""
    try:
        return Done(function(*arguments))
    except Exception as error:
        where = f"In a worker:\n{traceback.format_exc()}"
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an error of any class may be made in a way that pickle cannot repeat
            error = RuntimeError(f"{type(error).__name__}: {error}")
        error.add_note(where)
        return Raised(error)
