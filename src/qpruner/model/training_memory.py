"""How much memory a step of training takes, found by doing it without numbers.

The model's own forward and backward run on tensors that have shapes and no contents, and every allocation is counted
for as long as it lives. What autograd keeps, what adapters and dropout add, what a packed linear decodes at a time and
what the loss makes of the logits need no formula then, and hold for any architecture that chooses nothing by values.

What libraries allocate inside of an operation is not seen, nor what the allocator keeps of what was freed.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from qpruner.errors import ModelError
from qpruner.math.books import book
from qpruner.math.divergence import sum_in_chunks, surprise
from qpruner.model.packed import native
from qpruner.model.packed.linear import values_of_words

MOMENTS = 2  # averages of gradients that AdamW keeps of what is trained
Loss = Callable[[nn.Module, Tensor], Tensor]  # of (batch, length) tokens


@dataclass(frozen=True)
class StepMemory:
    """Bytes of tensors in a step of training.

    base: what is frozen, and buffers. adapters: what is trained. moments: of its gradients. kept: for the way back, at
    its start, with what the loss keeps. passing: the most that forward and backward hold at once beside base, adapters
    and moments; gradients and what is kept are in it.
    """

    base: int
    adapters: int
    moments: int
    kept: int
    passing: int

    @property
    def peak(self) -> int:
        return self.base + self.adapters + self.moments + self.passing


class Allocations(TorchDispatchMode):
    """Counts the bytes of all storages that operations give, as long as they live; also of tensors with contents.

    known: tensors that were there before, and are not counted. Attributes: now, peak.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # held, so that none other gets its address
        self._seen = {storage._cdata for storage in self._known}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, result)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            size = storage.nbytes()
            weakref.finalize(storage, self._freed, key, size).atexit = False
            self.now += size
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """As recovery takes it: of logits that are made float32, a chunk of them at a time; every token is predicted."""
    batch, length = ids.shape
    logits = model(input_ids=ids, use_cache=False).logits.float().flatten(0, 1)
    places = torch.arange(batch * length - 1, device=ids.device)
    return sum_in_chunks(lambda z, rows: surprise(z, ids.flatten()[places[rows] + 1]), logits, places).float()


def step_memory(
    model: nn.Module,
    batch: int,
    length: int,
    *,
    autocast: torch.dtype | None = torch.bfloat16,
    device: str = "cpu",
    loss: Loss = next_token_loss,
) -> StepMemory:
    """What a step of training takes, `batch` windows of `length` tokens at once.

    Whether layers are computed again on the way back is as the model has it.

    Args:
        model: with its adapters, in train mode, on any device, "meta" for one; afterwards its tensors have no contents.
            What requires a gradient is trained, by AdamW.
        autocast: the dtype of products; None for that of the model.
        device: where the model is to lie, one that the machine has.
    Raises:
        ModelError: the model does what depends on numbers, as most mixtures of experts do.
    """
    with without_numbers():
        tensors = _place_(model, device)
        trained = [p for p in model.parameters() if p.requires_grad]
        learned, frozen = _bytes(trained), _bytes(tensors) - _bytes(trained)
        ids = torch.zeros(batch, length, dtype=torch.int64, device=device)
        with Allocations(tensors) as count:
            with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
                found = loss(model, ids)
            kept = count.now
            found.backward()
    return StepMemory(frozen, learned, MOMENTS * learned, kept, count.peak)


@contextmanager
def without_numbers() -> Iterator[None]:
    """Within, new tensors have no contents."""
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )
    from transformers import masking_utils

    # Whether a row holds several texts is read from positions, and a mask made for them where nothing can be read.
    one_text = patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    _forget_tables()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), native.without_contents(), one_text:
            yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ModelError(
            f"what a step of training takes cannot be counted without doing it: {error.func} depends on numbers"
        ) from None
    finally:
        _forget_tables()  # what was remembered within has no contents either


def _forget_tables() -> None:
    for table in (book, values_of_words):
        table.cache_clear()


def _place_(model: nn.Module, device: str) -> list[Tensor]:
    """Puts tensors without contents into the model, and gives them; shared ones stay shared."""
    memo: dict[int, Tensor] = {}

    def placed(tensor: Tensor) -> Tensor:
        if id(tensor) not in memo:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new
        return memo[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: placed(tensor) for name, tensor in tensors.items() if tensor is not None})
    return list(memo.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
