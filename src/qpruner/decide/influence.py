"""How much a decoder layer changes the hidden states: what a model loses with the whole layer (ShortGPT)."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from qpruner.decide.saliences import batch_of
from qpruner.model.scratch import Scratch
from qpruner.model.skeleton import decoder_layers
from qpruner.model.stage import bare, without_hidden
from qpruner.model.stream import OnLayer
from qpruner.model.whole import Streamable

INFLUENCE = "influence"


def block_influence(stream: Streamable, windows: Tensor, scratch: Scratch, on_layer: OnLayer | None = None) -> Tensor:
    """1 - mean over tokens of cos(hidden states before a layer, after it), (n_layers,) float64, from 0 to 2.

    Args:
        windows: (n, length) token ids.
    Source: arXiv:2403.03853, Block Influence.
    """
    paths = decoder_layers(stream.model)

    @contextmanager
    def watch(layer: int) -> Iterator[Callable[[], dict[str, Tensor]]]:
        before: list[Tensor] = []
        likeness = torch.zeros(2, dtype=torch.float64)  # its sum over tokens, and their number

        def arrive(module: nn.Module, args: tuple, kwargs: dict) -> None:
            # a copy, before the layer is at work: it may add to its hidden states in place
            before.append(normalize(without_hidden(args, kwargs)[0].detach().double(), dim=-1))

        def leave(module: nn.Module, args: tuple, output) -> None:
            cosines = (before.pop() * normalize(bare(output).detach().double(), dim=-1)).sum(-1)
            likeness.add_(torch.tensor([cosines.sum().item(), cosines.numel()], dtype=torch.float64))

        with ExitStack() as stack:
            module = stream.model.get_submodule(paths[layer])
            stack.callback(module.register_forward_pre_hook(arrive, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
            yield lambda: {INFLUENCE: 1 - likeness[0] / likeness[1]}

    results = stream.forward(windows, scratch, batch_size=batch_of(windows), watch=watch, on_layer=on_layer)
    return torch.stack([result[INFLUENCE] for result in results])
