"""The same model with its hidden states in another basis: every tensor that touches them is turned as it is read.

reads     h -> norm -> W         W diag(g) Q, once the norm's own weight g has gone into it
writes    h + W x                Q^T W, and Q^T b
norms     g -> 1, b -> Q^T (b / g)
tables    embedding rows, learned positions        E Q
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qpruner.errors import ModelError
from qpruner.math.rotation import Rotation, along
from qpruner.model.tensors import Tensors


@dataclass(frozen=True)
class Norm:
    """Tensors of a norm, by name. Its gain is the weight plus `offset`: some models store how far it is from one."""

    weight: str
    bias: str | None
    offset: float

    @property
    def neutral(self) -> float:
        return 1 - self.offset


@dataclass(frozen=True)
class Turn:
    """What becomes of which tensor, by its name.

    reads: dimension of the hidden states, and the path of the norm in between. writes: the dimension. norms: by path.
    """

    width: int
    norms: dict[str, Norm] = field(default_factory=dict)
    reads: dict[str, tuple[int, str | None]] = field(default_factory=dict)
    writes: dict[str, int] = field(default_factory=dict)


class Rotated:
    """Tensors of a model whose hidden states are turned; computed in float64, given in float32 at least. Final."""

    def __init__(self, tensors: Tensors, turn: Turn, seed: int):
        self._tensors, self._turn, self._rotation = tensors, turn, Rotation.of(turn.width, seed)
        self._weights = {norm.weight: norm for norm in turn.norms.values()}
        self._biases = {norm.bias: norm for norm in turn.norms.values() if norm.bias}

    @property
    def bytes_read(self) -> int:
        return self._tensors.bytes_read

    def read(self, name: str) -> Tensor:
        tensor = self._tensors.read(name)
        if name in self._weights:
            return torch.full_like(tensor, self._weights[name].neutral)
        reads, writes = self._turn.reads.get(name), self._turn.writes.get(name)
        if not (reads or writes is not None or name in self._biases):
            return tensor
        turned = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if reads:
            dim, norm = reads
            if norm is not None:
                shape = [-1 if d == dim else 1 for d in range(turned.dim())]
                turned = turned * self._gain(self._turn.norms[norm]).to(turned).view(shape)
            turned = along(turned, self._rotation, dim)
        if writes is not None:
            turned = along(turned, self._rotation, writes)
        if name in self._biases:
            turned = self._bias(turned, self._biases[name])
        return turned

    def _gain(self, norm: Norm) -> Tensor:
        return self._tensors.read(norm.weight).double() + norm.offset

    def _bias(self, bias: Tensor, norm: Norm) -> Tensor:
        gain = self._gain(norm)
        if (lost := (gain == 0) & (bias != 0)).any():
            raise ModelError(
                f"{norm.weight!r} is zero for {int(lost.sum())} channel(s) to which {norm.bias!r} adds something: they "
                "have no place in rotated hidden states. Leave 'rotate' out of transforms."
            )
        return self._rotation(bias.double() / torch.where(gain == 0, 1, gain)).to(bias.dtype)
