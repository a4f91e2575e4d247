"""Every linear of a model in every form that a joint search asks for: made once, kept on disk, and read by many.

A linear that reads units of which some went is refitted to give what it gave, from the Gram matrix of its inputs in the
whole model, and then rounded with feedback on the columns that stay. Its weight is given back in the original's shape,
zero in the columns that went, so that nothing in a model has to be narrowed to try it. Rows that make units which went
are left as they are: nothing reads them.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qpruner.files import replacing
from qpruner.math.gptq import Feedback
from qpruner.math.least_squares import factor
from qpruner.math.salient import Rounding
from qpruner.model.graph import Graph, Projection
from qpruner.model.packed.split import Quantized, assembled, packed, stored
from qpruner.model.tensors import Tensors
from qpruner.plan import DENSE, QuantSpec
from qpruner.plan import Rounding as Settings

RECENT = 4  # sets of inputs whose least squares and feedback are kept, as many specs are made one after the other
DAMPING = 0.01  # of the least squares, a fraction of the mean diagonal of the Gram matrix


class CandidateStore:
    """Final. Several processes may use one folder, and make the same candidate at the same time.

    A file holds what the linears of one projection store, named by a digest of all that it depends on; without a folder
    they are in memory. What was decoded lately is kept too, up to a number of bytes.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Tensors,
        grams: Callable[[str], Tensor] | None,
        orders: Mapping[str, Tensor],
        settings: Settings,
        *,
        folder: Path | None = None,
        identity: str = "",
        damping: float = DAMPING,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        memory_bytes: int = 2**30,
    ):
        """
        Args:
            tensors: of the original.
            grams: name of the first linear of a projection -> Gram matrix of its inputs in the original, float64.
                Without it nothing can be cut, and everything is rounded to nearest.
            orders: group -> its units, best first; those that may lose some.
            settings: `method` and `ranges` of them count.
            identity: digest of the model and of the text that the Gram matrices and orders come from.
            dtype, device: of the weights that are given out.
        """
        self._graph, self._tensors, self._grams, self._settings = graph, tensors, grams, settings
        self._orders = {name: order.long().cpu() for name, order in orders.items()}
        self._folder, self._damping, self._dtype, self._device = folder, damping, dtype, torch.device(device)
        self._identity = [identity, settings.method, settings.ranges, damping]
        self._projections = {linear: p for p in graph.projections for linear in p.linears}
        self._made: dict[str, dict[str, Tensor]] = {}
        self._inputs: OrderedDict[str, _Inputs] = OrderedDict()
        self._decoded: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._memory_bytes, self._held_bytes = memory_bytes, 0
        self.n_made = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def weight(self, linear: str, spec: QuantSpec, kept: Mapping[str, int] | None = None) -> Tensor:
        """(d_out, d_in) as the original has it. Not to be changed: it is given out again.

        linear: or an embedding, or a head. kept: units that stay, of groups that lose some: the first in their order.
        """
        stays = self._stays(linear, kept or {})
        key = self._key(self._of(linear), spec, stays), linear
        if key in self._decoded:
            self._decoded.move_to_end(key)
            return self._decoded[key]
        found = self._decode(linear, spec, stays)
        self._decoded[key] = found
        self._held_bytes += found.nbytes
        while self._held_bytes > self._memory_bytes and len(self._decoded) > 1:
            self._held_bytes -= self._decoded.popitem(last=False)[1].nbytes
        return found

    def is_original(self, linear: str, spec: QuantSpec, kept: Mapping[str, int] | None = None) -> bool:
        """Whether nothing of it changes."""
        return spec == DENSE and self._stays(linear, kept or {}) is None

    def parts(self, linear: str, spec: QuantSpec, kept: Mapping[str, int] | None = None) -> Quantized | Tensor:
        """What is stored for the columns that stay, ascending: a packed linear without bias; a matrix at 16 bits."""
        return self._parts(linear, spec, self._stays(linear, kept or {}))

    def make(self, linear: str, spec: QuantSpec, kept: Mapping[str, int] | None = None) -> None:
        """Have it on disk, with those that are rounded together with it."""
        stays = self._stays(linear, kept or {})
        if spec != DENSE or stays is not None:
            self._stored(linear, spec, stays)

    # --- what a candidate is ------------------------------------------------------------------------------------------

    def _stays(self, linear: str, kept: Mapping[str, int]) -> Tensor | None:
        """Columns that stay, ascending; None for all."""
        site = self._graph.linears.get(linear)
        gone = None
        for name, n in kept.items() if site else ():
            group = self._graph.groups[name]
            if linear in group.consumers and n < group.n_units:
                gone = torch.zeros(site.d_in, dtype=torch.bool) if gone is None else gone
                gone[group.consumers[linear][self._orders[name][n:]]] = True
        return None if gone is None else (~gone).nonzero()[:, 0]

    def _of(self, linear: str) -> Projection:
        """The linears that it is rounded with; an embedding is alone."""
        return self._projections.get(linear) or Projection(linear, -1, (linear,))

    def _key(self, projection: Projection, spec: QuantSpec, stays: Tensor | None) -> str:
        columns = "all" if stays is None else hashlib.sha256(stays.numpy().tobytes()).hexdigest()
        said = [*self._identity, projection.name, spec.model_dump(mode="json"), columns]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def _original(self, linear: str) -> Tensor:
        W = self._tensors.read(f"{linear}.weight")
        site = self._graph.linears.get(linear)
        return W.T.contiguous() if site is not None and site.transposed else W

    def _decode(self, linear: str, spec: QuantSpec, stays: Tensor | None) -> Tensor:
        if spec == DENSE and stays is None:
            return self._original(linear).to(self._device, self._dtype)
        part = self._parts(linear, spec, stays)
        W = part.to(self._dtype) if isinstance(part, Tensor) else part.dequantize(self._dtype)
        if stays is not None:
            whole = W.new_zeros(len(W), self._graph.linears[linear].d_in)
            whole[:, stays] = W
            W = whole
        return W.to(self._device)

    def _parts(self, linear: str, spec: QuantSpec, stays: Tensor | None) -> Quantized | Tensor:
        found = self._stored(linear, spec, stays)
        own = {name.removeprefix(f"{linear}."): t for name, t in found.items() if name.startswith(f"{linear}.")}
        if spec.bits == 16:
            return own["weight"]
        if stays is not None:
            return stored(own, None, spec, len(stays))
        site = self._graph.linears.get(linear)
        return stored(own, None, spec, self._original(linear).shape[1] if site is None else site.d_in)

    # --- keeping ------------------------------------------------------------------------------------------------------

    def _stored(self, linear: str, spec: QuantSpec, stays: Tensor | None) -> dict[str, Tensor]:
        """Of all linears of the projection, by name."""
        projection = self._of(linear)
        key = self._key(projection, spec, stays)
        if self._folder is None:
            if key not in self._made:
                self._made[key] = self._make(projection, spec, stays)
            return self._made[key]
        path = self._folder / f"{key}.safetensors"
        if not path.is_file():
            made = self._make(projection, spec, stays)
            with replacing(path) as temporary:
                save_file({name: tensor.contiguous() for name, tensor in made.items()}, temporary)
        # Mapped, so that workers on one machine share the pages.
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(f"{linear}.")}  # noqa: SIM118

    # --- making -------------------------------------------------------------------------------------------------------

    def _make(self, projection: Projection, spec: QuantSpec, stays: Tensor | None) -> dict[str, Tensor]:
        self.n_made += 1
        inputs = self._inputs_of(projection, stays)
        if spec.bits == 16:
            return {f"{name}.weight": W.to(inputs.dtype) for name, W in inputs.each(inputs.W)}
        made: dict[str, Quantized] = {}
        if self._settings.method == "nearest" or inputs.G is None:
            made = {n: packed(W, None, spec, ranges=self._settings.ranges) for n, W in inputs.each(inputs.W)}
        else:
            parts = inputs.rounding(spec, self._settings.ranges)(inputs.W)
            for name, rows in inputs.slices():
                own = parts.rows(rows)
                made[name] = assembled(own.rest, own.high, own.salient, None, spec)
        return {f"{name}.{key}": t.cpu() for name, layer in made.items() for key, t in layer.state_dict().items()}

    def _inputs_of(self, projection: Projection, stays: Tensor | None) -> "_Inputs":
        key = self._key(projection, DENSE, stays)
        if key not in self._inputs:
            weights = {name: self._original(name) for name in projection.linears}
            known = projection.layer >= 0 and self._grams is not None
            G = self._grams(projection.linears[0]).to(self._device) if known else None
            self._inputs[key] = _Inputs.of(weights, G, stays, self._damping, self._device)
            while len(self._inputs) > RECENT:
                self._inputs.popitem(last=False)
        self._inputs.move_to_end(key)
        return self._inputs[key]


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Linears that read the same inputs, as one matrix, and what rounding it needs to know of the inputs that stay.

    W: (d_out, k), float32 at least. G: (k, k). dtype: that the original stores.
    """

    names: tuple[str, ...]
    heights: tuple[int, ...]
    W: Tensor
    G: Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(
        cls, weights: Mapping[str, Tensor], G: Tensor | None, stays: Tensor | None, damping: float, device: torch.device
    ) -> "_Inputs":
        first = next(iter(weights.values()))
        W = torch.cat(list(weights.values())).to(device, torch.promote_types(first.dtype, torch.float32))
        if stays is not None:
            assert G is not None, "a cut linear is refitted on the Gram matrix of its inputs"
            W = refitted(W, G, stays, damping)
            G = G[stays][:, stays]
        return cls(tuple(weights), tuple(map(len, weights.values())), W, G, first.dtype)

    def slices(self) -> Iterator[tuple[str, slice]]:
        start = 0
        for name, height in zip(self.names, self.heights, strict=True):
            yield name, slice(start, start + height)
            start += height

    def each(self, W: Tensor) -> Iterator[tuple[str, Tensor]]:
        return ((name, W[rows]) for name, rows in self.slices())

    @cached_property
    def _feedback(self) -> Feedback:
        return Feedback.of(self.G)

    def rounding(self, spec: QuantSpec, ranges: str) -> Rounding:
        if spec.salient:  # which go first depends on the spec
            return Rounding.of(self.W, self.G, spec, ranges)
        return Rounding(self.G, spec, ranges, self._feedback, None)


def refitted(W: Tensor, G: Tensor, stays: Tensor | Sequence[int], damping: float = DAMPING) -> Tensor:
    """The weight on the columns that stay that best gives what W gives on all of them; sliced where nothing was seen.

    Minimises |X W^T - X[:, stays] V^T|^2 + damping m |V - W[:, stays]|^2, m the mean diagonal of G[stays, stays], and
    G = X^T X.
    """
    gone = torch.ones(W.shape[1], dtype=torch.bool)
    gone[stays] = False
    sliced = W[:, stays]
    A = G[stays][:, stays]
    found = factor(A, A.diagonal().mean(), damping) if len(A) else None
    if found is None:
        return sliced
    missing = G[stays][:, gone] @ W[:, gone].to(G).T
    return (sliced.to(G) + torch.cholesky_solve(missing, found[1]).T).to(W.dtype)
