"""What each unit's output tells about the model's prediction: QPruner's layer importance, measured by hooks.

For a whole decoder layer the output is its residual update, what it adds to its input; for fused linears it is their
outputs side by side. The prediction is the teacher-forced argmax token, in classes (see `qpruner.math.information`).
Outputs are projected onto principal directions found in the first window and sampled as they pass by, so that only
(positions, RANK) numbers per unit are ever kept.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from qpruner.math import information as mi
from qpruner.model.graph import Graph
from qpruner.model.scratch import Scratch
from qpruner.model.stage import bare
from qpruner.model.stream import OnLayer, Watch
from qpruner.model.whole import Streamable

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
    """Collects sampled, projected outputs of one unit, window after window."""

    def __init__(self, rank: int, positions: list[Tensor], n_sources: int):
        self._rank, self._positions, self._n_sources = rank, positions, n_sources
        self._parts: dict[str, Tensor] = {}
        self._rows: list[Tensor] = []
        self._basis: Tensor | None = None

    def add(self, source: str, output: Tensor) -> None:
        at = self._positions[len(self._rows)].to(output.device)
        self._parts[source] = output.detach().flatten(0, -2)[at].float()  # one window: rows are positions
        if len(self._parts) == self._n_sources:
            rows = torch.cat([self._parts[s] for s in sorted(self._parts)], dim=1)
            if self._basis is None:
                rank = min(self._rank, len(rows) - 1, rows.shape[1])
                self._basis = mi.principal_projection(rows, rank)
            self._rows.append(rows @ self._basis)
            self._parts = {}

    def matrix(self) -> Tensor:
        return torch.cat(self._rows)


def outputs_watch(stream: Streamable, units: tuple[BitUnit, ...], rank: int, positions: list[Tensor]) -> Watch:
    @contextmanager
    def watch(layer: int) -> Iterator[Callable[[], dict[str, Tensor]]]:
        inside = [unit for unit in units if unit.layer == layer]
        sources = lambda unit: 1 if unit.module is not None else len(unit.linears)
        outputs = {unit.name: _Outputs(rank, positions, sources(unit)) for unit in inside}

        def update_of(unit: BitUnit):
            def hook(module, args, kwargs, result) -> None:
                before = args[0] if args else kwargs["hidden_states"]
                outputs[unit.name].add(unit.name, bare(result) - before)

            return hook

        def output_of(unit: BitUnit, linear: str):
            return lambda module, args, result: outputs[unit.name].add(linear, result)

        with ExitStack() as stack:
            for unit in inside:
                if unit.module is not None:
                    module = stream.model.get_submodule(unit.module)
                    stack.callback(module.register_forward_hook(update_of(unit), with_kwargs=True).remove)
                else:
                    for linear in unit.linears:
                        module = stream.model.get_submodule(linear)
                        stack.callback(module.register_forward_hook(output_of(unit, linear)).remove)
            yield lambda: {name: found.matrix() for name, found in outputs.items()}

    return watch


def measure_information(
    stream: Streamable,
    units: tuple[BitUnit, ...],
    windows: Tensor,
    *,
    estimator: str,
    seed: int,
    scratch: Scratch,
    on_layer: OnLayer | None,
) -> list[dict]:
    """For each unit, in order: `unit`, `layer`, `nats`, `null_mean`, `null_std`, `z`.

    Args:
        windows: (n, length) token ids; position 0 of each is left out.
        estimator: `gaussian` or `binned`.
    """
    generator = torch.Generator().manual_seed(seed)
    per_window = min(windows.shape[1] - 1, POSITIONS_PER_WINDOW)
    draw = lambda: 1 + torch.randperm(windows.shape[1] - 1, generator=generator)[:per_window].sort().values
    positions = [draw() for _ in windows]
    watch = outputs_watch(stream, units, RANK if estimator == "gaussian" else BINNED_RANK, positions)
    results = stream.forward(windows, scratch, watch=watch, on_layer=on_layer)
    outputs = {name: rows for result in results for name, rows in result.items()}
    predictions = [
        logits[0, at.to(logits.device)].argmax(-1).cpu()
        for logits, at in zip(stream.logits(windows, scratch), positions, strict=True)
    ]
    Y = mi.prediction_classes(torch.cat(predictions), CLASSES)
    estimate, prepared = mi.binned, lambda X: X
    if estimator == "gaussian":
        Y = mi.whitened(mi.one_hot(Y))
        estimate, prepared = mi.canonical, mi.whitened
    measured = []
    for unit in units:
        found = mi.with_null(estimate, prepared(outputs[unit.name].double()), Y, generator=generator)
        measured.append({"unit": unit.name, "layer": unit.layer, **asdict(found)})
    return measured
