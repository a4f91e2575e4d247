"""Whether a plan can be carried out on a model; refused here, with a sentence, before anything is touched."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from qpruner.errors import PlanError, listed
from qpruner.model.graph import Graph, Group
from qpruner.plan import Plan, QuantSpec


def check_plan(plan: Plan, graph: Graph) -> None:
    """Raises PlanError unless the plan decides every group and every linear of the graph, and nothing else."""
    origin = f"plan for {plan.model_name!r}"
    check_kept(graph, plan.kept, origin=origin)
    _check_names(plan.specs, graph.linears, origin, "linear", "needs a spec, of 16 bits where it stays as it is")
    check_fused(plan.specs, graph, origin=origin)
    check_embeddings(plan.embeddings, graph, origin=origin)
    _check_known(plan.adapter_ranks, graph.linears, origin, "linear")
    _check_known(plan.added_biases, graph.linears, origin, "linear")
    if biased := [name for name in plan.added_biases if graph.linears[name].bias]:
        raise PlanError(f"{origin} adds a bias to {listed(biased)}, which has one. Leave it out of added_biases.")
    if wrong := [name for name, rank in plan.adapter_ranks.items() if rank < 1]:
        raise PlanError(
            f"{origin} gives an adapter of rank below 1 to {listed(wrong)}. Ranks start at 1; leave out a linear "
            "that gets no adapter."
        )


def check_fused(specs: Mapping[str, QuantSpec], graph: Graph, *, origin: str = "plan") -> None:
    """Raises PlanError where linears that runtimes fuse are stored differently."""
    for projection in graph.projections:
        found = {name: str(specs[name]) for name in projection.linears}
        if len(set(found.values())) > 1:
            said = ", ".join(f"{name.rpartition('.')[2]} {spec}" for name, spec in found.items())
            raise PlanError(
                f"{origin} stores the linears of {projection.name!r} differently: {said}. "
                f"{' and '.join(name.rpartition('.')[2] for name in found)} share a spec, because runtimes fuse them."
            )


def check_embeddings(specs: Mapping[str, QuantSpec], graph: Graph, *, origin: str = "plan") -> None:
    """Raises PlanError where the model has no such matrix, or it is to be stored as only linears of layers are."""
    if unknown := [name for name in specs if name not in graph.embeddings]:
        there = f"It can store {listed(graph.embeddings)} so" if graph.embeddings else "It has none that can be"
        why = "".join(f"; {note}" for note in graph.notes if any(note.startswith(repr(name)) for name in unknown))
        raise PlanError(
            f"{origin} stores {len(unknown)} embedding(s) or head(s) in codes that the model does not have: "
            f"{listed(unknown)}. {there}{why}."
        )
    if wrong := [name for name, spec in specs.items() if spec.salient or spec.activation_bits < 16]:
        raise PlanError(
            f"{origin} keeps salient channels of {listed(wrong)}, or rounds inputs for it: rows that are looked up "
            "have neither. Set salient to 0 and activation_bits to 16."
        )


def check_salient(
    specs: Mapping[str, QuantSpec], shapes: Mapping[str, tuple[int, int]], *, origin: str = "plan"
) -> None:
    """Raises PlanError where more channels are to be kept at high precision than there are besides one. shapes: (d_out,
    d_in) of what is left of each linear."""
    if wrong := [name for name, spec in specs.items() if spec.salient and spec.salient >= shapes[name][1]]:
        raise PlanError(
            f"{origin} has no more channels than salient ones in {len(wrong)} linear(s): {listed(wrong)}. "
            f"{wrong[0]!r} has {shapes[wrong[0]][1]} inputs; ask for fewer, or store it at more bits."
        )


def check_kept(graph: Graph, kept: Mapping[str, Sequence[int]], *, origin: str = "plan") -> None:
    """Raises PlanError unless `kept` names every group with ascending units that it has, one at least, and as many in
    every block of the group."""
    _check_names(kept, graph.groups, origin, "group", "needs its kept units, all of them where nothing is removed")
    for name, units in kept.items():
        n = graph.groups[name].n_units
        place = f"{origin}, group {name!r}"
        if not len(units):
            raise PlanError(f"{place}: keeps no unit. At least one of its {n} has to stay.")
        if len(units) < graph.groups[name].at_least:
            raise PlanError(
                f"{place}: keeps {len(units)} of {n} units, and every token is sent to "
                f"{graph.groups[name].at_least} of them. Keep as many at least."
            )
        if beyond := [u for u in units if not 0 <= u < n]:
            raise PlanError(f"{place}: keeps unit(s) {listed(beyond)}, but the units are numbered 0 to {n - 1}.")
        if any(a >= b for a, b in zip(units, units[1:], strict=False)):
            raise PlanError(f"{place}: the kept units are not in ascending order, each once. Sort them.")
        block = n // graph.groups[name].n_blocks
        sizes = Counter(u // block for u in units)
        if len(sizes) < graph.groups[name].n_blocks or len(set(sizes.values())) > 1:
            raise PlanError(
                f"{place}: its {n} units come in {graph.groups[name].n_blocks} blocks of {block}, such as those of one "
                f"expert each, and every block has to keep equally many. Kept are {min_max(sizes, graph.groups[name])}."
            )


def min_max(sizes: Counter, group: Group) -> str:
    """between 3 and 5 of a block"""
    least = min(sizes.values()) if len(sizes) == group.n_blocks else 0
    return f"between {least} and {max(sizes.values())} of a block"


def _check_names(found: Iterable[str], expected: Iterable[str], origin: str, what: str, needs: str) -> None:
    _check_known(found, expected, origin, what)
    if missing := [name for name in expected if name not in found]:
        raise PlanError(f"{origin} leaves out {len(missing)} {what}(s) of the model: {listed(missing)}. Each {needs}.")


def _check_known(found: Iterable[str], expected: Iterable[str], origin: str, what: str) -> None:
    if unknown := [name for name in found if name not in expected]:
        raise PlanError(
            f"{origin} names {len(unknown)} {what}(s) the model does not have: {listed(unknown)}. "
            "Was it made for another model?"
        )
