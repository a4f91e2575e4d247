"""The passes of a `Stream` over a model whose layers read more of each other than hidden states: all of it at once.

Such layers (`Graph.exchanges`) cannot run one at a time, so the model has to fit in memory. What is measured of a layer
is measured in the same way.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from qpruner.model.graph import Graph
from qpruner.model.residence import Residence
from qpruner.model.scratch import Scratch
from qpruner.model.skeleton import decoder_layers
from qpruner.model.stream import OnLayer, Pace, Results, Stream, Watch, batches
from qpruner.model.tensors import Tensors


class Whole:
    """A model on the meta device that is filled at the first pass. Final."""

    def __init__(
        self,
        model: nn.Module,
        tensors: Tensors,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.model, self.tensors, self.device = model, tensors, torch.device(device)
        self.n_layers = len(decoder_layers(model))
        self._residence = Residence(model, tensors, dtype=dtype, device=self.device, keep=True)

    def forward(
        self,
        ids: Tensor,
        scratch: Scratch,
        *,
        batch_size: int = 1,
        watch: Watch | None = None,
        on_layer: OnLayer | None = None,
    ) -> Results:
        names = [f"forward-{i}" for i in range(self.n_layers)]
        if watch is None:
            for name in names:
                scratch.finish(name, {})
        else:
            with torch.no_grad():
                self._watched(names, scratch, watch, lambda: list(self._logits(ids, batch_size)), ids, on_layer)
        return Results(scratch, tuple(names))

    def logits(self, ids: Tensor, scratch: Scratch, *, batch_size: int = 1) -> Iterator[Tensor]:
        """Nothing of `forward` is kept: the model runs again."""
        self.loaded()
        yield from self._logits(ids, batch_size)

    @contextmanager
    def predicting(self, ids: Tensor, scratch: Scratch) -> Iterator[Callable[[int], Tensor]]:
        self.loaded()
        yield lambda window: next(self._logits(ids[window : window + 1], 1))

    def backward(
        self,
        ids: Tensor,
        scratch: Scratch,
        *,
        labels: Tensor | None = None,
        watch: Watch | None = None,
        batch_size: int = 1,
        on_layer: OnLayer | None = None,
    ) -> Results:
        wanted = ids if labels is None else labels
        names = [f"backward-{i}" for i in range(self.n_layers)]

        def run() -> None:
            losses = []
            for first, rows in batches(ids, batch_size):
                aims = wanted[first : first + len(rows)].to(self.device)
                loss = self.model(input_ids=rows.to(self.device), labels=aims, use_cache=False).loss
                (loss * len(rows)).backward()
                losses.append(loss.detach().cpu())
            scratch.finish("loss", {"loss": torch.stack(losses)})

        with torch.inference_mode(False), torch.enable_grad():
            self._watched(names, scratch, watch or (lambda i: nullcontext(dict)), run, ids, on_layer)
        return Results(scratch, tuple(names))

    def layers(self, order: Sequence[int] | None = None) -> Iterator[tuple[int, nn.Module]]:
        yield from self._residence.layers(range(self.n_layers) if order is None else order)

    def loaded(self) -> nn.Module:
        return self._residence.fill()

    def _watched(self, names: list[str], scratch: Scratch, watch: Watch, run, ids: Tensor, on_layer) -> None:
        self.loaded()
        start = time.monotonic()
        # A gradient for activations even where no weight asks for one.
        handle = self.model.get_input_embeddings().register_forward_hook(lambda _, __, found: _asking(found))
        with ExitStack() as stack:
            stack.callback(handle.remove)
            results = [stack.enter_context(watch(i)) for i in range(self.n_layers)]
            run()
            for name, result in zip(names, results, strict=True):
                scratch.finish(name, result())
        if on_layer is not None:
            seconds = max(time.monotonic() - start, 1e-9)
            on_layer(len(names), len(names), Pace(ids.numel() * len(names) / seconds, 0.0))

    def _logits(self, ids: Tensor, batch_size: int) -> Iterator[Tensor]:
        for _, rows in batches(ids, batch_size):
            with torch.no_grad():
                logits = self.model(input_ids=rows.to(self.device), use_cache=False).logits
            yield logits


Streamable = Stream | Whole


def _asking(found: Tensor) -> Tensor:
    return found.requires_grad_().clone() if torch.is_grad_enabled() and found.is_leaf else found


def opened(model: nn.Module, tensors: Tensors, graph: Graph, *, resident: bool = False, **how) -> Streamable:
    """A stream, or the whole model where its layers exchange more than hidden states."""
    return Whole(model, tensors, **how) if graph.exchanges else Stream(model, tensors, resident=resident, **how)
