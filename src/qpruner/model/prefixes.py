"""Hidden states that may be wanted again: of the last few models that were tried, by all that they depend on."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

Batch = tuple[int, int]  # number of the first window, windows


class Prefixes:
    """What reached a layer, known by a key for everything before it. Final.

    Those that were not used for the longest go first. Where those of two models would not fit, only every so manieth
    layer's are kept.
    """

    def __init__(self, limit_bytes: int, n_layers: int):
        self._limit, self._n_layers, self._held = limit_bytes, n_layers, 0
        self._states: OrderedDict[tuple[str, Batch], Tensor] = OrderedDict()

    def deepest(self, keys: Sequence[str], batches: Sequence[Batch]) -> int | None:
        """The last of the keys that is known for all batches; None if none of them is."""
        there = lambda key: all((key, batch) in self._states for batch in batches)
        found = next((i for i in reversed(range(len(keys))) if there(keys[i])), None)
        for key in keys[: 0 if found is None else found + 1]:  # they belong together, so they go together
            for batch in batches:
                if (key, batch) in self._states:
                    self._states.move_to_end((key, batch))
        return found

    def get(self, key: str, batch: Batch) -> Tensor:
        """Not to be changed."""
        return self._states[key, batch]

    def put(self, layer: int, key: str, batches: Sequence[Batch], states: Sequence[Tensor]) -> None:
        """What reaches this layer."""
        size = sum(state.nbytes for state in states)
        if layer % self._stride(size) or size > self._limit:
            return
        for batch, state in zip(batches, states, strict=True):
            if (key, batch) not in self._states:
                self._states[key, batch] = state
                self._held += state.nbytes
        while self._held > self._limit:
            self._held -= self._states.popitem(last=False)[1].nbytes

    def _stride(self, size: int) -> int:
        return max(1, -(-2 * (self._n_layers + 1) * size // max(self._limit, 1)))
