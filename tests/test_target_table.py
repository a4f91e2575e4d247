"""What is said of where a model loads is what the exports do: a cell is a family, widths, a storage and a target.

A handful here; all of them with `--run-targets`, which `--write-targets PATH` also writes down as a page.
"""

from pathlib import Path

import pytest
from loader_process import Loaders
from target_table import TARGETS, Answer, Cell, Row, cells, markdown, rows

from qpruner.artifact.gguf import llamacpp
from qpruner.exporting import fresh

pytest.importorskip("compressed_tensors")
pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(not llamacpp.installed(), reason="llama.cpp: pip install 'qpruner[llamacpp]'")

BY_NAME = {target.name: target for target in TARGETS}


@pytest.fixture(scope="session")
def loaders():
    found = Loaders()
    yield found
    found.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("table")


@pytest.fixture
def filled(folder, loaders, monkeypatch):
    """Cells of a row, each as it was said; asked of the one long-lived process."""
    monkeypatch.setattr(fresh, "subprocess", loaders)

    def fill(row, targets=TARGETS) -> dict[str, Cell]:
        found = cells(row, folder, targets)
        wrong = {name: cell for name, cell in found.items() if not cell.agrees}
        assert not wrong, (row, wrong)
        return found

    return fill


def test_a_yes_and_a_no_are_as_they_were_said(filled, loaders):
    targets = [BY_NAME[name] for name in ("`--to hf`", "`--to hf --padded`")]
    found = filled(Row("llama", "uneven", "int4"), targets)
    assert "layer 0 keeps 4 heads" in found["`--to hf`"].done.why_not
    assert found["`--to hf --padded`"].done == Answer() and loaders.asked == 1


@needs_llama_cpp
def test_llama_cpp_takes_the_architecture_that_was_said(filled):
    found = filled(Row("llama", "uneven", "int4"), [BY_NAME["`--to gguf`"]])
    assert found["`--to gguf`"].done.how == "deci"


def test_what_differs_from_what_was_said_is_seen():
    yes, no = Answer(), Answer("it does not")
    assert Cell(yes, yes).agrees and Cell(no, Answer("another sentence")).agrees
    assert not Cell(yes, no).agrees and not Cell(no, yes).agrees
    assert not Cell(no, no, late=True).agrees and not Cell(Answer(how="llama"), Answer(how="deci")).agrees


@pytest.fixture(scope="module")
def written_down(request):
    """Rows that were filled; written as a page in the end, if all of them were."""
    found: dict[Row, dict[str, Cell]] = {}
    yield found
    if path := request.config.getoption("--write-targets"):
        missing = [row for row in rows() if row not in found]
        assert not missing, f"{len(missing)} rows were not filled, such as {missing[0]}; nothing was written"
        Path(path).write_text(markdown(found))


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        skipped = pytest.param(
            None, marks=pytest.mark.skip(reason="the whole table; give --run-targets"), id="every row"
        )
        asked = metafunc.config.getoption("--run-targets")
        metafunc.parametrize("row", rows() if asked else [skipped], ids=lambda row: row and "-".join(row))


@needs_llama_cpp
def test_every_cell_is_as_it_was_said(row, filled, written_down):
    written_down[row] = filled(row)
