"""The groups of one decoder layer, from the derivatives that `probe` takes. Names here are relative to the layer.

Producer rows and consumer columns are the nodes of a graph, with an edge where a column depends on a row. Its connected
components are the units; units that join the same linears are a group.

Notation
    label      of a row: the smallest row of its component found so far   (n_rows,)
    component  of a row or column: number of its unit in the layer, -1 for none
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qpruner.errors import listed
from qpruner.model.graph import Group
from qpruner.model.probe import earlier_rows, over_tokens, reached, touched

BLOCK = 64  # columns that are first asked together; units that begin at multiples of it come apart at once


@dataclass(frozen=True)
class Coupling:
    """What one layer shape was found to be; every layer of that shape shares it."""

    groups: tuple[Group, ...]
    unreached: dict[str, tuple[int, ...]]
    notes: tuple[str, ...]


@dataclass
class Components:
    """Of every row of the producers, and of every column of the consumers. mixing: rows seen to reach a later token."""

    n: int
    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    mixing: dict[str, Tensor]


def couple(
    calls: dict[str, tuple[Tensor, Tensor]],
    parameters: dict[str, Tensor],
    escapes: set[str],
    generator: torch.Generator,
) -> Coupling:
    """The groups of a layer.

    Args:
        calls: input and leaf of every linear, in the model's order.
        parameters: of the layer, without those of linears.
        escapes: linears whose rows reach beyond the layer: they are no producers.
    """
    leaves = {name: leaf for name, (_, leaf) in calls.items() if name not in escapes}
    found = find_components(calls, leaves, generator)
    private = private_parameters(calls, parameters, found, generator)
    groups, notes = [], []
    for components in alike(found):
        group, why_whole = assemble(components, found, private)
        groups.append(group)
        notes.append(why_whole)
    groups = named(groups)
    notes = [f"{group.name!r}: {note}" for group, note in zip(groups, notes, strict=True) if note]
    unreached = {name: tuple((c < 0).nonzero().flatten().tolist()) for name, c in found.rows.items() if (c < 0).any()}
    for name, rows in unreached.items():
        notes.append(f"{len(rows)} row(s) of {name!r} reach no other linear of the layer and are never removed")
    return Coupling(tuple(groups), unreached, tuple(notes))


def find_components(calls, leaves: dict[str, Tensor], generator: torch.Generator) -> Components:
    """Asks every linear input what it depends on; most depend on no producer, and one derivative says so."""
    sizes = {name: leaf.shape[-1] for name, leaf in leaves.items()}
    label = torch.arange(sum(sizes.values()))
    numbers = dict(zip(leaves, label.clone().split(list(sizes.values())), strict=True))
    mixing = {name: torch.zeros(size, dtype=torch.bool) for name, size in sizes.items()}
    witness = {}
    for name, (x, _) in calls.items():
        hit = {n: leaves[n] for n in reached([x], leaves, generator)}
        if hit:
            for n, early in earlier_rows(x, hit, generator).items():
                mixing[n] |= early
            label, witness[name] = join_columns(x, hit, torch.cat([numbers[n] for n in hit]), label, generator)
    touched_labels = torch.cat(
        [torch.empty(0, dtype=torch.int64), *(label[w[w >= 0]] for w in witness.values())]
    ).unique()
    component = torch.full((len(label) + 1,), -1)  # the last entry serves witness -1
    component[touched_labels] = torch.arange(len(touched_labels))
    return Components(
        n=len(touched_labels),
        rows={name: component[label[rows]] for name, rows in numbers.items()},
        columns={name: torch.where(w >= 0, component[label[w]], -1) for name, w in witness.items()},
        mixing=mixing,
    )


def join_columns(
    x: Tensor, leaves: dict[str, Tensor], numbers: Tensor, label: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Joins the rows that a column of x depends on, for every column; also returns one of these rows per column.

    One derivative per column would be slow (11008 of them in a LLaMA). Blocks of columns are asked first. Where two
    sets of blocks share no row, a row tells by itself which of the two it was reached from, so that one column of every
    such set is asked in the same derivative: about 240 derivatives instead of 11008, with the same answer.

    Args:
        numbers: the number that each row of the leaves has in `label`.
    """
    d_in = x.shape[-1]
    block = torch.arange(d_in) // BLOCK
    coarse, seen = torch.arange(len(numbers)), torch.full((int(block[-1]) + 1,), -1)
    for first, hits in touched(x, leaves, block, generator):
        blocks, rows = torch.cat([over_tokens(h) for h in hits], 1).nonzero(as_tuple=True)
        coarse = join(coarse, blocks, rows)
        seen[blocks + first] = rows
    apart = torch.where(seen >= 0, coarse[seen], -1)[block]  # columns with different numbers share no row
    in_order, order = apart.sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(d_in) - torch.searchsorted(in_order, in_order)
    place[apart < 0] = -1
    witness = torch.full((d_in,), -1)
    for first, hits in touched(x, leaves, place, generator):
        places, rows = torch.cat([over_tokens(h) for h in hits], 1).nonzero(as_tuple=True)
        columns = order[torch.searchsorted(in_order, coarse[rows]) + places + first]
        witness[columns] = numbers[rows]
        label = join(label, columns, numbers[rows])
    return label, witness


def join(label: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Labels after joining all `right` nodes that share a `left` node: everybody takes the smallest label in reach."""
    while len(left):
        root = label[right]
        smallest = torch.full((int(left.max()) + 1,), len(label)).scatter_reduce(0, left, root, "amin")[left]
        if torch.equal(smallest, root):
            break
        label = label.scatter_reduce(0, root, smallest, "amin")
        while not torch.equal(label, label[label]):
            label = label[label]
    return label


def private_parameters(calls, parameters: dict[str, Tensor], found: Components, generator) -> dict[str, set[int]]:
    """Parameters with elements of one unit only, such as attention sinks, with those units; not so a norm per head."""
    private, parameters = {}, {name: p for name, p in parameters.items() if p.requires_grad}
    for name, components in found.columns.items():
        x, _ = calls[name]
        names = list(reached([x], parameters, generator))
        ids, set_of = components.unique(return_inverse=True)
        if not names or len(ids) < 2:
            continue
        set_of = torch.where(components < 0, -1, set_of - int(ids[0] < 0))
        parts = [hits for _, hits in touched(x, {n: parameters[n] for n in names}, set_of, generator)]
        for n, *hits in zip(names, *parts, strict=True):
            hits = torch.cat([h.flatten(1) for h in hits])
            users = hits.any(1)
            if (hits[users].any(0) != hits[users].all(0)).any():
                private.setdefault(n, set()).update(ids[ids >= 0][users].tolist())
    return private


def alike(found: Components) -> list[Tensor]:
    """Components that join the same linears, as sets; everything ordered by first consumer column."""
    if not found.n:
        return []
    joins = torch.stack([count(c, found.n) > 0 for c in (*found.rows.values(), *found.columns.values())], 1)
    columns = torch.cat(list(found.columns.values()))
    at = (columns >= 0).nonzero().flatten()
    first = torch.full((found.n,), len(columns)).scatter_reduce(0, columns[at], at, "amin")
    kinds = joins.unique(dim=0, return_inverse=True)[1]
    sets = [(kinds == k).nonzero().flatten() for k in range(int(kinds.max()) + 1)]
    return sorted((s[first[s].argsort()] for s in sets), key=lambda s: int(first[s[0]]))


def count(components: Tensor, n: int) -> Tensor:
    return components[components >= 0].bincount(minlength=n)


def assemble(components: Tensor, found: Components, private: dict[str, set[int]]) -> tuple[Group, str]:
    """One group, and why it cannot be pruned if so: its components are then merged into a single unit."""
    joined = lambda side: {name: c for name, c in side.items() if torch.isin(c, components).any()}
    producers, consumers = joined(found.rows), joined(found.columns)
    sizes = torch.stack([count(c, found.n)[components] for c in (*producers.values(), *consumers.values())], 1)
    blocking = [name for name, units in private.items() if units & set(components.tolist())]
    why_whole = ""
    if len(components) == 1:
        why_whole = f"the columns of {listed(consumers)} are all tied together by the rows of {listed(producers)}"
    elif (sizes != sizes[0]).any():
        why_whole = f"its {len(components)} units are of unequal size"
    elif blocking:
        why_whole = f"its units have values of their own in {listed(blocking)}, which cannot be cut"
    unit = torch.full((found.n + 1,), -1)  # the last entry serves component -1
    unit[components] = torch.zeros_like(components) if why_whole else torch.arange(len(components))
    n_units = 1 if why_whole else len(components)
    mixes = any(found.mixing[name][torch.isin(c, components)].any() for name, c in producers.items())
    group = Group(
        name="",
        layer=-1,
        kind="kv_group" if mixes else "channel",
        module=common_module([*producers, *consumers]),
        producers={name: table(unit[c], n_units) for name, c in producers.items()},
        consumers={name: table(unit[c], n_units) for name, c in consumers.items()},
    )
    return group, why_whole and f"{why_whole}, so it is one indivisible unit and never pruned"


def table(unit: Tensor, n_units: int) -> Tensor:
    """Indices by unit, ascending within each; `unit` is the unit of every index, -1 for none."""
    order = unit.argsort(stable=True)
    return order[unit[order] >= 0].view(n_units, -1)


def common_module(linears: list[str]) -> str:
    """Path of the smallest module around all of them; empty for the layer itself."""
    parents = [name.split(".")[:-1] for name in linears]
    same = 0
    while all(len(p) > same and p[same] == parents[0][same] for p in parents):
        same += 1
    return ".".join(parents[0][:same])


def named(groups: list[Group]) -> list[Group]:
    """After the module, or after the first consumer where the module is the layer itself or holds several groups."""
    modules = [g.module for g in groups]
    names = [g.module if modules.count(g.module) == 1 else "" for g in groups]
    names = [name or next(iter(g.consumers)) for name, g in zip(names, groups, strict=True)]
    repeats = [names[:i].count(name) for i, name in enumerate(names)]
    return [
        replace(g, name=f"{name}#{r + 1}" if r else name) for g, name, r in zip(groups, names, repeats, strict=True)
    ]
