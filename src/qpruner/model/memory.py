"""How much memory each stage of a run will take, from shapes alone: a promise that is measured afterwards.

Notation
    largest  elements of the largest decoder layer, and of its largest matrix
    batch    tokens that go through a layer at once
Temporary tensors of a library are estimated by how many copies of what size it holds at its peak; the factors below
were measured on the CPU.
"""

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch

from qpruner.errors import MemoryLimitError
from qpruner.model.checkpoint import Header
from qpruner.model.cost import ITEMSIZE, TensorSpec, tensor_bytes
from qpruner.model.graph import Graph

SCORE_COPIES = {"element-first": 1, "element-mixed": 2, "hybrid": 2}  # float32 tensors per weight of a layer
FORWARD_SCORES = ("wanda-sp", "flap", "brain-surgeon")  # which no gradient is taken for
WEIGHT_SCORES = ("magnitude", "random")  # nor any pass
SURGEON_SQUARES, SURGEON_PRODUCTS = (
    7,
    4,
)  # float64: Gram matrices of a layer, damped, factor, inverse; weights, refitted
WIDE_COPIES = 3 * 8  # bytes for each number of one linear's inputs, or of its weight, while it is in float64
LOGIT_COPIES = 5  # float32 logits, shifted, log-probabilities, gradients; or those of a second model
LOFTQ_COPIES = 14  # of the largest matrix in float32: itself, rounded, error, factors of its decomposition
FORWARD_COPIES, BACKWARD_COPIES = 1.5, 3.0  # of what goes in and out of a layer's linears
TRAINING_COPIES = 2  # the same in every layer, with what dropout and adapters keep; see `training_memory`, which counts
RECOMPUTED_COPIES = 2.25  # of one layer, where only what comes into layers is kept
TRAINING_LOGIT_COPIES = 3  # float32 logits, their gradient, and that times what comes from the mean
REFIT_TOKENS = 2048  # that go through a layer at once while linears are refitted
REFIT_SQUARES, REFIT_PRODUCTS = 5, 7  # moments of two parts, what is solved and its factor; what is solved for
REMEMBERED = 2**28  # bytes of a layer's activations that are kept while its linears are rounded one after the other
LEARNED_COPIES = 6  # float32, per weight: latents, gradients, two averages of them, and what is made of them
ROUNDED_TOGETHER = 2**22  # weights of several candidates that are rounded together
START_SQUARES, START_COPIES = 3, 12  # Gram matrix, damped, its factor; target, error, factors, in float64 half of them
ROUND_COPIES = 6  # of them in float32: stacked, in tiles, values, and dequantized in float64
PACKED_BYTES, PACKED_TILE = 4, 2**26  # for each weight of a matrix that is rounded at once, and for a part of it
EXPERT_MOMENTS = 2**30  # bytes of the moments of experts that are summed up at the same time
ARENA, LIBRARIES = 96 * 2**20, 256 * 2**20  # what the allocator keeps besides; peft, the trainer and botorch


@dataclass(frozen=True)
class Refit:
    """What least squares is asked for at once: a linear, or a stack of experts. k: inputs that are left."""

    d_out: int
    k: int
    n_experts: int = 0

    @property
    def at_once(self) -> int:
        """Maps whose moments are summed up at the same time; the text goes through the layer once for so many."""
        return max(1, min(self.n_experts, EXPERT_MOMENTS // self._moments))

    @property
    def size_bytes(self) -> int:
        solving = 8 * (REFIT_SQUARES * self.k * self.k + REFIT_PRODUCTS * self.k * self.d_out)
        return solving + (self.at_once - 1) * self._moments + 4 * self.n_experts * self.k * self.d_out

    @property
    def _moments(self) -> int:
        """Bytes of those of both parts of the text."""
        return 2 * 8 * self.k * (self.k + self.d_out)


@dataclass(frozen=True)
class Rounds:
    """What rounding with text is asked for at once: linears that share k inputs, d_out outputs in all.

    ends: inputs of all linears of a layer that share theirs with no other: what may be remembered of a token.
    beside: the original walks along. candidates: weights that are rounded to find the best.
    learns: codes of a layer are learned once they are found. weighs: adapters start from errors in those of the inputs.
    """

    d_out: int
    k: int
    ends: int
    beside: bool
    candidates: int
    learns: bool = False
    weighs: bool = False

    @property
    def size_bytes(self) -> int:
        elements = self.k * self.d_out
        together = max(elements, min(ROUNDED_TOGETHER, self.candidates * elements))
        moments = 8 * (REFIT_SQUARES * self.k**2 + (REFIT_PRODUCTS * elements if self.beside else 0))
        start = 8 * START_SQUARES * self.k**2 + 4 * START_COPIES * elements if self.weighs else 0
        return moments + 4 * (self.candidates * elements + ROUND_COPIES * together) + start


@dataclass(frozen=True)
class Work:
    """What a run will do, in the numbers that memory depends on."""

    score: str
    calibration: tuple[int, int]  # windows, tokens in each
    score_tokens: int  # that go through a layer at once while scores are measured
    judged: tuple[int, int]  # windows in a batch, tokens in each
    judged_windows: int  # in all
    vocabulary: int
    dtype: torch.dtype
    quantizes: bool
    measures_information: bool
    measures_influence: bool  # of whole layers
    whole_bytes: int | None  # of the pruned model in memory with its candidates and adapters, where a stage needs that
    training_tokens: int  # of adapters, in the part of a batch that is in memory at once
    recomputes: bool = False  # layers on the way back, while adapters are trained
    tuning_tokens: int = 0  # in a batch, while codes of the whole model are learned
    refits: Refit | None = None  # the largest
    rounds: Rounds | None = None  # the largest
    packs_embeddings: bool = False
    tries: bool = False  # plans, with weights swapped in


@dataclass(frozen=True)
class Forecast:
    """Peak bytes of the process in each stage. resident: every layer stays in memory once it was read.

    disk: bytes of hidden states that lie on disk at the same time, where layers do not stay.
    """

    stages: dict[str, int]
    resident: bool
    limit: int
    disk: int = 0

    def __str__(self) -> str:
        stage, most = max(self.stages.items(), key=lambda item: item[1])
        how = "all layers in memory" if self.resident else "one layer at a time"
        return f"memory: {most / 2**30:.2f} GiB ({stage}) of {self.limit / 2**30:.2f}, {how}"


class Sizes:
    """Sizes of a model that no plan has changed yet."""

    def __init__(self, tensors: Mapping[str, TensorSpec], graph: Graph):
        elements = lambda name: math.prod(tensors[name][1])
        inside = [[n for n in tensors if n.startswith(f"{path}.")] for path in graph.layers]
        self.layer = max((sum(map(elements, names)) for names in inside), default=0)
        self.layer_stored = max((sum(tensor_bytes(tensors[n]) for n in names) for names in inside), default=0)
        self.matrix = max((elements(n) for names in inside for n in names), default=0)
        outside = [n for n in tensors if not n.startswith(tuple(f"{path}." for path in graph.layers))]
        self.ends = max(map(elements, outside), default=0)  # embedding and head are not there at the same time
        self.ends_stored = max((tensor_bytes(tensors[n]) for n in outside), default=0)
        self.all = sum(map(elements, tensors))
        layers, ends = range(len(inside)), lambda sites, i: sum(s.d_in + s.d_out for s in sites if s.layer == i)
        widths = [ends(graph.linears.values(), i) for i in layers]
        self.expert_widths = max((ends(graph.stacks.values(), i) for i in layers), default=0)  # of one of each stack
        self.widest = max((site.d_in for site in graph.linears.values()), default=0)
        self.widths, self.all_widths = max(widths, default=0), sum(widths)
        self.n_units, self.n_layers = len(graph.projections), len(inside)


def forecast(
    sizes: Sizes, work: Work, hidden_size: int, *, exchanges: Sequence[str] = (), limit: int | None = None
) -> Forecast:
    """Whether all layers may stay in memory, and what each stage will take.

    Args:
        exchanges: why layers cannot run one at a time, as in `Graph`; none for most models.
        limit: bytes for the whole process; without one, nine tenths of what is free on the machine.
    Raises:
        MemoryLimitError: a stage cannot do with so little.
    """
    free = psutil.virtual_memory().available * 9 // 10
    limit = present_bytes() + free if limit is None else limit
    in_memory = stages_of(sizes, work, hidden_size, resident=True)
    if max(in_memory.values()) <= limit:
        return Forecast(in_memory, True, limit)
    if exchanges:
        stage, needed = max(in_memory.items(), key=lambda item: item[1])
        raise MemoryLimitError(
            f"{stage} takes about {needed / 2**30:.2f} GiB, and {limit / 2**30:.2f} GiB are allowed. This model has "
            f"to fit in memory: {exchanges[0]}."
        )
    streamed = stages_of(sizes, work, hidden_size, resident=False)
    stage, needed = max(streamed.items(), key=lambda item: item[1])
    if needed > limit:
        raise MemoryLimitError(
            f"{stage} takes about {needed / 2**30:.2f} GiB, and {limit / 2**30:.2f} GiB are allowed. Raise the limit, "
            f"or {LESS.get(stage, 'use shorter windows')}."
        )
    item = work.dtype.itemsize
    arrays = 2 if work.score in FORWARD_SCORES + WEIGHT_SCORES else sizes.n_layers + 3
    back = math.prod(work.calibration) * hidden_size * item * arrays
    there = work.judged_windows * work.judged[1] * hidden_size * item * 4  # two of either model, for the divergence
    side_by_side = math.prod(work.calibration) * hidden_size * item * 4 + 2 * 2 * sizes.all if walks_beside(work) else 0
    return Forecast(streamed, False, limit, disk=max(back, there, side_by_side))


def walks_beside(work: Work) -> bool:
    return work.refits is not None or (work.rounds is not None and work.rounds.beside)


WHOLE = "search and recovery"
TRIAL_BYTES = 2**29  # that trials keep of weights in codes once they are decoded, and again of hidden states
LESS = {  # what takes less memory, by stage
    "reconstruction": "set reconstruction to none: two layers and the moments of their widest linear are in memory",
    "rounding": "set rounding to nearest: layers and the moments of their widest linears are in memory",
    "importance": "use shorter windows, or the score `vector`, which keeps no gradient of a weight",
    WHOLE: "train on less at once: [micro_batch=1,gradient_checkpointing=true]; or use a recipe that never needs the "
    "whole model: [allocation=mutual-information,steps=0]; of a joint search [gate_steps=0,network_steps=0]",
}


def stages_of(sizes: Sizes, work: Work, hidden_size: int, *, resident: bool) -> dict[str, int]:
    """Peak bytes of the process in each stage, beside what it holds now."""
    item = work.dtype.itemsize
    n_windows, window = work.calibration
    judged_tokens = math.prod(work.judged)
    weights = sizes.all * item if resident else sizes.layer * item + sizes.layer_stored
    outside = 0 if resident else sizes.ends * item
    states = lambda arrays: n_windows * window * hidden_size * item * arrays if resident else 0
    scores = SCORE_COPIES.get(work.score, 0) * sizes.layer * 4 + sizes.matrix * 2 * item
    through = weights + FORWARD_COPIES * work.score_tokens * sizes.widths * item + states(2)
    through = max(outside, through + WIDE_COPIES * work.score_tokens * sizes.widest)
    backward = weights + scores + BACKWARD_COPIES * work.score_tokens * sizes.widths * item + states(sizes.n_layers + 2)
    loss = outside + LOGIT_COPIES * work.score_tokens * work.vocabulary * 4 + states(sizes.n_layers + 2)
    loss += weights if resident else 0
    forward = weights + FORWARD_COPIES * judged_tokens * sizes.widths * item
    tail = outside + LOGIT_COPIES * judged_tokens * work.vocabulary * 4 + (weights if resident else 0)
    importance = max(backward, loss)
    if work.score in FORWARD_SCORES:
        importance = through
        if work.score == "brain-surgeon":
            importance += 8 * (SURGEON_SQUARES * sizes.widest**2 + SURGEON_PRODUCTS * sizes.matrix)
    elif work.score in WEIGHT_SCORES:
        importance = weights + sizes.layer_stored + WIDE_COPIES * sizes.matrix
    stages = {"importance": importance, "judging": max(forward, tail)}
    if work.measures_influence:
        stages["block influence"] = through
    if work.measures_information:
        stages["mutual information"] = max(forward, tail) + sizes.n_units * min(n_windows, 32) * 256 * 64 * 4
    if work.quantizes and work.whole_bytes is None:
        stages["quantizing"] = weights * 4 // item + LOFTQ_COPIES * sizes.matrix * 4
    if work.packs_embeddings:
        rounding = sizes.ends_stored + PACKED_BYTES * sizes.ends + PACKED_TILE
        stages["embeddings"] = (weights if resident else 0) + rounding
    if work.refits is not None:
        both = 2 * weights + (sizes.all * 2 if resident else 0)  # refitted weights wait in memory, or on disk
        ends = (sizes.widths + sizes.expert_widths) * item + 4 * (work.refits.d_out + work.refits.k)
        through = FORWARD_COPIES * max(window, REFIT_TOKENS) * ends
        stages["reconstruction"] = both + through + work.refits.size_bytes + states(4)
    if work.rounds is not None:
        models = (2 if work.rounds.beside else 1) * weights + (sizes.all if resident else 0)
        ends = sizes.widths * item + 4 * (work.rounds.d_out + work.rounds.k)
        through = FORWARD_COPIES * max(window, REFIT_TOKENS) * ends
        through += (2 if work.rounds.beside else 1) * min(REMEMBERED, n_windows * window * work.rounds.ends * item)
        rounding = work.rounds.size_bytes
        if work.rounds.learns:
            learning = (
                LEARNED_COPIES * sizes.layer * 4 + BACKWARD_COPIES * max(window, REFIT_TOKENS) * sizes.widths * item
            )
            rounding = max(rounding, learning)
        stages["rounding"] = models + through + rounding + states(4) + (work.whole_bytes or 0)
    if work.tries:
        stages["trials"] = max(forward, tail) + 2 * TRIAL_BYTES
    if work.whole_bytes is not None:
        training = max(training_bytes(sizes, work, hidden_size), tuning_bytes(sizes, work))
        stages[WHOLE] = work.whole_bytes + LIBRARIES + max(training, LOFTQ_COPIES * sizes.matrix * 4)
    present = present_bytes() + ARENA
    return {name: int(present + size) for name, size in stages.items()}


def training_bytes(sizes: Sizes, work: Work, hidden_size: int) -> float:
    """What forward and backward hold at once while adapters are trained, beside the model and them."""
    if work.recomputes:
        layers = RECOMPUTED_COPIES * sizes.widths + sizes.n_layers * hidden_size
    else:
        layers = TRAINING_COPIES * sizes.all_widths
    return work.training_tokens * 4 * (layers + TRAINING_LOGIT_COPIES * work.vocabulary)


def tuning_bytes(sizes: Sizes, work: Work) -> int:
    return work.tuning_tokens * 4 * (TRAINING_COPIES * sizes.all_widths + LOGIT_COPIES * work.vocabulary)


def fits(tensors: Mapping[str, Header], limit: int | None) -> bool:
    """Whether a model may be in memory in float32, beside what judging it takes. tensors: name -> (shape, dtype)."""
    return whole_bytes(tensors) <= allowed_bytes(limit)


def whole_bytes(tensors: Mapping[str, Header]) -> int:
    """What the process will hold with a whole model in float32 (codes as they are), and what judging it takes."""
    wide = sum(
        max(4, ITEMSIZE[dtype]) * math.prod(shape) if ITEMSIZE[dtype] > 1 else math.prod(shape)
        for shape, dtype in tensors.values()
    )
    return present_bytes() + ARENA + wide * 5 // 4 + 2**30 // 2


def allowed_bytes(limit: int | None) -> int:
    """The limit; without one, nine tenths of what is free on the machine beside what the process holds."""
    return present_bytes() + psutil.virtual_memory().available * 9 // 10 if limit is None else limit


def present_bytes() -> int:
    """What the process holds now, Python and the libraries included."""
    return psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """The most that the process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
