"""The model's own forward without its decoder layers: what comes before them, and what comes after.

Every layer stands in for itself, so masks, rotary tables and whatever else an architecture computes around its layers
stay its own business.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qpruner.errors import ModelError
from qpruner.model.residence import Residence

Arguments = tuple[tuple, dict[str, Any]]  # of a layer's call, with HIDDEN in the place of its hidden states
HIDDEN = object()


class Stage:
    """A model whose layers can be called by hand. Final."""

    def __init__(self, model: nn.Module, layers: list[nn.Module], residence: Residence, device: torch.device):
        self._model, self._layers, self._residence, self._device = model, layers, residence, device
        self._as_returned: Callable[[Tensor], Any] | None = None  # hidden states -> what a layer returns; learned once

    def before(self, ids: Tensor) -> tuple[Tensor, list[Arguments]]:
        """Of one batch: the hidden states that reach the first layer, and the other arguments of every layer."""
        if self._as_returned is None:
            self._learn_what_is_returned(ids[:1])
        first, found = [], []

        def note(i: int, args: tuple, kwargs: dict):
            hidden, arguments = without_hidden(args, kwargs)
            if first and hidden is not first[0] and not torch.equal(hidden, first[0]):
                raise ModelError(
                    f"{type(self._model).__name__} changes hidden states between its decoder layers {i - 1} and {i}, "
                    "so they cannot run one at a time. It has to fit in memory."
                )
            first.append(hidden)
            found.append(arguments)
            if i + 1 == len(self._layers):
                raise _FarEnough
            return self._as_returned(hidden)

        self._up_to(note, ids)
        if len(found) != len(self._layers):
            raise ModelError(
                f"{type(self._model).__name__} called {len(found)} of its {len(self._layers)} decoder layers, so they "
                "cannot run one at a time."
            )
        return first[0], found

    def after(self, ids: Tensor, hidden: Tensor, *, labels: Tensor | None = None):
        """The model's output for the hidden states that its last layer returns. The embedding is not looked at."""
        last, embedding = len(self._layers) - 1, self._model.get_input_embeddings()
        like = dict(dtype=hidden.dtype, device=self._device)
        blank = lambda found: torch.zeros(*found.shape, embedding.embedding_dim, **like)

        def pass_on(i: int, args: tuple, kwargs: dict):
            return self._as_returned(hidden if i == last else without_hidden(args, kwargs)[0])

        try:
            embedding.forward = blank
            with self._standing_in(pass_on):
                return self._model(input_ids=ids.to(self._device), labels=labels, use_cache=False)
        finally:
            del embedding.forward

    def run(self, i: int, hidden: Tensor, arguments: Arguments) -> Tensor:
        """One layer, whose weights are in memory."""
        args, kwargs = arguments
        given = lambda value: hidden if value is HIDDEN else value
        return bare(self._layers[i](*map(given, args), **{key: given(value) for key, value in kwargs.items()}))

    def _learn_what_is_returned(self, ids: Tensor) -> None:
        """Hidden states bare, or in a tuple: seen on the first layer at work."""
        calls = []

        def note(i: int, args: tuple, kwargs: dict):
            calls.append((args, kwargs))
            raise _FarEnough

        self._up_to(note, ids)
        args, kwargs = calls[0]
        with torch.no_grad():
            for _, layer in self._residence.layers([0]):
                output = layer(*args, **kwargs)
        before, after = without_hidden(args, kwargs)[0], bare(output)
        if before.shape != after.shape or len(before) != 1:
            raise ModelError(
                f"the decoder layers of {type(self._model).__name__} do not return hidden states in the shape in which "
                "they take them, one row per window, so they cannot run one at a time. It has to fit in memory."
            )
        wrapped = isinstance(output, tuple | list)
        self._as_returned = (lambda h: (h, *output[1:])) if wrapped else (lambda h: h)

    def _up_to(self, stand_in: Callable[[int, tuple, dict], Any], ids: Tensor) -> None:
        with self._residence.ends("before"), self._standing_in(stand_in), torch.no_grad():
            try:
                self._model(input_ids=ids.to(self._device), use_cache=False)
            except _FarEnough:
                pass

    @contextmanager
    def _standing_in(self, stand_in: Callable[[int, tuple, dict], Any]) -> Iterator[None]:
        """Within, decoder layers do not run; what `stand_in` makes of their arguments is what they return."""
        try:
            for i, layer in enumerate(self._layers):
                layer.forward = lambda *args, _i=i, **kwargs: stand_in(_i, args, kwargs)
            yield
        finally:
            for layer in self._layers:
                layer.__dict__.pop("forward", None)


class _FarEnough(Exception):
    """The model's forward got as far as it was wanted."""


def bare(output: Any) -> Tensor:
    """The hidden states in what a decoder layer returns."""
    return output[0] if isinstance(output, tuple | list) else output


def without_hidden(args: tuple, kwargs: dict) -> tuple[Tensor, Arguments]:
    """A layer's hidden states, which come first, and its arguments with HIDDEN in their place."""
    if args:
        return args[0], ((HIDDEN, *args[1:]), kwargs)
    return kwargs["hidden_states"], (args, kwargs | {"hidden_states": HIDDEN})


def shared(found: Any, known: Any) -> Any:
    """`found`, with every tensor in it that equals the one of `known` replaced by that."""
    if isinstance(found, Tensor):
        same = isinstance(known, Tensor) and found.shape == known.shape and torch.equal(found, known)
        return known if same else found
    if isinstance(found, tuple | list) and isinstance(known, type(found)) and len(found) == len(known):
        return type(found)(shared(f, k) for f, k in zip(found, known, strict=True))
    if isinstance(found, dict) and isinstance(known, dict):
        return {key: shared(value, known.get(key)) for key, value in found.items()}
    return found
