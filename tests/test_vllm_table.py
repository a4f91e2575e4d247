"""What is said of vLLM is what vLLM does, for every family of the target table: only with `--run-targets`, and a Python
that has vLLM under QPRUNER_VLLM. Products of codes are written out, since a CPU has kernels of vLLM's for few widths.
"""

import os
import shutil
from pathlib import Path

import pytest
import target_table
from target_table import FAMILIES, Row, planned, write_artifact, write_model

from qpruner import exporting
from qpruner import shape as shaping
from qpruner.body import body_of_plan
from qpruner.errors import QPrunerError
from qpruner.exporting import served
from qpruner.loading import Loads, loads_in
from qpruner.model import load

PYTHON = os.environ.get("QPRUNER_VLLM")
KINDS = [("one width", "16 bits"), ("one width", "int4"), ("uneven", "16 bits"), ("uneven", "int4")]


@pytest.fixture
def asked(monkeypatch):
    """vLLM is asked once for each export; its attention on a CPU wants heads of 32."""
    both = served._unless
    once = lambda *args, written_out, **how: both(*args, written_out=written_out, **how) if written_out else None
    monkeypatch.setattr(served, "_unless", once)
    for size, wide in ((8, 32), (32, 256)):
        monkeypatch.setitem(target_table.WIDE, size, wide)
    monkeypatch.setitem(FAMILIES, "qwen2", {"head_dim": 32})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("served")


def said_and_served(row: Row, folder: Path) -> tuple[Loads, str]:
    """What is said before, and the class that vLLM made of it; "" where it was not asked, for a reason that is said."""
    model = folder / row.family
    if not model.is_dir():
        write_model(row.family, model)
    shape, plan = planned(shaping.shape_of(load.inspect_source(model)), row)
    said = loads_in("vLLM", body_of_plan(shape.source, shape.source.config, shape.graph, plan), "OUT")
    artifact = write_artifact(shape, plan, folder / "MODEL")
    try:
        to = "hf" if said.loads else "compressed-tensors"
        made = exporting.export(artifact, to, folder / "OUT", vllm=PYTHON)
        shutil.rmtree(folder / "OUT")
        return said, made.served.model_class if made.served else ""
    except QPrunerError as error:
        assert "vLLM" not in str(error), error
        return said, ""
    finally:
        shutil.rmtree(artifact)


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        reason = "the whole table; give --run-targets, and a Python that has vLLM in QPRUNER_VLLM"
        skipped = pytest.param(None, marks=pytest.mark.skip(reason=reason), id="every row")
        asked = PYTHON and metafunc.config.getoption("--run-targets")
        every = [Row(family, *kind) for family in FAMILIES for kind in KINDS]
        metafunc.parametrize("row", every if asked else [skipped], ids=lambda row: row and "-".join(row))


@pytest.mark.vllm
def test_vllm_takes_what_was_said(row, folder, asked):
    said, model_class = said_and_served(row, folder)
    assert bool(said.loads or said.command) is bool(model_class), (said, model_class)
    print(" | ".join((*row, model_class or said.sentence)))
