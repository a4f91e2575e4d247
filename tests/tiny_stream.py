"""A model in memory, taken apart so that it can be streamed."""

from torch import Tensor, nn

from qpruner.model.skeleton import build_skeleton
from qpruner.model.stream import Stream


class Held:
    """The tensors of a model in memory, given out as copies."""

    def __init__(self, model: nn.Module):
        self.state, self.bytes_read = model.state_dict(), 0
        self.names: list[str] = []  # as they were asked for

    def read(self, name: str) -> Tensor:
        self.names.append(name)
        self.bytes_read += self.state[name].nbytes
        return self.state[name].detach().clone()


def streamed(model: nn.Module, **options) -> Stream:
    dtype = next(model.parameters()).dtype
    return Stream(build_skeleton(model.config), Held(model), **(dict(dtype=dtype) | options))
