"""What depends on what inside a decoder layer, read from derivatives. No weight of the model is ever read.

A private copy of the model runs once on random embeddings. In it every linear returns a fresh random leaf in place
of its product, and every decoder layer starts from detached hidden states, so that a gradient stops at the linears
around it. A column of a linear's input then has an exactly zero gradient on rows of another that it does not depend on.

    column   one input of a linear layer
    row      one output of a linear layer: one element of its leaf, at every token
    escapes  of a row: it reaches the layer's output, or another layer, other than through a linear of its own layer.
             Rows of o_proj and down_proj do: they are added to the residual stream.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qpruner.errors import ModelError
from qpruner.model.skeleton import decoder_layers, linear_dims, linear_sites

TOKENS = 4
CHUNK_BYTES = 2**21  # of gradient held at once by `touched`; more is slower, it falls out of the cache


@dataclass
class Recording:
    """One run of the copy. calls: input and leaf of every linear that ran; outputs: what the decoder layers pass on."""

    model: nn.Module
    layers: tuple[str, ...]
    generator: torch.Generator
    calls: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)

    def inside(self, layer: str) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: call for name, call in self.calls.items() if name.startswith(layer + ".")}

    def parameters(self, layer: str) -> dict[str, Tensor]:
        """Parameters of a layer that belong to no linear: norms, attention sinks, stacked experts."""
        return {
            f"{path}.{name}": p
            for path, module in self.model.get_submodule(layer).named_modules(prefix=layer)
            if not linear_dims(module)
            for name, p in module.named_parameters(recurse=False)
        }


def record(model: nn.Module) -> Recording:
    """Runs a private copy of the model, on the CPU and in float32; the model itself is only looked at."""
    generator = torch.Generator().manual_seed(0)
    twin = weightless_copy(model, generator)
    run = Recording(twin, decoder_layers(twin), generator)
    watched = linear_sites(twin)
    for name, module in twin.named_modules():
        if linear_dims(module):
            module.forward = leaf_maker(module, name if name in watched else None, run)
    for path in run.layers:
        layer = twin.get_submodule(path)
        layer.register_forward_pre_hook(detach_inputs, with_kwargs=True)
        layer.register_forward_hook(lambda _, __, output: run.outputs.append(hidden_states(output)))
    embeddings = torch.randn(1, TOKENS, twin.get_input_embeddings().embedding_dim, generator=generator)
    try:
        twin(inputs_embeds=embeddings, use_cache=False)
    except ModelError:
        raise
    except Exception as error:  # whatever a model's own code raises
        raise ModelError(
            f"{type(model).__name__} does not run on input embeddings, which finds its groups: {error}"
        ) from error
    return run


def weightless_copy(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy with random values for every parameter, in next to no memory for those of linears and of the embedding.

    Random, so that a norm weight that training took to zero hides nothing, and that a model without weights gives the
    same graph.
    """
    memo = {}
    heavy = [m for m in model.modules() if linear_dims(m)] + [model.get_input_embeddings()]
    for tensor in (t for m in heavy for t in (*m.parameters(), *m.buffers())):
        memo[id(tensor)] = nn.Parameter(repeated(tensor.shape, generator), requires_grad=False)
    for parameter in model.parameters():
        if id(parameter) not in memo:
            large = parameter.numel() > 2**22  # experts stacked in one tensor may be gigabytes
            values = (repeated if large else random_values)(parameter.shape, generator)
            memo[id(parameter)] = nn.Parameter(values, requires_grad=not large)
    for name, buffer in model.named_buffers():
        if id(buffer) in memo:
            continue
        if buffer.is_meta:
            raise ModelError(f"buffer {name!r} is on the meta device. Build the model with build_skeleton(config).")
        dtype = torch.float32 if buffer.is_floating_point() else buffer.dtype
        memo[id(buffer)] = buffer.detach().to("cpu", dtype, copy=True)
    twin = copy.deepcopy(model, memo).eval()
    # the plain ones, whose every step can be differentiated in batches
    twin.config._attn_implementation = twin.config._experts_implementation = "eager"
    return twin


def random_values(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Positive, and of a size that norms have."""
    return torch.rand(shape, generator=generator) + 0.5


def repeated(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """One row of memory for a tensor of any size; a model that reads it is computed, and depends on all it should."""
    return (0.2 * torch.rand(shape[-1:], generator=generator)).expand(shape)


def leaf_maker(module: nn.Module, name: str | None, run: Recording):
    """A forward that ignores its input. The sign of a row flips from token to token, so that no rectifier hides it."""
    d_out, _ = linear_dims(module)

    def forward(x: Tensor) -> Tensor:
        if name in run.calls:
            raise ModelError(f"{name!r} is used more than once in a forward pass, which qpruner cannot prune.")
        n_tokens = x.shape[:-1].numel()
        signs = 1.0 - 2.0 * torch.randint(2, (d_out,), generator=run.generator)
        flips = 1.0 - 2.0 * (torch.arange(n_tokens) % 2)
        size = 0.1 + 0.2 * torch.rand(n_tokens, d_out, generator=run.generator)
        leaf = (size * signs * flips[:, None]).view(*x.shape[:-1], d_out).requires_grad_()
        if name is not None:
            run.calls[name] = (x, leaf)
        return leaf.clone()  # in-place code may follow

    return forward


def detach_inputs(_, args, kwargs):
    cut = lambda value: value.detach() if isinstance(value, Tensor) else value
    return tuple(map(cut, args)), {key: cut(value) for key, value in kwargs.items()}


def hidden_states(output) -> Tensor:
    """The first of what a decoder layer returns. Attention weights may come after, which nobody asked for."""
    return output[0] if isinstance(output, tuple | list) else output


def escaping(run: Recording) -> set[str]:
    """Linears with a row that escapes their layer; they produce no group."""
    owner = {name: layer for layer in run.layers for name in run.inside(layer)}
    found = reached_leaves(run, run.outputs)
    for layer in run.layers:
        inputs = [x for x, _ in run.inside(layer).values()]
        found |= {name for name in reached_leaves(run, inputs) if owner[name] != layer}
    return found


def reached_leaves(run: Recording, tensors: Iterable[Tensor]) -> set[str]:
    leaves = {name: leaf for name, (_, leaf) in run.calls.items()}
    return set(reached(tensors, leaves, run.generator))


def reached(tensors: Iterable[Tensor], targets: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The targets that any of the tensors depends on, with the gradient of a random combination of them.

    A random combination cancels with probability zero.
    """
    tensors = [t for t in tensors if t.requires_grad]
    if not tensors or not targets:
        return {}
    weights = [torch.randn(t.shape, generator=generator) for t in tensors]
    grads = torch.autograd.grad(tensors, list(targets.values()), weights, retain_graph=True, allow_unused=True)
    found = {name: g for name, g in zip(targets, grads, strict=True) if g is not None and finite(g).any()}
    return found


def finite(gradient: Tensor) -> Tensor:
    if not gradient.isfinite().all():
        raise ModelError("probing the model met an infinite or undefined derivative: it cannot say what is coupled.")
    return gradient


def earlier_rows(x: Tensor, leaves: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Rows whose value at an earlier token reaches the last token of x: that is where tokens mix."""
    last = x.flatten(0, -2)[-1]
    grads = reached([last], leaves, generator)
    return {name: g.flatten(0, -2)[:-1].ne(0).any(0) for name, g in grads.items()}


def touched(
    x: Tensor, targets: dict[str, Tensor], set_of: Tensor, generator: torch.Generator
) -> Iterator[tuple[int, list[Tensor]]]:
    """What each of many sets of columns depends on, some sets at a time.

    Args:
        set_of: the set of every column of x, from 0; -1 for a column that is in none.
    Yields:
        The number of the first set, and for every target a bool tensor (sets, *shape of the target).
    """
    n_sets = int(set_of.max()) + 1
    combination = torch.randn(x.shape, generator=generator)
    chunk = max(1, CHUNK_BYTES // (4 * (x.numel() + sum(t.numel() for t in targets.values()))))
    for first in range(0, n_sets, chunk):
        members = set_of == torch.arange(first, min(first + chunk, n_sets))[:, None]
        weights = combination * members.view(-1, *[1] * (x.dim() - 1), x.shape[-1])
        grads = torch.autograd.grad(x, list(targets.values()), weights, retain_graph=True, is_grads_batched=True)
        yield first, [finite(g).ne(0) for g in grads]


def over_tokens(dependence: Tensor) -> Tensor:
    """(sets, *tokens, rows) -> (sets, rows)"""
    return dependence.flatten(1, -2).any(1)
