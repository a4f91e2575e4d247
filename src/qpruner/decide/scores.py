"""Importance of every unit: one signature, several methods. Reads weights and gradients, changes neither.

The Taylor scores are LLM-Pruner's (arXiv 2305.11627; `qpruner.math.taylor` has the formulas). What a score needs
decides what is computed and kept, for one decoder layer at a time:

    vector           no weight gradient at all: outputs times their gradients, inputs times theirs, summed over tokens
    element-second   sums over rows and columns of each window's gradient
    element-first    the mean gradient of every weight of the layer
    element-mixed    that, and the mean square
    coarse           sums over rows and columns of each window's gradient, kept window by window until units are summed
    hybrid           what element-mixed and coarse need, in one pass

The last two are HyWIA's (arXiv 2403.10799); `hybrid` gives both its scores, which `decide/fusion.py` makes one.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from qpruner.decide.activations import flap, wanda_sp
from qpruner.decide.elimination import brain_surgeon
from qpruner.decide.saliences import (
    Scorer,
    UnitScores,
    batch_of,
    key_of,
    matrices_of,
    per_unit,
    saliences_of,
    sites_of,
)
from qpruner.math import taylor
from qpruner.math.grids import tiles
from qpruner.model.graph import Graph, LinearSite, Stack
from qpruner.model.skeleton import decoder_layers
from qpruner.model.stream import Watch
from qpruner.model.surgery import names_of
from qpruner.model.whole import Streamable
from qpruner.recipe import Recipe

# --- Taylor scores ---------------------------------------------------------------------------------------------------


class Sums:
    """For saliences that are linear in what one window adds: one number per column, and one per row."""

    def __init__(self, contribution: Callable[..., Tensor]):
        self._contribution, self._sums = contribution, {}

    def add(self, W: Tensor, g: Tensor, n_windows: int, window: int) -> None:
        for dim in (0, 1):
            self._sums[dim] = self._sums.get(dim, 0.0) + self._contribution(W, g, dim=dim) / n_windows

    def saliences(self, W: Tensor) -> tuple[Tensor, Tensor]:
        return (self._sums[0].abs(), self._sums[1].abs()) if self._sums else nothing(W)


class Means:
    """For saliences with a modulus around each weight's own term: the mean gradient, and F where it is asked for."""

    def __init__(self, salience: Callable[..., Tensor], *, fisher: float = 0.0):
        """fisher: factor of F, which is not even summed for 0."""
        self._salience, self._fisher, self._G, self._F = salience, fisher, None, None

    def add(self, W: Tensor, g: Tensor, n_windows: int, window: int) -> None:
        if self._G is None:
            self._G = torch.zeros_like(g, dtype=torch.promote_types(g.dtype, torch.float32))
            self._F = torch.zeros_like(self._G) if self._fisher else None
        for rows in tiles(*g.shape):  # each stays in the cache, and no temporary is as large as the weight
            wide = g[rows].to(self._G.dtype)
            self._G[rows].add_(wide, alpha=1 / n_windows)
            if self._fisher:
                self._F[rows].addcmul_(wide, wide, value=self._fisher / n_windows)

    def saliences(self, W: Tensor) -> tuple[Tensor, Tensor]:
        if self._G is None:
            return nothing(W)
        columns, by_row = 0.0, []
        for rows in tiles(*W.shape):
            part = W[rows], self._G[rows], self._F[rows] if self._fisher else None
            columns = columns + self._salience(*part, dim=0)
            by_row.append(self._salience(*part, dim=1))
        return columns, torch.cat(by_row)


class Samples:
    """First orders of every window by itself: (n_windows, n) for columns, and for rows.

    Windows that do not reach a weight, as happens to an expert, count as zero.
    """

    def __init__(self) -> None:
        self._each: list[Tensor] | None = None

    def add(self, W: Tensor, g: Tensor, n_windows: int, window: int) -> None:
        if self._each is None:
            self._each = [zeros.expand(n_windows, -1).clone() for zeros in nothing(W)]
        for dim, each in enumerate(self._each):
            each[window] = taylor.first_order(W, g, dim=dim)

    def saliences(self, W: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(self._each or (zeros[None] for zeros in nothing(W)))


class Both:
    """Row 0: saliences weight by weight; the other rows: those of `Samples`."""

    def __init__(self, fine: Means):
        self._fine, self._samples = fine, Samples()

    def add(self, W: Tensor, g: Tensor, n_windows: int, window: int) -> None:
        self._fine.add(W, g, n_windows, window)
        self._samples.add(W, g, n_windows, window)

    def saliences(self, W: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(self._fine.saliences(W), self._samples.saliences(W), strict=True)
        columns, rows = (torch.cat([fine[None], each]) for fine, each in pairs)
        return columns, rows


def nothing(W: Tensor) -> tuple[Tensor, Tensor]:
    """Of a weight that no window reached."""
    return torch.zeros(W.shape[1], device=W.device), torch.zeros(W.shape[0], device=W.device)


def gradient_watch(
    stream: Streamable,
    sites_in: Callable[[int], list[LinearSite | Stack]],
    n_windows: int,
    start: Callable[[], Sums | Means | Samples | Both],
) -> Watch:
    """Hands every weight gradient of a layer to a sum as it is made, and keeps none."""
    paths = decoder_layers(stream.model)

    @contextmanager
    def watch(layer: int) -> Iterator[Callable[[], dict[str, Tensor]]]:
        sites = sites_in(layer)
        weights = {site.name: stream.model.get_parameter(names_of(site)[0]) for site in sites}
        sums = {matrix: start() for site in sites for matrix in matrices_of(site)}
        calls = 0

        def count(*_) -> None:
            nonlocal calls
            calls += 1

        def hook_for(site: LinearSite | Stack):
            def hook(weight: nn.Parameter) -> None:
                for matrix in matrices_of(site):
                    sums[matrix].add(matrix.of(weight.detach()), matrix.of(weight.grad), n_windows, calls - 1)
                weight.grad = None

            return hook

        def result() -> dict[str, Tensor]:
            found = {}
            for site in sites:
                W = weights[site.name].detach()
                parts = [sums[matrix].saliences(matrix.of(W)) for matrix in matrices_of(site)]
                for dim, vectors in enumerate(zip(*parts, strict=True)):
                    found[key_of(site.name, dim)] = torch.cat(vectors, dim=-1)
            return found

        with ExitStack() as stack:
            stack.callback(stream.model.get_submodule(paths[layer]).register_forward_pre_hook(count).remove)
            for site in sites:
                weight = weights[site.name].requires_grad_(True)
                stack.callback(weight.requires_grad_, False)
                handle = weight.register_post_accumulate_grad_hook(hook_for(site))
                stack.callback(handle.remove)
            yield result

    return watch


def activation_watch(stream: Streamable, graph: Graph, n_windows: int) -> Watch:
    """The first order of linears without a weight gradient: from inputs, outputs, and the gradients of these."""

    @contextmanager
    def watch(layer: int) -> Iterator[Callable[[], dict[str, Tensor]]]:
        sites = [site for site in sites_of(graph, layer) if isinstance(site, LinearSite)]
        names = [site.name for site in sites]
        sums: dict[str, Tensor] = {}

        def multiply(key: str, value: Tensor, of: Tensor) -> None:
            """Adds `value` times the gradient of `of`, once that is there."""

            def hook(gradient: Tensor) -> None:
                product = taylor.first_order_of_activations(value.flatten(0, -2), gradient.flatten(0, -2))
                sums[key] = sums.get(key, 0.0) + product / n_windows

            if of.requires_grad:  # not what only chooses, such as an index of tokens
                of.register_hook(hook)

        def before(name: str):
            def hook(module: nn.Module, args: tuple) -> tuple:
                own = args[0].view_as(args[0])  # so that its gradient is what comes through this linear alone
                multiply(key_of(name, 0), own.detach(), own)
                return own, *args[1:]

            return hook

        def after(name: str):
            def hook(module: nn.Module, args: tuple, output) -> None:
                bias = getattr(module, "bias", None)
                if isinstance(output, Tensor):  # a router may be a linear that returns more
                    multiply(key_of(name, 1), (output if bias is None else output - bias).detach(), output)

            return hook

        with ExitStack() as stack:
            for name in names:
                module = stream.model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(before(name)).remove)
                stack.callback(module.register_forward_hook(after(name)).remove)
            none = {key_of(s.name, dim): torch.zeros(n) for s in sites for dim, n in enumerate((s.d_in, s.d_out))}
            yield lambda: none | {key: value.abs() for key, value in sums.items()}

    return watch


def gradient_scorer(start: Callable[[], Sums | Means], *, squares: bool) -> Scorer:
    """squares: of the gradient of every single window."""

    def scorer(stream, graph, windows, generator, scratch, on_layer) -> UnitScores:
        watch = gradient_watch(stream, lambda layer: sites_of(graph, layer), len(windows), start)
        how = dict(watch=watch, batch_size=1 if squares else batch_of(windows), on_layer=on_layer)
        return per_unit(graph, saliences_of(stream.backward(windows, scratch, **how)))

    return scorer


def vector(stream, graph, windows, generator, scratch, on_layer) -> UnitScores:
    """Of stacked experts, whose inputs and outputs no module sees, by the weight gradient after all."""
    stacks = gradient_watch(
        stream,
        lambda layer: [site for site in sites_of(graph, layer) if isinstance(site, Stack)],
        len(windows),
        lambda: Sums(taylor.first_order),
    )
    linears = activation_watch(stream, graph, len(windows))

    @contextmanager
    def watch(layer: int):
        with linears(layer) as ours, stacks(layer) as theirs:
            yield lambda: ours() | theirs()

    how = dict(watch=watch, batch_size=batch_of(windows), on_layer=on_layer)
    return per_unit(graph, saliences_of(stream.backward(windows, scratch, **how)))


# --- scores without gradients ----------------------------------------------------------------------------------------


def magnitude(stream, graph, windows, generator, scratch, on_layer) -> UnitScores:
    """Sum of the squared weights of a unit: the control that needs no text."""
    saliences = {}
    for layer, _ in stream.layers():
        for site in sites_of(graph, layer):
            W = stream.model.get_parameter(names_of(site)[0]).detach()
            parts = [squares(matrix.of(W)) for matrix in matrices_of(site)]
            for dim, vectors in enumerate(zip(*parts, strict=True)):
                saliences[site.name, dim] = torch.cat(vectors)
    return per_unit(graph, saliences)


def squares(W: Tensor) -> tuple[Tensor, Tensor]:
    """sum w^2 of every column, and of every row, in float64, with no temporary as large as the weight."""
    columns, by_row = 0.0, []
    for rows in tiles(*W.shape):
        part = W[rows].double().square()
        columns = columns + part.sum(0)
        by_row.append(part.sum(1))
    return columns, torch.cat(by_row)


def random_scores(stream, graph, windows, generator, scratch, on_layer) -> UnitScores:
    """Uniform noise: the control that knows nothing."""
    return {name: torch.rand(group.n_units, generator=generator) for name, group in graph.groups.items()}


def coarse(stream, graph, windows, generator, scratch, on_layer, *, fisher: float = 1.0) -> UnitScores:
    """A unit at a time, by what it adds in every window."""
    sums = gradient_scorer(Samples, squares=True)(stream, graph, windows, generator, scratch, on_layer)
    return {name: taylor.coarse(u, fisher=fisher).float() for name, u in sums.items()}


def element_mixed(stream, graph, windows, generator, scratch, on_layer, *, fisher: float = 1.0) -> UnitScores:
    scorer = gradient_scorer(lambda: Means(taylor.element_mixed, fisher=fisher), squares=True)
    return scorer(stream, graph, windows, generator, scratch, on_layer)


def hybrid(stream, graph, windows, generator, scratch, on_layer, *, fisher: float = 1.0) -> UnitScores:
    """Two scores of every unit, (2, n_units): `element-mixed`, and `coarse`."""
    scorer = gradient_scorer(lambda: Both(Means(taylor.element_mixed, fisher=fisher)), squares=True)
    found = scorer(stream, graph, windows, generator, scratch, on_layer)
    return {
        name: torch.stack([rows[0], taylor.coarse(rows[1:], fisher=fisher).float()]) for name, rows in found.items()
    }


def scorer_of(recipe: Recipe, window: int) -> Scorer:
    """The recipe's scorer. window: tokens in each window."""
    scorer = SCORERS[recipe.score]
    if recipe.fisher == "window":
        return scorer
    return functools.partial(scorer, fisher=taylor.fisher_factor(window))


SCORERS: dict[str, Scorer] = {
    "vector": vector,
    "element-first": gradient_scorer(lambda: Means(taylor.element_first), squares=False),
    "element-second": gradient_scorer(lambda: Sums(taylor.second_order), squares=True),
    "element-mixed": element_mixed,
    "coarse": coarse,
    "hybrid": hybrid,
    "wanda-sp": wanda_sp,
    "flap": flap,
    "brain-surgeon": brain_surgeon,
    "magnitude": magnitude,
    "random": random_scores,
}
