"""What importance is made of: one number per row or column of every weight, and how they become one per unit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qpruner.math import taylor
from qpruner.model.graph import Graph, LinearSite, Stack
from qpruner.model.scratch import Scratch
from qpruner.model.stream import OnLayer, Results
from qpruner.model.whole import Streamable

BATCH_TOKENS = 1024

UnitScores = dict[str, Tensor]  # group -> (n_units,) float32, higher = keep
Saliences = dict[tuple[str, int], Tensor]  # linear or stack, dim -> one value per row (dim 1) or column (dim 0)
Scorer = Callable[[Streamable, Graph, Tensor, torch.Generator, Scratch, OnLayer | None], UnitScores]


def per_unit(graph: Graph, saliences: Mapping[tuple[str, int], Tensor]) -> UnitScores:
    """Sums the saliences of rows and columns over every unit's slices."""
    scores = {}
    for name, group in graph.groups.items():
        rows = [(saliences[linear, 1], table) for linear, table in group.producers.items()]
        columns = [(saliences[linear, 0], table) for linear, table in group.consumers.items()]
        vectors, tables = zip(*rows, *columns, strict=True)
        scores[name] = taylor.unit_scores(list(vectors), list(tables)).float()
    return scores


@dataclass(frozen=True)
class Matrix:
    """One weight of (d_out, d_in): of a linear, or of one expert of a stack."""

    name: str
    expert: int | None
    transposed: bool

    def of(self, tensor: Tensor) -> Tensor:
        """This matrix in a parameter, or in its gradient, as a view."""
        matrix = tensor if self.expert is None else tensor[self.expert]
        return matrix.T if self.transposed else matrix


def matrices_of(site: LinearSite | Stack) -> list[Matrix]:
    experts = range(site.n_experts) if isinstance(site, Stack) else [None]
    return [Matrix(site.name, expert, site.transposed) for expert in experts]


def sites_of(graph: Graph, layer: int) -> list[LinearSite | Stack]:
    return [site for site in (*graph.linears.values(), *graph.stacks.values()) if site.layer == layer]


def key_of(site: str, dim: int) -> str:
    return f"{site}/{dim}"


def saliences_of(results: Results) -> Saliences:
    return {(key[:-2], int(key[-1])): value for result in results for key, value in result.items()}


def batch_of(windows: Tensor) -> int:
    """Windows that go through a layer together, where a sum over all of them is all that is wanted."""
    return max(1, BATCH_TOKENS // windows.shape[1])
