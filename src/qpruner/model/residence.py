"""Weights that come into a model on the meta device when they are needed, and go again."""

import ctypes
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from qpruner.model.packed.embedding import PackedEmbedding
from qpruner.model.packed.storage import EXACT
from qpruner.model.skeleton import decoder_layers
from qpruner.model.tensors import Tensors


def give_back_memory() -> None:
    """Have what was freed return to the system: glibc keeps smaller pieces, and fragments add up layer by layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # other C libraries have none
        trim(0)


class Residence:
    """Which weights of a model are in memory. Final.

    keep: what came stays; each tensor is then read once. dtype: of floating-point tensors, but for the scales of packed
    linears, and for modules that their model wants in float32.
    """

    def __init__(self, model: nn.Module, tensors: Tensors, *, dtype: torch.dtype, device: torch.device, keep: bool):
        model.tie_weights()
        self.model, self.tensors, self.keep = model, tensors, keep
        self._dtype, self._device = dtype, device
        self._layers = decoder_layers(model)
        self._away = dict(model.state_dict(keep_vars=True))  # what stands in a tensor's place while it is not there
        self._here: set[str] = set()
        wide = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        self._wide = [part for key in wide for part in getattr(model, key, None) or ()]
        for path, module in model.named_modules():
            if isinstance(module, PackedEmbedding):
                module.to(self._dtype_of(path))  # of what it looks up
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    module._buffers[name] = buffer.to(device)

    def layers(self, order: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
        """Decoder layers in the given order, each with its weights while it is at work.

        The next one is read in the meantime, so two are in memory, the second as stored.
        """
        read = lambda i: {name: self.tensors.read(name) for name in self._missing(self._inside(i))}
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(read, order[0]) if len(order) else None
            for i, after in pairwise([*order, None]):
                state = ahead.result()
                names = list(state)
                self._place(state)
                ahead = None if after is None else pool.submit(read, after)
                try:
                    yield i, self.model.get_submodule(self._layers[i])
                finally:
                    self._take_away(names)
                    if not self.keep:
                        give_back_memory()

    @contextmanager
    def ends(self, side: Literal["before", "after", "both"]) -> Iterator[None]:
        """Weights outside the decoder layers: `before` them all but the head, `after` them all but the embedding."""
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        of = lambda module: set() if module is None else {id(p) for p in self._standing(module)}
        idle = {"before": of(head) - of(embedding), "after": of(embedding) - of(head), "both": set()}[side]
        inside = tuple(f"{path}." for path in self._layers)
        names, seen = [], set(idle)
        for name, tensor in self._away.items():
            if not name.startswith(inside) and id(tensor) not in seen:
                seen.add(id(tensor))  # tied tensors are read once
                names.append(name)
        names = self._missing(names)
        for name in names:
            self._place({name: self.tensors.read(name)})
        try:
            yield
        finally:
            self._take_away(names)

    def fill(self) -> nn.Module:
        """Everything in memory, for good."""
        self.keep = True
        with self.ends("both"):
            for _ in self.layers(range(len(self._layers))):
                pass
        return self.model

    def _dtype_of(self, name: str) -> torch.dtype:
        wide = any(part in name for part in self._wide)
        return torch.promote_types(self._dtype, torch.float32) if wide else self._dtype

    def _standing(self, module: nn.Module) -> list[Tensor]:
        # A packed head shares the buffers of the embedding, which stores them.
        paths = tuple(
            f"{name}." for name, m in self.model.named_modules() if m is module or m._buffers is module._buffers
        )
        return [tensor for name, tensor in self._away.items() if name.startswith(paths)]

    def _inside(self, i: int) -> list[str]:
        return [name for name in self._away if name.startswith(f"{self._layers[i]}.")]

    def _missing(self, names: list[str]) -> list[str]:
        return [name for name in names if name not in self._here]

    def _tied(self, name: str) -> list[str]:
        """All names of a tensor outside the layers; inside, each layer gets its own."""
        if name.startswith(tuple(f"{path}." for path in self._layers)):
            return [name]
        return [other for other, tensor in self._away.items() if tensor is self._away[name]]

    def _place(self, tensors: dict[str, Tensor]) -> None:
        while tensors:  # each stored form goes as soon as it was converted
            name, tensor = tensors.popitem()
            if tensor.is_floating_point() and not name.endswith(EXACT):
                tensor = tensor.to(self._dtype_of(name))
            tensor = tensor.to(self._device)
            if isinstance(self._away[name], nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            for other in self._tied(name):
                self._assign(other, tensor)
                self._here.add(other)

    def _take_away(self, names: list[str]) -> None:
        if not self.keep:
            for name in {other for taken in names for other in self._tied(taken)}:
                self._assign(name, self._away[name])
                self._here.discard(name)

    def _assign(self, name: str, tensor: Tensor) -> None:
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        own = module._parameters if attribute in module._parameters else module._buffers
        own[attribute] = tensor
