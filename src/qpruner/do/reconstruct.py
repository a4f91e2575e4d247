"""What pruning took is put back as far as a linear map can: linears that lost inputs are refitted, layer by layer.

The original and the pruned model walk side by side, one layer of each in memory. A linear is fitted to what the
original one put out, from the inputs that it gets behind everything that was refitted before it. Where it adds to the
hidden states, it is fitted to what makes their sum that of the original, so each repairs what came before (measured:
a fifth more of the lost loss comes back). Within a layer the linears are taken in the order in which the layer calls
them. The last part of the windows is held out: the damping that does best there is taken, or none of them, and what
ships is then fitted to all windows. Weights are rounded as they will be stored before the pruned model goes on.

Of stacked experts each is fitted by itself to what the original makes of the tokens that it gets in the pruned model,
before other linears of its MLP. One that sees no token in either part of the windows stays as the cut left it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median_low
from typing import Literal

import torch
from torch import Tensor

from qpruner.do.experts import Reader, called, moments_of, one_by_one, readers_of
from qpruner.do.junction import Junction
from qpruner.do.walk import FACTS, in_order, n_fitted, side_by_side
from qpruner.math.least_squares import Moments, Repair, repair, repairs, squared_error
from qpruner.model.graph import Graph, LinearSite
from qpruner.model.memory import REFIT_TOKENS, Refit
from qpruner.model.scratch import Scratch
from qpruner.model.stream import OnLayer, Results, Step, Stream
from qpruner.model.surgery import bereft, refill_, remaining
from qpruner.plan import Plan, Reconstruction

UNSEEN = [math.nan, 1.0, 1.0, 1.0, 0]  # facts of a linear that does not see every token, or of experts never seen


@dataclass(frozen=True)
class Refitted:
    """What became of one linear or stack. Errors are squared, relative to what it should give, on held-out windows.

    damping: of least squares; None for the others. condition: of the matrix that was solved; 1 where none was.
    error, error_sliced: with what the other windows ask for, and as the cut left it.
    tokens: it was fitted to; 0 where it does not see every token and stays sliced.
    experts: of a stack, how many were refitted; None for a linear. The damping is then the median of theirs and the
        condition the largest, errors and tokens are summed up over all experts.
    """

    linear: str
    layer: int
    choice: Literal["least-squares", "bias", "sliced"]
    damping: float | None
    condition: float
    error_sliced: float
    error: float
    tokens: int
    experts: int | None = None


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
    border = n_fitted(len(windows), plan.reconstruction.held_out)
    settings = _Settings(plan.reconstruction, border, dtype, pruned.tensors.read)
    rows, sites = remaining(graph, plan.kept), bereft(graph, plan.kept)
    how = dict(border=border, tokens=REFIT_TOKENS, on_layer=on_layer)
    with one_by_one(original, pruned):
        for theirs, step in side_by_side(original, pruned, plan.layers, windows, scratches, **how):
            path = graph.layers[step.index] + "."
            inside = {n.removeprefix(path): s for n, s in sites.items() if s.layer == step.index}
            kept_rows = {inner: rows[site.name][0] for inner, site in inside.items()}
            readers = readers_of(graph, plan.kept, step.index)
            step.finish(_Layer(theirs, step, inside, kept_rows, readers, settings).refitted())
    return pruned.results(scratches[1])


def facts_of(layer: int, result: Mapping[str, Tensor]) -> list[dict]:
    """Of every refitted linear of a layer: `Refitted` as JSON holds it."""
    found = []
    for key, tensor in sorted(result.items()):
        if key.startswith(FACTS):
            damping, condition, error_sliced, error, tokens, *refitted = tensor.tolist()
            choice = "sliced" if math.isnan(damping) else "bias" if math.isinf(damping) else "least-squares"
            of = Refitted(
                linear=key.removeprefix(FACTS), layer=layer, choice=choice,
                damping=damping if choice == "least-squares" else None, condition=condition,
                error_sliced=error_sliced, error=error, tokens=int(tokens),
                experts=int(refitted[0]) if refitted else None,
            )  # fmt: skip
            found.append(asdict(of))
    return found


@dataclass(frozen=True)
class _Settings:
    """What holds for all layers.

    n_fitted: windows that are not held out. read: gives a tensor of the pruned model as it is stored.
    """

    of: Reconstruction
    n_fitted: int
    dtype: torch.dtype
    read: Callable[[str], Tensor]


class _Layer:
    """One layer of the original and of the pruned model, and what in it lost inputs, by inner name."""

    def __init__(
        self,
        theirs: Step,
        ours: Step,
        sites: Mapping[str, LinearSite],
        rows: Mapping[str, Tensor],
        readers: Mapping[str, Reader],
        settings: _Settings,
    ):
        self._theirs, self._ours, self._sites, self._rows = theirs, ours, sites, rows
        self._readers, self._settings = readers, settings

    def refitted(self) -> dict[str, Tensor]:
        """The layer's result; both models have gone on to the next."""
        result: dict[str, Tensor] = {}
        order = self._in_order()
        to_do = {inner: Junction.find(self._ours, inner) for inner in order if inner in self._sites}
        for inner in order:
            if inner in self._readers:
                result |= self._refit_experts(self._readers[inner])
                continue
            junction = to_do.pop(inner)
            later = [name for name, other in to_do.items() if other.place == junction.place is not None]
            result |= self._refit(inner, junction, later)
        self._theirs.pass_all_on()
        self._ours.pass_all_on()
        return result

    def _in_order(self) -> list[str]:
        """Linears as the layer calls them, stacks before those of the same MLP; then what the layer does not call."""
        places = {inner: inner for inner in self._sites}
        places |= {inner: inner.partition(".")[0] for inner, reader in self._readers.items() if reader.path}
        return list(dict.fromkeys((*in_order(self._ours, places), *self._readers)))

    def _refit(self, inner: str, junction: Junction, later: list[str]) -> dict[str, Tensor]:
        """later: linears that join the same sum and are not refitted yet: their errors are theirs to make up for."""
        site, linear = self._sites[inner], self._ours.layer.get_submodule(inner)
        W = (linear.weight.T if site.transposed else linear.weight).detach()
        b = None if linear.bias is None else linear.bias.detach()
        if b is None and self._settings.of.method == "bias":
            return {}
        parts = self._moments(junction, later, W)
        choice = None if parts is None else _chosen(W, b, *parts, self._settings.of)
        found = None if choice is None else choice.repair
        facts = UNSEEN if choice is None else choice.facts
        result = {FACTS + site.name: torch.tensor(facts, dtype=torch.float64)}
        changed: dict[str, Tensor] = {}
        if found is not None and math.isfinite(found.damping):
            changed["weight"] = (found.V.T if site.transposed else found.V).to(self._settings.dtype)
        if b is not None and (found is not None or not site.bias):  # an added one is stored nowhere else
            changed["bias"] = (b if found is None else found.b).to(self._settings.dtype)
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
            parts[first >= self._settings.n_fitted].add_(ours.X, (theirs.Y + theirs.rest)[:, kept] - ours.rest)
        return parts[0], parts[1]

    def _refit_experts(self, reader: Reader) -> dict[str, Tensor]:
        stack, settings, layer = reader.stack, self._settings, self._ours.layer
        if stack.bias is None and settings.of.method == "bias":
            return {}
        W = layer.get_parameter(reader.inner).detach()
        b = None if stack.bias is None else layer.get_parameter(reader.inner_bias).detach()
        names = [stack.name] if b is None else [stack.name, stack.bias]
        new = {name: settings.read(name).to(settings.dtype) for name in names}
        changed: set[str] = set()

        def refit(e: int, fitted: Moments, held_out: Moments) -> _Choice:
            choice = _chosen(reader.matrix(W, e), None if b is None else b[e], fitted, held_out, settings.of)
            if (found := choice.repair) is not None:
                if math.isfinite(found.damping):
                    reader.matrix(new[stack.name], e).copy_(found.V)
                    changed.add(stack.name)
                if b is not None:
                    new[stack.bias][e].copy_(found.b)
                    changed.add(stack.bias)
            return choice

        choices = []
        place = "" if reader.module is None else called(self._ours, reader.module)
        for some in _at_once(reader):
            moments = moments_of(reader, place, self._theirs, self._ours, some, settings.n_fitted)
            choices += [refit(e, *moments.pop(e)) for e in some]
        refill_(layer.get_submodule(reader.path), **{name.rpartition(".")[2]: new[name] for name in changed})
        facts = torch.tensor(_facts_of_experts(choices), dtype=torch.float64)
        return {FACTS + stack.name: facts} | {name: new[name] for name in changed}


def _at_once(reader: Reader) -> list[range]:
    """The experts that stay, in parts whose moments may be in memory together; none where their inputs are unknown."""
    n, k = reader.columns.shape
    size = Refit(reader.rows.shape[1], k, n).at_once
    return [] if reader.module is None else [range(i, min(n, i + size)) for i in range(0, n, size)]


@dataclass(frozen=True)
class _Choice:
    """What does best on what is held out, fitted to all; None where slicing does. Errors are sums of squares.

    size: of what should come out, a sum of squares as well.
    """

    repair: Repair | None
    error_sliced: float
    error: float
    size: float
    tokens: int

    @property
    def facts(self) -> list[float]:
        damping, condition = math.nan, 1.0
        if self.repair is not None:
            damping, condition = self.repair.damping, self.repair.condition or 1.0
        return [damping, condition, self.error_sliced / self.size, self.error / self.size, self.tokens]


def _facts_of_experts(choices: Sequence[_Choice]) -> list[float]:
    if not any(choice.tokens for choice in choices):
        return [*UNSEEN, 0]
    total = lambda attribute: sum(getattr(choice, attribute) for choice in choices)
    found = [choice.repair for choice in choices if choice.repair is not None]
    finite = [repair.damping for repair in found if math.isfinite(repair.damping)]
    damping = median_low(finite) if finite else math.inf if found else math.nan
    condition = max((repair.condition or 1.0 for repair in found), default=1.0)
    errors = [total("error_sliced") / total("size"), total("error") / total("size")]
    return [damping, condition, *errors, total("tokens"), len(found)]


def _chosen(W: Tensor, b: Tensor | None, fitted: Moments, held_out: Moments, settings: Reconstruction) -> _Choice:
    """The repair that does best on what is held out, fitted to all, or None where slicing does. Takes the moments."""
    bias = b is not None
    dampings = (*(settings.dampings if settings.method == "least-squares" else ()), math.inf)
    size = max(float(held_out.yy), 1e-300)
    sliced = least = squared_error(W, b, held_out)
    best = None
    for found in repairs(W, fitted, dampings, bias=bias):
        error = squared_error(found.V, found.b, held_out)
        if error < least:
            best, least = found.damping, error
    fitted.join_(held_out)
    final = None if best is None else repair(W, fitted, best, bias=bias)
    return _Choice(final, sliced, least, size, fitted.n)
