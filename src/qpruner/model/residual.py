"""The channels of the hidden states as one group of the whole model: who reads them, who writes them, what scales them.

Derivatives cannot tell the channels apart where a norm has mixed them all, but the norm's own weights can: element j of
such a weight reaches column j and no other. Everything that adds to the hidden states does so in their order.

    reader     a linear layer whose input is the hidden states, normed perhaps: it depends on no producer of its layer
    writer     a linear layer whose rows escape their layer: they are added to the hidden states
    scale      another parameter with one element per channel, on the way to a reader or out of the layer
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qpruner.model.graph import Group, LinearSite, Stack
from qpruner.model.probe import TOKENS, Call, Recording, reached
from qpruner.model.skeleton import linear_dims

NAME = "residual"


@dataclass(frozen=True)
class Roles:
    """Of one layer, names relative to it. scales: with the dimension along which they have a slice for each channel.

    why_not: half a sentence where its channels cannot go.
    """

    readers: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    scales: dict[str, int] = field(default_factory=dict)
    why_not: str = ""


def roles_in(
    calls: dict[str, Call],
    states: Tensor,
    output: Tensor,
    values: dict[str, Tensor | None],
    escapes: set[str],
    generator: torch.Generator,
) -> Roles:
    """Who takes part in the hidden states of a layer.

    Args:
        calls: input and leaf of every linear, and of one expert of every stack.
        states, output: the hidden states that the layer gets and hands on.
        values: parameters and tables that belong to no linear and no stack; None for one too large to be looked at.
        escapes: linears with rows that reach beyond the layer.
    """
    width = output.shape[-1]
    producers = {name: leaf for name, (_, leaf) in calls.items() if name not in escapes}
    sources = {name: leaf for name, (_, leaf) in calls.items() if name in escapes} | {"": states}
    readers = [name for name, (x, _) in calls.items() if not reached([x], producers, generator)]
    writers = tuple(n for n in calls if n in escapes and calls[n][1].shape[-1] == width)
    for name in readers:
        if calls[name][0].shape[-1] != width or not reached([calls[name][0]], sources, generator):
            return Roles(why_not=f"{name!r} reads something else")
    if large := [name for name, value in values.items() if value is None]:
        return Roles(why_not=f"{large[0]!r} is too large to be looked at")
    inputs = [*{id(x): x for x, _ in map(calls.get, readers) if x.requires_grad}.values(), output]
    wide = {name: v for name, v in values.items() if width in v.shape and v.requires_grad}
    met, scales = reached(inputs, wide, generator), {}
    for name in met:
        if wide[name].dim() == 1 and any(by_element(x, wide[name], generator) for x in inputs):
            scales[name] = 0
        elif wide[name].dim() == 2 and wide[name].shape[0] != width:  # of a router
            scales[name] = 1
        else:
            return Roles(why_not=f"{name!r} has no element for each of them")
    return Roles(tuple(readers), writers, scales)


def by_element(x: Tensor, vector: Tensor, generator: torch.Generator) -> bool:
    """Whether column j of x depends on element j of the vector and on no other.

    The columns whose number has a certain bit are asked together, for every bit in turn, and then those without it.
    """
    number = torch.arange(len(vector))
    for bit in range(max(1, (len(vector) - 1).bit_length())):
        for asked in ((number >> bit) % 2 == 1, (number >> bit) % 2 == 0):
            weights = torch.randn(x.shape, generator=generator) * asked
            (found,) = torch.autograd.grad(x, vector, weights, retain_graph=True, allow_unused=True)
            if found is None or not torch.equal(found != 0, asked):
                return False
    return True


def residual_group(
    run: Recording, sites: dict[str, LinearSite | Stack], roles: list[Roles]
) -> tuple[Group | None, str]:
    """The group, or None and why there is none."""
    width = run.outputs[0].shape[-1]
    tensors, why_not = outside(run.model, run.layers, width)
    reasons = [f"in decoder layer {i} {role.why_not}" for i, role in enumerate(roles) if role.why_not]
    if reasons or why_not:
        return None, f"channels of the hidden states: {[*reasons, why_not][0]}, so they are never pruned"
    tensors |= {f"{run.layers[i]}.{name}": dim for i, role in enumerate(roles) for name, dim in role.scales.items()}
    each = torch.arange(width)[:, None]

    def tables(side: str, size: str) -> dict[str, Tensor]:
        names = {f"{run.layers[i]}.{name}" for i, role in enumerate(roles) for name in getattr(role, side)}
        parts = {name: torch.arange(getattr(sites[name], "n_experts", 1)) for name in sites if name in names}
        return {name: each + part * getattr(sites[name], size) for name, part in parts.items()}

    return Group(
        name=NAME,
        layer=-1,
        kind="residual",
        module="",
        producers=tables("writers", "d_out"),
        consumers=tables("readers", "d_in"),
        tensors={name: (dim, each) for name, dim in tensors.items()},
    ), ""


def outside(model: nn.Module, layers: tuple[str, ...], width: int) -> tuple[dict[str, int], str]:
    """Parameters outside the decoder layers with a slice for each channel, with the dimension; or why it is unclear."""
    found, inside = {}, tuple(f"{layer}." for layer in layers)
    for path, module in model.named_modules():
        if getattr(module, "normalized_shape", None) == (width,) and not list(module.parameters()):
            return found, f"{path!r} is a norm without weights"
        if f"{path}.".startswith(inside):
            continue
        d_out, d_in = linear_dims(module) or (None, None)
        if d_out == width == d_in:
            return found, f"{path!r} has as many outputs as inputs"
        for name, parameter in module.named_parameters(prefix=path, recurse=False, remove_duplicate=False):
            if d_out is None:
                along = [parameter.dim() - 1] if parameter.dim() < 3 and parameter.shape[-1] == width else []
            elif parameter.dim() == 1:
                along = [0] if d_out == width else []
            else:
                along = [dim for dim, size in enumerate(parameter.shape) if size == width]
            if width in parameter.shape and not along and parameter.dim() > 2:
                return found, f"{name!r} belongs to no linear layer"
            found.update((name, dim) for dim in along)
        for name, buffer in module.named_buffers(prefix=path, recurse=False):
            if buffer.dim() and buffer.shape[-1] == width:
                return found, f"{name!r} is a table that is no weight"
    return found, ""


@torch.no_grad()
def fault_of(skeleton: nn.Module) -> str:
    """What a model without weights raises on a few tokens, with zeros in their place; empty for nothing."""
    parameters = skeleton.named_parameters(remove_duplicate=False)
    zeros = {name: torch.zeros(()).expand(p.shape) for name, p in parameters}  # of no memory
    meta = {name: b for name, b in skeleton.named_buffers() if b.is_meta}  # codes of what is packed
    zeros |= {name: torch.zeros((), dtype=b.dtype).expand(b.shape) for name, b in meta.items()}
    skeleton.config._experts_implementation = "eager"
    ids = torch.arange(3, 3 + TOKENS)[None]
    try:
        torch.func.functional_call(skeleton, zeros, kwargs={"input_ids": ids, "use_cache": False}, tie_weights=False)
    except Exception as error:  # whatever a model's own code raises
        return str(error)
    return ""
