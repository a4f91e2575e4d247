"""A GGUF file read back under the names of the model that it was made from, by the gguf package's decoder."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qpruner.artifact.gguf.families import anatomy, choose
from qpruner.artifact.gguf.layout import entries, restored


class Decoded:
    """`Tensors` of a file: what llama.cpp computes with, as floats."""

    def __init__(self, path: Path, model: nn.Module):
        """model: narrowed, on the meta device, as it was written."""
        import gguf

        self._tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        body = anatomy(model)
        self._places: dict[str, tuple[str, int, int, int]] = {}
        for entry in entries(model, body, choose(body)):
            start = 0
            for part, heads in zip(entry.parts, entry.heads, strict=True):
                rows = model.get_parameter(part).shape[0]
                self._places[part] = (entry.name, start, rows, heads)
                start += rows
        self._tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        self.bytes_read = 0

    def read(self, name: str) -> Tensor:
        import gguf

        place, start, rows, heads = self._places[name if name in self._places else self._tied[name]]
        tensor = self._tensors[place]
        self.bytes_read += int(tensor.n_bytes)
        data = tensor.data[start : start + rows] if tensor.data.ndim > 1 else tensor.data
        found = torch.from_numpy(gguf.dequantize(data, tensor.tensor_type).astype("float32"))
        return found[restored(rows, heads)] if heads else found
