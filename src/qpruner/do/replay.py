"""A layer that is run again and again while its linears change one after the other, without doing it all again.

Many modules end in a linear: attention in its output projection, an MLP in its last. Once all that comes before that
linear is settled, what reaches it is remembered for every batch, and the module does no more than call it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qpruner.model.memory import REMEMBERED
from qpruner.model.stream import Step


@dataclass(frozen=True)
class End:
    """module: inner name of what a linear is the end of. besides: what it returns beside that output; None for the bare
    output."""

    module: str
    besides: tuple[None, ...] | None


def ends_of(step: Step, inners: Sequence[str]) -> dict[str, End]:
    """Those of the linears that the module around them ends in, as seen on the first batch."""
    outputs: dict[str, Tensor] = {}
    last: dict[str, str] = {}  # linear that was called last in each module
    returned: dict[str, object] = {}
    around = {inner: inner.rpartition(".")[0] for inner in inners if "." in inner}

    def at_linear(inner: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            outputs[inner], last[around[inner]] = output.detach().clone(), inner

        return hook

    with ExitStack() as stack:
        for inner in around:
            stack.callback(step.layer.get_submodule(inner).register_forward_hook(at_linear(inner)).remove)
        for path in set(around.values()):
            note = lambda module, args, output, path=path: returned.setdefault(path, output)
            stack.callback(step.layer.get_submodule(path).register_forward_hook(note).remove)
        if around:
            step.run(0)
    found = {}
    for path, inner in last.items():
        bare = not isinstance(returned[path], tuple)
        first, *rest = (returned[path],) if bare else returned[path]
        same = isinstance(first, Tensor) and first.shape == outputs[inner].shape and torch.equal(first, outputs[inner])
        if same and all(value is None for value in rest):
            found[inner] = End(path, None if bare else tuple(rest))
    return found


class Replay:
    """A `Step` that remembers. Final; to be used as a context.

    ends: as `ends_of` finds them.
    """

    def __init__(self, step: Step, ends: Mapping[str, End]):
        self.step, self._ends = step, ends
        self.index, self.layer, self.batches = step.index, step.layer, step.batches
        self._b, self._left, self._stack = 0, REMEMBERED, ExitStack()

    def __enter__(self) -> "Replay":
        return self

    def __exit__(self, *exc) -> None:
        self.forget()

    def forget(self) -> None:
        """Every module does all of its work again."""
        self._stack.close()

    def run(self, b: int) -> Tensor:
        self._b = b
        return self.step.run(b)

    def pass_all_on(self) -> None:
        for b in range(len(self.batches)):
            self.step.pass_on(b, self.run(b))

    def settle(self, inner: str, d_in: int) -> None:
        """Nothing before this linear changes any more in the module that it ends."""
        end, linear = self._ends.get(inner), self.layer.get_submodule(inner)
        if end is None:
            return
        tokens = sum(rows.numel() for _, rows in self.batches)
        size = tokens * d_in * linear.weight.element_size()
        if size > self._left:
            return
        self._left -= size
        module, inputs = self.layer.get_submodule(end.module), {}
        whole = module.forward

        def remember(_: nn.Module, args: tuple) -> None:
            if self._b not in inputs:
                inputs[self._b] = args[0].detach().clone()  # code behind it may work in place

        def forward(*args, **kwargs):
            if self._b not in inputs:
                return whole(*args, **kwargs)
            output = linear(inputs[self._b])
            return output if end.besides is None else (output, *end.besides)

        module.forward = forward
        self._stack.callback(module.__dict__.pop, "forward")
        self._stack.callback(linear.register_forward_pre_hook(remember).remove)
