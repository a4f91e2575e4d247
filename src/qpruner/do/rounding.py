"""Every linear of a pruned model rounded for the inputs that it gets behind all that was rounded before it.

Layer by layer, and in a layer in the order of the calls, the linears that share an input are rounded together with
feedback (`math/gptq.py`). With propagation the original walks along: linears then aim at what the original gives, those
that add to the hidden states at what makes their sum the original's, so that each makes up for the errors before it.
Rounded weights are in the layer when it passes on, with their adapters where these start from what rounding lost: codes
and factors of a linear are then found together (`do/starts.py`). Stacked experts stay as they are.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from qpruner.do import starts
from qpruner.do.fused import Fused, by_name, fused_in
from qpruner.do.junction import Junction, inputs_of
from qpruner.do.replay import End, Replay, ends_of
from qpruner.do.rescale import rescale_
from qpruner.do.walk import FACTS, in_order, n_fitted, side_by_side
from qpruner.math import loftq, propagation
from qpruner.math.least_squares import Moments, Pairs
from qpruner.model.graph import Graph
from qpruner.model.memory import REFIT_TOKENS
from qpruner.model.packed.split import Quantized, assembled, packed
from qpruner.model.scratch import Scratch
from qpruner.model.stream import OnLayer, Results, Step, Stream
from qpruner.model.surgery import remaining
from qpruner.plan import Plan

UNSEEN = [math.inf, 1.0, 1.0, 1.0, 0]  # facts of linears that no input came to

# May change the quantized linears of a layer, by inner name, once all of them are rounded. They stand in the layer of
# the second step, and the original's, the first, has passed on. Last come the weights that they stand for.
Tune = Callable[[Step, Step, Mapping[str, Quantized], Mapping[str, Tensor]], Mapping[str, Quantized]]


@dataclass(frozen=True)
class Rounded:
    """How one linear was rounded, together with those that share its input.

    damping: of the least squares that moved the weights before; None where they stayed. condition: of the matrix that
        was solved; 1 where none was.
    error, error_nearest: of what comes out, squared and relative, and what plain rounding with the same scales leaves:
        with propagation to what the original gives, on held-out windows; otherwise to what the linear gave before.
        Without adapters, which may come beside it.
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
    salient: Mapping[str, Tensor] | None = None,
    on_layer: OnLayer | None = None,
) -> Results:
    """For every layer: what its quantized linears store, by name, where their adapters start, and facts that `facts_of`
    reads.

    Args:
        original: walks along; None where the plan needs none.
        pruned: by the plan, and refitted; it is of no use afterwards, its weights are rounded as far as they stay.
        graph: of the model of the layers that stay, before the cuts.
        windows: (n, length) token ids, two at least with propagation.
        dtype: in which biases and adapters will be stored.
        salient: input channels of linears that are to be salient, without propagation; otherwise they are chosen.
        scratches: of the original and of the pruned model; an interrupted walk goes on after its last finished layer.
    """
    assert original is not None or not plan.rounding.needs_original
    border = len(windows) if original is None else n_fitted(len(windows), plan.rounding.held_out)
    rows = remaining(graph, plan.kept)
    known: dict[tuple, _Structure] = {}
    if original is None:
        size = max(1, REFIT_TOKENS // windows.shape[1])
        steps: Iterator = ((None, s) for s in pruned.steps(windows, scratches[1], batch_size=size, on_layer=on_layer))
    else:
        how = dict(border=border, on_layer=on_layer)
        steps = side_by_side(original, pruned, plan.layers, windows, scratches, **how)
    for theirs, ours in steps:
        layer = _Layer(theirs, ours, graph, plan, rows, border, dtype, salient or {})
        if layer.kind not in known:
            known[layer.kind] = layer.structure()
        ours.finish(layer.rounded(known[layer.kind], tune))
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
class _Structure:
    """How a layer calls its linears: their order, the modules that they end, and the sums that they join."""

    order: list[str]
    ends: dict[str, End]
    places: dict[str, str | None]


class _Layer:
    """One layer of the model that is rounded, and that of the original where it walks along.

    rows: of linears that lost some, as `remaining` has them. border: number of the first window that is held out.
    """

    def __init__(
        self,
        theirs: Step | None,
        ours: Step,
        graph: Graph,
        plan: Plan,
        rows: Mapping[str, tuple[Tensor, Tensor]],
        border: int,
        dtype: torch.dtype,
        salient: Mapping[str, Tensor],
    ):
        self._salient = salient
        self._theirs, self._ours, self._graph, self._plan = theirs, ours, graph, plan
        self._rounding = plan.rounding
        self._outputs: dict[str, Tensor] = {}  # of what linears give: so many times what it was before it was rescaled
        self._rows, self._border, self._dtype = rows, border, dtype
        self._fused = {fused.first: fused for fused in fused_in(ours.layer, ours.index, graph, plan.specs)}

    @property
    def _looks(self) -> bool:
        """Whether the inputs of linears are looked at."""
        return self._rounding.method != "nearest" or self._plan.weighs_adapters

    @property
    def kind(self) -> tuple:
        """Layers that print alike are built alike; what is quantized of them may differ."""
        return repr(self._ours.layer), tuple(self._fused)

    def structure(self) -> _Structure:
        if not self._looks:
            return _Structure(list(self._fused), {}, {})
        order = in_order(self._ours, {first: first for first in self._fused})
        alone = [first for first, fused in self._fused.items() if len(fused.sites) == 1]  # others join no sum
        places = {inner: Junction.find(self._ours, inner).place for inner in alone if self._rounding.propagation}
        return _Structure(order, ends_of(self._ours, alone), places)

    def rounded(self, structure: _Structure, tune: Tune | None) -> dict[str, Tensor]:
        """The layer's result; both models have gone on to the next."""
        changed = self._rescaled()
        before = {} if tune is None else {inner: W for each in self._fused.values() for inner, _, W in each.linears}
        with ExitStack() as stack:
            ours = stack.enter_context(Replay(self._ours, structure.ends))
            theirs = None if self._theirs is None else stack.enter_context(Replay(self._theirs, structure.ends))
            made, found = self._all_rounded(theirs, ours, structure)
            if theirs is not None:
                theirs.pass_all_on()
            if tune is not None and made:
                ours.forget()
                made = self._tuned(tune, made, before)
            ours.pass_all_on()
        return found | changed | by_name(list(self._fused.values()), made, self._dtype)

    def _rescaled(self) -> dict[str, Tensor]:
        """Tensors besides those of quantized linears that are other ones now, by name."""
        if "rescale" not in self._rounding.transforms or not self._fused:
            return {}
        done = rescale_(self._ours, self._graph, self._plan, self._rows, self._dtype)
        self._outputs = done.outputs
        path = self._graph.layers[self._ours.index]
        return {f"{path}.{name}": tensor.to(self._dtype) for name, tensor in done.changed.items()}

    def _tuned(self, tune: Tune, made: Mapping[str, Quantized], before: Mapping[str, Tensor]) -> dict[str, Quantized]:
        dense = {inner: self._ours.layer.get_submodule(inner) for inner in made}
        for inner, quantized in made.items():
            self._ours.layer.set_submodule(inner, quantized)
        try:
            tuned = dict(tune(self._theirs, self._ours, made, before))
        finally:
            for inner, linear in dense.items():
                self._ours.layer.set_submodule(inner, linear)
        for fused in self._fused.values():
            fused.put_(tuned, self._dtype)
        return tuned

    def _all_rounded(
        self, theirs: Replay | None, ours: Replay, structure: _Structure
    ) -> tuple[dict[str, Quantized], dict[str, Tensor]]:
        """Quantized linears by inner name; facts, and where adapters start."""
        made: dict[str, Quantized] = {}
        others: dict[str, Tensor] = {}
        to_do = list(structure.order)
        while to_do:
            fused = self._fused[to_do.pop(0)]
            found = G = None
            if self._rounding.method != "nearest":
                place = structure.places.get(fused.first)
                later = [inner for inner in to_do if structure.places.get(inner) == place is not None]
                found, tokens = self._found(theirs, ours, fused, Junction(fused.first, place), later)
                numbers = UNSEEN
                if found is not None:
                    numbers = [found.damping, found.condition, found.error_nearest, found.error, tokens]
                    G = found.rounding.G
                others |= {
                    FACTS + site.name: torch.tensor(numbers, dtype=torch.float64) for site in fused.sites.values()
                }
            elif self._plan.weighs_adapters:
                ours.settle(fused.first, fused.W.shape[1])
                G = self._inputs(ours, fused).XX
            starts_ = self._started(fused, found, G)
            own = {inner: candidate.layer for inner, candidate in starts_.items()}
            beside = {inner: candidate.factors for inner, candidate in starts_.items() if candidate.factors}
            fused.put_(own, self._dtype, {inner: starts.correction(self._plan, of) for inner, of in beside.items()})
            for inner in beside:
                others |= starts.tensors_of(fused.sites[inner].name, starts_[inner])
            made |= own
        return made, others

    def _started(self, fused: Fused, found: propagation.Found | None, G: Tensor | None) -> dict[str, starts.Candidate]:
        """Each by itself; without what was found rounded to nearest. G: of the inputs, where errors count by them."""
        corrects = self._plan.recovery.loftq_iterations > 0
        L = loftq.weighting(G) if G is not None and corrects and self._plan.adapter_ranks else None
        own, start = {}, 0
        for inner, linear, W in fused.linears:
            rows = slice(start, start := start + len(W))
            name, target = fused.sites[inner].name, W if found is None else found.V[rows]

            def rounding(V: Tensor, linear=linear, rows=rows) -> tuple[Quantized, Tensor]:
                if found is None:
                    layer = packed(V, linear.bias, fused.spec, ranges=self._rounding.ranges)
                else:
                    parts = found.rounding(V)
                    layer = assembled(parts.rest, parts.high, parts.salient, linear.bias, fused.spec)
                return layer, layer.dequantize(V.dtype)

            if corrects and name in self._plan.adapter_ranks:
                own[inner] = starts.started(target, name, rounding, self._plan, self._dtype, L)
            elif found is None:
                own[inner] = starts.Candidate(rounding(W)[0], None, 0.0, 0.0)
            else:
                parts = found.parts.rows(rows)
                layer = assembled(parts.rest, parts.high, parts.salient, linear.bias, fused.spec)
                own[inner] = starts.Candidate(layer, None, 0.0, 0.0)
            self._make_up_(own[inner], found, rows)
        return own

    def _make_up_(self, candidate: starts.Candidate, found: propagation.Found | None, rows: slice) -> None:
        """Give a linear the bias that was found for it, if one was."""
        if found is not None and found.b is not None:
            Q = candidate.layer.dequantize(torch.float64) + starts.correction(self._plan, candidate.factors)
            candidate.layer.bias.data = found.bias(rows, Q).to(self._dtype)

    def _found(
        self, theirs: Replay | None, ours: Replay, fused: Fused, junction: Junction, later: list[str]
    ) -> tuple[propagation.Found | None, int]:
        """What rounding with feedback finds, if any input comes, and for how many tokens.

        later: linears that join the same sum and are not rounded yet: their errors are theirs to make up for.
        """
        W, how = fused.W, (fused.spec, self._rounding.ranges)
        for walk in filter(None, (theirs, ours)):
            walk.settle(fused.first, W.shape[1])
        parts = self._moments(theirs, ours, fused, junction, later) if self._rounding.propagation else None
        if parts is not None:
            return propagation.propagated(W, fused.b, *parts, *how, self._rounding.dampings), parts[0].n
        moments, salient = self._inputs(ours, fused), self._salient.get(fused.sites[fused.first].name)
        return (propagation.gptq(W, moments.XX, *how, salient) if moments.n else None), moments.n

    def _inputs(self, ours: Replay, fused: Fused) -> Moments:
        """Of the inputs alone."""
        W = fused.W
        moments = Moments(W.shape[1], 0, W.device)
        for b in range(len(ours.batches)):
            X = inputs_of(ours, b, fused.first)
            if X is not None:
                moments.add_(X, X.new_empty(len(X), 0))
        return moments

    def _moments(
        self, theirs: Replay, ours: Replay, fused: Fused, junction: Junction, later: list[str]
    ) -> tuple[Moments, Moments] | None:
        """Of the windows that are fitted to, and of those held out; None if it does not see every token in both."""
        W = fused.W
        kept = fused.kept(self._rows).to(W.device)
        fixed = 0 if fused.b is not None else fused.constant  # a bias that all of them have moves
        if junction.place is None:
            whole = Fused(theirs.layer, fused.sites, fused.spec)
            factors = self._factors(fused)
            W, constant = whole.W[kept] * factors[:, None], whole.constant[kept] * factors - fixed
            return self._of_inputs(theirs, ours, fused.first, W, constant)
        parts = [Moments(W.shape[1], W.shape[0], W.device) for _ in range(2)]
        for b, (first, rows) in enumerate(ours.batches):
            own, aim = (junction.look(walk, b, later) for walk in (ours, theirs))
            if own is None or aim is None or not len(own.X) == len(aim.X) == rows.numel():
                return None
            parts[first >= self._border].add_(own.X, (aim.Y + aim.rest)[:, kept] - own.rest - fixed)
        return parts[0], parts[1]

    def _of_inputs(
        self, theirs: Replay, ours: Replay, inner: str, W: Tensor, constant: Tensor
    ) -> tuple[Moments, Moments] | None:
        """W, constant: of the original, of the rows that are left."""
        pairs = None
        for b, (first, rows) in enumerate(ours.batches):
            X, Z = inputs_of(ours, b, inner), inputs_of(theirs, b, inner)
            if X is None or Z is None or not len(X) == len(Z) == rows.numel():
                return None
            pairs = pairs or [Pairs(X.shape[1], Z.shape[1], X.device) for _ in range(2)]
            pairs[first >= self._border].add_(X, Z)
        return pairs[0].moments(W, constant), pairs[1].moments(W, constant)

    def _factors(self, fused: Fused) -> Tensor:
        """Of the outputs of a set, what rescaling made of them."""
        return torch.cat([self._outputs.get(inner, torch.ones(len(W))).to(W) for inner, _, W in fused.linears])
