"""Stacked experts that lost inputs: what each is given in the pruned model, and what the original makes of it.

Both models send a token to other experts once hidden states differ, so the original's own stream says nothing of what
an expert of the pruned model is asked. Inputs and targets are therefore taken from the pruned stream: the original's
mixture runs on what reaches that of the pruned model, and its products with the stack are noticed. Where whole experts
went, the original's router chooses among all of them, and those that stayed see the tokens that it sends to them.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from posixpath import commonpath

import torch
from torch import Tensor, nn

from qpruner.math.least_squares import Moments
from qpruner.model.graph import Graph, Stack
from qpruner.model.products import Answered, Matrix
from qpruner.model.stream import Step, Stream
from qpruner.model.surgery import bereft_stacks, remaining, remaining_slices


@dataclass(frozen=True)
class Reader:
    """A stack whose experts lost inputs, in its layer.

    inner, module: names in the layer, of the parameter and of the module that holds all that stacks beside it lost,
        so that nothing which goes into it was cut; None where the hidden states themselves were.
    experts: that stay. rows, columns: of each of them that stay, (experts that stay, n).
    """

    stack: Stack
    inner: str
    module: str | None
    experts: Tensor
    rows: Tensor
    columns: Tensor

    @property
    def path(self) -> str:
        """Inner name of the module that the stack belongs to; its attribute is the rest of `inner`."""
        return self.inner.rpartition(".")[0]

    @property
    def inner_bias(self) -> str:
        """Of the parameter, where the stack has one."""
        return f"{self.path}.{self.stack.bias.rpartition('.')[2]}"

    def matrix(self, stack: Tensor, expert: int) -> Tensor:
        """(d_out, d_in) of one expert, as a view of the original's stack or of what is left of it."""
        return stack[expert].T if self.stack.transposed else stack[expert]


def readers_of(graph: Graph, kept: Mapping[str, Sequence[int]], layer: int) -> dict[str, Reader]:
    """By inner name."""
    found, left, slices = {}, remaining(graph, kept), remaining_slices(graph, kept)
    path = graph.layers[layer] + "."
    cut = [group for group in graph.groups.values() if len(kept[group.name]) < group.n_units]
    for name, stack in bereft_stacks(graph, kept).items():
        if stack.layer != layer:
            continue
        rows, columns = (index.view(stack.n_experts, -1) for index in left[name])
        experts = dict(slices.get(name, ())).get(0, torch.arange(stack.n_experts))
        inner = name.removeprefix(path)
        beside = {other for other in graph.stacks if other.startswith(path + inner.partition(".")[0])}
        module = None
        if not any(group.kind == "residual" for group in cut):
            lost = joint(group.module for group in cut if beside & group.consumers.keys())
            module = f"{lost}.".removeprefix(path).removesuffix(".")
        left_of = (rows[experts] % stack.d_out, columns[experts] % stack.d_in)
        found[inner] = Reader(stack, inner, module, experts, *left_of)
    return found


def joint(paths: Iterable[str]) -> str:
    """The innermost module that contains these."""
    return commonpath([path.replace(".", "/") for path in paths]).replace("/", ".")


@contextmanager
def one_by_one(*streams: Stream) -> Iterator[None]:
    """Within, models compute their experts one after the other, each by its own matrix."""
    configs = [stream.model.config for stream in streams]
    before = [config._experts_implementation for config in configs]
    try:
        for config in configs:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._experts_implementation = implementation


def called(step: Step, module: str) -> str:
    """The innermost module from this one outwards that the layer calls; "" for the layer."""
    parts, seen = module.split(".") if module else [], set()
    outwards = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    with ExitStack() as stack:
        for name in outwards:
            note = lambda module, args, name=name: seen.add(name)
            stack.callback(step.layer.get_submodule(name).register_forward_pre_hook(note).remove)
        if outwards:
            step.run(0)
    return next((name for name in outwards if name in seen), "")


def moments_of(
    reader: Reader, place: str, theirs: Step, ours: Step, experts: Collection[int], n_fitted: int
) -> dict[int, tuple[Moments, Moments]]:
    """Of some of the experts that stay, by their number among them: of the first windows, and of those held out.

    An expert that no product was seen with has moments of no tokens.

    Args:
        place: inner name of the module that holds all that was cut, and is called.
    """
    stack = theirs.layer.get_parameter(reader.inner).detach()
    bias = None if reader.stack.bias is None else theirs.layer.get_parameter(reader.inner_bias).detach()
    (_, k), d_out = reader.columns.shape, reader.rows.shape[1]
    found = {e: (Moments(k, d_out, stack.device), Moments(k, d_out, stack.device)) for e in experts}
    number = {int(reader.experts[e]): e for e in experts}  # in the original -> among those that stay
    held_out = False

    def add(expert: int, x: Tensor) -> None:
        e = number.get(expert)
        if e is None or not len(x):
            return
        rows, columns = reader.rows[e].to(x.device), reader.columns[e].to(x.device)
        y = x @ reader.matrix(stack, expert)[rows].T
        found[e][held_out].add_(x[:, columns], y if bias is None else y + bias[expert, rows])

    def answer(matrix: Matrix, x: Tensor) -> Tensor:
        if matrix.expert is not None:
            add(matrix.expert, x.flatten(0, -2))
        elif bias is None:  # with one, tokens that an expert is handed but not asked about would count
            for expert, of in enumerate(x):
                add(expert, of)
        return x.new_zeros(*x.shape[:-1], matrix.d_out)  # nothing is made of what the mixture returns

    def run_theirs(module: nn.Module, args: tuple, kwargs: dict) -> None:
        with Answered(stack, answer):
            original(*args, **kwargs)

    original = theirs.layer.get_submodule(place)
    with ours.layer.get_submodule(place).register_forward_pre_hook(run_theirs, with_kwargs=True):
        for b, (first, _) in enumerate(ours.batches):
            held_out = first >= n_fitted
            ours.run(b)
    return found
