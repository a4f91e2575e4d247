"""What a pass over the blocks of a model holds between them: hidden states row by row, and results block by block.

In a folder it is on disk, so that memory holds one batch at a time and a killed pass is taken up at the last block that
was finished. Without one it is in memory. Files are read and written, not mapped: a mapped page counts as memory.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qpruner.files import replacing, write_text
from qpruner.model.checkpoint import TORCH_DTYPES
from qpruner.model.cost import TORCH_NAMES
from qpruner.model.tensors import Stored


class Scratch:
    """Arrays whose rows are windows of text, all rows of one shape and dtype, and finished results by name."""

    def __init__(self, folder: Path | None = None):
        self._folder = folder
        self._arrays: dict[str, dict[int, Tensor]] = {}  # without a folder: first row -> rows
        self._results: dict[str, dict[str, Tensor]] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    # --- arrays ------------------------------------------------------------------------------------------------------

    def put(self, array: str, first: int, rows: Tensor) -> None:
        """Set rows from number `first` on, in the pieces in which they are read later."""
        rows = rows.detach().cpu().contiguous()
        if self._folder is None:
            self._arrays.setdefault(array, {})[first] = rows
            return
        row_bytes = rows[0].numel() * rows.element_size()
        layout = self._folder / "layout.json"
        if not layout.is_file():
            write_text(layout, json.dumps({"shape": list(rows.shape[1:]), "dtype": TORCH_NAMES[rows.dtype]}))
        descriptor = os.open(self._file(array), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, memoryview(rows.flatten().view(torch.uint8).numpy()), first * row_bytes)
        finally:
            os.close(descriptor)

    def get(self, array: str, first: int, n: int) -> Tensor:
        """Rows `first` to `first + n - 1`, in memory of their own."""
        if self._folder is None:
            rows = self._arrays[array][first]
            assert len(rows) == n, f"{array} was written in other pieces"
            return rows.clone()
        layout = json.loads((self._folder / "layout.json").read_text())
        rows = torch.empty(n, *layout["shape"], dtype=TORCH_DTYPES[layout["dtype"]])
        view = memoryview(rows.flatten().view(torch.uint8).numpy())
        with self._file(array).open("rb", buffering=0) as file:
            file.seek(first * len(view) // n)
            assert file.readinto(view) == len(view), f"{array} is cut short"
        return rows

    def drop(self, array: str) -> None:
        self._arrays.pop(array, None)
        if self._folder is not None:
            self._file(array).unlink(missing_ok=True)

    def _file(self, array: str) -> Path:
        return self._folder / f"{array}.rows"

    # --- results -----------------------------------------------------------------------------------------------------

    def finish(self, name: str, result: Mapping[str, Tensor]) -> None:
        """Keep a result; from then on `finished(name)`, also in another process."""
        result = {key: value.detach().cpu().contiguous() for key, value in result.items()}
        if self._folder is None:
            self._results[name] = result
        else:
            with replacing(self._folder / f"{name}.safetensors") as temporary:
                save_file(result, temporary)

    def finished(self, name: str) -> bool:
        return name in self._results or (self._folder is not None and (self._folder / f"{name}.safetensors").is_file())

    def result(self, name: str) -> dict[str, Tensor]:
        if self._folder is None:
            return self._results[name]
        # not load_file: it maps the file, and one small tensor that is kept would keep all of it in memory
        stored = Stored([self._folder / f"{name}.safetensors"])
        return {key: stored.read(key) for key in stored.places}

    def part(self, name: str) -> "Scratch":
        """A scratch of its own for something that is done again and again inside; in the folder if there is one."""
        return Scratch(None if self._folder is None else self._folder / name)

    def clear(self) -> None:
        """Let go of everything, once what was made of it is stored elsewhere."""
        self._arrays, self._results = {}, {}
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
