"""Products of activations with weights, as they are seen among the calls of torch that a model makes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)


@dataclass(frozen=True)
class Matrix:
    """A whole matrix of (d_out, d_in) in a parameter: of a stack that of one expert, or of them all if that is None.

    transposed: the parameter is stored as (..., d_in, d_out).
    """

    expert: int | None
    d_out: int
    d_in: int
    transposed: bool


def factors_of(func, args: Sequence, kwargs: dict) -> tuple[Tensor, Tensor, bool] | None:
    """Of a product: x, the weight, and whether outputs are the weight's rows; None for any other computation."""
    if func is F.linear:
        x, weight = (*args, *kwargs.values())[:2]
        return x, weight, True
    if func in MATMULS or func is torch.addmm:
        x, weight = args[1:3] if func is torch.addmm else args[:2]
        return x, weight, False
    return None


def matrix_of(weight: Tensor, by_row: bool, whole: Sequence[int]) -> Matrix | None:
    """Which matrix of a contiguous parameter, whose shape is `whole`, a view of it is; None for a part of one."""
    matrix = weight if by_row else weight.transpose(-1, -2)
    (*experts, d_out, d_in), (*jump, down, across) = matrix.shape, matrix.stride()
    *n_experts, first, second = whole
    if (d_out, d_in, down, across) == (first, second, second, 1):
        transposed = False
    elif (d_out, d_in, down, across) == (second, first, 1, second):
        transposed = True
    else:
        return None
    size, offset = first * second, matrix.storage_offset()
    if experts and (experts != n_experts or jump != [size]) or offset % size:
        return None
    return Matrix(None if experts else offset // size, d_out, d_in, transposed)


class Answered(TorchFunctionMode):
    """Within, products with matrices of a stack of experts are computed by `answer`, from the matrix and x.

    Biases that a call adds to its product are left out.
    """

    def __init__(self, stack: Tensor, answer: Callable[[Matrix, Tensor], Tensor]):
        super().__init__()
        self._stack, self._answer = stack, answer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if factors := factors_of(func, args, kwargs):
            x, weight, by_row = factors
            if self._is_of_stack(weight):
                matrix = matrix_of(weight, by_row, self._stack.shape)
                if matrix and (matrix.expert is not None or x.dim() == 3):
                    return self._answer(matrix, x)
        return func(*args, **kwargs)

    def _is_of_stack(self, weight: Tensor) -> bool:
        start = lambda tensor: tensor.untyped_storage().data_ptr()
        return isinstance(weight, Tensor) and 2 <= weight.dim() <= 3 and start(weight) == start(self._stack)
