"""Whole experts of a mixture as units: what is removed is never routed to.

An expert is a slice of every stack, and a row of the router that chooses between them, with whatever else has one value
for each expert. Which those are is read from shapes: nothing but the number of experts ties them together.
"""

from collections import defaultdict

import torch
from torch import Tensor, nn

from qpruner.model.graph import Group, LinearSite, Stack

CHOSEN = ("top_k", "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k")
ROUTED_IN_GROUPS = ("n_group", "num_group", "num_expert_group")


def expert_groups(
    model: nn.Module, sites: dict[str, LinearSite], stacks: dict[str, Stack]
) -> tuple[list[Group], list[tuple[int, str, str]]]:
    """A group for every mixture of stacked experts; and layer, module and reason where there is none."""
    mixtures, groups, notes = defaultdict(list), [], []
    for stack in stacks.values():
        mixtures[stack.name.rpartition(".")[0]].append(stack)
    for path, members in mixtures.items():
        group, why_not = expert_group(model, path, members, sites)
        if group:
            groups.append(group)
        else:
            notes.append((members[0].layer, path, why_not))
    return groups, notes


def expert_group(
    model: nn.Module, path: str, members: list[Stack], sites: dict[str, LinearSite]
) -> tuple[Group | None, str]:
    """The experts of one module, chosen by a router inside it or beside it."""
    n = members[0].n_experts
    if any(stack.n_experts != n for stack in members):
        return None, "its stacks hold different numbers of them"
    beside = path.rpartition(".")[0]
    scope = next((p for p in (path, beside) if matrices(model, p, members, n)), "")
    routers = matrices(model, scope, members, n) if scope else []
    if len(routers) != 1:
        return None, "it is not clear which matrix chooses between them"
    settings = [value for module in model.get_submodule(scope).modules() for value in (vars(module),)]
    asked = lambda names: [v[name] for v in settings for name in names if isinstance(v.get(name), int)]
    if max(asked(ROUTED_IN_GROUPS), default=1) > 1:
        return None, "they are chosen group by group"
    if not asked(CHOSEN):
        return None, "it is not seen how many are chosen for a token"
    each = torch.arange(n)[:, None]
    tensors = {name: (0, each) for stack in members for name in (stack.name, stack.bias) if name}
    linears = {name: each for name in routers if name in sites}
    tensors |= {name: (0, each) for name in values(model, scope, members) if shape_in(model, name)[:1] == (n,)}
    whole = lambda width: each * width + torch.arange(width)
    return Group(
        name=f"{scope}.whole_experts",
        layer=members[0].layer,
        kind="expert",
        module=scope,
        producers=linears | {stack.name: whole(stack.d_out) for stack in members},
        consumers={stack.name: whole(stack.d_in) for stack in members},
        tensors=tensors,
        at_least=max(asked(CHOSEN)),
    ), ""


def matrices(model: nn.Module, scope: str, members: list[Stack], n: int) -> list[str]:
    """Linears and matrices of a module with a row for each expert."""
    linears = [
        name
        for name, module in model.get_submodule(scope).named_modules(prefix=scope)
        if isinstance(getattr(module, "out_features", None), int) and module.out_features == n
    ]
    own = values(model, scope, members)
    return linears + [name for name in own if len(shape_in(model, name)) == 2 and shape_in(model, name)[0] == n]


def values(model: nn.Module, scope: str, members: list[Stack]) -> list[str]:
    """Parameters and buffers of a module that are neither stacks of it nor of a linear."""
    known = {name for stack in members for name in (stack.name, stack.bias)}
    return [
        f"{path}.{name}"
        for path, module in model.get_submodule(scope).named_modules(prefix=scope)
        if not isinstance(getattr(module, "out_features", None), int)
        for name, value in (*module._parameters.items(), *module._buffers.items())
        if value is not None and f"{path}.{name}" not in known
    ]


def shape_in(model: nn.Module, name: str) -> tuple[int, ...]:
    path, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), attribute)
    return tuple(tensor.shape)
