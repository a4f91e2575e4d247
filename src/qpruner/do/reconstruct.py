"""What pruning took is put back as far as a linear map can: linears that lost inputs are refitted, layer by layer.

The original and the pruned model walk side by side, one layer of each in memory. A linear is fitted to what the
original one put out, from the inputs that it gets behind everything that was refitted before it. Where it adds to the
hidden states, it is fitted to what makes their sum that of the original, so each repairs what came before (measured:
a fifth more of the lost loss comes back). Within a layer the linears are taken in the order in which the layer calls
them. The last part of the windows is held out: the damping that does best there is taken, or none of them, and what
ships is then fitted to all windows. Weights are rounded as they will be stored before the pruned model goes on.
"""

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from qpruner.do.junction import Junction
from qpruner.math.least_squares import Moments, Repair, repair, repairs, squared_error
from qpruner.model.graph import Graph, LinearSite
from qpruner.model.memory import REFIT_TOKENS
from qpruner.model.scratch import Scratch
from qpruner.model.stream import OnLayer, Results, Step, Stream
from qpruner.model.surgery import bereft, refill_, remaining
from qpruner.plan import Plan, Reconstruction

ROWS = "linears.json"  # beside the files of a finished reconstruction
FACTS = "facts:"  # before the name of a linear, in a layer's result
UNSEEN = [math.nan, 1.0, 1.0, 1.0, 0]  # facts of a linear that does not see every token


@dataclass(frozen=True)
class Refitted:
    """What became of one linear. Errors are squared, relative to what it should give, on the held-out windows.

    damping: of least squares; None for the others. condition: of the matrix that was solved; 1 where none was.
    error, error_sliced: with what the other windows ask for, and as the cut left it.
    tokens: it was fitted to; 0 where it does not see every token, as an expert, and stays sliced.
    """

    linear: str
    layer: int
    choice: Literal["least-squares", "bias", "sliced"]
    damping: float | None
    condition: float
    error_sliced: float
    error: float
    tokens: int


def reconstruct(
    original: Stream,
    pruned: Stream,
    graph: Graph,
    plan: Plan,
    windows: Tensor,
    *,
    dtype: torch.dtype,
    scratches: tuple[Scratch, Scratch],
    on_layer: OnLayer | None = None,
) -> Results:
    """For every layer of the pruned model: the tensors that change, by name, and facts that `facts_of` reads.

    Args:
        pruned: by the plan, added biases at zero.
        graph: of the model of the layers that stay, before the cuts.
        windows: (n, length) token ids, two at least.
        dtype: in which weights and biases will be stored.
        scratches: of the original and of the pruned model; an interrupted walk goes on after its last finished layer.
    """
    size = max(1, REFIT_TOKENS // windows.shape[1])
    number = dict(zip(plan.layers or range(original.n_layers), range(pruned.n_layers), strict=True))
    rows, sites = remaining(graph, plan.kept), bereft(graph, plan.kept)
    ours = pruned.steps(windows, scratches[1], batch_size=size, on_layer=on_layer)
    step = next(ours, None)
    for theirs in original.steps(windows, scratches[0], batch_size=size):
        if step is None:
            break  # of the original only layers are left that do not stay
        if number.get(theirs.index) != step.index:
            theirs.pass_all_on()
            theirs.finish({})
            continue
        path = graph.layers[step.index] + "."
        inside = {n.removeprefix(path): s for n, s in sites.items() if s.layer == step.index}
        kept_rows = {inner: rows[site.name][0] for inner, site in inside.items()}
        step.finish(_Layer(theirs, step, inside, kept_rows, windows, plan.reconstruction, dtype).refitted())
        theirs.finish({})
        step = next(ours, None)
    return pruned.results(scratches[1])


def facts_of(layer: int, result: Mapping[str, Tensor]) -> list[dict]:
    """Of every refitted linear of a layer: `Refitted` as JSON holds it."""
    found = []
    for key, tensor in sorted(result.items()):
        if key.startswith(FACTS):
            damping, condition, error_sliced, error, tokens = tensor.tolist()
            choice = "sliced" if math.isnan(damping) else "bias" if math.isinf(damping) else "least-squares"
            of = Refitted(
                linear=key.removeprefix(FACTS), layer=layer, choice=choice,
                damping=damping if choice == "least-squares" else None, condition=condition,
                error_sliced=error_sliced, error=error, tokens=int(tokens),
            )  # fmt: skip
            found.append(asdict(of))
    return found


def write_refitted(results: Iterable[Mapping[str, Tensor]], folder: Path) -> None:
    """One file of tensors for each layer that has some, and the facts of all linears."""
    rows = []
    for layer, result in enumerate(results):
        rows += facts_of(layer, result)
        if tensors := {name: tensor for name, tensor in result.items() if not name.startswith(FACTS)}:
            save_file(tensors, folder / f"{layer}.safetensors")
    (folder / ROWS).write_text(json.dumps(rows, indent=1) + "\n")


def read_facts(folder: Path) -> list[dict]:
    return json.loads((folder / ROWS).read_text())


class _Layer:
    """One layer of the original and of the pruned model, and the linears in it that lost inputs, by inner name."""

    def __init__(
        self,
        theirs: Step,
        ours: Step,
        sites: Mapping[str, LinearSite],
        rows: Mapping[str, Tensor],
        windows: Tensor,
        settings: Reconstruction,
        dtype: torch.dtype,
    ):
        self._theirs, self._ours, self._sites, self._rows = theirs, ours, sites, rows
        self._settings, self._dtype, self._length = settings, dtype, windows.shape[1]
        n = len(windows)
        self._fitted = n - min(n - 1, max(1, round(settings.held_out * n)))  # windows that are not held out

    def refitted(self) -> dict[str, Tensor]:
        """The layer's result; both models have gone on to the next."""
        result: dict[str, Tensor] = {}
        to_do = {inner: Junction.find(self._ours, inner) for inner in self._in_order()}
        while to_do:
            inner, junction = next(iter(to_do.items()))
            del to_do[inner]
            later = [name for name, other in to_do.items() if other.place == junction.place is not None]
            result |= self._refit(inner, junction, later)
        self._theirs.pass_all_on()
        self._ours.pass_all_on()
        return result

    def _in_order(self) -> list[str]:
        """The linears as the layer calls them, and then those that it does not call."""
        order: dict[str, None] = {}
        with ExitStack() as stack:
            for inner in self._sites:
                note = lambda module, args, inner=inner: order.setdefault(inner)
                stack.callback(self._ours.layer.get_submodule(inner).register_forward_pre_hook(note).remove)
            if self._sites:
                self._ours.run(0)
        return list(order | dict.fromkeys(self._sites))

    def _refit(self, inner: str, junction: Junction, later: list[str]) -> dict[str, Tensor]:
        """later: linears that join the same sum and are not refitted yet: their errors are theirs to make up for."""
        site, linear = self._sites[inner], self._ours.layer.get_submodule(inner)
        W = (linear.weight.T if site.transposed else linear.weight).detach()
        b = None if linear.bias is None else linear.bias.detach()
        if b is None and self._settings.method == "bias":
            return {}
        parts = self._moments(junction, later, W)
        found, facts = (None, UNSEEN) if parts is None else _chosen(W, b, *parts, self._settings)
        result = {FACTS + site.name: torch.tensor(facts, dtype=torch.float64)}
        changed: dict[str, Tensor] = {}
        if found is not None and math.isfinite(found.damping):
            changed["weight"] = (found.V.T if site.transposed else found.V).to(self._dtype)
        if b is not None and (found is not None or not site.bias):  # an added one is stored nowhere else
            changed["bias"] = (b if found is None else found.b).to(self._dtype)
        refill_(linear, **changed)
        return result | {f"{site.name}.{name}": tensor for name, tensor in changed.items()}

    def _moments(self, junction: Junction, later: list[str], W: Tensor) -> tuple[Moments, Moments] | None:
        """Of the windows that are fitted to, and of those held out; None if it does not see every token in both."""
        parts = [Moments(W.shape[1], W.shape[0], W.device) for _ in range(2)]
        kept = self._rows[junction.inner].to(W.device)
        for b, (first, rows) in enumerate(self._ours.batches):
            theirs, ours = (junction.look(step, b, later) for step in (self._theirs, self._ours))
            if theirs is None or ours is None or not len(theirs.X) == len(ours.X) == rows.numel():
                return None
            target = (theirs.Y + theirs.rest)[:, kept] - ours.rest
            border = min(max(0, self._fitted - first), len(rows)) * self._length
            for part, of in zip(parts, (slice(border), slice(border, None)), strict=True):
                part.add_(ours.X[of], target[of])
        return parts[0], parts[1]


def _chosen(
    W: Tensor, b: Tensor | None, fitted: Moments, held_out: Moments, settings: Reconstruction
) -> tuple[Repair | None, list[float]]:
    """The repair that does best on what is held out, fitted to all, or None where slicing does; and its facts."""
    bias = b is not None
    dampings = (*(settings.dampings if settings.method == "least-squares" else ()), math.inf)
    whole = max(float(held_out.yy), 1e-300)
    sliced = least = squared_error(W, b, held_out)
    best = None
    for found in repairs(W, fitted, dampings, bias=bias):
        error = squared_error(found.V, found.b, held_out)
        if error < least:
            best, least = found.damping, error
    fitted.join_(held_out)
    if best is None:
        return None, [math.nan, 1.0, sliced / whole, sliced / whole, fitted.n]
    final = repair(W, fitted, best, bias=bias)
    return final, [final.damping, final.condition or 1.0, sliced / whole, least / whole, fitted.n]
