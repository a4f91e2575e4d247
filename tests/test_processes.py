"""Worker processes: every item is answered once, a dead process costs what it was at, and none outlives its parent."""

import os
import signal
import subprocess
import sys
import time

import pytest

from qpruner.workers.processes import _next, in_processes

PARENT = """
import sys, time, os
from qpruner.workers.processes import in_processes

def wait(item):
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    list(in_processes(wait, [1, 2, 3], n=2, apart=str, lost=str))
"""


def doubled_or_dead(item: int) -> int:
    if item == 3:
        os._exit(1)
    return 2 * item


def test_every_item_is_answered_once_and_a_dead_process_costs_its_own():
    found = list(in_processes(doubled_or_dead, range(8), n=2, apart=lambda item: item, lost=lambda item: "lost"))
    assert sorted(item for item, _ in found) == list(range(8))
    answers = dict(found)
    assert answers[3] == "lost"
    assert sum(answer == "lost" for answer in answers.values()) <= 2  # it and its neighbour at that moment
    assert all(answer in ("lost", 2 * item) for item, answer in answers.items())


def test_items_that_would_compute_the_same_wait_for_each_other_while_there_are_others():
    first = lambda item: item[0]
    assert _next(["a2", "b1", "b2"], {"a"}, first) == "b1"
    assert _next(["a2", "b1"], {"a", "b"}, first) == "a2"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes through /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_its_parent(tmp_path, how):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with parent.stdout:
        workers = [int(parent.stdout.readline()) for _ in range(2)]
    assert all(map(alive, workers))
    parent.send_signal(how)
    assert parent.wait(timeout=30) != 0
    for _ in range(100):
        if not any(map(alive, workers)):
            break
        time.sleep(0.1)
    assert not any(map(alive, workers))
