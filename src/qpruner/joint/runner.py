"""A folder with all that trials of one joint search need, so that any process that sees it can run them.

runner.json              the model and how trials are run; written last
windows.safetensors      token ids of the search text, and the units of every group, best first
reference.safetensors    what the original predicts for them
grams/                   Gram matrices of the inputs of linears in the original, a file for each layer
candidates/              linears in every form that was asked for
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qpruner.artifact.opened import open_stream
from qpruner.decide.grams import measure_grams
from qpruner.do.candidates import DAMPING, CandidateStore
from qpruner.errors import ModelError, OutputError
from qpruner.files import replacing, write_text
from qpruner.joint.trials import TrialRunner
from qpruner.model import load
from qpruner.model.discover import discover
from qpruner.model.graph import Graph
from qpruner.model.reference import Reference
from qpruner.model.scratch import Scratch
from qpruner.model.stream import OnLayer, Stream
from qpruner.model.tensors import Stored
from qpruner.model.whole import Streamable
from qpruner.plan import Rounding, Selection
from qpruner.run import digest_of

BATCH = 4  # windows that go through a layer at once
FILE = "runner.json"


def prepare_runner(
    folder: Path,
    stream: Streamable,
    graph: Graph,
    *,
    model: str,
    trust_remote_code: bool = False,
    windows: Tensor,
    calibration: Tensor,
    orders: Mapping[str, Tensor],
    settings: Rounding,
    identity: str,
    damping: float = DAMPING,
    resident: bool = True,
    memory_bytes: int = 2**30,
    scratch: Scratch | None = None,
    on_layer: OnLayer | None = None,
) -> None:
    """Fill a folder. What is there and was made from the same stays.

    Args:
        stream: the original; its dtype is that of all trials.
        model: a name or folder from which any process can open it.
        windows: (n, length) token ids of the search text. calibration: of the text that weights are fitted to.
        orders: group -> its units, best first.
        identity: digest of the model's weights and whatever else `orders` and Gram matrices depend on.
        memory_bytes: of hidden states, and of decoded weights, that a worker keeps.
    """
    if not isinstance(stream, Stream):
        raise ModelError(
            f"layers of {type(stream.model).__name__} read more of each other than hidden states, and trials of a "
            "joint search run one layer after the other. Choose another allocation."
        )
    said = {
        "model": model, "trust_remote_code": trust_remote_code, "settings": settings.model_dump(mode="json"),
        "identity": digest_of([identity, calibration.tolist(), {n: order.tolist() for n, order in orders.items()}]),
        "windows": digest_of(windows.tolist()), "damping": damping, "dtype": str(stream.dtype).removeprefix("torch."),
        "resident": resident, "memory_bytes": memory_bytes,
    }  # fmt: skip
    path = folder / FILE
    if path.is_file() and json.loads(path.read_text()) == said:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with replacing(folder / "windows.safetensors") as temporary:
        save_file({"windows": windows, **{f"order {n}": order.long() for n, order in orders.items()}}, temporary)
    scratch = scratch or Scratch()
    stream.forward(windows, scratch, batch_size=BATCH, on_layer=on_layer)
    logits = stream.logits(windows, scratch, batch_size=BATCH)
    Reference.of(logits, len(windows)).save(folder / "reference.safetensors")
    scratch.clear()
    inputs = [projection.linears[0] for projection in graph.projections]
    found = measure_grams(
        stream, graph, inputs, calibration, scratch=scratch.part("grams"), batch_size=BATCH, on_layer=on_layer
    )
    with replacing(folder / "grams") as temporary:
        temporary.mkdir()
        for layer, matrices in enumerate(found):
            save_file(matrices, temporary / f"{layer}.safetensors")
    scratch.clear()
    write_text(path, json.dumps(said, indent=1) + "\n")


def open_trials(folder: Path, *, device: torch.device | str = "cpu") -> TrialRunner:
    """What `prepare_runner` prepared."""
    if not (folder / FILE).is_file():
        raise OutputError(
            f"nothing is prepared for trials in {folder}. Workers on other machines have to see this folder, and the "
            "model, under the same paths."
        )
    said = json.loads((folder / FILE).read_text())
    source = load.inspect_source(said["model"], trust_remote_code=said["trust_remote_code"])
    dtype = getattr(torch, said["dtype"])
    how = dict(dtype=dtype, device=device, resident=said["resident"])
    known = load_file(folder / "windows.safetensors")
    stream = open_stream(source, **how)
    graph = discover(stream.model)
    store = CandidateStore(
        graph, stream.tensors, stored_grams(folder),
        {name.removeprefix("order "): order for name, order in known.items() if name.startswith("order ")},
        Rounding.model_validate(said["settings"]), folder=folder / "candidates", identity=said["identity"],
        damping=said["damping"], dtype=dtype, device=device, memory_bytes=said["memory_bytes"],
    )  # fmt: skip
    reference = Reference.load(folder / "reference.safetensors")
    return TrialRunner(
        stream, graph, store, known["windows"], reference, batch_size=BATCH, memory_bytes=said["memory_bytes"]
    )


def stored_grams(folder: Path) -> Callable[[str], Tensor]:
    """First linear of a projection -> Gram matrix of its inputs, read when it is asked for."""
    return Stored(sorted((folder / "grams").glob("*.safetensors"))).read


def open_runner(folder: str, device: str = "cpu") -> Callable[[str], dict[str, Any]]:
    """For a worker, from picklable arguments: a function of a trial that may be run again and again, anywhere.

    It takes JSON, {"selection": ..., "n_windows": ..., "bar": ..., "remember": ...}, all but the first optional; and
    gives what `Observed` holds, and what it took: seconds, and passes of all windows through all layers.
    """
    return evaluator(open_trials(Path(folder), device=device))


def evaluator(trials: TrialRunner) -> Callable[[str], dict[str, Any]]:
    """What `open_runner` gives, of trials that are open."""

    def run(item: str) -> dict[str, Any]:
        asked = json.loads(item)
        selection = Selection.model_validate(asked.pop("selection"))
        start, before = time.monotonic(), trials.cost.passes
        found = json.loads(trials.evaluate(selection, **asked).to_json())
        return found | {"seconds": time.monotonic() - start, "passes": trials.cost.passes - before}

    return run


def item_of(selection: Selection, **options: Any) -> str:
    """What `open_runner`'s function takes."""
    return json.dumps({"selection": selection.model_dump(mode="json"), **options})
