"""Every linear of a pruned model rounded for the inputs that it gets behind all that was rounded before it.

Layer by layer, and in a layer in the order of the calls, the linears that share an input are rounded together with
feedback (`math/gptq.py`). With propagation the original walks along: linears then aim at what the original gives, those
that add to the hidden states at what makes their sum the original's, so that each makes up for the errors before it.
Rounded weights are in the layer when it passes on. Stacked experts stay as they are.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from qpruner.do.junction import Junction, inputs_of, outputs_of
from qpruner.do.walk import FACTS, in_order, n_fitted, side_by_side
from qpruner.math import propagation
from qpruner.math.least_squares import Moments
from qpruner.model.graph import Graph, LinearSite
from qpruner.model.memory import REFIT_TOKENS
from qpruner.model.quantized import Quantized, assembled, packed
from qpruner.model.scratch import Scratch
from qpruner.model.stream import OnLayer, Results, Step, Stream
from qpruner.model.surgery import refill_, remaining
from qpruner.plan import Plan, QuantSpec

# May change the quantized linears of a layer, by inner name, once all of them are rounded and their weights are in the
# layer. The first step is the original's, None where it does not walk along.
Tune = Callable[[Step | None, Step, Mapping[str, Quantized]], Mapping[str, Quantized]]


@dataclass(frozen=True)
class Rounded:
    """How one linear was rounded, together with those that share its input.

    damping: of the least squares that moved the weights before; None where they stayed. condition: of the matrix that
        was solved; 1 where none was.
    error, error_nearest: of what comes out, squared and relative, and what plain rounding with the same scales leaves:
        with propagation to what the original gives, on held-out windows; otherwise to what the linear gave before.
    tokens: that it was rounded for; 0 where no input was seen, and weights were rounded to nearest.
    """

    linear: str
    layer: int
    spec: str
    damping: float | None
    condition: float
    error_nearest: float
    error: float
    tokens: int


def round_(
    original: Stream | None,
    pruned: Stream,
    graph: Graph,
    plan: Plan,
    windows: Tensor,
    *,
    dtype: torch.dtype,
    scratches: tuple[Scratch, Scratch],
    tune: Tune | None = None,
    on_layer: OnLayer | None = None,
) -> Results:
    """For every layer: what its quantized linears store, by name, and facts that `facts_of` reads.

    Args:
        original: walks along; None where the plan has no propagation, and `tune` needs no original.
        pruned: by the plan, and refitted; it is of no use afterwards, its weights are rounded as far as they stay.
        graph: of the model of the layers that stay, before the cuts.
        windows: (n, length) token ids, two at least with propagation.
        dtype: in which biases will be stored.
        scratches: of the original and of the pruned model; an interrupted walk goes on after its last finished layer.
    """
    propagates = plan.rounding.propagation
    assert original is not None or not propagates
    border = n_fitted(len(windows), plan.rounding.held_out) if propagates else len(windows)
    rows = remaining(graph, plan.kept)
    if original is None:
        size = max(1, REFIT_TOKENS // windows.shape[1])
        steps: Iterator = ((None, s) for s in pruned.steps(windows, scratches[1], batch_size=size, on_layer=on_layer))
    else:
        how = dict(border=border, on_layer=on_layer)
        steps = side_by_side(original, pruned, plan.layers, windows, scratches, **how)
    for theirs, ours in steps:
        ours.finish(_Layer(theirs, ours, graph, plan, rows, border, dtype).rounded(tune))
    return pruned.results(scratches[1])


def facts_of(plan: Plan, layer: int, result: Mapping[str, Tensor]) -> list[dict]:
    """Of every quantized linear of a layer: `Rounded` as JSON holds it."""
    found = []
    for key, tensor in sorted(result.items()):
        if key.startswith(FACTS):
            linear = key.removeprefix(FACTS)
            damping, condition, error_nearest, error, tokens = tensor.tolist()
            of = Rounded(
                linear=linear, layer=layer, spec=str(plan.specs[linear]),
                damping=damping if math.isfinite(damping) else None, condition=condition,
                error_nearest=error_nearest, error=error, tokens=int(tokens),
            )  # fmt: skip
            found.append(asdict(of))
    return found


@dataclass(frozen=True)
class _Set:
    """Linears of one input and one spec, by inner name, their weights on top of each other."""

    sites: dict[str, LinearSite]
    spec: QuantSpec

    @property
    def first(self) -> str:
        return next(iter(self.sites))


class _Layer:
    """One layer of the model that is rounded, and that of the original where it walks along."""

    def __init__(
        self,
        theirs: Step | None,
        ours: Step,
        graph: Graph,
        plan: Plan,
        rows: Mapping[str, tuple[Tensor, Tensor]],
        border: int,
        dtype: torch.dtype,
    ):
        self._theirs, self._ours, self._rounding = theirs, ours, plan.rounding
        self._rows, self._border, self._dtype = rows, border, dtype
        path = graph.layers[ours.index] + "."
        self._sets = [
            _Set({name.removeprefix(path): graph.linears[name] for name in fused.linears}, plan.specs[fused.linears[0]])
            for fused in graph.projections
            if fused.layer == ours.index and plan.specs[fused.linears[0]].bits < 16
        ]

    def rounded(self, tune: Tune | None) -> dict[str, Tensor]:
        """The layer's result; both models have gone on to the next."""
        layers: dict[str, Quantized] = {}
        facts: dict[str, Tensor] = {}
        sets = {of.first: of for of in self._sets}
        if self._rounding.method == "nearest":
            for of in self._sets:
                layers |= self._nearest(of)
        else:
            to_do = self._junctions([sets[inner] for inner in in_order(self._ours, {inner: inner for inner in sets})])
            while to_do:
                inner = next(iter(to_do))
                junction = to_do.pop(inner)
                later = [other.inner for other in to_do.values() if other.place == junction.place is not None]
                made, found = self._round(sets[inner], junction, later)
                layers |= made
                facts |= {FACTS + site.name: found.clone() for site in sets[inner].sites.values()}
        if tune is not None:
            layers = dict(tune(self._theirs, self._ours, layers))
            self._put(layers)
        for step in (self._theirs, self._ours):
            if step is not None:
                step.pass_all_on()
        names = {inner: site.name for of in self._sets for inner, site in of.sites.items()}
        found = {f"{names[inner]}.{key}": t for inner, layer in layers.items() for key, t in layer.state_dict().items()}
        return facts | {key: t.to(self._dtype) if key.endswith(".bias") else t for key, t in found.items()}

    def _junctions(self, sets: list[_Set]) -> dict[str, Junction]:
        """Where the sum is that a set joins, in the order of the calls. Linears that share an input join none."""
        finds = self._rounding.propagation
        alone = lambda of: finds and len(of.sites) == 1
        return {of.first: Junction.find(self._ours, of.first) if alone(of) else Junction(of.first, None) for of in sets}

    def _nearest(self, of: _Set) -> dict[str, Quantized]:
        made = {}
        for inner, site in of.sites.items():
            linear = self._ours.layer.get_submodule(inner)
            made[inner] = packed(_matrix(linear, site), linear.bias, of.spec, ranges=self._rounding.ranges)
        self._put(made)
        return made

    def _round(self, of: _Set, junction: Junction, later: list[str]) -> tuple[dict[str, Quantized], Tensor]:
        """later: sets that join the same sum and are not rounded yet: their errors are theirs to make up for."""
        linears = {inner: self._ours.layer.get_submodule(inner) for inner in of.sites}
        W = torch.cat([_matrix(linears[inner], site) for inner, site in of.sites.items()])
        biases = [linear.bias for linear in linears.values()]
        b = None if any(bias is None for bias in biases) else torch.cat([bias.detach() for bias in biases])
        parts = self._moments(of, W, b, junction, later) if self._rounding.propagation else None
        settings = of.spec, self._rounding.ranges
        if parts is None:
            G, tokens = self._gram(of, W)
            if not tokens:
                return self._nearest(of), torch.tensor([math.inf, 1, 1, 1, 0], dtype=torch.float64)
            found = propagation.gptq(W, G, *settings)
        else:
            found = propagation.propagated(W, b, *parts, *settings, self._rounding.dampings)
            tokens = parts[0].n
        made, start = {}, 0
        for inner, linear in linears.items():
            rows = slice(start, start + _n_rows(linear, of.sites[inner]))
            own, start = found.parts.rows(rows), rows.stop
            bias = linear.bias if found.b is None else found.b[rows].to(self._dtype)
            made[inner] = assembled(own.rest, own.high, own.salient, bias, of.spec)
        self._put(made)
        facts = [found.damping, found.condition, found.error_nearest, found.error, tokens]
        return made, torch.tensor(facts, dtype=torch.float64)

    def _put(self, made: Mapping[str, Quantized]) -> None:
        """The layer computes with what will be stored."""
        sites = {inner: site for of in self._sets for inner, site in of.sites.items()}
        for inner, quantized in made.items():
            linear, Q = self._ours.layer.get_submodule(inner), quantized.dequantize()
            changed = {"weight": Q.T if sites[inner].transposed else Q}
            if quantized.bias is not None:
                changed["bias"] = quantized.bias.to(self._dtype)
            refill_(linear, **changed)

    def _gram(self, of: _Set, W: Tensor) -> tuple[Tensor, int]:
        """X^T X of the inputs as they come, and the number of tokens."""
        moments = Moments(W.shape[1], 0, W.device)
        for b in range(len(self._ours.batches)):
            X = inputs_of(self._ours, b, of.first)
            if X is not None:
                moments.add_(X, X.new_empty(len(X), 0))
        return moments.XX, moments.n

    def _moments(
        self, of: _Set, W: Tensor, bias: Tensor | None, junction: Junction, later: list[str]
    ) -> tuple[Moments, Moments] | None:
        """Of the windows that are fitted to, and of those held out; None if it does not see every token in both."""
        parts = [Moments(W.shape[1], W.shape[0], W.device) for _ in range(2)]
        offset = torch.zeros(len(W)).to(W) if bias is not None else self._fixed(of, W)
        kept = self._kept_rows(of).to(W.device)
        for b, (first, rows) in enumerate(self._ours.batches):
            if junction.place is None:
                X, Y = inputs_of(self._ours, b, of.first), outputs_of(self._theirs, b, list(of.sites))
                target = None if Y is None else Y[:, kept]
            else:
                theirs, ours = (junction.look(step, b, later) for step in (self._theirs, self._ours))
                X = None if ours is None else ours.X
                target = None if X is None or theirs is None else (theirs.Y + theirs.rest)[:, kept] - ours.rest
            if X is None or target is None or not len(X) == len(target) == rows.numel():
                return None
            parts[first >= self._border].add_(X, target - offset)
        return parts[0], parts[1]

    def _fixed(self, of: _Set, W: Tensor) -> Tensor:
        """Biases that stay, because not all linears of the set have one."""
        found = []
        for inner, site in of.sites.items():
            linear = self._ours.layer.get_submodule(inner)
            n = _n_rows(linear, site)
            found.append(torch.zeros(n).to(W) if linear.bias is None else linear.bias.detach())
        return torch.cat(found)

    def _kept_rows(self, of: _Set) -> Tensor:
        """Of the original's outputs of a set, those that its linears still have."""
        found, start = [], 0
        for site in of.sites.values():
            own = self._rows[site.name][0] if site.name in self._rows else torch.arange(site.d_out)
            found.append(start + own)
            start += site.d_out
        return torch.cat(found)


def _matrix(linear: torch.nn.Module, site: LinearSite) -> Tensor:
    """(d_out, d_in)."""
    return (linear.weight.T if site.transposed else linear.weight).detach()


def _n_rows(linear: torch.nn.Module, site: LinearSite) -> int:
    return linear.weight.shape[1 if site.transposed else 0]
