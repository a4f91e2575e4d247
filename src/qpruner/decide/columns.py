"""How large the inputs of linears are, column by column: the diagonal of their Gram matrices, without the rest."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from qpruner.model.scratch import Scratch
from qpruner.model.skeleton import decoder_layers, linear_dims
from qpruner.model.stream import OnLayer
from qpruner.model.whole import Streamable


def mean_squares(stream: Streamable, windows: Tensor, *, on_layer: OnLayer | None = None) -> dict[str, Tensor]:
    """Linear of a decoder layer -> mean square of each input over all tokens, (d_in,) float64.

    Args:
        windows: (n, length) token ids.
    """
    layers = decoder_layers(stream.model)

    @contextmanager
    def watch(layer: int) -> Iterator[Callable[[], dict[str, Tensor]]]:
        path = layers[layer]
        sums: dict[str, Tensor] = {}

        def hook_for(name: str):
            def hook(module: nn.Module, args: tuple) -> None:
                squares = args[0].detach().flatten(0, -2).double().square().sum(0).cpu()
                sums[name] = squares + sums.get(name, 0)

            return hook

        with ExitStack() as stack:
            for name, module in stream.model.get_submodule(path).named_modules(prefix=path):
                if linear_dims(module):
                    stack.callback(module.register_forward_pre_hook(hook_for(name)).remove)
            yield lambda: {name: total / windows.numel() for name, total in sums.items()}

    results = stream.forward(windows, Scratch(), watch=watch, on_layer=on_layer)
    return {name: tensor for result in results for name, tensor in result.items()}
