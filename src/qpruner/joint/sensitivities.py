"""What every single choice of a joint search loses: estimated for all of them, measured for those that matter.

The estimate takes one pass forward and back (`decide/fisher.py`). A measurement is a trial in which one choice is made
and everything else is at its best.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qpruner.decide.fisher import Change, contributions, drawn_labels, estimated
from qpruner.decide.space import Space, Variable
from qpruner.do.candidates import CandidateStore
from qpruner.joint.trials import Observed
from qpruner.model.graph import Graph
from qpruner.model.scratch import Scratch
from qpruner.model.stream import OnLayer, Stream
from qpruner.model.swap import swapped
from qpruner.plan import DENSE, Selection

Option = tuple[int, int]  # variable, option
# Selections, how many layers of each the next may have in common -> what was seen of each
Evaluate = Callable[[Sequence[Selection], Sequence[int]], list[Observed]]
SMALLEST = 1e-9  # nats per token: below it nothing is told from nothing


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """In nats per token, for options of variables in the order of the space.

    single: what an option loses while all others are at their best, less what the best of everything loses: as it was
        measured, elsewhere as it is estimated, brought to the scale of the measurements.
    interaction: (N, N), all options of all variables end to end: what two lose together beyond the sum, at the same
        scale; zero between options of one variable.
    estimated, measured: each by itself; not a number where nothing was measured.
    base: what the best of everything loses.
    """

    single: tuple[np.ndarray, ...]
    interaction: np.ndarray
    estimated: tuple[np.ndarray, ...]
    measured: tuple[np.ndarray, ...]
    base: float

    def to_tensors(self) -> dict[str, Tensor]:
        flat = lambda arrays: torch.from_numpy(np.concatenate(arrays))
        return {
            "sizes": torch.tensor([len(each) for each in self.single]),
            "single": flat(self.single),
            "interaction": torch.from_numpy(self.interaction),
            "estimated": flat(self.estimated),
            "measured": flat(self.measured),
            "base": torch.tensor(self.base, dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Sensitivities":
        ends = tensors["sizes"].cumsum(0)[:-1].tolist()
        split = lambda name: tuple(np.split(tensors[name].numpy(), ends))
        parts = {name: split(name) for name in ("single", "estimated", "measured")}
        return cls(interaction=tensors["interaction"].numpy(), base=float(tensors["base"]), **parts)


def estimate(
    stream: Stream,
    graph: Graph,
    store: CandidateStore,
    space: Space,
    ids: Tensor,
    scratch: Scratch,
    *,
    generator: torch.Generator,
    on_layer: OnLayer | None = None,
) -> np.ndarray:
    """(N, N): what two options lose beyond the sum; half of the diagonal is what each of them does.

    Args:
        ids: (windows, length) token ids; the estimate's relative error falls with the root of the number of windows.
    """
    found = scores_of_options(stream, graph, store, space, ids, scratch, generator=generator, on_layer=on_layer)
    return estimated(found).numpy()


def scores_of_options(stream, graph, store, space, ids, scratch, *, generator, on_layer=None) -> Tensor:
    """(N, windows, length): c of `decide/fisher.py` for all options of all variables end to end, zero for the best."""
    labels = drawn_labels(stream, ids, scratch.part("labels"), generator)
    scratch.part("labels").clear()
    starts = np.concatenate([[0], np.cumsum(space.sizes)])
    found = torch.zeros(int(starts[-1]), *ids.shape)
    changes = lambda layer: (c for v in space_of_layer(space, layer) for c in changes_of(graph, store, *v))
    ends = {name: v for v, name in enumerate(v.name for v in space.variables) if space.variables[v].layer < 0}
    own = scratch.part("scores")
    if own.finished("loss") and not own.finished("head"):
        own.clear()
    with _watched_head(stream, store, space, ends, ids.shape) as head:
        results = contributions(stream, ids, labels, changes, own, on_layer=on_layer)
    own.finish("head", head)
    for result in (*results, own.result("head"), _of_entrance(stream, store, space, ends, ids, own)):
        for key, c in result.items():
            variable, option = map(int, key.split())
            found[starts[variable] + option] += c
    own.clear()
    return found


def space_of_layer(space: Space, layer: int) -> Iterator[tuple[int, Variable]]:
    return ((i, v) for i, v in enumerate(space.variables) if v.layer == layer)


def changes_of(graph: Graph, store: CandidateStore, number: int, variable: Variable) -> Iterator[Change]:
    """From the best option of a variable of a layer to each of the others; of a width at 16 bits."""
    for option, chosen in enumerate(variable.options[:-1]):
        key = f"{number} {option}"
        if variable.kind == "layer":
            yield Change(key, variable.name)
        elif variable.kind == "width":
            for linear in graph.groups[variable.name].consumers:
                W = store.weight(linear, DENSE, {variable.name: chosen})
                yield Change(key, linear, W - store.weight(linear, DENSE))
        else:
            (projection,) = (p for p in graph.projections if p.name == variable.name)
            for linear in projection.linears:
                yield Change(key, linear, store.weight(linear, chosen) - store.weight(linear, variable.options[-1]))


@contextmanager
def _watched_head(stream: Stream, store, space: Space, ends: Mapping[str, int], shape) -> Iterator[dict[str, Tensor]]:
    """What options of the head, and of an embedding that is tied to it, do to its own output."""
    model, found = stream.model, {}
    head = model.get_output_embeddings()
    weight = None if head is None else head._parameters["weight"]
    names = [n for n, _ in ends.items() if model.get_submodule(n)._parameters["weight"] is weight]
    options = [(ends[n], n, o) for n in names for o in range(space.sizes[ends[n]] - 1)]
    found |= {f"{v} {o}": torch.zeros(shape) for v, _, o in options}
    if not options:
        yield found
        return
    spec = lambda v, o: space.variables[v].options[o]
    moved_by = {f"{v} {o}": store.weight(n, spec(v, o)) - store.weight(n, spec(v, -1)) for v, n, o in options}
    window = -1

    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        nonlocal window
        if not output.requires_grad:
            return
        window += 1
        x, at = args[0].detach(), window

        def arrived(g: Tensor) -> None:
            for key, D in moved_by.items():
                found[key][at] = (shape[1] - 1) * (g * (x @ D.T)).sum(-1).flatten().float().cpu()

        output.register_hook(arrived)

    handle = head.register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


def _of_entrance(stream: Stream, store, space: Space, ends: Mapping[str, int], ids: Tensor, scratch: Scratch) -> dict:
    """What options of the embedding do to the hidden states that reach the first layer."""
    model, found = stream.model, {}
    weight = model.get_input_embeddings()._parameters["weight"]
    for name, v in ends.items():
        if model.get_submodule(name)._parameters["weight"] is not weight:
            continue
        options = space.variables[v].options
        with stream.ends("both"):
            with swapped(model, {name: store.weight(name, options[-1])}):
                best = [stream.before(rows)[0] for rows in ids.split(1)]
            for o, spec in enumerate(options[:-1]):
                with swapped(model, {name: store.weight(name, spec)}):
                    rows = [stream.before(rows)[0] - h for rows, h in zip(ids.split(1), best, strict=True)]
                c = [scratch.get("gradient-0", i, 1).to(row.device).mul(row).sum(-1) for i, row in enumerate(rows)]
                found[f"{v} {o}"] = (ids.shape[1] - 1) * torch.cat(c).float().cpu()
    return found


# --- measuring -------------------------------------------------------------------------------------------------------


def wanted(space: Space, used: Collection[Option], estimates: Sequence[np.ndarray], limit: int) -> list[Option]:
    """Options to measure: all of them if they are no more than the limit; else those that are used and their
    neighbours, and of these the ones that are thought to lose most."""
    every = [(v, o) for v, n in enumerate(space.sizes) for o in range(n - 1)]
    if len(every) <= limit:
        return every
    near = {(v, o + step) for v, o in used for step in (-1, 0, 1)}
    some = [option for option in every if option in near]
    return sorted(sorted(some, key=lambda at: -estimates[at[0]][at[1]])[:limit])


def measure(
    space: Space, options: Sequence[Option], evaluate: Evaluate, on_progress: Callable[[int, int], None] | None = None
) -> tuple[float, dict[Option, float]]:
    """What the best of everything loses, and what each option adds to it, not below zero."""
    top = space.top
    # Late layers first: the first trials leave what reaches every layer behind, and later ones begin there.
    ordered = sorted(options, key=lambda at: (-space.variables[at[0]].layer, at))
    points = [top, *(tuple(o if i == v else n for i, n in enumerate(top)) for v, o in ordered)]
    common = [max(space.variables[v].layer, 0) for v, _ in ordered]
    found = evaluate([space.selection(point) for point in points], [max(common, default=0), *common])
    base = found[0].kl
    if on_progress is not None:
        on_progress(len(points), len(points))
    return base, {at: max(0.0, seen.kl - base) for at, seen in zip(ordered, found[1:], strict=True)}


def combined(space: Space, both: np.ndarray, base: float, measured: Mapping[Option, float]) -> Sensitivities:
    """both: of `estimate`."""
    starts = np.concatenate([[0], np.cumsum(space.sizes)])
    estimates = np.diagonal(both) / 2
    known = np.full(len(estimates), np.nan)
    known[starts[1:] - 1] = 0.0
    for (v, o), value in measured.items():
        known[starts[v] + o] = value
    kinds = [kind_of(v, o) for v in space.variables for o in range(len(v.options))]
    ratios = _ratios(kinds, estimates, known)
    single = np.where(np.isnan(known), estimates * ratios, known)
    # A choice that loses so many times what was estimated moves the predictions by the root of it.
    scale = np.sqrt(np.divide(single, estimates, out=np.ones_like(single), where=estimates > SMALLEST))
    interaction = both * scale[:, None] * scale
    for v in range(len(space.sizes)):
        interaction[starts[v] : starts[v + 1], starts[v] : starts[v + 1]] = 0
    split = lambda array: tuple(np.split(array, starts[1:-1]))
    return Sensitivities(split(single), interaction, split(estimates), split(known), base)


def kind_of(variable: Variable, option: int) -> tuple:
    """Options of one kind are estimated too low or too high alike."""
    chosen = variable.options[option]
    return variable.kind, variable.layer < 0, chosen.bits if variable.kind == "bits" else None


def _ratios(kinds: Sequence[tuple], estimates: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Measured by estimated, as a geometric mean over the options of a kind; over all where none of it was measured."""
    found: dict[tuple | None, list[float]] = defaultdict(list)
    for kind, guess, value in zip(kinds, estimates, known, strict=True):
        if guess > SMALLEST and value > SMALLEST:
            for key in (kind, None):
                found[key].append(math.log(value / guess))
    mean = {key: math.exp(sum(logs) / len(logs)) for key, logs in found.items()}
    return np.array([mean.get(kind, mean.get(None, 1.0)) for kind in kinds])


def correlation(guessed: np.ndarray, seen: np.ndarray) -> dict[str, float]:
    """Of two sets of losses: by rank, of the logarithms, and the mean of the absolute logarithm of their ratio."""
    both = (guessed > SMALLEST) & (seen > SMALLEST)
    a, b = np.log(guessed[both]), np.log(seen[both])
    if len(a) < 2:
        return {"n": len(a), "spearman": math.nan, "pearson": math.nan, "log_ratio": math.nan}
    ranks = lambda x: np.argsort(np.argsort(x))
    of = lambda x, y: float(np.corrcoef(x, y)[0, 1])
    return {
        "n": len(a), "spearman": of(ranks(a), ranks(b)), "pearson": of(a, b), "log_ratio": float(np.abs(a - b).mean())
    }  # fmt: skip
