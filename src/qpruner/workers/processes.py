"""Worker processes on this machine, one item's misfortune costing only itself."""

import atexit
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from qpruner.workers.crew import Crew, Died, Lost, Make, Message, Raised, Ready, attempt

Item, Result = TypeVar("Item"), TypeVar("Result")

PATIENCE_S = 10  # for a process that was told to end


def in_processes(
    function: Callable[..., Result],
    items: Sequence[Item],
    *arguments,
    n: int,
    apart: Callable[[Item], object],
    lost: Callable[[Item], Result],
) -> Iterator[tuple[Item, Result]]:
    """`function(item, *arguments)` of every item, as each is done, in `n` fresh processes that share out the cores.

    Args:
        apart: items for which this is the same are not worked on at once while there are others.
        lost: the result of items whose process died; new ones take up the rest.
    Raises:
        KeyboardInterrupt: the processes are ended first.
    """
    key = lambda index: apart(items[index])
    choose = lambda waiting, working: _next(waiting, {key(index) for index in working}, key)
    with closing(Crew(Processes(_partial, (function, arguments), n), on_event=lambda text: None)) as crew:
        for index, result in crew.each(items, attempts=1, choose=choose):
            yield items[index], lost(items[index]) if isinstance(result, Lost) else result


def _partial(function: Callable, arguments: tuple) -> Callable:
    return lambda item: function(item, *arguments)


def _next(waiting: Sequence, taken: set, apart: Callable):
    return next((item for item in waiting if apart(item) not in taken), waiting[0])


class Processes:
    """Spawned processes as a place. None has more threads than this one, and none outlives it, however it ends.

    What goes between is pickled here, not by multiprocessing: torch would have tensors shared with a process that may
    be gone when they are looked at.
    """

    def __init__(self, make: Make, arguments: tuple, n: int):
        self.size = n
        self._threads = max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // n))
        self._task = pickle.dumps((make, arguments))
        self._processes: dict[Connection, BaseProcess] = {}  # a worker is known by its connection
        self._ending: list[BaseProcess] = []
        self._gone_before: set[Connection] = set()  # died with nothing to do, as giving them something has shown
        atexit.register(self.close)  # a generator that nobody closed would have multiprocessing wait for its processes

    def start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        # No daemon: it may have processes of its own.
        process = context.Process(target=_serve, args=(theirs, self._threads), daemon=False)
        process.start()
        theirs.close()
        self._processes[ours] = process
        self._send(ours, self._task)
        return ours

    def give(self, worker: Connection, item: Any) -> None:
        self._send(worker, pickle.dumps(item))

    def wait(self) -> list[tuple[Connection, Message]]:
        return [(worker, self._message(worker)) for worker in wait(list(self._processes))]

    def end(self, worker: Connection, *, at_once: bool) -> None:
        process = self._processes.pop(worker)
        self._ending.append(process)
        if at_once:
            process.terminate()
        worker.close()  # which it takes as its end where it waits for an item

    def close(self) -> None:
        atexit.unregister(self.close)
        for worker in list(self._processes):
            self.end(worker, at_once=True)
        while self._ending:
            _joined(self._ending.pop())

    def _send(self, worker: Connection, data: bytes) -> None:
        try:
            worker.send_bytes(data)
        except (BrokenPipeError, ConnectionResetError):  # what waits for its message will find so too
            self._gone_before.add(worker)

    def _message(self, worker: Connection) -> Message:
        try:
            return pickle.loads(worker.recv_bytes())
        except (EOFError, ConnectionResetError):
            process = self._processes.pop(worker)
            worker.close()
            begun = worker not in self._gone_before
            self._gone_before.discard(worker)
            return Died(_how_it_ended(_joined(process)), begun)


def _joined(process: BaseProcess) -> int:
    """Its status, when it has ended; which it does, willingly or not."""
    process.join(PATIENCE_S)
    process.kill()
    process.join()
    return process.exitcode


def _how_it_ended(status: int) -> str:
    if status == -signal.SIGKILL:
        return "was killed, perhaps for want of memory"
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended by itself with status {status}"


def _serve(connection: Connection, threads: int) -> None:
    """All that a worker does: it is made, and answers items until its parent closes the connection."""
    _start(threads)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        made = attempt(lambda task: _made(*pickle.loads(task)), connection.recv_bytes())
        _tell(connection, made if isinstance(made, Raised) else Ready())
        while not isinstance(made, Raised):
            _tell(connection, attempt(lambda data: made.result(pickle.loads(data)), connection.recv_bytes()))


def _made(make: Make, arguments: tuple) -> Callable:
    return make(*arguments)


def _tell(connection: Connection, message: Message) -> None:
    data = attempt(pickle.dumps, message)
    connection.send_bytes(pickle.dumps(data) if isinstance(data, Raised) else data.result)


def _start(threads: int) -> None:
    """In a worker: it leaves interrupts to its parent, and ends with it, however that ends."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
