"""The same function over many items in worker processes, one item's misfortune costing only itself."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

Item, Result = TypeVar("Item"), TypeVar("Result")


def in_processes(
    function: Callable[..., Result],
    items: Sequence[Item],
    *arguments,
    n: int,
    apart: Callable[[Item], object],
    lost: Callable[[Item], Result],
) -> Iterator[tuple[Item, Result]]:
    """`function(item, *arguments)` of every item, as each is done, in `n` fresh processes that share out the cores.

    No process has more threads than this one, so that one core gives the same bytes with any number of processes.

    Args:
        apart: items for which this is the same are not worked on at once while there are others.
        lost: the result of items whose process died; new ones take up the rest.
    Raises:
        KeyboardInterrupt: the processes are ended first.
    """
    threads = max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // n))
    waiting = list(items)
    while waiting:
        others = set(multiprocessing.active_children())
        pool = ProcessPoolExecutor(
            n, mp_context=multiprocessing.get_context("spawn"), initializer=_start, initargs=(threads,)
        )
        working = {}
        try:
            while waiting or working:
                while waiting and len(working) < n:
                    item = _next(waiting, {apart(other) for other in working.values()}, apart)
                    working[pool.submit(function, item, *arguments)] = item
                    waiting.remove(item)
                for future in wait(working, return_when=FIRST_COMPLETED).done:
                    item = working[future]
                    yield item, future.result()
                    del working[future]
        except BrokenProcessPool:
            yield from ((item, lost(item)) for item in working.values())
        except (KeyboardInterrupt, GeneratorExit):
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _next(waiting: Sequence, taken: set, apart: Callable):
    return next((item for item in waiting if apart(item) not in taken), waiting[0])


def _start(threads: int) -> None:
    """In a worker: it leaves interrupts to its parent, and ends with it, however that ends."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
