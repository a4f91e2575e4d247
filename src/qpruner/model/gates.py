"""A gate for every unit or layer of a model in memory or streamed: what one gives is multiplied, weights stay."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from qpruner.model.graph import Graph


@contextmanager
def gated(model: nn.Module, graph: Graph, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, inputs of the linears that read a unit are multiplied by its gate: at zero it is as good as removed.

    Stacked experts read their units where no module sees it; these go ungated.

    Args:
        gates: group -> (n_units,); groups without gates stay as they are. Gradients reach them.
    """
    readers = defaultdict(list)
    for name, gate in gates.items():
        for linear, table in graph.groups[name].consumers.items():
            if linear in graph.linears:
                readers[linear].append((gate, table))

    def hook_for(linear: str):
        def hook(module: nn.Module, args: tuple) -> tuple:
            columns = torch.ones(graph.linears[linear].d_in, dtype=args[0].dtype, device=args[0].device)
            for gate, table in readers[linear]:
                each = gate.to(columns).repeat_interleave(table.shape[1])
                columns = columns * torch.ones_like(columns).index_put((table.flatten().to(columns.device),), each)
            return args[0] * columns, *args[1:]

        return hook

    with ExitStack() as stack:
        for linear in readers:
            stack.callback(model.get_submodule(linear).register_forward_pre_hook(hook_for(linear)).remove)
        yield


@contextmanager
def skippable(model: nn.Module, gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, what a decoder layer adds to the hidden states is multiplied by its gate: at zero they pass it by.

    Args:
        gates: path of a decoder layer -> (); other layers stay as they are. Gradients reach them.
    """

    def hook_for(gate: Tensor):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output):
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            share = gate.to(after)
            # At one and at zero exactly what a layer that stays and one that goes give.
            mixed = after * share + before * (1 - share)
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        return hook

    with ExitStack() as stack:
        for path, gate in gates.items():
            hook = model.get_submodule(path).register_forward_hook(hook_for(gate), with_kwargs=True)
            stack.callback(hook.remove)
        yield
