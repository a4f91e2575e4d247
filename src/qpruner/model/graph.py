"""What is coupled to what in a model: the value that `discover` makes and everything after it reads.

Names are module paths in the model, as in `model.named_modules()`. Rows are outputs of a linear layer and columns its
inputs, whatever way its weight is stored (`Conv1D` keeps the transpose).
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class LinearSite:
    """One linear layer inside a decoder layer. `transposed`: the weight is stored as (d_in, d_out), as in Conv1D."""

    name: str
    layer: int
    d_out: int
    d_in: int
    bias: bool
    transposed: bool = False


@dataclass(frozen=True)
class Group:
    """Units that can be removed one by one; unit u is row u of every index table below.

    Removing unit u deletes rows producers[p][u] of every producer p and columns consumers[c][u] of every consumer c.
    The model changes exactly as if those input columns of the consumers were set to zero.

    kind: `kv_group` where the unit mixes tokens (query heads with the key/value head they share), else `channel`.
    module: path of the smallest module that contains every producer and consumer.
    """

    name: str
    layer: int
    kind: Literal["kv_group", "channel"]
    module: str
    producers: dict[str, Tensor]  # linear name -> (n_units, rows per unit), int64, ascending within a unit
    consumers: dict[str, Tensor]  # linear name -> (n_units, columns per unit), int64, ascending within a unit

    @property
    def n_units(self) -> int:
        return len(next(iter(self.consumers.values())))


@dataclass(frozen=True)
class Projection:
    """Linears that runtimes fuse: they read the same input and belong to the same group (q, k, v; gate, up)."""

    name: str
    layer: int
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """The coupled structure of a decoder.

    layers: module path of every decoder layer, in order.
    linears: every linear inside the decoder layers, in the model's order.
    unreached: rows of a linear that no consumer was seen to depend on; they are never removed.
    notes: sentences for a person about what cannot be pruned and why.
    """

    layers: tuple[str, ...]
    linears: dict[str, LinearSite]
    groups: dict[str, Group]
    projections: tuple[Projection, ...]
    unreached: dict[str, tuple[int, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
