"""Which tensors of a model turn with its hidden states, and the proof that it then is the same model.

Who reads, who writes and which norm is in between is found by derivatives. That the turned model is the same function
is not taken from that: it runs on random products in both bases, and all that it computes between its linears has to
agree.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from qpruner.errors import ModelError
from qpruner.math.rotation import Rotation
from qpruner.model.graph import Graph, Group
from qpruner.model.norms import offset_of
from qpruner.model.probe import Recording, reached, record, run_on
from qpruner.model.residual import NAME, by_element
from qpruner.model.rotate import Norm, Rotated, Turn
from qpruner.model.skeleton import linear_dims
from qpruner.model.surgery import names_of

TOLERANCE = dict(rtol=1e-3, atol=1e-4)  # of two float32 computations in different bases
SEED = 0  # of the rotation that is tried: if one is allowed, all are


def turn_of(model: nn.Module, graph: Graph) -> Turn:
    """What a rotation of the hidden states makes of the tensors of a model, which may be on the meta device.

    Args:
        graph: of this model, before any cut.
    Raises:
        ModelError: the model would not be the same; why.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        return _Finding(model, graph).turn()


class _Finding:
    def __init__(self, model: nn.Module, graph: Graph):
        self._model, self._graph = model, graph

    def turn(self) -> Turn:
        group = self._graph.groups.get(NAME)
        if group is None:
            start = "channels of the hidden states: "
            found = next((note for note in self._graph.notes if note.startswith(start)), "it is unclear what they are")
            raise self._refusal(found.removeprefix(start).removesuffix(", so they are never pruned"))
        if tied := sorted(group.tensors.keys() & (getattr(self._model, "all_tied_weights_keys", None) or {}).keys()):
            raise self._refusal(
                f"{tied[0]!r} is tied to another tensor, and the weight of the last norm would have to go into one of "
                "them alone"
            )
        run = record(self._model)
        if run.embeddings is None:
            raise self._refusal("the model does not run on embeddings, so it cannot be tried")
        reads, writes, scales = self._roles(group)
        fed = self._run_again(run, reads)
        norms, through = self._norms(run, scales, reads, fed)
        turn = Turn(group.n_units, norms, {n: (dim, through[n]) for n, dim in reads.items()}, writes)
        self._prove(run, turn, fed)
        return turn

    def _refusal(self, reason: str) -> ModelError:
        name = type(self._model).__name__
        return ModelError(f"the hidden states of {name} cannot be rotated: {reason}. Leave 'rotate' out of transforms.")

    def _roles(self, group: Group) -> tuple[dict[str, int], dict[str, int], set[str]]:
        """Tensors that read and write the hidden states, with the dimension, and elements that scale or shift them."""
        reads, writes, scales = {}, {}, set()
        for table, found, side in ((group.consumers, reads, 1), (group.producers, writes, 0)):
            for name in table:
                linear = self._graph.linears.get(name)
                site = linear or self._graph.stacks[name]
                weight, bias = names_of(site)
                found[weight] = (linear is None) + (side if not site.transposed else 1 - side)
                if side == 0 and bias:
                    found[bias] = int(linear is None)
        for name, (dim, _) in group.tensors.items():
            module = self._model.get_submodule(name.rpartition(".")[0])
            parameter = self._model.get_parameter(name)
            d_out, d_in = linear_dims(module) or (None, None)
            if d_out is None and parameter.dim() == 1:
                scales.add(name)
            elif d_in == group.n_units or (d_out is None and self._layer(name)):
                reads[name] = dim
            else:
                writes[name] = dim
        return reads, writes, scales

    def _layer(self, name: str) -> str:
        """The decoder layer of a tensor; empty for one outside of them."""
        return next((layer for layer in self._graph.layers if name.startswith(f"{layer}.")), "")

    def _run_again(
        self, run: Recording, reads: Mapping[str, int], embeddings: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What every tensor that reads is given; stacks of experts whatever one of their experts is."""
        fed: dict[str, Tensor] = {}
        handles = []
        for name in reads:
            if name not in self._graph.stacks:
                module = run.model.get_submodule(name.rpartition(".")[0])
                handles.append(module.register_forward_pre_hook(_note(fed, name), with_kwargs=True))
        run.generator.manual_seed(1)
        try:
            run_on(run, inputs_embeds=(run.embeddings if embeddings is None else embeddings).clone())
        finally:
            for handle in handles:
                handle.remove()
        for name in self._graph.stacks:
            if name in reads and name in run.uses:
                fed[name] = run.uses[name].all_calls[0][0]
        if idle := [name for name in reads if name not in fed]:
            raise self._refusal(f"{idle[0]!r} did not run on the few tokens of a trial")
        return fed

    def _norms(
        self, run: Recording, scales: set[str], reads: Mapping[str, int], fed: Mapping[str, Tensor]
    ) -> tuple[dict[str, Norm], dict[str, str | None]]:
        """Norms by path, and through which of them a tensor reads."""
        values = {name: run.model.get_parameter(name) for name in sorted(scales)}
        for layer, output in zip(run.layers, run.outputs, strict=True):
            for name in reached([output], values, run.generator):  # routers may let a norm reach it in another way
                if self._layer(name) == layer and by_element(output, values[name], run.generator):
                    raise self._refusal(f"{name!r} scales what is added to them")
        through = {}
        for name in reads:
            near = {n: value for n, value in values.items() if self._layer(n) == self._layer(name)}
            paths = sorted({met.rpartition(".")[0] for met in reached([fed[name]], near, run.generator)})
            if len(paths) > 1:
                raise self._refusal(f"{name!r} reads them behind {paths[0]!r} and {paths[1]!r}")
            through[name] = paths[0] if paths else None
        between = {path for path in through.values() if path is not None}
        if others := sorted(name for name in scales if name.rpartition(".")[0] not in between):
            raise self._refusal(f"{others[0]!r} scales them before anything reads them")
        return {path: self._norm(run.model.get_submodule(path), path) for path in sorted(between)}, through

    def _norm(self, module: nn.Module, path: str) -> Norm:
        offset = offset_of(module)
        if offset is None:
            raise self._refusal(f"{path!r} has parameters other than a weight and a bias")
        return Norm(
            f"{path}.weight", f"{path}.bias" if hasattr(module, "bias") and module.bias is not None else None, offset
        )

    def _prove(self, run: Recording, turn: Turn, fed: Mapping[str, Tensor]) -> None:
        """Between its linears, the turned model computes what the model does, in the other basis."""
        rotation = Rotation.of(turn.width, SEED)
        gains = {p: run.model.get_parameter(n.weight).detach().double() + n.offset for p, n in turn.norms.items()}

        def turned(name: str, x: Tensor) -> Tensor:
            if name in self._graph.layers:
                return rotation(x)
            if name not in turn.reads:
                return x
            norm = turn.reads[name][1]
            return rotation(x.double() if norm is None else x.double() / gains[norm]).to(x.dtype)

        wanted = {name: [turned(name, x) for x in xs] for name, xs in self._seen(run, fed).items()}
        self._turn_copy(run, turn)
        run.change = lambda name, x: rotation(x) if self._weight(name) in turn.writes else x
        found = self._seen(run, self._run_again(run, turn.reads, self._embeddings(run, turn, rotation)))
        for name, xs in wanted.items():
            if not _close(xs, found.get(name, [])):
                raise self._refusal(f"tried on random numbers, {name!r} was not the same afterwards")

    def _seen(self, run: Recording, fed: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """What every product and everything that reads was given, by weight, and what went in and out of each layer."""
        found = {self._weight(name): [x for x, _ in use.all_calls] for name, use in run.uses.items()}
        found |= {weight: [x] for weight, x in fed.items() if weight not in found}
        found |= {layer: pair for layer, *pair in zip(run.layers, run.taken, run.outputs, strict=True)}
        return {name: [x.detach().clone() for x in xs] for name, xs in found.items()}

    def _weight(self, name: str | None) -> str:
        """Of a linear, or of a stack, which is one."""
        return name if name in self._graph.stacks else f"{name}.weight"

    def _embeddings(self, run: Recording, turn: Turn, rotation: Rotation) -> Tensor:
        embedding = run.model.get_input_embeddings()
        path = next(name for name, module in run.model.named_modules() if module is embedding)
        given = run.embeddings.detach()
        return rotation(given) if f"{path}.weight" in turn.writes else given

    def _turn_copy(self, run: Recording, turn: Turn) -> None:
        """The parameters of the copy that have values: of norms, routers and positions."""
        real = {n: p for n, p in run.model.named_parameters() if type(p) is nn.Parameter}
        rotated = Rotated(_Values(real), turn, SEED)
        touched = [name for norm in turn.norms.values() for name in (norm.weight, norm.bias)]
        changed = {n: rotated.read(n) for n in (*touched, *turn.reads, *turn.writes) if n in real}
        for name, tensor in changed.items():
            path, _, attribute = name.rpartition(".")
            run.model.get_submodule(path)._parameters[attribute] = nn.Parameter(tensor)


class _Values:
    bytes_read = 0

    def __init__(self, parameters: Mapping[str, Tensor]):
        self._parameters = parameters

    def read(self, name: str) -> Tensor:
        return self._parameters[name].detach().clone()


def _note(fed: dict[str, Tensor], name: str) -> Callable:
    """A forward pre-hook that notes the first tensor that a module is first given."""

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        fed.setdefault(name, next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    return hook


def _close(wanted: list[Tensor], found: list[Tensor]) -> bool:
    return len(wanted) == len(found) and all(
        a.shape == b.shape and torch.allclose(a, b, **TOLERANCE) for a, b in zip(wanted, found, strict=True)
    )
