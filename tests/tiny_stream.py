"""A model in memory, taken apart so that it can be streamed."""

from torch import nn

from qpruner.model.skeleton import build_skeleton
from qpruner.model.stream import Stream
from qpruner.testing.tiny import Held


def streamed(model: nn.Module, **options) -> Stream:
    dtype = next(model.parameters()).dtype
    return Stream(build_skeleton(model.config), Held(model), **(dict(dtype=dtype) | options))
