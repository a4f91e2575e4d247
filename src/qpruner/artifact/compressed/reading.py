"""Tensors of a folder in compressed-tensors' format, read one at a time, as floats or in our codes."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from qpruner.artifact.compressed.encoding import decoded, tensor_specs
from qpruner.artifact.compressed.schemes import schemes_in
from qpruner.model.packed.linear import PackedLinear
from qpruner.model.tensors import Stored
from qpruner.vllm import Scheme

CODES = "weight_packed"
OURS = ("codes", "scales", "zeros")
THEIRS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


class Unpacked:
    """`Tensors` of a model whose linears lie there in codes. Final.

    They are read under the names of plain linears, `X.weight`, in float32, and under those of packed ones. The weight
    of a tied module is that of the one it is tied to.
    """

    def __init__(self, stored: Stored, schemes: Mapping[str, Scheme], tied: Mapping[str, str] | None = None):
        self._stored, self._schemes, self._tied = stored, schemes, tied or {}

    @classmethod
    def of(cls, folder: Path, tied: Mapping[str, str] | None = None) -> "Unpacked":
        stored = Stored.of(folder)
        config = json.loads((folder / "config.json").read_text()).get("quantization_config")
        return cls(stored, schemes_in(config, linears_in(stored)) if config else {}, tied)

    @property
    def bytes_read(self) -> int:
        return self._stored.bytes_read

    def layer(self, path: str) -> PackedLinear:
        """A linear without its bias."""
        scheme = self._schemes[path]
        names = tensor_specs(1, scheme.group_size or 1, scheme)
        rounded = decoded({name: self._stored.read(f"{path}.{name}") for name in names}, scheme)
        return PackedLinear.from_rounded(rounded, None, scheme.spec)

    def read(self, name: str) -> Tensor:
        name = self._tied.get(name, name)
        path, _, part = name.rpartition(".")
        if path not in self._schemes or part not in ("weight", *OURS):
            return self._stored.read(name)
        layer = self.layer(path)
        return layer.dequantize(torch.float32) if part == "weight" else getattr(layer, part)

    def all(self) -> dict[str, Tensor]:
        """Every tensor, as a model with packed linears has them."""
        found = {}
        for name in self._stored.places:
            path, _, part = name.rpartition(".")
            if path not in self._schemes or part not in THEIRS:
                found[name] = self._stored.read(name)
        for path in self._schemes:
            found |= {f"{path}.{part}": tensor for part, tensor in self.layer(path).state_dict().items()}
        return found


def in_their_codes(config: PreTrainedConfig) -> bool:
    """Whether a folder's weights lie in another program's format."""
    return getattr(config, "quantization_config", None) is not None


def linears_in(stored: Stored) -> list[str]:
    return [name.removesuffix(f".{CODES}") for name in stored.places if name.endswith(f".{CODES}")]
