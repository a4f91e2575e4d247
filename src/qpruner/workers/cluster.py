"""Workers on a Ray cluster: an actor for each core, on whatever node has one free.

Only a connection is made, to a cluster that is there: nothing of Ray is started here. Every node needs qpruner,
installed or at the same path, and the same versions of Python and Ray. The head node, which holds the cluster's
records, and the node that this process runs on have to last: Ray cannot go on without either.
"""

import logging
import os
import socket
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qpruner.errors import MissingExtraError, WorkersError
from qpruner.workers.crew import Deserted, Died, Done, Make, Message, OnEvent, Raised, Ready, attempt

log = logging.getLogger(__name__)

CONNECT_S = 10
LOOK_S = 0.5  # between looks at whether there is any worker left
TELL_S = 15  # without any worker, until that is said: to start one takes a few seconds by itself
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Cluster:
    """A Ray cluster as a place. Workers that no node has room for wait for one.

    address: `auto`, or HOST:PORT of the head node.
    n: 0 for as many as the cluster has cores, counted anew for every lot of items.
    wait_s: without any worker on a node, until `Deserted`.
    """

    def __init__(self, make: Make, arguments: tuple, n: int, address: str, *, wait_s: float, on_event: OnEvent):
        self._ray = _ray()
        self._task, self._n, self._address = (make, arguments), n, address
        self._wait_s, self._on_event = wait_s, on_event
        self._ours = _connected(self._ray, address)
        self._printing = _hush() if self._ours else None
        options = {"num_cpus": 1, "scheduling_strategy": "SPREAD", "runtime_env": {"env_vars": _import_path()}}
        self._actor = self._ray.remote(**options)(_Actor)
        self._answers: dict[Any, Any] = {}  # what will be said, as Ray's reference, and by which worker
        self._alive: dict[Any, Any] = {}  # of workers that have an item, a reference that says whether they took it
        self._placed: set = set()  # workers that run on a node
        self._alone_since: float | None = None
        self._said_so = False

    @property
    def size(self) -> int:
        return self._n or max(1, int(self._ray.cluster_resources().get("CPU", 0)))

    def start(self) -> Any:
        worker = self._actor.remote()
        self._answers[worker.place.remote()] = worker
        return worker

    def give(self, worker: Any, item: Any) -> None:
        # Calls are taken in order, so where this one fails too, the item was never begun.
        self._alive[worker] = worker.place.remote()
        self._answers[worker.answer.remote(item)] = worker

    def wait(self) -> list[tuple[Any, Message]]:
        self._look_around()
        said, _ = self._ray.wait(list(self._answers), timeout=LOOK_S)
        messages = [(worker, self._message(reference, worker)) for reference, worker in self._taken(said)]
        return [(worker, message) for worker, message in messages if message is not None]

    def end(self, worker: Any, *, at_once: bool) -> None:
        self._answers = {reference: other for reference, other in self._answers.items() if other is not worker}
        self._placed.discard(worker)
        self._alive.pop(worker, None)
        self._ray.kill(worker)

    def close(self) -> None:
        if self._ours:
            self._ray.shutdown()
            _hush(self._printing)

    def _taken(self, references: list) -> list[tuple[Any, Any]]:
        return [(reference, self._answers.pop(reference)) for reference in references]

    def _message(self, reference: Any, worker: Any) -> Message | None:
        try:
            said = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:  # what Ray could not carry there or back
            return Raised(error.cause if isinstance(error.cause, Exception) else RuntimeError(str(error)))
        except self._ray.exceptions.RayError as error:
            begun = self._began(worker)
            self.end(worker, at_once=True)  # where it is only out of reach, nobody waits for its answer any more
            return Died(f"was lost ({_first_line(error)})", begun)
        if said is None:
            self._placed.add(worker)
            self._answers[worker.make.remote(*self._task)] = worker
        return said

    def _began(self, worker: Any) -> bool:
        if worker not in self._alive:
            return True
        try:
            self._ray.get(self._alive[worker], timeout=CONNECT_S)
        except self._ray.exceptions.RayError:
            return False
        return True

    def _look_around(self) -> None:
        if self._placed:
            self._alone_since, self._said_so = None, False
            return
        self._alone_since = self._alone_since or time.monotonic()
        alone_s = time.monotonic() - self._alone_since
        if alone_s > self._wait_s:
            raise Deserted(f"the Ray cluster at {self._address!r} had no core for a worker for {self._wait_s:g} s")
        if alone_s > min(TELL_S, self._wait_s / 2) and not self._said_so:
            self._said_so = True
            self._on_event(
                f"no node of the Ray cluster at {self._address!r} has a core for a worker; waiting up to "
                f"{self._wait_s:g} s for one"
            )


class _Actor:
    """A worker, in a process on some node."""

    def place(self) -> None:
        """Answered as soon as it runs, which tells waiting for a node from taking long to be made."""
        import torch

        torch.set_num_threads(1)

    def make(self, make: Make, arguments: tuple) -> Message:
        made = attempt(lambda: make(*arguments))
        if isinstance(made, Raised):
            return made
        self._work: Callable = made.result
        return Ready()

    def answer(self, item: Any) -> Done | Raised:
        return attempt(lambda: self._work(item))


def _ray():
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise MissingExtraError(
            "workers on a cluster need Ray, which is not installed: pip install 'qpruner[ray]'"
        ) from None
    return ray


def _connected(ray, address: str) -> bool:
    """Whether the connection is ours, and so to be ended by us. Another one that is open already is used."""
    if ray.is_initialized():
        found = ray.get_runtime_context().gcs_address
        if address not in ("auto", found):
            raise WorkersError(f"this process is connected to the Ray cluster at {found}, not to {address}.")
        return False
    if address != "auto":
        _knock(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise WorkersError(
            f"no Ray cluster can be joined at {address!r} ({_first_line(error)}). A cluster is begun with `ray start "
            "--head` and joined, also by the machine that asks, with `ray start --address=HOST:PORT`."
        ) from error
    return True


def _logged(data: dict, **_) -> None:
    log.info("\n".join(data["lines"]))


def _hush(printing: Callable = _logged) -> Callable:
    """Ray prints the logs of nodes that are lost among what this process prints, and no setting of it prevents that.

    Returns:
        What did so until now.
    """
    from ray._private import worker

    before = getattr(worker, "print_to_stdstream", printing)
    worker.print_to_stdstream = printing
    return before


def _knock(address: str) -> None:
    """Ray itself tries for half a minute, and says little then."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:
        raise WorkersError(
            f"{address!r} is no address of a Ray cluster. Accepted: auto, or HOST:PORT of its head node."
        )
    if host in LOOPBACK:
        return  # Ray takes this machine's address on its network instead
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise WorkersError(
            f"nothing answers at {address}, where a Ray cluster should be: tried a connection for up to {CONNECT_S} s "
            f"({error}). Is it the address that `ray start --head` printed, and can this machine reach it?"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _import_path() -> dict[str, str]:
    """For workers to import the same qpruner, where this one is a source checkout."""
    source = Path(__file__).parents[2]
    if source in map(Path, (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))):
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(source), os.environ.get("PYTHONPATH")]))}
