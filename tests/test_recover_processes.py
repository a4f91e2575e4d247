"""Training in two processes: the same batches, the same adapters, one that writes."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import two_processes

from qpruner.do import recover

HERE = Path(__file__).parent


def launched(folder: Path) -> list[dict]:
    """What both processes had in the end."""
    folder.mkdir()
    # `accelerate launch --cpu` starts one process, unless there is an mpirun
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    source = str(HERE.parent / "src")
    subprocess.run(
        [sys.executable, *launch, str(HERE / "two_processes.py"), str(folder)], check=True,
        env=os.environ | {"PYTHONPATH": f"{source}{os.pathsep}{HERE}"}, timeout=300, capture_output=True,
    )  # fmt: skip
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_learn_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(recover, "fast_bfloat16", recover.fast_bfloat16)  # put back what a process of its own changes
    (tmp_path / "one").mkdir()
    two_processes.main(tmp_path / "one")
    alone = torch.load(tmp_path / "one" / "0.pt")
    first, second = launched(tmp_path / "two")
    assert first["found"] == second["found"]
    torch.testing.assert_close(first["adapters"], second["adapters"], rtol=0, atol=0)
    torch.testing.assert_close(first["found"], alone["found"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(first["adapters"], alone["adapters"], rtol=1e-3, atol=1e-5)
    assert not list((tmp_path / "two" / "passes").iterdir())
