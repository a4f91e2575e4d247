"""Tiny models side by side with what a plan makes of them, for reconstruction."""

import torch
from tiny_stream import streamed

from qpruner.do.reconstruct import FACTS, facts_of, reconstruct
from qpruner.model.discover import discover
from qpruner.model.scratch import Scratch
from qpruner.model.skeleton import build_skeleton
from qpruner.model.stream import Stream
from qpruner.model.surgery import add_biases_, bereft, names_of, narrow_
from qpruner.model.tensors import Cut, Renamed, Replaced, Zeros
from qpruner.plan import DENSE, Plan, Reconstruction
from qpruner.testing.tiny import Held

IDS = torch.randint(2, 61, (8, 12), generator=torch.Generator().manual_seed(0))
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
    """A model, what a plan makes of it, and its reconstruction, all in the dtype of the model."""

    def __init__(self, model, plan: Plan, graph=None, *, ids=IDS, **how):
        self.model, self.plan, self.ids, self.how = model, plan, ids, how
        self.experts = "eager"  # torch's fused product of them knows no float64
        self.dtype = next(model.parameters()).dtype
        self.graph = graph or discover(model)
        self.config, self.names = model.config, {}  # another one where layers go, and names in the original

    def stream(self, results=()) -> Stream:
        skeleton = build_skeleton(self.config)
        skeleton.config._experts_implementation = self.experts
        narrow_(skeleton, self.graph, self.plan.kept)
        add_biases_(skeleton, self.plan.added_biases)
        biases = {f"{n}.bias": (self.graph.linears[n].d_out,) for n in self.plan.added_biases}
        tensors = Replaced(
            Cut(Renamed(Held(self.model), self.names), self.graph, self.plan.kept), Zeros(biases), biases
        )
        found = {n: t for result in results for n, t in result.items() if not n.startswith(FACTS)}
        return Stream(skeleton, Replaced(tensors, Given(found), found), dtype=self.dtype, **self.how)

    def results(self, scratches=None, *, stored=None, **options):
        original, pruned = self.streams = streamed(self.model, **self.how), self.stream()
        original.model.config._experts_implementation = self.experts
        return reconstruct(
            original, pruned, self.graph, self.plan, self.ids, dtype=stored or self.dtype,
            scratches=scratches or (Scratch(), Scratch()), **options,
        )  # fmt: skip

    def logits(self, results=()):
        with torch.no_grad():
            return self.stream(results).loaded()(self.ids).logits


def tensors_of(config) -> list[str]:
    return list(build_skeleton(config).state_dict())


class Given(dict):
    bytes_read = 0

    def read(self, name: str) -> torch.Tensor:
        return self[name]


def flat(results) -> dict:
    return {name: tensor for result in results for name, tensor in result.items()}


def rows_of(results) -> list[dict]:
    return [row for i, result in enumerate(results) for row in facts_of(i, result)]


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def with_doubles(model, graph) -> None:
    """Every unit of the second half of a block becomes a double of one in the first."""
    state = model.state_dict()
    for group in graph.groups.values():
        if group.kind in ("kv_group", "channel"):
            size = group.n_units // group.n_blocks
            firsts = torch.tensor([u for u in range(group.n_units) if u % size < size // 2], dtype=torch.long)
            for name, table in group.producers.items():
                site = graph.linears.get(name) or graph.stacks[name]
                new, old = (table[units].flatten() for units in (firsts + size // 2, firsts))
                for key in filter(None, names_of(site)):
                    tensor = state[key] if name in graph.stacks else state[key][None]
                    rows = tensor.mT if site.transposed and key == names_of(site)[0] else tensor
                    rows[new // site.d_out, new % site.d_out] = rows[old // site.d_out, old % site.d_out]
            for name, (dim, table) in group.tensors.items():
                values = state[name].movedim(dim, 0)
                values[table[firsts + size // 2]] = values[table[firsts]]
