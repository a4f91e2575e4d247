"""Importance of units under the condition that the rest is refitted: what least squares will not bring back."""

import torch

from qpruner.decide.grams import measure_grams
from qpruner.decide.saliences import UnitScores, batch_of
from qpruner.math.elimination import elimination_scores
from qpruner.model.graph import Graph, Group
from qpruner.model.surgery import names_of


def brain_surgeon(stream, graph, windows, generator, scratch, on_layer) -> UnitScores:
    """One forward pass for Gram matrices, then units go one by one from every group, the rest refitted each time.

    Linears outside modules' sight (stacked experts) are taken to have inputs of one size that know nothing of each
    other. Hidden channels are read all through the model; they get the sum of what their columns weigh in all layers,
    as if nothing were refitted.
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
            if group.layer == layer:
                scores[name] = elimination_scores(
                    [_reader(stream, graph, group, site, found) for site in group.consumers]
                )
            elif group.layer < 0:
                for site in group.consumers.keys() & found.keys():
                    W, C, units = _reader(stream, graph, group, site, found)
                    scores[name] += (W.double().square().sum(0) * C.diagonal())[units].sum(1)
    return {name: scores[name].float() for name in graph.groups}


def _reader(stream, graph: Graph, group: Group, site: str, grams: dict) -> tuple:
    """Weight, Gram matrix and columns of one that reads a group; of a stack all its experts side by side."""
    of = graph.linears.get(site) or graph.stacks[site]
    W = stream.model.get_parameter(names_of(of)[0]).detach()
    if site in grams:
        return W.T if of.transposed else W, grams[site], group.consumers[site]
    W = W.mT if of.transposed else W
    return W.transpose(0, 1).flatten(1), torch.eye(of.n_experts * of.d_in, dtype=torch.float64), group.consumers[site]
