"""A folder from which any process runs trials, with the numbers of the process that prepared it."""

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from qpruner.artifact.opened import open_stream
from qpruner.errors import ModelError, OutputError
from qpruner.joint.runner import FILE, item_of, open_runner, open_trials, prepare_runner
from qpruner.model import load
from qpruner.model.discover import discover
from qpruner.model.scratch import Scratch
from qpruner.model.whole import Whole
from qpruner.plan import QuantSpec, Rounding, Selection

INT4 = QuantSpec(bits=4, grid="integer", group_size=16, symmetric=False)
IDS = torch.randint(2, 259, (12, 16), generator=torch.Generator().manual_seed(0))
GPTQ = Rounding(method="gptq", ranges="mse")


def prepared(folder: Path, model: Path, *, stream=None, **changes):
    stream = stream or open_stream(load.inspect_source(model), resident=True)
    graph = discover(stream.model)
    orders = {n: torch.arange(g.n_units) for n, g in graph.groups.items() if g.kind in ("kv_group", "channel")}
    given = dict(model=str(model), windows=IDS[:8], calibration=IDS[8:], orders=orders, settings=GPTQ, identity="m")
    prepare_runner(folder, stream, graph, **given | changes)
    kept = {name: max(1, len(order) // 2) for name, order in orders.items()}
    return Selection(layers=(0, 1, 3), kept=kept, specs={p.name: INT4 for p in graph.projections if p.layer != 2})


def test_processes_find_the_same(small_llama, tmp_path):
    selection = prepared(tmp_path / "run", small_llama)
    item = item_of(selection, n_windows=5)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(evaluated, [(str(tmp_path / "run"), item)] * 2, chunksize=1)
    here = evaluated((str(tmp_path / "run"), item))
    assert found == [here, here] and here["n_windows"] == 5 and here["kl"] > 0
    observed = open_trials(tmp_path / "run").evaluate(selection, 5)
    assert here == json.loads(observed.to_json())


def evaluated(asked):
    torch.set_num_threads(1)
    folder, item = asked
    run = open_runner(folder)
    costs = ("seconds", "passes")
    first, again = run(item), run(item)
    assert again["passes"] == 0 < first["passes"] and first["seconds"] > 0
    first, again = ({key: value for key, value in each.items() if key not in costs} for each in (first, again))
    assert first == again
    return first


def test_what_is_prepared_stays_until_something_else_is_asked_for(small_llama, tmp_path):
    prepared(tmp_path, small_llama)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    prepared(tmp_path, small_llama, scratch=Untouched())
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    prepared(tmp_path, small_llama, windows=IDS[:6])
    assert before[tmp_path / FILE] != (tmp_path / FILE).stat().st_mtime_ns
    assert open_trials(tmp_path).n_windows == 6


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OutputError, match="nothing is prepared for trials in .*elsewhere"):
        open_runner(str(tmp_path / "elsewhere"))


class Untouched(Scratch):
    def put(self, *_):
        raise AssertionError("a pass was made again")


def test_layers_that_read_of_each_other_are_refused(small_llama, tmp_path):
    stream = open_stream(load.inspect_source(small_llama))
    with pytest.raises(ModelError, match="Choose another allocation"):
        prepared(tmp_path, small_llama, stream=Whole(stream.model, stream.tensors))
