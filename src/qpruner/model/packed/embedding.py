"""An embedding whose rows stay in codes, and the head that multiplies with the same codes."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qpruner.model.embeddings import scale_of
from qpruner.model.graph import EmbeddingSite, Graph
from qpruner.model.packed.linear import PackedLinear
from qpruner.plan import QuantSpec


class PackedEmbedding(nn.Embedding):
    """Looks rows up in a matrix of codes: those that are asked for are decoded, no others. Final.

    matrix: a linear over the same buffers, no part of the model. They share the dictionary that holds them, so whoever
        moves, loads or replaces a buffer does it for both, and a copy of the model shares them again.
    factor: a buffer that is not stored. Rows are multiplied by it, and are of its dtype.

    Like that of a PackedLinear, `weight` is a flat view of the stored bytes that says where the embedding lives.
    """

    _is_hf_initialized = True  # there is nothing that transformers could initialize

    def __init__(
        self, matrix: PackedLinear, *, scale: float | Tensor = 1.0, padding_idx: int | None = None, dtype: torch.dtype
    ):
        """scale: as `scale_of` has it. dtype: of what is looked up, until the model is moved to another."""
        nn.Module.__init__(self)  # not nn.Embedding's, which would allocate the dense weight
        self.num_embeddings, self.embedding_dim = matrix.out_features, matrix.in_features
        self.padding_idx, self.spec = padding_idx, matrix.spec
        self.__dict__["matrix"] = matrix.sharing(None)  # not registered
        self._buffers = matrix._buffers
        factor = scale if isinstance(scale, Tensor) else torch.ones(())
        self.number = 1.0 if isinstance(scale, Tensor) else scale  # which is not rounded to the dtype of the rows
        device = matrix.weight.device
        self.register_buffer("factor", factor.to("cpu" if device.type == "meta" else device, dtype), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The stored bytes, flat."""
        return self.matrix.weight

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A dense copy of what is stored, (num_embeddings, embedding_dim); rows that are looked up are `factor` times
        these."""
        return self.matrix.dequantize(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        rows, places = ids.flatten(), None
        if rows.numel() > 1:  # in text most tokens come more than once
            rows, places = rows.unique(return_inverse=True)
        found = self.matrix.dequantize_rows(rows, self.factor.dtype)
        if places is not None:
            found = found[places]
        return (found * self.factor * self.number).view(*ids.shape, self.embedding_dim)

    def reset_parameters(self) -> None:
        """Nothing to reset: codes are given, not trained."""

    def _apply(self, fn, recurse: bool = True):
        self.matrix._apply(fn, recurse)  # which knows what must keep its dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}, {self.spec}"


def put_embedding_(
    model: nn.Module,
    site: EmbeddingSite,
    matrix: PackedLinear,
    *,
    dtype: torch.dtype,
    dense: Mapping[str, nn.Module] | None = None,
) -> None:
    """Have the embedding or the head at its site, with what is tied to it, read this matrix.

    Args:
        dtype: of what is looked up. dense: the modules that stood at these places, by path; without it they still do.
    """
    dense = {path: model.get_submodule(path) for path in (site.name, *site.heads)} if dense is None else dense
    _untie_(model, {f"{path}.weight" for path in dense})
    old = dense[site.name]
    if not site.looked_up:
        model.set_submodule(site.name, matrix)
        return
    scale = scale_of(old)
    assert scale is not None, f"{site.name}: {type(old).__name__}"
    model.set_submodule(site.name, PackedEmbedding(matrix, scale=scale, padding_idx=old.padding_idx, dtype=dtype))
    for path in site.heads:
        model.set_submodule(path, matrix.sharing(dense[path].bias))


def put_empty_embeddings_(
    model: nn.Module, graph: Graph, specs: Mapping[str, QuantSpec], *, dtype: torch.dtype = torch.float32
) -> None:
    """Replace the embeddings and heads that have a spec by empty packed ones, on the meta device, for a loader to fill.

    The model may have been narrowed by now.
    """
    for name, spec in specs.items():
        old = model.get_submodule(name)
        bias = getattr(old, "bias", None) is not None
        put_embedding_(model, graph.embeddings[name], PackedLinear.empty(*old.weight.shape, bias, spec), dtype=dtype)


def _untie_(model: nn.Module, keys: set[str]) -> None:
    """Have transformers no longer assign these weights to each other: there are none any more."""
    for path, module in model.named_modules():
        if getattr(module, "_tied_weights_keys", None):
            own = module.get_expanded_tied_weights_keys(all_submodels=False)
            full = lambda key, path=path: f"{path}.{key}".removeprefix(".")
            module._tied_weights_keys = {t: s for t, s in own.items() if not {full(t), full(s)} & keys}
        if tied := getattr(module, "all_tied_weights_keys", None):
            full = lambda key, path=path: f"{path}.{key}".removeprefix(".")
            module.all_tied_weights_keys = {t: s for t, s in tied.items() if not {full(t), full(s)} & keys}
