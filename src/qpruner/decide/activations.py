"""Importance of units from the inputs of the linears that read them: one forward pass (FLAP, Wanda-sp).

Of a unit only its consumers' columns count: those of `o_proj` for heads, of `down_proj` for channels, of all that reads
the hidden states for channels of these. Inputs of stacked experts are seen by no module, so their weights alone
count, as if all inputs were of one size. A linear that no token reaches has no importance.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from qpruner.decide.saliences import UnitScores, batch_of, key_of, matrices_of, saliences_of, sites_of
from qpruner.math.inputs import Norms, Variances, standardised
from qpruner.math.taylor import unit_scores
from qpruner.model.graph import Graph, LinearSite, Stack
from qpruner.model.stream import Watch
from qpruner.model.surgery import names_of
from qpruner.model.whole import Streamable

Columns = dict[str, Tensor]  # linear or stack -> one value per column, (d_in,) or (n_experts * d_in,), float64


def wanda_sp(stream, graph, windows, generator, scratch, on_layer) -> UnitScores:
    """sum |W_ij| |X_j|_2 over the rows and a unit's columns.

    Source: Wanda-sp, the structured Wanda (arXiv:2306.11695) that FLAP compares with. Its code scores a layer on what
    the already pruned layers before it put out; here all layers are scored once, on the original.
    """
    columns = column_saliences(stream, graph, windows, Norms, scratch, on_layer)
    scores = {}
    for name, group in graph.groups.items():
        vectors, tables = zip(*((columns[site], table) for site, table in group.consumers.items()), strict=True)
        scores[name] = unit_scores(list(vectors), list(tables)).float()
    return scores


def flap(stream, graph, windows, generator, scratch, on_layer) -> UnitScores:
    """Var(X_j) sum_i W_ij^2, standardised over the columns of each linear, mean over a unit's columns.

    So units of all layers and kinds compare, and half of them score below zero: what counts between units of
    different size is the bare score (`worth: score`).

    Source: arXiv:2312.11983, WIFV and its adaptive search. The authors' code squares the score of `o_proj` before it is
    standardised, takes the variance about a mean that it has moved already, and counts none for the first sample; the
    paper says none of this, and none of it is done here.
    """
    columns = column_saliences(stream, graph, windows, Variances, scratch, on_layer)
    columns = {site: standardised(values) for site, values in columns.items()}
    return {
        name: torch.cat([columns[site][table] for site, table in group.consumers.items()], dim=1).mean(1).float()
        for name, group in graph.groups.items()
    }


def column_saliences(
    stream: Streamable,
    graph: Graph,
    windows: Tensor,
    start: Callable[[], Norms] | Callable[[], Variances],
    scratch,
    on_layer,
) -> Columns:
    """Of every linear and stack that reads units: what its weights make of a column, times what the texts do."""
    watch = input_watch(stream, graph, start)
    results = stream.forward(windows, scratch, batch_size=batch_of(windows), watch=watch, on_layer=on_layer)
    return {site: values for (site, _), values in saliences_of(results).items()}


def input_watch(stream: Streamable, graph: Graph, start: Callable[[], Norms] | Callable[[], Variances]) -> Watch:
    """Shows the inputs of every linear that reads units to a sum of its own, and keeps none."""
    readers = {site for group in graph.groups.values() for site in group.consumers}

    def salience(site: LinearSite | Stack, inputs: Norms | Variances) -> Tensor:
        W = stream.model.get_parameter(names_of(site)[0]).detach()
        of_weights = torch.cat([inputs.of_weights(matrix.of(W)) for matrix in matrices_of(site)])
        if isinstance(site, Stack):
            return of_weights
        factors = inputs.factors()
        return torch.zeros_like(of_weights) if factors is None else of_weights * factors

    @contextmanager
    def watch(layer: int) -> Iterator[Callable[[], dict[str, Tensor]]]:
        sites = [site for site in sites_of(graph, layer) if site.name in readers]
        inputs = {site.name: start() for site in sites}

        def hook_for(name: str):
            def hook(module: nn.Module, args: tuple) -> None:
                inputs[name].add(args[0].detach().flatten(0, -2))

            return hook

        with ExitStack() as stack:
            for site in sites:
                if isinstance(site, LinearSite):
                    module = stream.model.get_submodule(site.name)
                    stack.callback(module.register_forward_pre_hook(hook_for(site.name)).remove)
            yield lambda: {key_of(site.name, 0): salience(site, inputs[site.name]) for site in sites}

    return watch
