"""What the original gives for every training example, kept on disk, so that it need not be in memory while another
model learns from it: its predictions, and the hidden states after some of its decoder layers.

    layout.json     dtype and shape of each array
    NAME.rows       its elements, example after example
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from qpruner.files import copy, write_text
from qpruner.model.checkpoint import TORCH_DTYPES
from qpruner.model.cost import TORCH_NAMES
from qpruner.model.reference import Reference
from qpruner.model.scratch import Scratch
from qpruner.model.skeleton import decoder_layers
from qpruner.model.stage import bare
from qpruner.model.stream import OnLayer
from qpruner.model.whole import Streamable

LAYOUT = "layout.json"
TOKENS_AT_ONCE = 2048
VALUES, CLASSES, HIDDEN = "values", "classes", "hidden"


class Lessons:
    """Final. By number of the example:

    values     log-probabilities, (length - 1, k + 1) or (length - 1, vocabulary), float16
    classes    ids of the k tokens, (length - 1, k), int32; absent where the whole vocabulary is kept
    hidden     (layers, length, width), bfloat16; absent where no layer was asked for

    Files are mapped: what is not looked at takes no memory.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._layout: dict[str, dict] = json.loads((folder / LAYOUT).read_text())

    def __len__(self) -> int:
        return self._layout[VALUES]["shape"][0]

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        found = {name: self._arrays[name][i].clone() for name in (VALUES, CLASSES) if name in self._arrays}
        if hidden := [name for name in self._arrays if name.startswith(HIDDEN)]:
            found[HIDDEN] = torch.stack([self._arrays[name][i] for name in hidden])
        return found

    @cached_property
    def _arrays(self) -> dict[str, Tensor]:
        found = {}
        for name, each in self._layout.items():
            file, dtype = str(self._folder / f"{name}.rows"), TORCH_DTYPES[each["dtype"]]
            found[name] = torch.from_file(file, shared=False, size=math.prod(each["shape"]), dtype=dtype)
            found[name] = found[name].view(each["shape"])
        return found


def write_lessons(
    teacher: Streamable,
    ids: Tensor,
    folder: Path,
    scratch: Scratch,
    *,
    top: int,
    layers: Sequence[int] = (),
    channels: Sequence[int] | None = None,
    passes: Path,
    on_layer: OnLayer | None = None,
) -> None:
    """Run the original over all examples, layer by layer, and keep what it gives.

    A pass that was cut is gone on with at the layer where it stopped, if `scratch` and `passes` are on disk.

    Args:
        ids: (examples, length).
        top: tokens of each prediction that are kept; the whole vocabulary where that is one less, or more.
        layers: whose hidden states are kept, ascending. channels: of these; None for all.
        passes: a folder for what is not finished.
    """
    batch_size = max(1, TOKENS_AT_ONCE // ids.shape[1])
    passes.mkdir(parents=True, exist_ok=True)
    kept = None if channels is None else torch.tensor(channels)
    watch = keeping_watch(teacher.model, layers, kept, passes) if layers else None
    teacher.forward(ids, scratch, batch_size=batch_size, watch=watch, on_layer=on_layer)
    layout: dict[str, dict] = {}
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for logits in teacher.logits(ids, scratch, batch_size=batch_size):
            known = Reference.of(iter([logits]), len(logits), top=top)
            for name, rows in ((VALUES, known.values), (CLASSES, known.classes)):
                if rows is None:
                    continue
                if name not in files:
                    files[name] = stack.enter_context((folder / f"{name}.rows").open("wb"))
                    layout[name] = _described(rows, len(ids))
                files[name].write(as_bytes(rows))
    for layer in layers:
        file = passes / f"{HIDDEN}-{layer}.rows"
        shape = (len(ids), ids.shape[1], file.stat().st_size // (2 * ids.numel()))
        assert file.stat().st_size == 2 * math.prod(shape), f"{file.name} is cut short"
        layout[file.stem] = {"dtype": TORCH_NAMES[torch.bfloat16], "shape": list(shape)}
        _put(file, folder / file.name)
    write_text(folder / LAYOUT, json.dumps(layout, indent=1))


def keeping_watch(model: nn.Module, layers: Sequence[int], channels: Tensor | None, passes: Path) -> Callable:
    """A `Watch` that writes what comes out of some layers, in bfloat16."""
    paths = decoder_layers(model)

    @contextmanager
    def watch(i: int) -> Iterator[Callable[[], Mapping[str, Tensor]]]:
        if i not in layers:
            yield dict
            return
        with (passes / f"{HIDDEN}-{i}.rows").open("wb") as file:

            def write(module: nn.Module, args: tuple, output) -> None:
                found = bare(output).detach()
                found = found if channels is None else found.index_select(-1, channels.to(found.device))
                file.write(as_bytes(found.to("cpu", torch.bfloat16)))

            handle = model.get_submodule(paths[i]).register_forward_hook(write)
            try:
                yield dict
            finally:
                handle.remove()

    return watch


def _put(file: Path, to: Path) -> None:
    """Where it was it stays, too: until the folder has its name, an interrupted process goes on from there."""
    try:
        os.link(file, to)
    except OSError:  # a file system without links
        copy(file, to)


def as_bytes(rows: Tensor) -> memoryview:
    return memoryview(rows.contiguous().flatten().view(torch.uint8).numpy())


def _described(rows: Tensor, n: int) -> dict:
    return {"dtype": TORCH_NAMES[rows.dtype], "shape": [n, *rows.shape[1:]]}
