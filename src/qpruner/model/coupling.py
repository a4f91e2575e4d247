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
from qpruner.model.probe import columns_reading, earlier_rows, over_tokens, reached, touched

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


@dataclass(frozen=True)
class Surroundings:
    """What the columns of a layer may depend on besides the rows of its producers.

    values: parameters and tables. fixed: those of them that cannot be cut, and leaves whose rows cannot: units may read
    them, if all read them alike. stream: what is as wide as the hidden states, where norms hide who reads what, and
    weights of which parts were read: no unit may read any.
    experts: of every stack (n_experts, d_out, d_in).
    rigid: module -> why the groups in it stay whole.
    """

    values: dict[str, Tensor]
    fixed: dict[str, Tensor]
    stream: dict[str, Tensor]
    experts: dict[str, tuple[int, int, int]]
    rigid: dict[str, str]


def couple(
    calls: dict[str, tuple[Tensor, Tensor]], around: Surroundings, escapes: set[str], generator: torch.Generator
) -> Coupling:
    """The groups of a layer.

    Args:
        calls: input and leaf of every linear, and of one expert of every stack, in the model's order.
        escapes: linears whose rows reach beyond the layer: they are no producers.
    """
    leaves = {name: leaf for name, (_, leaf) in calls.items() if name not in escapes}
    found, assembled = taken_apart(calls, leaves, around, generator)
    notes = []
    for name in tying(assembled):
        rest = {n: leaf for n, leaf in leaves.items() if n != name}
        without = taken_apart(calls, rest, replace(around, fixed=around.fixed | {name: leaves[name]}), generator)
        if divisible(without[1]) > divisible(assembled):
            (found, assembled), leaves = without, rest
            notes.append(f"the rows of {name!r} are read by every unit alike, so they all stay")
    groups = named([group for group, _ in assembled])
    notes += [f"{group.name!r}: {why}" for group, (_, why) in zip(groups, assembled, strict=True) if why]
    unreached = {name: tuple((c < 0).nonzero().flatten().tolist()) for name, c in found.rows.items() if (c < 0).any()}
    for name, rows in unreached.items():
        notes.append(f"{len(rows)} row(s) of {name!r} reach no other linear of the layer and are never removed")
    alone = lambda g: g.kind == "kv_group" and not around.experts.keys() & (g.producers | g.consumers).keys()
    own = torch.Generator().manual_seed(0)  # what is found so far does not depend on what more is looked for
    heads = [query_heads(g, calls, around, found, own) for g in groups if alone(g)]
    return Coupling((*groups, *filter(None, heads)), unreached, tuple(notes))


def taken_apart(calls, leaves, around: Surroundings, generator) -> tuple["Components", list[tuple[Group, str]]]:
    """The components, and every group with the reason why it cannot be pruned, if so."""
    found = find_components(calls, leaves, generator)
    return found, [assemble(components, found, calls, around, generator) for components in alike(found)]


def tying(assembled: list[tuple[Group, str]]) -> list[str]:
    """Producers that may tie a group together because every unit reads them alike; fewer rows than the group's columns.

    In latent attention such is the linear whose rows are, turned by position, a part of the keys of all heads.
    """
    found = []
    for group, _ in assembled:
        if group.n_units == 1 and len(group.producers) > 1:
            columns = min(t.numel() for t in group.consumers.values())
            found += [name for name, rows in group.producers.items() if rows.numel() < columns]
    return found


def divisible(assembled: list[tuple[Group, str]]) -> int:
    return sum(group.n_units > 1 for group, _ in assembled)


def find_components(
    calls, leaves: dict[str, Tensor], generator: torch.Generator, among: dict[str, Tensor] | None = None
) -> Components:
    """Asks every linear input what it depends on; most depend on no producer, and one derivative says so.

    Args:
        among: the rows of each leaf to look at, all by default; the others are in no component.
    """
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
            masks = None if among is None else torch.cat([among[n] for n in hit])
            label, witness[name] = join_columns(x, hit, torch.cat([numbers[n] for n in hit]), label, generator, masks)
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
    x: Tensor,
    leaves: dict[str, Tensor],
    numbers: Tensor,
    label: Tensor,
    generator: torch.Generator,
    among: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Joins the rows that a column of x depends on, for every column; also returns one of these rows per column.

    One derivative per column would be slow (11008 of them in a LLaMA). Blocks of columns are asked first. Where two
    sets of blocks share no row, a row tells by itself which of the two it was reached from, so that one column of every
    such set is asked in the same derivative: about 240 derivatives instead of 11008, with the same answer.

    Args:
        numbers: the number that each row of the leaves has in `label`.
        among: which rows count; all by default.
    """
    counted = lambda hits: torch.cat([over_tokens(h) for h in hits], 1) & (True if among is None else among)
    d_in = x.shape[-1]
    block = torch.arange(d_in) // BLOCK
    coarse, seen = torch.arange(len(numbers)), torch.full((int(block[-1]) + 1,), -1)
    readers = torch.zeros(len(numbers), dtype=torch.int64)
    for first, hits in touched(x, leaves, block, generator):
        hits = counted(hits)
        blocks, rows = hits.nonzero(as_tuple=True)
        coarse = join(coarse, blocks, rows)
        seen[blocks + first] = rows
        readers += hits.sum(0)
    if len(seen) > 1 and (readers == len(seen)).any():
        row = int((readers == len(seen)).nonzero()[0, 0])
        if columns_reading(x, leaves, row, generator).all():  # then all are tied together by this row
            rows = numbers[readers > 0]
            return join(label, torch.zeros_like(rows), rows), numbers[row].expand(d_in).clone()
    apart = torch.where(seen >= 0, coarse[seen], -1)[block]  # columns with different numbers share no row
    in_order, order = apart.sort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(d_in) - torch.searchsorted(in_order, in_order)
    place[apart < 0] = -1
    witness = torch.full((d_in,), -1)
    for first, hits in touched(x, leaves, place, generator):
        places, rows = counted(hits).nonzero(as_tuple=True)
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


def assemble(
    components: Tensor, found: Components, calls, around: Surroundings, generator: torch.Generator
) -> tuple[Group, str]:
    """One group, and why it cannot be pruned if so: its components are then merged into a single unit."""
    joined = lambda side: {name: c for name, c in side.items() if torch.isin(c, components).any()}
    producers, consumers = joined(found.rows), joined(found.columns)
    sizes = torch.stack([count(c, found.n)[components] for c in (*producers.values(), *consumers.values())], 1)
    unit = torch.full((found.n + 1,), -1)  # the last entry serves component -1
    unit[components] = torch.arange(len(components))
    module = common_module([*producers, *consumers])
    tensors, why_whole = {}, next((why for m, why in around.rigid.items() if f"{module}.".startswith(f"{m}.")), "")
    if why_whole:
        pass
    elif len(components) == 1:
        why_whole = f"the columns of {listed(consumers)} are all tied together by the rows of {listed(producers)}"
    elif len({around.experts[n][0] for n in (producers | consumers) if n in around.experts}) > 1:
        why_whole = f"{listed(producers | consumers)} are stacks of different numbers of experts"
    elif (sizes != sizes[0]).any():
        why_whole = f"its {len(components)} units are of unequal size"
    else:
        columns = {name: (calls[name][0], unit[c]) for name, c in consumers.items()}
        tensors, blocking = own_slices(columns, around, generator)
        if blocking:
            why_whole = f"its units have values of their own in {listed(blocking)}, which cannot be cut"
    if why_whole:
        unit[components], tensors = torch.zeros_like(components), {}
    n_units = 1 if why_whole else len(components)
    mixes = any(found.mixing[name][torch.isin(c, components)].any() for name, c in producers.items())
    group = Group(
        name="",
        layer=-1,
        kind="kv_group" if mixes else "channel",
        module=module,
        producers={name: table(unit[c], n_units) for name, c in producers.items()},
        consumers={name: table(unit[c], n_units) for name, c in consumers.items()},
        n_blocks=max(blocks(unit[c]) for c in (*producers.values(), *consumers.values())),
        tensors=tensors,
    )
    return of_all_experts(
        group, around.experts
    ), why_whole and f"{why_whole}, so it is one indivisible unit and never pruned"


def own_slices(
    columns: dict[str, tuple[Tensor, Tensor]], around: Surroundings, generator: torch.Generator
) -> tuple[dict[str, tuple[int, Tensor]], list[str]]:
    """Values that belong to single units, such as attention sinks: as slices by unit, and names where there are none.

    What every unit reads alike, such as a norm per head, belongs to none.

    Args:
        columns: of every consumer, its input and the unit of every column, -1 for none.
    """
    targets = {name: v for name, v in (around.values | around.fixed).items() if v.requires_grad}
    owners, blocking = {}, list(reached([x[..., unit >= 0] for x, unit in columns.values()], around.stream, generator))
    for x, unit in columns.values():
        names = list(reached([x], targets, generator))
        if not names:
            continue
        parts = [hits for _, hits in touched(x, {n: targets[n] for n in names}, unit, generator)]
        for name, *hits in zip(names, *parts, strict=True):
            hits = torch.cat(hits)
            readers = hits.sum(0)
            if ((readers > 1) & (readers < len(hits))).any():
                blocking.append(name)
            if name in around.fixed and hits.flatten(0, -2).any(0).sum() >= (unit >= 0).sum():
                blocking.append(name)  # as many rows as columns: behind a norm each column may read one of its own
            owner = torch.where(readers == 1, hits.int().argmax(0), -1)
            if name in owners and not torch.equal(owners[name], owner):
                blocking.append(name)
            owners[name] = owner
    found = {name: slices(owner) for name, owner in owners.items() if (owner >= 0).any()}
    blocking += [name for name, cut in found.items() if not cut or name in around.fixed]
    return {name: cut for name, cut in found.items() if name not in blocking}, sorted(set(blocking))


def slices(owner: Tensor) -> tuple[int, Tensor] | None:
    """The dimension along which every slice belongs to one unit, and the slices by unit; None if there is no such.

    Args:
        owner: the unit of every element, -1 for none.
    """
    for dim in range(owner.dim()):
        by_slice = owner.movedim(dim, 0).flatten(1) if owner.dim() > 1 else owner[:, None]
        unit = by_slice.amax(1)
        sizes = unit[unit >= 0].bincount()
        if ((by_slice == unit[:, None]) | (by_slice < 0)).all() and (sizes == sizes[0]).all():
            return dim, table(unit, len(sizes))
    return None


def blocks(unit: Tensor) -> int:
    """How many parts the rows or columns of a linear come in, with units of their own in each, mixed up within it.

    A model that keeps its heads in four parts, with the q, k and v of a part together, takes its rows apart in four
    equal ones, so that the parts have to keep equally many heads. Where every unit is a part, nothing has to.
    """
    order = unit[unit >= 0]
    n_units = int(order.max()) + 1
    for n in range(n_units, 1, -1):
        if n_units % n == 0 and len(order) % n == 0:
            part = order.view(n, -1) // (n_units // n)
            if (part == torch.arange(n)[:, None]).all():
                return n if n < n_units else 1
    return 1


def of_all_experts(group: Group, experts: dict[str, tuple[int, int, int]]) -> Group:
    """The group of one expert as that of all of them, which share its structure.

    Units within experts come expert by expert, as blocks; units that linears outside of the experts share in are the
    same for every expert.
    """
    members = group.producers.keys() | group.consumers.keys()
    stacked = members & experts.keys()
    if not stacked or len({experts[name][0] for name in stacked}) > 1:
        return group
    n = experts[next(iter(stacked))][0]
    dim = 0 if stacked == members else 1

    def widened(tables: dict[str, Tensor], side: int) -> dict[str, Tensor]:
        every = lambda name, t: torch.cat([t + e * experts[name][side] for e in range(n)], dim)
        return {name: every(name, t) if name in stacked else t for name, t in tables.items()}

    return replace(
        group,
        producers=widened(group.producers, 1),
        consumers=widened(group.consumers, 2),
        n_blocks=group.n_blocks * n if dim == 0 else group.n_blocks,
    )


def query_heads(group: Group, calls, around: Surroundings, found: Components, generator) -> Group | None:
    """The query heads inside the kv groups of a layer, in a block for each; None unless all have several, all alike.

    They are the components of the rows that stay at their own token, which keys and values do not, and of the columns
    that depend on those rows.
    """
    among = {}
    for name, rows in group.producers.items():
        among[name] = ~found.mixing[name]
        among[name][~torch.isin(torch.arange(len(among[name])), rows)] = False
    leaves = {name: calls[name][1] for name, rows in among.items() if rows.any()}
    readers = {name: calls[name] for name in group.consumers}
    inner = find_components(readers, leaves, generator, among)
    sets = alike(inner)
    if len(sets) != 1 or group.n_blocks > 1:
        return None
    heads, why_whole = assemble(sets[0], inner, readers, around, generator)
    name, columns = next(iter(heads.consumers.items()))
    owner = (group.consumers[name][..., None] == columns[:, 0]).any(1).long().argmax(0)
    per_group = len(owner) // group.n_units
    mixed_up = len(found.columns[name][columns].unique()) != group.n_units  # kv groups were merged into one unit
    if why_whole or mixed_up or per_group < 2 or (owner.bincount(minlength=group.n_units) != per_group).any():
        return None
    order = owner.argsort(stable=True)
    return replace(
        heads,
        name=f"{group.name}.query_heads",
        kind="query_head",
        producers={name: rows[order] for name, rows in heads.producers.items()},
        consumers={name: columns[order] for name, columns in heads.consumers.items()},
        n_blocks=group.n_units,
        tensors={name: (dim, slices[order]) for name, (dim, slices) in heads.tensors.items()},
    )


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
