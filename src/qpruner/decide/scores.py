"""Importance of every unit: one signature, several methods. Reads weights and gradients, changes neither.

The Taylor scores are LLM-Pruner's (arXiv 2305.11627; `qpruner.math.taylor` has the formulas). Gradients are consumed as
they are made: the hook that receives a weight's gradient adds what the score needs and drops it. What a score needs
decides what is kept: `vector` and `element-second` are linear in a sample's term, so sums over rows and columns do.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qpruner.math import taylor
from qpruner.model.graph import Graph, Group, LinearSite

UnitScores = dict[str, Tensor]  # group -> (n_units,) float32, higher = keep
OnGradient = Callable[[str, Tensor], None]  # linear, gradient of its weight as stored
OnBatch = Callable[[int, int], None]
Scorer = Callable[[nn.Module, Graph, Tensor, torch.Generator, OnBatch], UnitScores]


def rows_by_columns(model: nn.Module, site: LinearSite) -> Tensor:
    """The weight of a linear as (d_out, d_in), a view whatever way it is stored."""
    return oriented(model.get_submodule(site.name).weight, site)


def oriented(weight: Tensor, site: LinearSite) -> Tensor:
    return weight.T if site.transposed else weight


def per_unit(graph: Graph, salience: Callable[[LinearSite, int], Tensor]) -> UnitScores:
    """Sums `salience(site, dim)`, one value per row (dim 1) or column (dim 0) of a linear, over every unit's slices."""
    return {name: _group_score(group, graph, salience) for name, group in graph.groups.items()}


def _group_score(group: Group, graph: Graph, salience: Callable[[LinearSite, int], Tensor]) -> Tensor:
    rows = [(salience(graph.linears[name], 1), index) for name, index in group.producers.items()]
    columns = [(salience(graph.linears[name], 0), index) for name, index in group.consumers.items()]
    vectors, tables = zip(*rows, *columns, strict=True)
    return taylor.unit_scores(list(vectors), list(tables)).float()


@contextmanager
def _gradients(model: nn.Module, graph: Graph, on_gradient: OnGradient) -> Iterator[None]:
    """Within, backward passes hand each linear's weight gradient to `on_gradient` and keep none."""
    weights = {name: model.get_submodule(name).weight for name in graph.linears}
    wanted = {id(w) for w in weights.values()}
    before = [(p, p.requires_grad) for p in model.parameters()]
    handles = []

    def hook_for(name: str):
        def hook(weight: nn.Parameter) -> None:
            on_gradient(name, weight.grad)
            weight.grad = None

        return hook

    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        handles = [w.register_post_accumulate_grad_hook(hook_for(name)) for name, w in weights.items()]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def _sums(model: nn.Module, graph: Graph, windows: Tensor, accumulate: OnGradient, on_batch: OnBatch):
    """One backward pass per window, so that squared gradients are those of single samples."""
    with _gradients(model, graph, accumulate):
        for i, window in enumerate(windows):
            ids = window[None].to(model.device)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            on_batch(i + 1, len(windows))


def reduced_scorer(contribution: Callable[..., Tensor]) -> Scorer:
    """Scores that are linear in what one sample adds: only sums over rows and columns are ever kept."""

    def scorer(model, graph, windows, generator, on_batch) -> UnitScores:
        sums: dict[tuple[str, int], Tensor] = defaultdict(lambda: torch.zeros(()))

        def accumulate(name: str, gradient: Tensor) -> None:
            site = graph.linears[name]
            W, g = rows_by_columns(model, site).detach(), oriented(gradient, site)
            for dim in (0, 1):
                sums[name, dim] = sums[name, dim] + contribution(W, g, dim=dim) / len(windows)

        _sums(model, graph, windows, accumulate, on_batch)
        return per_unit(graph, lambda site, dim: sums[site.name, dim].abs())

    return scorer


def elementwise_scorer(salience: Callable[..., Tensor], *, fisher: bool) -> Scorer:
    """Scores with a modulus around each weight's own term: the mean gradient (and F) of every weight is kept."""

    def scorer(model, graph, windows, generator, on_batch) -> UnitScores:
        G: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        F: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))

        def accumulate(name: str, gradient: Tensor) -> None:
            g = oriented(gradient, graph.linears[name]).float()
            G[name] = G[name] + g / len(windows)
            if fisher:
                F[name] = F[name] + g.square() / len(windows)

        _sums(model, graph, windows, accumulate, on_batch)
        weight = lambda site: rows_by_columns(model, site).detach()
        return per_unit(graph, lambda site, dim: salience(weight(site), G[site.name], F.get(site.name), dim=dim))

    return scorer


def magnitude(model, graph, windows, generator, on_batch) -> UnitScores:
    """Sum of the squared weights of a unit: the control that needs no text."""
    return per_unit(graph, lambda site, dim: rows_by_columns(model, site).detach().double().square().sum(dim))


def random_scores(model, graph, windows, generator, on_batch) -> UnitScores:
    """Uniform noise: the control that knows nothing."""
    return {name: torch.rand(group.n_units, generator=generator) for name, group in graph.groups.items()}


SCORERS: dict[str, Scorer] = {
    "vector": reduced_scorer(taylor.first_order),
    "element-first": elementwise_scorer(taylor.element_first, fisher=False),
    "element-second": reduced_scorer(taylor.second_order),
    "element-mixed": elementwise_scorer(taylor.element_mixed, fisher=True),
    "magnitude": magnitude,
    "random": random_scores,
}
