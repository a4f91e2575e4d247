"""What all stages of a run have in common: the request, its models, its run folder, and what a stage depends on."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from qpruner import __version__
from qpruner.artifact.opened import open_stream
from qpruner.decide.draft import embeddings_of
from qpruner.judge.tasks import Asked
from qpruner.model import depth, load
from qpruner.model.discover import discover
from qpruner.model.graph import Graph
from qpruner.model.packed.embedding import put_empty_embeddings_
from qpruner.model.packed.split import packed
from qpruner.model.rotate import Rotated, Turn
from qpruner.model.scratch import Scratch
from qpruner.model.skeleton import build_skeleton
from qpruner.model.stream import Pace
from qpruner.model.surgery import add_biases_, narrow_
from qpruner.model.tensors import Cut, Named, Renamed, Replaced, Stored, Tensors, Zeros
from qpruner.model.turning import turn_of
from qpruner.model.whole import Streamable, opened
from qpruner.plan import Plan, QuantSpec
from qpruner.prepare import Prepared
from qpruner.progress import OnProgress
from qpruner.recipe import Recipe
from qpruner.run import Run, digest_of
from qpruner.shape import Shape, evaluation_batch

CODES = "codes.safetensors"  # of embeddings, in their stage's folder


@dataclass(frozen=True)
class Places:
    """Where trials of a joint search are evaluated: so many processes, or a Ray cluster; in this one without either."""

    workers: int = 0
    ray: str | None = None


@dataclass(frozen=True)
class Job:
    """A prepared request on an open run folder."""

    prepared: Prepared
    run: Run
    on_progress: OnProgress
    measure_speed: bool
    measure_kl: bool = True
    measure_stages: bool = True
    refitted: Path | None = None  # a folder of tensors that stand in for those that the pruned model was cut to
    refitted_from: str | None = None  # digest of all that they depend on
    rounded: Path | None = None  # a folder of what the quantized linears store, where that was found with text
    rounded_from: str | None = None
    embeddings: dict[str, QuantSpec] | None = None  # how embedding and head are stored; None for as the recipe says
    places: Places = Places()
    tasks: Asked | None = None  # zero-shot tasks that both models are scored on at the end

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
        if not self.rotates:
            return self.original()
        source = self.shape.source
        model = build_skeleton(source.config, trust_remote_code=source.trust_remote_code)
        graph = self.graph if self.shape.layers is None else discover(model)
        tensors = self._turned(Named(model, Stored.of(source.folder)), turn_of(model, graph))
        return opened(model, tensors, graph, dtype=self.precision, **self.where())

    def pruned(self, kept: Mapping, dtype: torch.dtype = torch.float32) -> Streamable:
        """The model of the layers and units that stay, its weights cut from the original's as they are read.

        Those that were refitted or rescaled are read instead; until then added biases are zero. The embedding and the
        head stand in it as in the artifact.
        """
        source, layers = self.shape.source, self.shape.layers
        trust = {"trust_remote_code": source.trust_remote_code}
        model = build_skeleton(depth.shortened_config(source.config, layers), **trust)
        original = model if layers is None else build_skeleton(source.config, **trust)
        whole = Renamed(
            Named(original, Stored.of(source.folder)), depth.original_names(self.graph, layers, model.state_dict())
        )
        turn = turn_of(model, self.graph) if self.rotates else None
        narrow_(model, self.graph, kept)
        plan = self.plan(kept, 16)
        add_biases_(model, added := plan.added_biases)
        zeros = {f"{name}.bias": model.get_submodule(name).bias.shape for name in added}
        refitted = Stored(sorted(self.refitted.glob("*.safetensors")) if self.refitted else [])
        tensors = Replaced(Cut(whole, self.graph, kept), Zeros(zeros), zeros)
        tensors = Replaced(self._turned(tensors, turn), refitted, refitted.places)
        if plan.packed_embeddings:
            codes_of = Stored([self._embeddings(tensors, plan) / CODES])
            put_empty_embeddings_(model, self.graph, plan.packed_embeddings)
            tensors = Replaced(tensors, codes_of, codes_of.places)
        if codes := self.codes():
            tensors = Replaced(tensors, codes, codes.places.keys() & model.state_dict().keys())
        return opened(model, tensors, self.graph, dtype=dtype, **self.where())

    def _embeddings(self, tensors: Tensors, plan: Plan) -> Path:
        """The stage that rounds the embedding and the head, to nearest. tensors: of the pruned model."""
        residual = {name: plan.kept[name] for name, g in self.graph.groups.items() if g.kind == "residual"}
        inputs = replace(self, refitted_from=None, rounded_from=None).inputs(
            kept=residual, embeddings={n: spec.model_dump() for n, spec in plan.packed_embeddings.items()},
            ranges=plan.rounding.ranges, rotates=self.rotates,
        )  # fmt: skip

        def compute(folder: Path) -> None:
            found = {}
            for name, spec in plan.packed_embeddings.items():
                matrix = packed(tensors.read(f"{name}.weight"), None, spec, ranges=plan.rounding.ranges)
                found |= {f"{name}.{part}": tensor for part, tensor in matrix.state_dict().items()}
            save_file(found, folder / CODES)

        return self.run.files("embeddings", inputs, compute)

    def _turned(self, tensors: Tensors, turn: Turn | None) -> Tensors:
        return tensors if turn is None else Rotated(tensors, turn, self.prepared.seed)

    @property
    def rotates(self) -> bool:
        return "rotate" in self.recipe.transforms

    @property
    def basis(self) -> dict:
        """What stages that look at the pruned model depend on if its hidden states are rotated, or its embedding is
        rounded; empty if not."""
        found = {"transforms": ["rotate"]} if self.rotates else {}
        specs = embeddings_of(self.graph, self.recipe) if self.embeddings is None else self.embeddings
        packed = {name: spec.model_dump() for name, spec in specs.items() if spec.bits < 16}
        return found | ({"embeddings": [packed, self.recipe.ranges]} if packed else {})

    def codes(self) -> Stored | None:
        """What the quantized linears store, if that was found with text."""
        return None if self.rounded is None else Stored(sorted(self.rounded.glob("*.safetensors")))

    def where(self) -> dict:
        device = "cuda" if torch.cuda.is_available() and not self.prepared.in_memory else "cpu"
        return {"resident": self.prepared.forecast.resident, "device": device}

    def plan(self, kept: Mapping, bits: int | dict[str, int] | dict[str, QuantSpec]) -> Plan:
        return self.shape.plan(self.recipe, kept, bits, self.prepared.seed, embeddings=self.embeddings)

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


def unfinished(output: Path) -> Path:
    """Where an artifact is written, beside its final place."""
    return output.with_name(f".{output.name}.partial")
