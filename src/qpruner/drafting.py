"""The first half of deciding: which layers and units stay, and the plan once bits are known."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from qpruner.decide import widths
from qpruner.decide.fusion import Fused
from qpruner.deciding import Decided, choose_bits, measure_layers, measure_scores, settled, worth_of_layers
from qpruner.do.quantize import Candidates
from qpruner.job import Job
from qpruner.joint.stages import Searched, searched
from qpruner.model.depth import Renaming
from qpruner.plan import QuantSpec, Selection
from qpruner.prepare import Prepared, without_layers
from qpruner.shape import stored_sizes


@dataclass(frozen=True)
class Drafted:
    """What is decided before the model is cut. prepared: the request, for the model of the layers that stay.

    specs: of every linear; None where bits are chosen once the model is cut. embeddings: how embedding and head are
        stored; None for as the recipe says. rivals: other plans, which may turn out better once they are carried out.
    """

    prepared: Prepared
    scores: dict[str, Tensor]
    kept: widths.Kept
    fused: Fused | None = None
    specs: dict[str, QuantSpec] | None = None
    embeddings: dict[str, QuantSpec] | None = None
    searched: Searched | None = None
    rivals: tuple["Drafted", ...] = ()


def drafted(job: Job) -> Drafted:
    """Widths by the recipe's scores, with bits to come later; or all at once, where the recipe searches jointly."""
    if job.recipe.allocation == "joint":
        return at_once(job, searched(job, [job.prepared.limit_bytes]))
    scores, fused = measure_scores(job)
    prepared, scores = without_layers(job.prepared, scores, worth_of_layers(job, scores))
    job = replace(job, prepared=prepared)
    sizes = stored_sizes(job.shape, job.recipe)
    kept = widths.choose(job.graph, job.recipe, scores, prepared.counts, sizes, prepared.limit_bytes)
    return Drafted(prepared, scores, kept, fused)


def at_once(job: Job, found: Searched) -> Drafted:
    """The plan that a search has for the job's budget, and rivals that are nearly as good by what was tried."""
    points = found.finalists(job.prepared.limit_bytes, job.recipe.finalists)
    drafts = [of_selection(job.prepared, found.scores, found.space.selection(point)) for point in points]
    first, *rivals = (replace(each, searched=found) for each in drafts)
    return replace(first, rivals=tuple(rivals))


def of_selection(prepared: Prepared, scores: Mapping[str, Tensor], selection: Selection) -> Drafted:
    """The best units of every group, as many as a selection says, by the names of the model of the layers that stay."""
    graph, shape = prepared.shape.graph, prepared.shape
    counts = {name: selection.kept.get(name, group.n_units) for name, group in graph.groups.items()}
    kept = widths.select(graph, scores, counts)
    specs = {n: selection.specs[p.name] for p in graph.projections if p.layer in selection.layers for n in p.linears}
    embeddings = {name: selection.specs[name] for name in graph.embeddings if name in selection.specs}
    if len(selection.layers) == len(graph.layers):
        return Drafted(replace(prepared, counts=counts), dict(scores), kept, specs=specs, embeddings=embeddings)
    of_keys = Renaming(graph, selection.layers).of_keys
    shorter = replace(prepared, shape=shape.of_layers(selection.layers), counts=of_keys(counts))
    return Drafted(shorter, of_keys(dict(scores)), of_keys(kept), specs=of_keys(specs), embeddings=embeddings)


def completed(job: Job, draft: Drafted, loaded: tuple[nn.Module, Candidates] | None) -> Decided:
    """The plan, and what it was decided on. loaded: the pruned model, where it is in memory."""
    if draft.specs is None:
        information = measure_layers(job, draft.kept)
        decided = choose_bits(job, draft.scores, draft.kept, information, loaded)
    else:
        decided = settled(job, draft.scores, draft.kept, draft.specs)
    return replace(decided, fused=draft.fused, searched=draft.searched)
