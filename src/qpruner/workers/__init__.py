"""Stateful workers, in this process, in several, or on many machines, behind one interface.

    with workers(make, *arguments, n=2) as pool:
        results = pool.map(items, on_result=journal)

`make(*arguments)` builds a worker once for each process, say by loading a model; what it returns answers items. The
function and its arguments are pickled, and so are items and results. Items are idempotent: one may be begun twice.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from qpruner.workers.cluster import Cluster
from qpruner.workers.crew import Crew, Deserted, Here, Lost, Make, OnEvent, Place
from qpruner.workers.processes import Processes

__all__ = ["Lost", "Make", "OnEvent", "Pool", "workers"]

ATTEMPTS = 2


@contextmanager
def workers(
    make: Make,
    *arguments,
    n: int = 0,
    ray: str | None = None,
    on_event: OnEvent = lambda text: None,
    wait_s: float = 300,
) -> Iterator["Pool"]:
    """Workers that end with the block, however that ends.

    Args:
        n: processes that share out the cores; 0 for a single worker in this process. With `ray`, actors of one core
            each, 0 for as many as the cluster has cores.
        ray: `auto` or HOST:PORT of a Ray cluster that this machine is a node of.
        on_event: told of workers that died, and of waiting.
        wait_s: how long to wait for a node, where none is left or free, until one process of this machine goes on.
    Raises:
        MissingExtraError: Ray is not installed.
        WorkersError: the cluster cannot be reached, or no worker can be made.
    """
    if ray is not None:
        place = Cluster(make, arguments, n, ray, wait_s=wait_s, on_event=on_event)
    else:
        place = Processes(make, arguments, n) if n else Here(make, arguments)
    with closing(Pool(place, on_event, lambda: Processes(make, arguments, 1))) as pool:
        yield pool


class Pool:
    """What `workers` gives."""

    def __init__(self, place: Place, on_event: OnEvent, otherwise: Callable[[], Place]):
        self._crew, self._on_event, self._otherwise = Crew(place, on_event), on_event, otherwise

    def map(self, items: Sequence, on_result: Callable[[int, Any], None] = lambda index, result: None) -> list:
        """The result of every item, in their order; `Lost` for one whose worker died, and then another's too.

        Args:
            on_result: called with the index and the result of each as it is done, in whatever order that is.
        Raises:
            Exception: what a worker raised, at once; items that others were at are given up.
        """
        results: dict[int, Any] = {}
        while len(results) < len(items):
            left = [index for index in range(len(items)) if index not in results]
            try:
                with closing(self._crew.each([items[index] for index in left], attempts=ATTEMPTS)) as answers:
                    for place, result in answers:
                        results[left[place]] = result
                        on_result(left[place], result)
            except Deserted as deserted:
                # A process of its own rather than this one: among what is left may be what workers died of.
                self._on_event(f"{deserted}; going on with one process on this machine")
                self.close()
                self._crew = Crew(self._otherwise(), self._on_event)
        return [results[index] for index in range(len(items))]

    def close(self) -> None:
        self._crew.close()
