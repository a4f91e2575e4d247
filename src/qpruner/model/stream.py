"""Passes over a model whose decoder layers are in memory only while they run, so that any size can be measured.

The layers run one after the other over all windows of text, each read from disk while the one before it computes, with
the hidden states between them in a `Scratch`. Gradients walk back the same way: a layer is read again, its forward is
recomputed with gradients, and what it passes on is all that is kept.

A model that fits stays in memory once it was read (`resident`). Nothing else differs, so results are the same to the
last bit.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from qpruner.model.residence import Residence
from qpruner.model.scratch import Scratch
from qpruner.model.skeleton import decoder_layers
from qpruner.model.stage import Arguments, Stage, shared
from qpruner.model.tensors import Tensors

# Entered around the work of one decoder layer, by its index; what it gives is called for the layer's result at the end.
Watch = Callable[[int], AbstractContextManager[Callable[[], Mapping[str, Tensor]]]]


@dataclass(frozen=True)
class Results(Sequence[dict[str, Tensor]]):
    """What a watch gave for every layer, read when it is asked for: all together it may not fit in memory."""

    scratch: Scratch
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return self.scratch.result(self.names[i])


@dataclass(frozen=True)
class Pace:
    """How fast a pass has been so far. A token counts once for every layer it went through."""

    tokens_per_second: float
    bytes_read_per_second: float

    def __str__(self) -> str:
        return f"{self.tokens_per_second:,.0f} tokens/s, {self.bytes_read_per_second / 2**20:,.0f} MiB/s read"


OnLayer = Callable[[int, int, Pace], None]  # layers done, layers to do, pace


class Stream:
    """A model on the meta device, and the tensors to fill it with. Final.

    model: a skeleton in evaluation mode, whole, narrowed or with packed linears; `tensors` has its names.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: Tensors,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        resident: bool = False,
    ):
        self.model, self.tensors, self.device, self.dtype = model, tensors, torch.device(device), dtype
        self.n_layers = len(decoder_layers(model))
        layers = [model.get_submodule(path) for path in decoder_layers(model)]
        self._residence = Residence(model, tensors, dtype=dtype, device=self.device, keep=resident)
        self._stage = Stage(model, layers, self._residence, self.device)

    def forward(
        self,
        ids: Tensor,
        scratch: Scratch,
        *,
        batch_size: int = 1,
        watch: Watch | None = None,
        on_layer: OnLayer | None = None,
    ) -> Results:
        """All windows through all layers; afterwards `logits` gives what comes out.

        Args:
            ids: (windows, length) token ids on the CPU.
            watch: may hook into the modules of the layer at work, which sees batch after batch, in order.
        """
        walk = _Walk(self, ids, scratch, batch_size, on_layer, n_steps=self.n_layers)
        walk.forward(watch or _unwatched, keep_inputs=False)
        return self.results(scratch)

    def logits(self, ids: Tensor, scratch: Scratch, *, batch_size: int = 1) -> Iterator[Tensor]:
        """Logits of every batch, (batch, length, vocabulary), after `forward` with the same arguments."""
        with self._residence.ends("after"):
            for first, rows in batches(ids, batch_size):
                with torch.no_grad():
                    hidden = scratch.get(f"hidden-{self.n_layers}", first, len(rows)).to(self.device)
                    logits = self._stage.after(rows, hidden).logits
                yield logits

    @contextmanager
    def predicting(self, ids: Tensor, scratch: Scratch) -> Iterator[Callable[[int], Tensor]]:
        """A function that gives the logits of any window, (1, length, vocabulary), after `forward` one by one."""
        with self._residence.ends("after"):

            def logits(window: int) -> Tensor:
                with torch.no_grad():
                    hidden = scratch.get(f"hidden-{self.n_layers}", window, 1).to(self.device)
                    return self._stage.after(ids[window : window + 1], hidden).logits

            yield logits

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
        """The mean loss of every window, back through all layers; `scratch` keeps the losses as its result `loss`.

        Args:
            labels: tokens that are to be predicted, each at its place in the window; the text itself by default.
            batch_size: windows that go through a layer together, where the sum of their gradients will do.
            watch: is entered for a layer before the windows go through it with gradients, in order; it may hook into
                the layer's modules and have its weights require gradients.
        """
        with torch.inference_mode(False):
            walk = _Walk(self, ids, scratch, batch_size, on_layer, n_steps=2 * self.n_layers)
            walk.forward(_unwatched, keep_inputs=True)
            walk.loss(ids if labels is None else labels)
            walk.backward(watch or _unwatched)
        return Results(scratch, tuple(f"backward-{i}" for i in range(self.n_layers)))

    def steps(
        self,
        ids: Tensor,
        scratch: Scratch,
        *,
        batch_size: int = 1,
        border: int = 0,
        on_layer: OnLayer | None = None,
    ) -> Iterator["Step"]:
        """`forward` by hand, so that two models can walk side by side: the layers that are not finished, in order.

        border: no batch holds both windows before this one and windows from it on.
        """
        yield from _Walk(self, ids, scratch, batch_size, on_layer, n_steps=self.n_layers, border=border).steps()

    def results(self, scratch: Scratch) -> Results:
        """Of a walk whose steps are all finished."""
        return Results(scratch, tuple(f"forward-{i}" for i in range(self.n_layers)))

    def layers(self, order: Sequence[int] | None = None) -> Iterator[tuple[int, nn.Module]]:
        """Decoder layers in turn, all of them or those named, each with its weights."""
        yield from self._residence.layers(range(self.n_layers) if order is None else order)

    def loaded(self) -> nn.Module:
        """The model with all its weights in memory."""
        return self._residence.fill()

    # --- by hand ------------------------------------------------------------------------------------------------------

    def ends(self, side: Literal["before", "after", "both"]) -> AbstractContextManager[None]:
        """Within, weights outside the decoder layers are in memory: `before` all but the head, `after` but the
        embedding."""
        return self._residence.ends(side)

    def before(self, rows: Tensor) -> tuple[Tensor, list[Arguments]]:
        """Of one batch: the hidden states that reach the first layer, and the other arguments of every layer."""
        return self._stage.before(rows)

    def run(self, i: int, hidden: Tensor, arguments: Arguments) -> Tensor:
        """What a layer that `layers` has just given returns."""
        return self._stage.run(i, hidden, arguments)

    def after(self, rows: Tensor, hidden: Tensor) -> Tensor:
        """Logits for what the last layer returns."""
        return self._stage.after(rows, hidden).logits


class _Walk:
    """One pass, taken up where an earlier one with the same scratch stopped."""

    def __init__(
        self, stream: Stream, ids: Tensor, scratch: Scratch, batch_size: int, on_layer, n_steps: int, border: int = 0
    ):
        self._residence, self._stage, self._device = stream._residence, stream._stage, stream.device
        self._scratch, self._n_layers = scratch, stream.n_layers
        after = ((border + first, rows) for first, rows in batches(ids[border:], batch_size))
        self._batches = [*batches(ids[:border], batch_size), *after]
        self._tensors, self._read_before = stream.tensors, stream.tensors.bytes_read
        self._on_layer, self._done, self._n_steps = on_layer, 0, n_steps
        self._start, self._tokens = time.monotonic(), 0
        self._arguments: list[list[Arguments]] = []  # of every batch, of every layer

    def forward(self, watch: Watch, *, keep_inputs: bool) -> None:
        for step in self.steps():
            with watch(step.index) as result, torch.no_grad():
                step.pass_all_on()
                step.finish(result(), keep_input=keep_inputs)

    def steps(self) -> Iterator["Step"]:
        order = [i for i in range(self._n_layers) if not self._scratch.finished(f"forward-{i}")]
        self._set_out(write=len(order) == self._n_layers)
        self._done = self._n_layers - len(order)
        for i, layer in self._residence.layers(order):
            yield Step(self, i, layer)

    def loss(self, labels: Tensor) -> None:
        """The gradient of each window's loss at what the last layer returns."""
        if self._scratch.finished("loss"):
            return
        losses = []
        with self._residence.ends("after"), torch.enable_grad():
            for first, rows in self._batches:
                hidden = self._get(f"hidden-{self._n_layers}", first, len(rows)).requires_grad_()
                wanted = labels[first : first + len(rows)].to(self._device)
                loss = self._stage.after(rows, hidden.clone(), labels=wanted).loss
                (loss * len(rows)).backward()  # windows are of one length, so this is the sum of their means
                losses.append(loss.detach().cpu())
                self._scratch.put(f"gradient-{self._n_layers}", first, hidden.grad)
        self._scratch.finish("loss", {"loss": torch.stack(losses)})
        self._scratch.drop(f"hidden-{self._n_layers}")

    def backward(self, watch: Watch) -> None:
        order = [i for i in reversed(range(self._n_layers)) if not self._scratch.finished(f"backward-{i}")]
        self._done = 2 * self._n_layers - len(order)
        for i, _ in self._residence.layers(order):
            with watch(i) as result, torch.enable_grad():
                for b, (first, rows) in enumerate(self._batches):
                    hidden = self._get(f"hidden-{i}", first, len(rows)).requires_grad_()
                    self._run(i, b, hidden.clone()).backward(self._get(f"gradient-{i + 1}", first, len(rows)))
                    self._scratch.put(f"gradient-{i}", first, hidden.grad)
                self._finish(f"backward-{i}", result())
            self._scratch.drop(f"hidden-{i}")
            self._scratch.drop(f"gradient-{i + 1}")

    def _set_out(self, *, write: bool) -> None:
        """The arguments of every layer for every batch; what is equal in all batches is kept once."""
        with self._residence.ends("before"):
            for first, rows in self._batches:
                hidden, arguments = self._stage.before(rows)
                if write:
                    self._scratch.put("hidden-0", first, hidden)
                known = self._arguments[0] if self._arguments else arguments
                self._arguments.append([shared(found, old) for found, old in zip(arguments, known, strict=True)])

    def _get(self, array: str, first: int, n: int) -> Tensor:
        return self._scratch.get(array, first, n).to(self._device)

    def _run(self, i: int, b: int, hidden: Tensor) -> Tensor:
        self._tokens += hidden.shape[:2].numel()
        return self._stage.run(i, hidden, self._arguments[b][i])

    def _finish(self, name: str, result: Mapping[str, Tensor]) -> None:
        self._scratch.finish(name, result)
        self._done += 1
        if self._on_layer is not None:
            seconds = max(time.monotonic() - self._start, 1e-9)
            read = self._tensors.bytes_read - self._read_before
            self._on_layer(self._done, self._n_steps, Pace(self._tokens / seconds, read / seconds))


class Step:
    """One layer of a walk by hand, with its weights in memory: batches go through it as often as it takes. Final.

    index: of the layer. Once all batches were passed on, `finish` lets go of what came in.
    """

    def __init__(self, walk: _Walk, index: int, layer: nn.Module):
        self._walk, self.index, self.layer = walk, index, layer
        self.batches = walk._batches  # number of the first window, token ids

    def run(self, b: int, *, gradients: bool = False) -> Tensor:
        """What the layer returns for batch number b, (batch, length, width). It may be changed by then."""
        first, rows = self.batches[b]
        with torch.set_grad_enabled(gradients):
            return self._walk._run(self.index, b, self._walk._get(f"hidden-{self.index}", first, len(rows)))

    def pass_on(self, b: int, hidden: Tensor) -> None:
        """What the next layer gets for batch number b."""
        self._walk._scratch.put(f"hidden-{self.index + 1}", self.batches[b][0], hidden)

    def passed_on(self, b: int) -> Tensor:
        """What `pass_on` was given for batch number b."""
        first, rows = self.batches[b]
        return self._walk._get(f"hidden-{self.index + 1}", first, len(rows))

    def pass_all_on(self) -> None:
        for b in range(len(self.batches)):
            self.pass_on(b, self.run(b))

    def finish(self, result: Mapping[str, Tensor], *, keep_input: bool = False) -> None:
        """Keep the layer's result; a walk with the same scratch goes on after it."""
        self._walk._finish(f"forward-{self.index}", result)
        if not keep_input:
            self._walk._scratch.drop(f"hidden-{self.index}")


def batches(ids: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """The number of its first window, and the windows."""
    for first in range(0, len(ids), size):
        yield first, ids[first : first + size]


def _unwatched(i: int) -> AbstractContextManager[Callable[[], Mapping[str, Tensor]]]:
    return nullcontext(dict)
