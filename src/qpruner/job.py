"""What all stages of a run have in common: the request, its models, its run folder, and what a stage depends on."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from qpruner import __version__
from qpruner.artifact.opened import open_stream
from qpruner.model import depth, load
from qpruner.model.discover import discover
from qpruner.model.graph import Graph
from qpruner.model.rotate import Rotated, Turn
from qpruner.model.scratch import Scratch
from qpruner.model.skeleton import build_skeleton
from qpruner.model.stream import Pace
from qpruner.model.surgery import add_biases_, narrow_
from qpruner.model.tensors import Cut, Named, Renamed, Replaced, Stored, Tensors, Zeros
from qpruner.model.turning import turn_of
from qpruner.model.whole import Streamable, opened
from qpruner.plan import Plan
from qpruner.prepare import Prepared
from qpruner.progress import OnProgress
from qpruner.recipe import Recipe
from qpruner.run import Run, digest_of
from qpruner.shape import Shape, evaluation_batch


@dataclass(frozen=True)
class Job:
    """A prepared request on an open run folder."""

    prepared: Prepared
    run: Run
    on_progress: OnProgress
    measure_speed: bool
    measure_kl: bool = True
    refitted: Path | None = None  # a folder of tensors that stand in for those that the pruned model was cut to
    refitted_from: str | None = None  # digest of all that they depend on
    rounded: Path | None = None  # a folder of what the quantized linears store, where that was found with text
    rounded_from: str | None = None

    @property
    def recipe(self) -> Recipe:
        return self.prepared.recipe

    @property
    def shape(self) -> Shape:
        return self.prepared.shape

    @property
    def graph(self) -> Graph:
        return self.shape.graph

    @property
    def precision(self) -> torch.dtype:
        return getattr(torch, self.recipe.precision)

    @property
    def stored_dtype(self) -> torch.dtype:
        return load.stored_dtype(self.shape.source)

    # --- models ------------------------------------------------------------------------------------------------------

    def original(self) -> Streamable:
        graph = self.graph if self.shape.layers is None else None
        return open_stream(self.shape.source, graph=graph, dtype=self.precision, **self.where())

    def original_beside(self) -> Streamable:
        """The original, in the basis of the pruned model, to walk beside it."""
        if not self.basis:
            return self.original()
        source = self.shape.source
        model = build_skeleton(source.config, trust_remote_code=source.trust_remote_code)
        graph = self.graph if self.shape.layers is None else discover(model)
        tensors = self._turned(Named(model, Stored.of(source.folder)), turn_of(model, graph))
        return opened(model, tensors, graph, dtype=self.precision, **self.where())

    def pruned(self, kept: Mapping, dtype: torch.dtype = torch.float32) -> Streamable:
        """The model of the layers and units that stay, its weights cut from the original's as they are read.

        Those that were refitted or rescaled are read instead; until then added biases are zero.
        """
        source, layers = self.shape.source, self.shape.layers
        trust = {"trust_remote_code": source.trust_remote_code}
        model = build_skeleton(depth.shortened_config(source.config, layers), **trust)
        original = model if layers is None else build_skeleton(source.config, **trust)
        whole = Renamed(
            Named(original, Stored.of(source.folder)), depth.original_names(self.graph, layers, model.state_dict())
        )
        turn = turn_of(model, self.graph) if self.basis else None
        narrow_(model, self.graph, kept)
        add_biases_(model, added := self.plan(kept, 16).added_biases)
        zeros = {f"{name}.bias": model.get_submodule(name).bias.shape for name in added}
        refitted = Stored(sorted(self.refitted.glob("*.safetensors")) if self.refitted else [])
        tensors = Replaced(Cut(whole, self.graph, kept), Zeros(zeros), zeros)
        tensors = Replaced(self._turned(tensors, turn), refitted, refitted.places)
        if codes := self.codes():
            tensors = Replaced(tensors, codes, codes.places.keys() & model.state_dict().keys())
        return opened(model, tensors, self.graph, dtype=dtype, **self.where())

    def _turned(self, tensors: Tensors, turn: Turn | None) -> Tensors:
        return tensors if turn is None else Rotated(tensors, turn, self.prepared.seed)

    @property
    def basis(self) -> dict:
        """What stages that look at the pruned model depend on if its hidden states are rotated; empty if not."""
        return {"transforms": ["rotate"]} if "rotate" in self.recipe.transforms else {}

    def codes(self) -> Stored | None:
        """What the quantized linears store, if that was found with text."""
        return None if self.rounded is None else Stored(sorted(self.rounded.glob("*.safetensors")))

    def where(self) -> dict:
        device = "cuda" if torch.cuda.is_available() and not self.prepared.in_memory else "cpu"
        return {"resident": self.prepared.forecast.resident, "device": device}

    def plan(self, kept: Mapping, bits: int | dict[str, int]) -> Plan:
        return self.shape.plan(self.recipe, kept, bits, self.prepared.seed)

    @property
    def batch(self) -> int:
        """Windows that are judged at once."""
        return evaluation_batch(self.prepared.evaluation.ids.shape[1], self.shape.vocabulary)

    # --- stages ------------------------------------------------------------------------------------------------------

    @property
    def passes(self) -> Path:
        return self.run.folder / "passes"

    @contextmanager
    def scratch(self, stage: str, inputs: Mapping) -> Iterator[Scratch]:
        """For one stage with these inputs; what an interrupted run left of it is found there again."""
        if self.prepared.forecast.resident:
            yield Scratch()
            return
        scratch = Scratch(self.passes / f"{stage}-{digest_of(inputs)[:16]}")
        yield scratch
        scratch.clear()

    def inputs(self, **facts) -> dict:
        """What a stage depends on: the version, the model, the precision and the seed, which all do, and `facts`."""
        made = {"refitted": self.refitted_from, "rounded": self.rounded_from}
        return {
            **{name: digest for name, digest in made.items() if digest is not None},
            "qpruner": __version__,
            "model": self.prepared.weights_digest,
            "architecture": self.shape.source.digest,
            "precision": self.recipe.precision,
            "seed": self.prepared.seed,
            **facts,
        }

    def progress(self, stage: str) -> Callable[..., None]:
        return lambda done, total, detail="", *rest: self.on_progress(stage, done, total, _shown(detail))


def _shown(detail: object) -> str:
    """A pace is shown; the loss of a training step is not."""
    return str(detail) if isinstance(detail, Pace) else ""


def partial(output: Path) -> Path:
    """Where an artifact is written, beside its final place."""
    return output.with_name(f".{output.name}.partial")
