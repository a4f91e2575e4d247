"""Importance of units under the condition that the rest is refitted: what least squares will not bring back."""

import torch
from torch import Tensor

from qpruner.decide.grams import measure_grams
from qpruner.decide.saliences import UnitScores, batch_of
from qpruner.math.elimination import elimination_scores
from qpruner.model.graph import Graph, Group, LinearSite, Stack
from qpruner.model.surgery import names_of


def brain_surgeon(stream, graph, windows, generator, scratch, on_layer) -> UnitScores:
    """One forward pass for Gram matrices, then units go one by one from every group, the rest refitted each time.

    Units that stacked experts read, whose inputs no module sees, get the share of the squared weights that is theirs,
    as if inputs knew nothing of each other. Hidden channels are read all through the model; they get the sum of what
    their columns weigh in all layers, as if nothing were refitted.
    """
    readers = {site for group in graph.groups.values() for site in group.consumers if site in graph.linears}
    grams = measure_grams(
        stream, graph, readers, windows, scratch=scratch, batch_size=batch_of(windows), on_layer=on_layer
    )
    scores = {
        name: torch.zeros(group.n_units, dtype=torch.float64) for name, group in graph.groups.items() if group.layer < 0
    }
    for layer, _ in stream.layers():
        found = grams[layer]
        for name, group in graph.groups.items():
            if group.layer == layer and group.consumers.keys() <= found.keys():
                scores[name] = elimination_scores(
                    [_reader(stream, graph, group, site, found) for site in group.consumers]
                )
            elif group.layer == layer:
                scores[name] = _shares(stream, graph, group)
            elif group.layer < 0:
                for site in group.consumers.keys() & found.keys():
                    W, C, units = _reader(stream, graph, group, site, found)
                    scores[name] += (W.double().square().sum(0) * C.diagonal())[units].sum(1)
    return {name: scores[name].float() for name in graph.groups}


def _weight(stream, site: LinearSite | Stack) -> Tensor:
    """(d_out, d_in), of a stack (n_experts, d_out, d_in)."""
    W = stream.model.get_parameter(names_of(site)[0]).detach()
    return W.mT if site.transposed else W


def _reader(stream, graph: Graph, group: Group, site: str, grams: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, Gram matrix and columns of every unit, of one linear that reads a group."""
    return _weight(stream, graph.linears[site]), grams[site], group.consumers[site]


def _shares(stream, graph: Graph, group: Group) -> Tensor:
    sites = graph.linears | graph.stacks
    squares = [
        _weight(stream, sites[name]).double().square().sum(-2).flatten()[table].sum(1)
        for name, table in group.consumers.items()
    ]
    return torch.stack(squares).sum(0) / torch.stack(squares).sum()
