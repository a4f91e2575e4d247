"""Gram matrices of the inputs of linears, one decoder layer at a time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from qpruner.math.gram import add_gram_
from qpruner.model.graph import Graph
from qpruner.model.scratch import Scratch
from qpruner.model.stream import OnLayer, Results
from qpruner.model.whole import Streamable


def measure_grams(
    stream: Streamable,
    graph: Graph,
    linears: Iterable[str],
    windows: Tensor,
    *,
    scratch: Scratch,
    batch_size: int = 1,
    on_layer: OnLayer | None = None,
) -> Results:
    """For every layer: name of a linear -> X^T X over all tokens of the windows, (d_in, d_in) float64.

    One layer's matrices are in memory at a time; with a scratch on disk they lie there until they are asked for, and as
    long as the scratch is not cleared.

    Args:
        windows: (n, length) token ids.
    """
    wanted = frozenset(linears)

    @contextmanager
    def watch(layer: int) -> Iterator[Callable[[], dict[str, Tensor]]]:
        sites = [site for site in graph.linears.values() if site.layer == layer and site.name in wanted]
        grams = {
            site.name: torch.zeros(site.d_in, site.d_in, dtype=torch.float64, device=stream.device) for site in sites
        }

        def hook_for(name: str):
            def hook(module: nn.Module, args: tuple) -> None:
                add_gram_(grams[name], args[0].detach().flatten(0, -2))

            return hook

        with ExitStack() as stack:
            for name in grams:
                module = stream.model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(hook_for(name)).remove)
            yield lambda: grams

    return stream.forward(windows, scratch, batch_size=batch_size, watch=watch, on_layer=on_layer)
