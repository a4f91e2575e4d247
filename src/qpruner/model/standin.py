"""Weights that are not there. A model runs with them as ever, and every product with one is noticed.

A stand-in is a tensor on the meta device: it has a shape, strides and no values. Whatever a model makes of it by
indexing, transposing or viewing is a stand-in too, whose strides tell which part of the parameter it is: of stacked
experts, which expert, and which way round. A product with a whole matrix is reported and answered by a fresh leaf; in
any other computation made-up values take its place.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from qpruner.model.products import factors_of, matrix_of

CONVERSIONS = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone", "detach"}


@dataclass(frozen=True)
class Product:
    """x times a matrix of (d_out, d_in), one for each expert if `expert` is None.

    name: of the parameter's linear, or of the stack.
    n_experts: 0 for a linear.
    transposed: the parameter is stored as (..., d_in, d_out).
    """

    name: str | None
    x: Tensor
    n_experts: int
    expert: int | None
    d_out: int
    d_in: int
    transposed: bool


@dataclass(frozen=True)
class Origin:
    """The parameter that a stand-in is a view of.

    misread: told of computations that are no product with a whole matrix. They read `values`, or where those would be
    too large what `made_up` gives for a shape.
    """

    name: str | None
    shape: torch.Size
    answer: Callable[[Product], Tensor]
    misread: Callable[[str | None], None]
    values: Tensor | None
    made_up: Callable[[str | None, torch.Size], Tensor]

    def stand_in(self) -> "StandIn":
        return StandIn.view_of(torch.empty(self.shape, device="meta"), self)


class StandIn(Tensor):
    origin: Origin

    @classmethod
    def view_of(cls, view: Tensor, origin: Origin) -> "StandIn":
        made = view.as_subclass(cls)
        made.origin = origin
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if product := product_of(func, args, kwargs):
            return product[0].answer(product[1])
        if isinstance(args[0], cls):
            if func is Tensor.device.__get__:
                return torch.device("cpu")
            if getattr(func, "__name__", "") in CONVERSIONS:
                return args[0]
            if (viewed := view(func, args, kwargs)) is not NotImplemented:
                return viewed
        return func(*tree_map(filled, args), **tree_map(filled, kwargs))

    def filled(self) -> Tensor:
        """Values for a computation that is no product with a whole matrix."""
        self.origin.misread(self.origin.name)
        if self.origin.values is None:
            return self.origin.made_up(self.origin.name, self.shape)
        with torch._C.DisableTorchFunctionSubclass():
            return self.origin.values.as_strided(self.size(), self.stride(), self.storage_offset())


def filled(value):
    return value.filled() if isinstance(value, StandIn) else value


def view(func, args, kwargs):
    """What func gives if that is no computation: views, which are stand-ins, or numbers and shapes."""
    whole = args[0]
    rest = (args[1:], kwargs)
    if func is Tensor.__getitem__:  # an expert's number is often a tensor, by which meta tensors cannot be indexed
        rest = tree_map(lambda i: int(i) if isinstance(i, Tensor) and i.numel() == 1 and not i.dim() else i, rest)
    if any(isinstance(value, Tensor) for value in tree_leaves(rest)):
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        out = func(whole, *rest[0], **rest[1])
        storage = whole.untyped_storage()._cdata
        tensors = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        if not tensors:
            return out
        if any(t.untyped_storage()._cdata != storage for t in tensors):
            return NotImplemented
    return tree_map(lambda t: StandIn.view_of(t, whole.origin) if isinstance(t, Tensor) else t, out)


def product_of(func, args, kwargs) -> tuple[Origin, Product] | None:
    """The product that func computes, if it is one of x with a whole stand-in, or with that of an expert."""
    x, weight, by_row = factors_of(func, args, kwargs) or (None, None, False)
    if not isinstance(weight, StandIn) or isinstance(x, StandIn) or not 2 <= weight.dim() <= 3:
        return None
    name, whole = weight.origin.name, weight.origin.shape
    with torch._C.DisableTorchFunctionSubclass():
        matrix = matrix_of(weight, by_row, whole)
    if matrix is None or (matrix.expert is None and x.dim() != 3):
        return None
    n_experts = whole[0] if len(whole) == 3 else 0
    return weight.origin, Product(name, x, n_experts, matrix.expert, matrix.d_out, matrix.d_in, matrix.transposed)
