"""A plan carried out layer by layer: what its artifact stores, one tensor after the other, from a model of any size."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from qpruner.do import starts
from qpruner.do.quantize import made
from qpruner.model import adapters
from qpruner.model.checkpoint import TORCH_DTYPES
from qpruner.model.cost import TensorSpec
from qpruner.model.graph import Graph
from qpruner.model.scratch import Scratch
from qpruner.model.tensors import Stored
from qpruner.model.whole import Streamable
from qpruner.plan import Plan


class LayerByLayer:
    """For plans whose adapters, if there are any, stay as LoftQ starts them. Final.

    stream: the pruned model. expected: the tensors of the weights file. scratch: keeps the layers that were quantized.
    codes: what the quantized linears store, where that is known; otherwise weights are rounded to nearest.
    adapter_state, errors: what was found on the way, once `tensors` is through.
    """

    def __init__(
        self,
        stream: Streamable,
        graph: Graph,
        plan: Plan,
        expected: Mapping[str, TensorSpec],
        scratch: Scratch,
        codes: Stored | None = None,
    ) -> None:
        self._stream, self._graph, self._plan, self._expected = stream, graph, plan, expected
        self._scratch, self._codes = scratch, codes
        self.adapter_state: dict[str, Tensor] = {}
        self.errors: dict[str, tuple[float, float]] = {}

    def tensors(
        self, adapter_dtype: torch.dtype, on_layer: Callable[[int, int], None] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the weights file, under its name, in its dtype."""
        yield from self._inside(adapter_dtype, on_layer)
        inside = tuple(f"{path}." for path in self._graph.layers)
        for name in self._expected:
            if not name.startswith(inside):
                yield name, self._as_stored(name, self._stream.tensors.read(name))

    def _as_stored(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.to(TORCH_DTYPES[self._expected[name][0]])

    def _inside(
        self, adapter_dtype: torch.dtype, on_layer: Callable[[int, int], None] | None
    ) -> Iterator[tuple[str, Tensor]]:
        n_layers = self._stream.n_layers
        packs = any(spec.bits < 16 for spec in self._plan.specs.values())
        done = [i for i in range(n_layers) if packs and self._scratch.finished(f"quantized-{i}")]
        for i in done:
            yield from self._read(i)
        for i, layer in self._stream.layers([i for i in range(n_layers) if i not in done]):
            if packs:
                self._scratch.finish(f"quantized-{i}", self._quantized(i, layer, adapter_dtype))
                yield from self._read(i)
            else:
                yield from self._quantized(i, layer, adapter_dtype).items()
            if on_layer is not None:
                on_layer(i + 1, n_layers)

    def _read(self, i: int) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._scratch.result(f"quantized-{i}").items():
            kind, _, linear = name.partition(":")
            if kind == "errors":
                self.errors[linear] = tuple(tensor.tolist())
            elif kind == "adapter":
                self.adapter_state[linear] = tensor
            else:
                yield name, tensor

    def _quantized(self, i: int, layer: nn.Module, adapter_dtype: torch.dtype) -> dict[str, Tensor]:
        """The layer's tensors by name; adapters and errors under names with a colon."""
        path = self._graph.layers[i]
        found = {f"{path}.{name}": tensor for name, tensor in layer.state_dict().items()}
        others = {}
        for name, site in self._graph.linears.items():
            if site.layer != i:
                continue
            dense, spec = layer.get_submodule(name.removeprefix(f"{path}.")), self._plan.specs[name]
            candidate = made(dense, site, spec, self._plan, adapter_dtype, codes=self._codes)
            stands = candidate.layer
            if candidate.factors is not None:
                if self._plan.adapters == "merged":
                    change = starts.correction(self._plan, candidate.factors)
                    stands = adapters.merged(stands, change, ranges=self._plan.rounding.ranges)
                else:
                    named = zip(adapters.tensor_names(name), candidate.factors, strict=True)
                    others |= {f"adapter:{key}": tensor for key, tensor in named}
            if spec.bits < 16:
                found |= {f"{name}.{key}": t for key, t in stands.state_dict().items()}
                others[f"errors:{name}"] = torch.tensor([candidate.plain_error, candidate.error], dtype=torch.float64)
        return others | {name: self._as_stored(name, t) for name, t in found.items() if name in self._expected}
