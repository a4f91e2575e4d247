"""What each unit's output tells about the model's prediction: QPruner's layer importance, measured by hooks.

For a whole decoder layer the output is its residual update, what it adds to its input; for fused linears it is their
outputs side by side. The prediction is the teacher-forced argmax token, in classes (see `qpruner.math.information`).
Outputs are projected onto principal directions found in the first window and sampled as they pass by, so that only
(positions, RANK) numbers per unit are ever kept.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from qpruner.math import information as mi
from qpruner.model.graph import Graph

RANK = 64  # principal directions of an output that the Gaussian estimator sees
BINNED_RANK = 8  # coordinates that are binned one by one
POSITIONS_PER_WINDOW = 256
CLASSES = 32


@dataclass(frozen=True)
class BitUnit:
    """Linears that share one choice of bits. module: the decoder layer, for a unit that is a whole layer."""

    name: str
    layer: int
    linears: tuple[str, ...]
    module: str | None


def bit_units(graph: Graph, kind: str) -> tuple[BitUnit, ...]:
    """`layer`: one unit per decoder layer; `projection`: one per fused set of linears."""
    if kind == "projection":
        return tuple(BitUnit(p.name, p.layer, p.linears, None) for p in graph.projections)
    by_layer = {
        index: tuple(n for n, s in graph.linears.items() if s.layer == index) for index in range(len(graph.layers))
    }
    return tuple(BitUnit(name, i, by_layer[i], name) for i, name in enumerate(graph.layers) if by_layer[i])


class _Outputs:
    """Collects sampled, projected outputs of one unit over the windows."""

    def __init__(self, rank: int):
        self._rank, self._parts, self._rows, self._basis = rank, {}, [], None

    def add(self, source: str, output: Tensor, positions: Tensor, n_sources: int) -> None:
        self._parts[source] = output.detach().flatten(0, -2)[positions].float()  # one window: rows are positions
        if len(self._parts) == n_sources:
            rows = torch.cat([self._parts[s] for s in sorted(self._parts)], dim=1)
            if self._basis is None:
                rank = min(self._rank, len(rows) - 1, rows.shape[1])
                self._basis = mi.principal_projection(rows, rank)
            self._rows.append(rows @ self._basis)
            self._parts = {}

    def matrix(self) -> Tensor:
        return torch.cat(self._rows).double()


@torch.no_grad()
def measure_information(
    model: nn.Module,
    units: tuple[BitUnit, ...],
    windows: Tensor,
    *,
    estimator: str,
    seed: int,
    on_batch: Callable[[int, int], None],
) -> list[dict]:
    """For each unit, in order: `unit`, `layer`, `nats`, `null_mean`, `null_std`, `z`.

    Args:
        windows: (n, length) token ids; position 0 of each is left out.
        estimator: `gaussian` or `binned`.
    """
    generator = torch.Generator().manual_seed(seed)
    outputs = {unit.name: _Outputs(RANK if estimator == "gaussian" else BINNED_RANK) for unit in units}
    per_window = min(windows.shape[1] - 1, POSITIONS_PER_WINDOW)
    positions = torch.arange(0)
    handles = []

    def watch_layer(unit: BitUnit):
        def hook(module, args, kwargs, result):
            before = args[0] if args else kwargs["hidden_states"]
            after = result[0] if isinstance(result, tuple) else result
            outputs[unit.name].add(unit.name, after - before, positions, 1)

        handles.append(model.get_submodule(unit.module).register_forward_hook(hook, with_kwargs=True))

    def watch_linear(unit: BitUnit, linear: str):
        def hook(module, args, result):
            outputs[unit.name].add(linear, result, positions, len(unit.linears))

        handles.append(model.get_submodule(linear).register_forward_hook(hook))

    predictions = []
    try:
        for unit in units:
            if unit.module is not None:
                watch_layer(unit)
            else:
                for linear in unit.linears:
                    watch_linear(unit, linear)
        for i, window in enumerate(windows):
            positions = 1 + torch.randperm(windows.shape[1] - 1, generator=generator)[:per_window].sort().values
            logits = model(input_ids=window[None].to(model.device), use_cache=False).logits
            predictions.append(logits[0, positions].argmax(-1).cpu())
            on_batch(i + 1, len(windows))
    finally:
        for handle in handles:
            handle.remove()

    Y = mi.prediction_classes(torch.cat(predictions), CLASSES)
    estimate, prepared = mi.binned, lambda X: X
    if estimator == "gaussian":
        Y = mi.whitened(mi.one_hot(Y))
        estimate, prepared = mi.canonical, mi.whitened
    measured = []
    for unit in units:
        found = mi.with_null(estimate, prepared(outputs[unit.name].matrix()), Y, generator=generator)
        measured.append({"unit": unit.name, "layer": unit.layer, **asdict(found)})
    return measured
