"""Where the tensors of a model come from: read one at a time, when they are asked for, by the model's own names.

    Stored   as they lie in the safetensors files of a folder
    Renamed  under other names
    Named    of a model: renamed and joined as transformers does when it loads the folder
    Cut      with the rows and columns removed that a plan removes
    Replaced with some of them taken from elsewhere

Files are read, not mapped: pages of a mapped file count as memory of the process.
"""

import copy
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qpruner.errors import ModelError, listed
from qpruner.files import replacing
from qpruner.model.checkpoint import OLD_BUFFERS, places_in, weight_files
from qpruner.model.cost import TORCH_NAMES, TensorSpec, safetensors_header
from qpruner.model.graph import Graph
from qpruner.model.surgery import cut_tensor, cuts_of

READ_BYTES = 1 << 30  # the most that one call of the system reads


class Tensors(Protocol):
    """Tensors by name, each read anew: memory of the caller's own, on the CPU, in the dtype of the file."""

    def read(self, name: str) -> Tensor:
        """Raises ModelError for a name that is not there."""

    @property
    def bytes_read(self) -> int: ...


class Stored:
    """The tensors of a folder under the names of its files."""

    def __init__(self, files: Iterable[Path]):
        self.places = {name: place for path in files for name, place in places_in(path).items()}
        self.bytes_read = 0

    @classmethod
    def of(cls, folder: Path) -> "Stored":
        return cls(weight_files(folder))

    def read(self, name: str) -> Tensor:
        place = self.places.get(name)
        if place is None:
            raise ModelError(f"there is no tensor {name!r} in the weight files.")
        memory = torch.empty(place.n_bytes, dtype=torch.uint8)
        view, done = memoryview(memory.numpy()), 0
        descriptor = os.open(place.path, os.O_RDONLY)
        try:
            while done < place.n_bytes:
                got = os.preadv(descriptor, [view[done : done + READ_BYTES]], place.start + done)
                if not got:
                    raise ModelError(f"{place.path.name} ends inside {name!r}. Fetch it again.")
                done += got
        finally:
            os.close(descriptor)
        self.bytes_read += done
        return memory.view(place.dtype).view(place.shape)


@dataclass
class _Origin:
    """What a tensor of the model is made of: one stored tensor, or several that a converter joins."""

    converter: WeightConverter | None
    parts: list[tuple[str, str]]  # stored name, pattern of the converter


class Named:
    """The tensors of `model` out of stored ones, by transformers' own rules for renaming and joining."""

    def __init__(self, model: nn.Module, stored: Stored):
        self._model, self._stored = model, stored
        self._own = model.state_dict(keep_vars=True)
        self._tied = getattr(model, "all_tied_weights_keys", None) or {}
        self._origins: dict[str, _Origin] = {}
        self._first: dict[str, str] = {}  # a tensor that is made along with another -> that other
        self._made: dict[str, Tensor] = {}  # made along with one that was read, and not read yet
        self._resolve()

    @property
    def bytes_read(self) -> int:
        return self._stored.bytes_read

    def _resolve(self) -> None:
        rules = get_model_conversion_mapping(self._model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        prefix = self._model.base_model_prefix
        unknown = []
        for stored in sorted(self._stored.places, key=_natural):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, self._own)
            if name not in self._own and stored in self._own:
                name, pattern = stored, None
            if name not in self._own:
                unknown.append(stored)
                continue
            converter = by_pattern.get(pattern)
            origin = self._origins.setdefault(name, _Origin(converter, []))
            origin.parts.append((stored, pattern or stored))
            for other in converter.target_patterns[1:] if converter else ():
                self._first[name.replace(converter.target_patterns[0], other)] = name
        ignored = (*(getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()), *OLD_BUFFERS)
        if strangers := [key for key in unknown if not any(re.search(p, key) for p in ignored)]:
            raise ModelError(
                f"the weight files hold {len(strangers)} tensor(s) that the model does not have: {listed(strangers)}."
            )

    def read(self, name: str) -> Tensor:
        if name in self._made:
            return self._made.pop(name)
        origin = self._origins.get(self._first.get(name, name))
        if origin is None:
            if name in self._tied and self._tied[name] != name:
                return self.read(self._tied[name])
            raise ModelError(f"the weight files have nothing for {name!r}.")
        if origin.converter is None:
            return self._stored.read(origin.parts[0][0])
        converter = copy.deepcopy(origin.converter)
        first = self._first.get(name, name)
        for stored, pattern in origin.parts:
            converter.add_tensor(first, stored, pattern, lambda stored=stored: self._stored.read(stored))
        made = converter.convert(first, model=self._model, config=self._model.config)
        made = {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
        wanted = made.pop(name)
        self._made |= made
        return wanted


def _natural(name: str) -> list:
    """Experts in the order of their numbers: 9 before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


class Renamed:
    """Stored tensors under other names: `names` gives the stored one for each of the model's."""

    def __init__(self, stored: Tensors, names: Mapping[str, str]):
        self._stored, self._names = stored, names

    @property
    def bytes_read(self) -> int:
        return self._stored.bytes_read

    def read(self, name: str) -> Tensor:
        return self._stored.read(self._names.get(name, name))


class Cut:
    """What `surgery.narrow_` leaves of every tensor; a cut model then reads its weights like any other."""

    def __init__(self, whole: Tensors, graph: Graph, kept: Mapping[str, Sequence[int]]):
        self._whole, self._cuts = whole, cuts_of(graph, kept)

    @property
    def bytes_read(self) -> int:
        return self._whole.bytes_read

    def read(self, name: str) -> Tensor:
        return cut_tensor(self._whole.read(name), self._cuts.get(name, ()))


class Replaced:
    """Tensors of which those that `others` has are taken from there; they may be new."""

    def __init__(self, tensors: Tensors, others: Tensors, names: Iterable[str]):
        self._tensors, self._others, self._names = tensors, others, frozenset(names)

    @property
    def bytes_read(self) -> int:
        return self._tensors.bytes_read + self._others.bytes_read

    def read(self, name: str) -> Tensor:
        return (self._others if name in self._names else self._tensors).read(name)


class Zeros:
    """Tensors that nothing is known of yet, by their shapes."""

    bytes_read = 0

    def __init__(self, shapes: Mapping[str, Sequence[int]]):
        self._shapes = shapes

    def read(self, name: str) -> Tensor:
        return torch.zeros(tuple(self._shapes[name]))


def write_safetensors(path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a file whose tensors come one by one, in any order; the same bytes as `safetensors.torch.save_file` writes.

    Args:
        specs: every tensor of the file, name -> (dtype, shape). Anything else among `tensors` is a fault of ours.
    """
    header, starts = safetensors_header(specs)
    written = set()
    with replacing(path) as temporary:
        with temporary.open("wb") as file:
            file.write(header)
            for name, tensor in tensors:
                dtype, shape = specs[name]
                assert TORCH_NAMES[tensor.dtype] == dtype and tuple(tensor.shape) == tuple(shape), (
                    f"{name}: {tensor.dtype} {tuple(tensor.shape)}, predicted {dtype} {tuple(shape)}"
                )
                file.seek(len(header) + starts[name])
                file.write(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
                written.add(name)
            file.flush()
        assert written == specs.keys(), f"not written: {listed(sorted(specs.keys() - written))}"
