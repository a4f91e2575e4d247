"""What depends on what inside a decoder layer, read from derivatives. No weight of the model is ever read.

A private copy of the model runs once on random embeddings. In it every product with the weight of a linear layer, or
with that of one of many stacked experts, is answered by a fresh random leaf, and every decoder layer starts from
detached hidden states, so that a gradient stops at the linears around it. A column of a linear's input then has an
exactly zero gradient on rows of another that it does not depend on.

    column   one input of a linear layer
    row      one output of a linear layer: one element of its leaf, at every token
    escapes  of a row: it reaches the layer's output, or another layer, other than through a linear of its own layer.
             Rows of o_proj and down_proj do: they are added to the residual stream.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qpruner.errors import ModelError
from qpruner.model.skeleton import LARGE, decoder_layers, linear_dims, linear_sites
from qpruner.model.standin import Origin, Product, StandIn

TOKENS = 4
CHUNK_BYTES = 2**21  # of gradient held at once by `touched`; more is slower, it falls out of the cache
HIDDEN_STATES = "the hidden states"

Call = tuple[Tensor, Tensor]  # input and leaf


@dataclass
class Use:
    """What was computed with one linear, or with one stack of experts. calls: by expert; 0 for a linear."""

    product: Product
    calls: dict[int, list[Call]] = field(default_factory=lambda: defaultdict(list))

    @property
    def all_calls(self) -> list[Call]:
        return [call for calls in self.calls.values() for call in calls]


@dataclass
class Recording:
    """One run of the copy.

    uses: of every linear and stack inside a decoder layer that ran.
    misread: those whose weight took part in more than products with the whole of it, or is shared.
    made_up: leaves for the weights of which parts were read, where there was no room for the whole.
    given: leaves for what each decoder layer is given, its hidden states and what else has a value for every token.
    taken: the hidden states that each decoder layer is given. received: what else. outputs: the ones it returns.
    extras: other tensors that layers returned. handed: layers that were given one of those.
    embeddings: what the first layer's hidden states are made of, if the model runs on that. ends: what the head reads.
    change: of the answers that are given, by the name of a linear or stack; none unless somebody runs the copy again.
    """

    layers: tuple[str, ...]
    generator: torch.Generator
    watched: set[str]
    misread: set[str]
    model: nn.Module | None = None
    uses: dict[str, Use] = field(default_factory=dict)
    made_up: dict[str, Tensor] = field(default_factory=dict)
    given: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    taken: list[Tensor] = field(default_factory=list)
    received: list[list[Tensor]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    extras: list[Tensor] = field(default_factory=list)
    handed: list[str] = field(default_factory=list)
    embeddings: Tensor | None = None
    ends: list[Tensor] = field(default_factory=list)
    change: Callable[[str | None, Tensor], Tensor] = lambda name, answer: answer

    def answer(self, product: Product) -> Tensor:
        if product.expert is not None:
            return self._answer(product, product.expert, product.x).to(product.x.dtype)
        return torch.stack([self._answer(product, e, x) for e, x in enumerate(product.x)]).to(product.x.dtype)

    def _answer(self, product: Product, expert: int, x: Tensor) -> Tensor:
        leaf = fresh_leaf((*x.shape[:-1], product.d_out), self.generator)
        if product.name in self.watched and x.numel():
            use = self.uses.setdefault(product.name, Use(product))
            use.calls[expert].append((x, leaf))
        return self.change(product.name, leaf.clone())  # in-place code may follow

    def values_of(self, name: str | None, shape: torch.Size) -> Tensor:
        """One number for all of a weight is enough to see what depends on it."""
        if name not in self.watched:
            return repeated(shape, self.generator)
        one = self.made_up.setdefault(name, torch.ones(()).requires_grad_())
        return repeated(shape, self.generator) * one if shape.numel() < LARGE else (0.2 * one).expand(shape)

    def of(self, layer: str) -> dict[str, Use]:
        return {name: use for name, use in self.uses.items() if name.startswith(layer + ".")}

    def of_products(self) -> list[Tensor]:
        """The input of every product inside the decoder layers, linear by linear and expert by expert."""
        return [x for use in self.uses.values() for x, _ in use.all_calls]

    def separable(self, name: str) -> bool:
        """Each of its matrices was used once, and in no other way."""
        return name not in self.misread and all(len(calls) == 1 for calls in self.uses[name].calls.values())

    def calls(self, layer: str) -> dict[str, Call]:
        """Of the linears of a layer that can be told apart, and of one expert for all: the one with most tokens."""
        uses = {name: use for name, use in self.of(layer).items() if self.separable(name)}
        tokens = Counter()
        for use in uses.values():
            if use.product.n_experts:
                tokens.update({e: x.shape[:-1].numel() for e, [(x, _)] in use.calls.items()})
        expert = max(tokens, key=lambda e: (tokens[e], -e), default=0)
        return {
            name: use.calls[e][0]
            for name, use in uses.items()
            if (e := expert if use.product.n_experts else 0) in use.calls
        }

    def values(self, layer: str) -> dict[str, Tensor]:
        """Parameters and tables of a layer that are no weight of a linear: of norms, attention sinks, convolutions."""
        found = {}
        for path, module in self.model.get_submodule(layer).named_modules(prefix=layer):
            if not linear_dims(module):
                own = {n: t for n, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
                found |= {f"{path}.{n}": t for n, t in own.items() if f"{path}.{n}" not in self.uses}
        return {name: t.origin.values if isinstance(t, StandIn) else t for name, t in found.items()}


def record(model: nn.Module) -> Recording:
    """Runs a private copy of the model, on the CPU and in float32; the model itself is only looked at."""
    layers, generator = decoder_layers(model), torch.Generator().manual_seed(0)
    stacked = {n for n, p in model.named_parameters() if n.startswith(tuple(f"{p}." for p in layers)) and p.dim() == 3}
    run = Recording(layers, generator, {*linear_sites(model), *stacked}, shared_weights(model))
    run.model = twin = weightless_copy(model, run)
    for path in run.layers:
        layer = twin.get_submodule(path)
        layer.register_forward_pre_hook(starts_afresh(run, path), with_kwargs=True)
        layer.register_forward_hook(lambda _, __, output: note_output(run, output))
    if head := twin.get_output_embeddings():
        head.register_forward_pre_hook(lambda _, args: run.ends.append(args[0]))
    embeddings = torch.randn(1, TOKENS, twin.get_input_embeddings().embedding_dim, generator=generator)
    run.embeddings = embeddings.requires_grad_()
    try:
        run_on(run, inputs_embeds=embeddings.clone())
    except ModelError:
        raise
    except Exception as error:  # whatever a model's own code raises
        run.embeddings = None
        try:  # some look tokens up more than once
            run_on(run, input_ids=torch.arange(3, 3 + TOKENS)[None])
        except Exception:
            raise ModelError(
                f"{type(model).__name__} does not run on input embeddings, which finds its groups: {error}"
            ) from error
    return run


def run_on(run: Recording, **inputs: Tensor) -> None:
    for found in (run.uses, run.made_up, run.given, run.taken, run.received, run.outputs, run.extras, run.handed):
        found.clear()
    run.ends.clear()
    run.model(**inputs, use_cache=False)


def shared_weights(model: nn.Module) -> set[str]:
    """Linears that have their weight in common with others, as the blocks of some hybrids do."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name.removesuffix(".weight") for pair in tied.items() for name in pair}


def weightless_copy(model: nn.Module, run: Recording) -> nn.Module:
    """A copy whose weights are stand-ins, and everything else random.

    Random, so that a norm weight that training took to zero hides nothing, and that a model without weights gives the
    same graph.
    """
    stand_in = lambda name, shape, values: Origin(
        name, shape, run.answer, run.misread.add, values, run.values_of
    ).stand_in()
    memo = {}
    for name, module in model.named_modules():
        if linear_dims(module) and isinstance(getattr(module, "weight", None), Tensor):
            memo.setdefault(id(module.weight), stand_in(name, module.weight.shape, None))
    embedding = model.get_input_embeddings().weight
    memo.setdefault(id(embedding), stand_in(None, embedding.shape, None))
    for name, parameter in model.named_parameters():
        if id(parameter) in memo:
            continue
        large = parameter.numel() > LARGE
        values = None if large else nn.Parameter(random_values(parameter.shape, run.generator))
        if name in run.watched:
            memo[id(parameter)] = stand_in(name, parameter.shape, values)
        else:
            memo[id(parameter)] = (
                nn.Parameter(repeated(parameter.shape, run.generator), requires_grad=False) if large else values
            )
    for name, buffer in model.named_buffers():
        if id(buffer) in memo:
            continue
        if buffer.is_meta:
            raise ModelError(f"buffer {name!r} is on the meta device. Build the model with build_skeleton(config).")
        real = buffer.is_floating_point()
        copied = buffer.detach().to("cpu", torch.float32 if real else buffer.dtype, copy=True)
        memo[id(buffer)] = copied.requires_grad_(real and name.startswith(tuple(f"{p}." for p in run.layers)))
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


def fresh_leaf(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random values of many tokens. The sign of a row flips from token to token, so that no rectifier hides it."""
    *tokens, d_out = shape
    n_tokens = torch.Size(tokens).numel()
    signs = 1.0 - 2.0 * torch.randint(2, (d_out,), generator=generator)
    if n_tokens == 1:
        signs = signs.abs()  # of an expert with a single token; what rectifies passes on what is positive
    flips = 1.0 - 2.0 * (torch.arange(n_tokens) % 2)
    size = 0.1 + 0.2 * torch.rand(n_tokens, d_out, generator=generator)
    return (size * signs * flips[:, None]).view(shape).requires_grad_()


def starts_afresh(run: Recording, layer: str):
    """A forward pre-hook that gives a decoder layer fresh leaves for its hidden states and what else has its tokens."""

    def hook(_, args, kwargs):
        named = dict(enumerate(args)) | kwargs
        given = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        states = given.get("hidden_states", next(iter(given.values())))
        if any(value is extra for value in given.values() for extra in run.extras):
            run.handed.append(layer)
        run.taken.append(states.detach().clone())
        run.received.append([v for v in given.values() if v.requires_grad and v is not states])
        leaves = run.given.setdefault(layer, {})
        for name, value in given.items():
            named[name] = value.detach()
            by_token = value.dim() == 3 and value.shape[1] == states.shape[-2]
            if value is states or (by_token and value.is_floating_point()):
                key = HIDDEN_STATES if value is states else str(name)
                leaves[key] = value.detach().clone().requires_grad_()
                named[name] = leaves[key].clone()
        return tuple(named.pop(i) for i in range(len(args))), named

    return hook


def note_output(run: Recording, output) -> None:
    run.outputs.append(hidden_states(output))
    if isinstance(output, tuple | list):
        run.extras += [value for value in output[1:] if isinstance(value, Tensor)]


def hidden_states(output) -> Tensor:
    """The first of what a decoder layer returns. Attention weights may come after, which nobody asked for."""
    return output[0] if isinstance(output, tuple | list) else output


@dataclass(frozen=True)
class Escapes:
    """names: linears with a row that leaves its layer other than through a linear of it; they produce no group.

    into: for every layer, the linears of others that those of it depend on. exchanges: as in `Graph`.
    """

    names: set[str]
    into: dict[str, set[str]]
    exchanges: tuple[str, ...]


def escapes_of(run: Recording) -> Escapes:
    owner = {name: layer for layer in run.layers for name in run.of(layer)}
    leaves = {(name, i): leaf for name, use in run.uses.items() for i, (_, leaf) in enumerate(use.all_calls)}
    reached_by = lambda tensors: {name for name, _ in reached(tensors, leaves, run.generator)}
    names = reached_by(run.outputs)
    into, exchanges = {}, []
    for layer, received in zip(run.layers, run.received, strict=False):
        inputs = [x for use in run.of(layer).values() for x, _ in use.all_calls]
        into[layer] = {name for name in reached_by([*inputs, *received]) if owner[name] != layer}
        names |= into[layer]
        if into[layer]:
            others = sorted({run.layers.index(owner[name]) for name in into[layer]})
            exchanges.append(
                f"decoder layer {run.layers.index(layer)} reads more of layer {spans(others)} than hidden states"
            )
    exchanges += changed_between(run)
    unclear = [x for name, use in run.uses.items() if not run.separable(name) for x, _ in use.all_calls]
    return Escapes(names | reached_by(unclear), into, tuple(exchanges))


def changed_between(run: Recording) -> list[str]:
    """Sentences about hidden states that are not handed from layer to layer as they are, one row for each text."""
    found = [
        f"hidden states are changed between decoder layers {i} and {i + 1}"
        for i, (given, taken) in enumerate(zip(run.outputs, run.taken[1:], strict=False))
        if given.shape != taken.shape or not torch.equal(given, taken)
    ]
    found += [f"decoder layer {run.layers.index(layer)} is given what another returned" for layer in run.handed]
    ends = [x for x in run.ends if x.requires_grad]
    if ends and run.embeddings is not None:
        sums = sum(x.sum() for x in ends)
        (gradient,) = torch.autograd.grad(sums, [run.embeddings], retain_graph=True, allow_unused=True)
        if gradient is not None and gradient.any():
            found.append("what follows the decoder layers also reads what came before them")
    if any(states.shape[0] != 1 for states in run.taken):
        found.append("decoder layers take hidden states in another form than one row for each text")
    return found


def spans(numbers: list[int]) -> str:
    """0-3, 7"""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def reached(tensors: Iterable[Tensor], targets: dict, generator: torch.Generator) -> dict:
    """The targets that any of the tensors depends on, with the gradient of a random combination of them.

    A random combination cancels with probability zero.
    """
    tensors = [t for t in tensors if t.requires_grad]
    if not tensors or not targets:
        return {}
    weights = [torch.randn(t.shape, generator=generator) for t in tensors]
    try:
        grads = torch.autograd.grad(tensors, list(targets.values()), weights, retain_graph=True, allow_unused=True)
    except RuntimeError as error:  # raised by a derivative of the model's own
        raise ModelError(f"the model cannot be differentiated, which finds its groups: {error}") from error
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


def columns_reading(x: Tensor, leaves: dict[str, Tensor], row: int, generator: torch.Generator) -> Tensor:
    """Which columns of x depend on one row, numbered through all leaves: a derivative of a derivative."""
    for leaf in leaves.values():
        if row < leaf.shape[-1]:
            break
        row -= leaf.shape[-1]
    weights = torch.randn(x.shape, generator=generator).requires_grad_()
    (gradient,) = torch.autograd.grad(x, leaf, weights, create_graph=True)
    mixed = (gradient[..., row] * torch.randn(gradient.shape[:-1], generator=generator)).sum()
    (by_column,) = torch.autograd.grad(mixed, weights, retain_graph=True)
    return finite(by_column).flatten(0, -2).ne(0).any(0)


def over_tokens(dependence: Tensor) -> Tensor:
    """(sets, *tokens, rows) -> (sets, rows)"""
    return dependence.flatten(1, -2).any(1)
