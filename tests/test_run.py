import json

import pytest
import torch

from qpruner.errors import OutputError
from qpruner.files import replacing
from qpruner.run import Journal, Run, digest_of


class Counted:
    """A computation that knows how often it ran."""

    def __init__(self, value):
        self.value, self.calls = value, 0

    def __call__(self):
        self.calls += 1
        return self.value


def test_a_finished_stage_is_read_back(tmp_path):
    work = Counted({"a": [1, 2]})
    for _ in range(2):
        with Run(tmp_path / "run") as run:
            assert run.values("stage", {"x": 1}, work) == {"a": [1, 2]}
    assert work.calls == 1


def test_other_inputs_compute_anew(tmp_path):
    work = Counted(1)
    with Run(tmp_path / "run") as run:
        run.values("stage", {"x": 1}, work)
        run.values("stage", {"x": 2}, work)
    assert work.calls == 2


def test_a_damaged_result_is_computed_anew(tmp_path):
    work = Counted({"w": torch.arange(3.0)})
    with Run(tmp_path / "run") as run:
        run.tensors("stage", {}, work)
    (tmp_path / "run/measurements/stage.safetensors").write_bytes(b"half")
    with Run(tmp_path / "run") as run:
        assert torch.equal(run.tensors("stage", {}, work)["w"], torch.arange(3.0))
    assert work.calls == 2


class Writing(Counted):
    """A computation that leaves two files."""

    def __call__(self, folder):
        super().__call__()
        for name in ("a", "b"):
            (folder / name).write_text(self.value)


def test_a_folder_of_files_is_a_result_too(tmp_path):
    work = Writing("old")
    for name in ("one", "one", "other"):
        with Run(tmp_path / name, shared=tmp_path / "common") as run:
            folder = run.files("stage", {"x": 1}, work)
            assert [(p.name, p.read_text()) for p in sorted(folder.iterdir())] == [("a", "old"), ("b", "old")]
    assert work.calls == 1
    (tmp_path / "one/measurements/stage/b").unlink()
    with Run(tmp_path / "one") as run:
        assert (run.files("stage", {"x": 1}, Writing("new")) / "b").read_text() == "new", "a damaged one is made anew"
        assert (run.files("stage", {"x": 2}, Writing("newer")) / "a").read_text() == "newer"
    assert [p.name for p in (tmp_path / "one/measurements").iterdir()] == ["stage"]


def test_a_folder_that_was_not_finished_is_no_result(tmp_path):
    def fails(folder):
        (folder / "a").write_text("half")
        raise KeyboardInterrupt

    with Run(tmp_path / "run") as run, pytest.raises(KeyboardInterrupt):
        run.files("stage", {}, fails)
    assert list((tmp_path / "run/measurements").iterdir()) == []


def test_a_stage_that_fails_leaves_nothing(tmp_path):
    def fails():
        raise KeyboardInterrupt

    with Run(tmp_path / "run") as run:
        with pytest.raises(KeyboardInterrupt):
            run.values("stage", {}, fails)
        assert run.stages == {}
    assert list((tmp_path / "run/measurements").iterdir()) == []


def test_results_are_shared_between_runs(tmp_path):
    work = Counted(5)
    for name in ("a", "b"):
        with Run(tmp_path / name, shared=tmp_path / "common") as run:
            assert run.values("stage", {"x": 1}, work) == 5
    assert work.calls == 1


def test_two_processes_do_not_share_a_folder(tmp_path):
    with Run(tmp_path / "run"), pytest.raises(OutputError, match="another process"):
        Run(tmp_path / "run")


def test_replacing_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_journal_continues_after_a_torn_line(tmp_path):
    path = tmp_path / "trials.jsonl"
    journal = Journal(path, {"x": 1})
    journal.append({"number": 0})
    journal.append({"number": 1})
    path.write_text(path.read_text()[:-4])
    assert Journal(path, {"x": 1}).lines == [{"number": 0}]
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == [{"number": 0}]


def test_a_journal_of_other_inputs_starts_empty(tmp_path):
    Journal(tmp_path / "trials.jsonl", {"x": 1}).append({"number": 0})
    assert Journal(tmp_path / "trials.jsonl", {"x": 2}).lines == []
    kept = (tmp_path / "trials.before.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept[1:]] == [{"number": 0}]


def test_digests_do_not_depend_on_the_order_of_keys():
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1}) != digest_of({"a": 2, "b": 1})
