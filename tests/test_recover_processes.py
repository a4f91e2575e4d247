"""Training in two processes: the same batches, the same adapters, one that writes; the model in each, or shared."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_processes
from tiny_taught import adapters_of, packed

from qpruner.do import recover

HERE = Path(__file__).parent


def launched(folder: Path, *changes: str, **says: str) -> list[dict]:
    """What both processes had in the end."""
    folder.mkdir(exist_ok=True)
    # `accelerate launch --cpu` starts one process, unless there is an mpirun
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    source = str(HERE.parent / "src")
    subprocess.run(
        [sys.executable, *launch, str(HERE / "two_processes.py"), str(folder), *changes], check=True,
        env=os.environ | {"PYTHONPATH": f"{source}{os.pathsep}{HERE}"} | says, timeout=300, capture_output=True,
    )  # fmt: skip
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(autouse=True)
def put_back(monkeypatch):
    """What a process of its own changes."""
    monkeypatch.setattr(recover, "fast_bfloat16", recover.fast_bfloat16)


@pytest.fixture
def alone(tmp_path):
    """What one process has in the end."""
    folder = tmp_path / "one"
    folder.mkdir()
    two_processes.main(folder)
    found = torch.load(folder / "0.pt")
    start = adapters_of(packed())
    assert all((found["adapters"][n] - start[n]).abs().max() > 1e-3 for n in start)  # there is something to compare
    return found


def same(folder: Path, found: list[dict], alone: dict) -> None:
    first, second = found
    assert first["found"] == second["found"]
    torch.testing.assert_close(first["adapters"], second["adapters"], rtol=0, atol=0)
    torch.testing.assert_close(first["found"], alone["found"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(first["adapters"], alone["adapters"], rtol=1e-4, atol=1e-6)
    assert not list((folder / "passes").iterdir())


def test_two_processes_learn_what_one_does(alone, tmp_path):
    found = launched(tmp_path / "two")
    same(tmp_path / "two", found, alone)
    assert not any(each["shared"]["bytes"] for each in found)
    assert all(each["left"] == alone["left"] for each in found)


def test_processes_that_share_the_model_have_half_of_it_each_and_learn_the_same(alone, tmp_path):
    changes = ("micro_batch=1", "gradient_checkpointing=true")
    (tmp_path / "two").mkdir()
    with pytest.raises(KeyboardInterrupt):  # begun by one, which has the whole model
        two_processes.main(tmp_path / "two", *changes, last=3)
    assert list((tmp_path / "two" / "passes").glob("*/checkpoint-2"))
    found = launched(tmp_path / "two", *changes, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    same(tmp_path / "two", found, alone)
    here, in_all = zip(*(each["shared"]["bytes"] for each in found), strict=True)
    assert in_all[0] == in_all[1] == sum(here) and here[0] == here[1]  # widths of the model are even
    for each in found:
        whole = each["shared"]["whole layers"]
        assert whole and all(sum(layers) == 1 for layers in whole)  # the one that runs
    # the first goes on with the model, the other has nothing of the base in memory
    assert [each["left"] for each in found] == [alone["left"], 0]
