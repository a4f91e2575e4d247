"""Linears refitted behind a pruned prefix: what may not cost anything, and what may not change the result."""

import pytest
import torch
from tiny import tiny
from tiny_stream import streamed

from qpruner.do.reconstruct import FACTS, facts_of, reconstruct
from qpruner.math.least_squares import Moments, repair
from qpruner.model.discover import discover
from qpruner.model.scratch import Scratch
from qpruner.model.skeleton import build_skeleton
from qpruner.model.stream import Stream
from qpruner.model.surgery import add_biases_, bereft, narrow_
from qpruner.model.tensors import Cut, Replaced, Zeros
from qpruner.plan import DENSE, Plan, Reconstruction
from qpruner.testing.tiny import Held

IDS = torch.randint(2, 61, (8, 12), generator=torch.Generator().manual_seed(0))
FAMILIES = {
    "llama": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
}
LEAST_SQUARES = Reconstruction(method="least-squares", dampings=(1e-4, 1e-2, 1.0), held_out=0.25)


def plan_for(graph, kept, settings=LEAST_SQUARES, *, added: bool = False, layers=None) -> Plan:
    names = [n for n, s in bereft(graph, kept).items() if not s.bias] if added else []
    return Plan(
        model_name="m", model_digest="", layers=layers, kept=kept, reconstruction=settings, added_biases=names,
        specs=dict.fromkeys(graph.linears, DENSE),
    )  # fmt: skip


def kept_of(graph, fraction: float = 0.5) -> dict:
    """Of every group of a layer the first part; query heads stay with their groups."""
    prunable = lambda g: g.kind in ("kv_group", "channel")
    n = lambda g: max(1, int(fraction * g.n_units / g.n_blocks)) if prunable(g) else g.n_units // g.n_blocks
    return {
        name: tuple(u for u in range(g.n_units) if u % (g.n_units // g.n_blocks) < n(g))
        for name, g in graph.groups.items()
    }


class Pruned:
    """A model, what a plan makes of it, and its reconstruction in float64."""

    def __init__(self, model, plan: Plan, graph=None, **how):
        self.model, self.plan, self.how = model, plan, how
        self.graph = graph or discover(model)

    def stream(self, results=()) -> Stream:
        skeleton = build_skeleton(self.model.config)
        skeleton.config._experts_implementation = "eager"
        narrow_(skeleton, self.graph, self.plan.kept)
        add_biases_(skeleton, self.plan.added_biases)
        biases = {f"{n}.bias": (self.graph.linears[n].d_out,) for n in self.plan.added_biases}
        tensors = Replaced(Cut(Held(self.model), self.graph, self.plan.kept), Zeros(biases), biases)
        found = {n: t for result in results for n, t in result.items() if not n.startswith(FACTS)}
        return Stream(skeleton, Replaced(tensors, Given(found), found), dtype=torch.float64, **self.how)

    def results(self, scratches=None, **options):
        original = streamed(self.model, **self.how)
        original.model.config._experts_implementation = "eager"
        return reconstruct(
            original, self.stream(), self.graph, self.plan, IDS, dtype=torch.float64,
            scratches=scratches or (Scratch(), Scratch()), **options,
        )  # fmt: skip

    def logits(self, results=()):
        with torch.no_grad():
            return self.stream(results).loaded()(IDS).logits


class Given(dict):
    bytes_read = 0

    def read(self, name: str) -> torch.Tensor:
        return self[name]


def flat(results) -> dict:
    return {name: tensor for result in results for name, tensor in result.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_comes_closer_to_the_original(family):
    model = tiny(family, **FAMILIES[family])
    graph = discover(model)
    pruned = Pruned(model, plan_for(graph, kept_of(graph)), graph)
    results = pruned.results()
    with torch.no_grad():
        expected = model(IDS).logits
    distance = lambda logits: (logits - expected).square().mean()
    print(distance(pruned.logits()), distance(pruned.logits(results)))
    rows = [row for i, result in enumerate(results) for row in facts_of(i, result)]
    for row in rows:
        print(row)
    assert distance(pruned.logits(results)) < distance(pruned.logits())
