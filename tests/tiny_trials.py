"""A tiny model with all that trials of a joint search need, in memory or in a folder."""

from pathlib import Path

import torch
from tiny import tiny
from tiny_stream import streamed

from qpruner.decide.grams import measure_grams
from qpruner.do.candidates import CandidateStore
from qpruner.joint.trials import TrialRunner
from qpruner.model.discover import discover
from qpruner.model.reference import Reference
from qpruner.model.scratch import Scratch
from qpruner.plan import DENSE, QuantSpec, Rounding, Selection

INT3 = QuantSpec(bits=3, grid="integer", group_size=8, symmetric=False)
INT8 = QuantSpec(bits=8, grid="integer", group_size=8, symmetric=False)
GPTQ = Rounding(method="gptq", ranges="mse")
NEAREST = Rounding(ranges="mse")


def ids_of(n: int, seed: int) -> torch.Tensor:
    return torch.randint(2, 61, (n, 12), generator=torch.Generator().manual_seed(seed))


class Bench:
    def __init__(self, family="llama", *, settings=GPTQ, folder: Path | None = None, over=None, **options):
        self.model = tiny(family, **over or {})
        self.graph = discover(self.model)
        named = self.model.named_modules()
        self.embedding = next(name for name, module in named if module is self.model.get_input_embeddings())
        self.windows = ids_of(8, seed=1)
        self.groups = {n: g for n, g in self.graph.groups.items() if g.kind in ("kv_group", "channel")}
        generator = torch.Generator().manual_seed(2)
        self.orders = {n: torch.randperm(g.n_units, generator=generator) for n, g in self.groups.items()}
        inputs = [projection.linears[0] for projection in self.graph.projections]
        found = measure_grams(streamed(self.model), self.graph, inputs, ids_of(6, seed=0), scratch=Scratch())
        self.grams = {name: G for result in found for name, G in result.items()}
        self.stream = streamed(self.model, resident=True)
        self.settings = settings
        self.store = self.new_store(folder=folder)
        self.trials = self.new_trials(**options)

    def new_store(self, **how) -> CandidateStore:
        how = dict(dtype=torch.float64) | how
        tensors = self.stream.tensors
        return CandidateStore(self.graph, tensors, self.grams.__getitem__, self.orders, self.settings, **how)

    def new_trials(self, *, store=None, stream=None, **options) -> TrialRunner:
        scratch = Scratch()
        whole = streamed(self.model)
        whole.forward(self.windows, scratch)
        reference = Reference.of(whole.logits(self.windows, scratch), len(self.windows), dtype=torch.float64)
        where = stream or self.stream, self.graph, store or self.store, self.windows, reference
        return TrialRunner(*where, **dict(batch_size=2) | options)

    def selection(self, *, layers=None, kept=None, spec=DENSE, **specs) -> Selection:
        """kept: fraction of every group."""
        layers = tuple(range(len(self.graph.layers)) if layers is None else layers)
        widths = {n: max(1, int(kept * g.n_units)) for n, g in self.groups.items() if g.layer in layers} if kept else {}
        chosen = {p.name: spec for p in self.graph.projections if p.layer in layers}
        return Selection(layers=layers, kept=widths, specs=chosen | specs)
