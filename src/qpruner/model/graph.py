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
class Stack:
    """Linear layers of equal size that share one 3-D parameter, one for each expert of a mixture.

    name: path of the parameter. Row r of expert e has the number e * d_out + r in index tables, columns likewise.
    transposed: stored as (n_experts, d_in, d_out). bias: path of a parameter of (n_experts, d_out), if there is one.
    """

    name: str
    layer: int
    n_experts: int
    d_out: int
    d_in: int
    transposed: bool = False
    bias: str | None = None


Kind = Literal["kv_group", "query_head", "channel", "expert", "residual"]


@dataclass(frozen=True)
class Group:
    """Units that can be removed one by one; unit u is row u of every index table below.

    Removing unit u deletes rows producers[p][u] of every producer p and columns consumers[c][u] of every consumer c.
    The model changes exactly as if those input columns of the consumers were set to zero.

    kind
        kv_group    mixes tokens: query heads with the key/value head they share
        query_head  one query head, in a block for each kv group: all groups keep equally many
        channel     of an MLP; of stacked experts in a block for each expert: all experts keep equally many
        expert      of a mixture: what is removed is never routed to
        residual    a channel of the hidden states, all through the model; norms then see the channels that stay
    layer: -1 for a group of the whole model.
    module: path of the smallest module that contains every producer and consumer.
    n_blocks: units come in so many blocks of equal size, one after the other; every block keeps equally many.
    tensors: other parameters and buffers that lose slices with a unit, such as the weights of norms. Of whole experts
        the stacks are among them: they lose all rows and columns of a unit as one slice.
    at_least: units that have to stay, such as the experts that a token is sent to.
    """

    name: str
    layer: int
    kind: Kind
    module: str
    producers: dict[str, Tensor]  # linear or stack -> (n_units, rows per unit), int64, ascending within a unit
    consumers: dict[str, Tensor]  # linear or stack -> (n_units, columns per unit), int64, ascending within a unit
    n_blocks: int = 1
    # name -> dimension, (n_units, slices per unit)
    tensors: dict[str, tuple[int, Tensor]] = field(default_factory=dict)
    at_least: int = 1

    @property
    def n_units(self) -> int:
        tables = (*self.consumers.values(), *self.producers.values(), *(table for _, table in self.tensors.values()))
        return len(tables[0])


@dataclass(frozen=True)
class EmbeddingSite:
    """A matrix outside the decoder layers that has a row for every token.

    name: path of the module that stores it. looked_up: it is the embedding. heads: other paths of linears that multiply
    with the very same matrix.
    """

    name: str
    n_rows: int
    width: int
    looked_up: bool = True
    heads: tuple[str, ...] = ()


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
    stacks: every 3-D parameter of stacked experts inside the decoder layers.
    embeddings: the embedding and the head, if they can be stored in codes; one where they are tied.
    unreached: rows of a linear that no consumer was seen to depend on; they are never removed.
    notes: sentences for a person about what cannot be pruned and why.
    exchanges: sentences about what decoder layers read of each other besides hidden states; empty for most models.
    """

    layers: tuple[str, ...]
    linears: dict[str, LinearSite]
    groups: dict[str, Group]
    projections: tuple[Projection, ...]
    stacks: dict[str, Stack] = field(default_factory=dict)
    embeddings: dict[str, EmbeddingSite] = field(default_factory=dict)
    unreached: dict[str, tuple[int, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    exchanges: tuple[str, ...] = ()
