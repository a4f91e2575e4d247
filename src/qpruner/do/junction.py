"""Where the output of a linear joins the hidden states of its decoder layer, found by running the layer.

Most layers add what their attention and their MLP put out to what came in. A linear that writes there can make up not
only for its own lost inputs but for all that is off in the sum. Some layers have a norm in between: there the output
itself is all that can be aimed at.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class Runs(Protocol):
    """A layer that batches can be sent through: a step of a walk, or one that remembers."""

    layer: nn.Module

    def run(self, b: int) -> Tensor: ...


PLAIN = 0.02  # of the output: what the sum may change otherwise when the output is doubled; bfloat16 rounds so much


@dataclass(frozen=True)
class Seen:
    """Of one batch, flat over tokens: what a linear is given, what it gives, and the rest of the sum it joins."""

    X: Tensor
    Y: Tensor
    rest: Tensor


class Junction:
    """Taps on one linear of a layer. Final.

    place: inner name of the module whose input is the sum; "" for what the layer returns; None where there is no sum.
    """

    def __init__(self, inner: str, place: str | None):
        self.inner, self.place = inner, place

    @classmethod
    def find(cls, step: Runs, inner: str) -> "Junction":
        """The first input of a module behind the linear that is more than its output, and grows by that when doubled.

        Looked for on the first batch. Without one, the linear's output stands for the sum.
        """
        once, twice = _behind(step, inner, 1), _behind(step, inner, 2)
        output = once.pop(None, None)
        for place, before in once.items():
            after = twice.get(place)
            if after is not None and before.shape == output.shape and not torch.equal(before, output):
                if (after - before - output).norm() <= PLAIN * output.norm():
                    return cls(inner, place)
        return cls(inner, None)

    def look(self, step: Runs, b: int, without: Sequence[str] = ()) -> Seen | None:
        """At batch number b, as far into the layer as that takes; None where the linear is not called.

        without: other linears that join the same sum, whose outputs are left out of it.
        """
        given: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        total: list[Tensor] = []

        def at_linear(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
                given[name], outputs[name] = _flat(args[0]), _flat(output)
                if self.place is None:
                    raise _Enough

            return hook

        def at_place(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if outputs:
                total.append(_flat(_first(args, kwargs)))
                raise _Enough

        with ExitStack() as stack:
            for name in (self.inner, *without):
                linear = step.layer.get_submodule(name)
                stack.callback(linear.register_forward_hook(at_linear(name)).remove)
            if self.place:
                module = step.layer.get_submodule(self.place)
                stack.callback(module.register_forward_pre_hook(at_place, with_kwargs=True).remove)
            try:
                total.append(_flat(step.run(b)))
            except _Enough:
                pass
        if self.inner not in given:
            return None
        X, Y = given[self.inner], outputs[self.inner]
        return Seen(X, Y, torch.zeros_like(Y) if self.place is None else total[0] - sum(outputs.values()))


def inputs_of(step: Runs, b: int, inner: str) -> Tensor | None:
    """What a linear is given in batch number b, flat over tokens, going no further; None if it is not called."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple) -> None:
        found.append(_flat(args[0]))
        raise _Enough

    with step.layer.get_submodule(inner).register_forward_pre_hook(hook):
        try:
            step.run(b)
        except _Enough:
            pass
    return found[0] if found else None


class _Enough(Exception):
    """The layer got as far as it was wanted."""


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten(0, -2).clone()  # code behind it may work in place


def _first(args: tuple, kwargs: dict) -> Tensor | None:
    """The first tensor that a module is called with."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _behind(step: Runs, inner: str, times: int) -> dict[str | None, Tensor]:
    """The first inputs of all modules that are called after the linear, whose output is so many times what it is.

    In the order of their calls, of as many numbers as the output has, flat over tokens; at "" what the layer returns,
    and at None what the linear does.
    """
    found: dict[str | None, Tensor] = {}

    def at_linear(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        found.setdefault(None, _flat(output))
        return output * times

    def at(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            value = _first(args, kwargs)
            if None in found and value is not None and value.dim() > 1 and value.numel() == found[None].numel():
                found.setdefault(name, _flat(value))

        return hook

    with ExitStack() as stack:
        for name, module in step.layer.named_modules():
            if name == inner:
                stack.callback(module.register_forward_hook(at_linear).remove)
            elif name:
                stack.callback(module.register_forward_pre_hook(at(name), with_kwargs=True).remove)
        output = step.run(0)
    if None in found and output.numel() == found[None].numel():
        found.setdefault("", _flat(output))
    return found
