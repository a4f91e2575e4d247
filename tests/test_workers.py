"""Stateful workers: the same results wherever they are, in order; a death costs its item one more try, and no other."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_processes import alive

from qpruner.errors import MissingExtraError, PlanError, WorkersError
from qpruner.workers import Lost, Pool, workers
from qpruner.workers.crew import Crew, Died, Done, Place, Ready


def make(factor: int, folder: Path | None = None):
    """A worker that multiplies, and does other things when asked in words."""
    state = torch.tensor(float(factor), dtype=torch.float64)

    def work(item):
        word, _, rest = str(item).partition(" ")
        if word == "die":
            os._exit(7)
        if word == "stumble" and not (folder / rest).exists():
            (folder / rest).touch()
            os._exit(7)
        if word == "refuse":
            raise PlanError("this plan is for another model.")
        if word == "err":
            return [][1]
        if word == "wait":
            time.sleep(float(rest))
        return float(state.sin() * (item if isinstance(item, int) else 1))

    return work


def make_nothing():
    os._exit(3)


def make_error():
    raise PlanError("this model cannot be read.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stumbled")


@pytest.fixture(scope="module")
def pool(folder):
    with workers(make, 3, folder, n=2) as pool:
        yield pool


def test_in_this_process_and_in_others_the_results_are_the_same_and_in_order(pool):
    items = [5, 1, "wait 0.3", 4, 2, 9, 7]
    seen = {}
    found = pool.map(items, on_result=lambda index, result: seen.__setitem__(index, result))
    with workers(make, 3) as here:
        assert found == here.map(items)
    assert [seen[i] for i in range(len(items))] == found
    assert pool.map([]) == []


def test_an_item_whose_worker_dies_is_tried_again_and_given_up_when_another_dies(pool, folder):
    found = pool.map(["stumble once", 1, "die", 2, 3, 4])
    one = make(3)(1)
    assert found[0] == one
    assert isinstance(found[2], Lost) and "all 2 workers" in found[2].reason and "status 7" in found[2].reason
    assert found[1] == one and found[3:] == [2 * one, 3 * one, 4 * one]


@pytest.mark.parametrize("item, error, words", [("refuse", PlanError, "another model"), ("err", IndexError, "range")])
def test_an_error_in_a_worker_is_an_ordinary_error_and_says_where_it_arose(pool, item, error, words):
    with pytest.raises(error, match=words) as raised:
        pool.map([item, "wait 30"])
    assert "in work" in "".join(raised.value.__notes__)
    assert pool.map([1, 2]) == [make(3)(1), make(3)(2)]  # nothing late from before


def test_a_worker_that_cannot_be_made_is_an_error_of_its_own():
    with pytest.raises(PlanError, match="cannot be read"), workers(make_error, n=1) as pool:
        pool.map([1])
    with pytest.raises(PlanError, match="cannot be read"), workers(make_error) as pool:
        pool.map([1])
    with pytest.raises(WorkersError, match="in 2 tries; the last one ended by itself with status 3"):
        with workers(make_nothing, n=1) as pool:
            pool.map([1])


def test_in_this_process_a_worker_is_made_when_it_is_needed_and_once():
    made = []
    with workers(lambda: made.append(1) or (lambda item: item[0])) as pool:
        assert not made and pool.map([]) == [] and not made
        assert pool.map(["ab", "cd"]) == ["a", "c"]
        with pytest.raises(IndexError):
            pool.map([""])
        assert pool.map(["x"]) == ["x"]
    assert len(made) == 1


class Scripted(Place):
    """A place where all that is said is written down before, one thing at a time; workers are numbered from 0."""

    def __init__(self, *script, size: int):
        self.script, self.size, self.n_started, self.given, self.ended = list(script), size, 0, [], []

    def start(self):
        self.n_started += 1
        return self.n_started - 1

    def give(self, worker, item):
        self.given.append((worker, item))

    def wait(self):
        return [self.script.pop(0)]

    def end(self, worker, *, at_once):
        self.ended.append((worker, at_once))


silent = lambda text: None


def test_results_are_in_the_order_of_the_items_though_they_come_in_another():
    place = Scripted((0, Ready()), (1, Ready()), (1, Done("b")), (1, Done("c")), (0, Done("a")), size=2)
    told = []
    assert Pool(place, silent, None).map("xyz", on_result=lambda *each: told.append(each)) == ["a", "b", "c"]
    assert told == [(1, "b"), (2, "c"), (0, "a")]


def test_an_item_is_asked_for_again_only_when_its_worker_died():
    script = [(0, Ready()), (1, Ready()), (1, Done("b")), (0, Died("fell")), (1, Done("c")), (1, Died("fell, too"))]
    place = Scripted(*script, size=2)
    lost = Lost("all 2 workers that tried it died; the last one fell, too.")
    assert Pool(place, silent, None).map("xyz") == [lost, "b", "c"]
    assert place.given == [(0, "x"), (1, "y"), (1, "z"), (1, "x")]


def test_who_was_dead_before_it_got_an_item_is_not_held_against_it():
    gone = Died("fell", begun=False)
    place = Scripted((0, Ready()), (0, gone), (1, Ready()), (1, Died("fell")), (2, Ready()), (2, Done("a")), size=1)
    events = []
    assert list(Crew(place, events.append).each(["x"], attempts=2)) == [(0, "a")]
    assert place.given == [(0, "x"), (1, "x"), (2, "x")]
    assert events == ["a worker fell, at item 0"] * 2


def test_where_there_is_no_room_for_all_fewer_go_on():
    script = [(0, Ready()), (1, Died("fell")), (2, Died("fell")), (0, Done("a")), (0, Done("b")), (0, Done("c"))]
    place = Scripted(*script, size=2)
    assert dict(Crew(place, silent).each("xyz", attempts=2)) == {0: "a", 1: "b", 2: "c"}
    assert place.n_started == 3


def test_who_stops_asking_ends_those_that_are_at_work():
    place = Scripted((0, Ready()), (1, Ready()), (0, Done("a")), size=2)
    answers = Crew(place, silent).each("xy", attempts=2)
    assert next(answers) == (0, "a")
    answers.close()
    assert place.ended == [(1, True)]


INTERRUPTED = """
import os, time
from qpruner.workers import workers

def make():
    def work(item):
        print(os.getpid(), flush=True)
        time.sleep(60)
    return work

if __name__ == "__main__":
    with workers(make, n=2) as pool:
        pool.map([1, 2, 3])
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes through /proc")
def test_an_interrupt_ends_all(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(INTERRUPTED)
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with parent.stdout, parent.stderr:
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        parent.send_signal(signal.SIGINT)
        assert parent.wait(timeout=30) != 0
        assert not any(map(alive, pids))
        assert "KeyboardInterrupt" in parent.stderr.read()


def test_without_ray_a_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'qpruner\[ray\]'"), workers(make, 3, ray="auto"):
        pass
