"""The matrices outside the decoder layers that have a row for every token: which there are, and what is done with them.

An embedding may do more than look rows up. What its code does is tried, on rows that tell it: if that is a product
with one number it can be stored in codes, otherwise it stays as it is.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qpruner.model.graph import EmbeddingSite, Graph
from qpruner.model.surgery import remaining_slices

FEW = 5  # rows that are looked up on trial


def embedding_sites(model: nn.Module) -> tuple[dict[str, EmbeddingSite], tuple[str, ...]]:
    """The embedding and the head of a model that nothing was done to yet, and sentences about those that are left out.

    Weights may be on the meta device.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(module): name for name, module in model.named_modules()}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    found, notes = {}, []
    name = paths.get(id(embedding), "")
    weight = getattr(embedding, "weight", None)
    others = tied_to(model, name)
    if why_not := reason_against(model, embedding, name, others):
        notes.append(f"{name!r}: {why_not}, so it stays at 16 bits")
    else:
        found[name] = EmbeddingSite(name, *weight.shape, heads=others)
    apart = paths.get(id(head))
    if apart and apart not in others and f"{apart}.weight" not in tied and head is not embedding:
        if is_plain_linear(head):
            found[apart] = EmbeddingSite(apart, *head.weight.shape, looked_up=False)
        else:
            notes.append(f"{apart!r}: {type(head).__name__} is no plain linear layer, so it stays at 16 bits")
    return found, tuple(notes)


def tied_to(model: nn.Module, name: str) -> tuple[str, ...]:
    """Paths of the modules whose weight is that of the module of this name, also on the meta device."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    weight = getattr(model.get_submodule(name), "weight", None)
    same = {f"{path}.weight" for path, m in model.named_modules() if getattr(m, "weight", None) is weight is not None}
    keys = same | {target for target, source in tied.items() if source == f"{name}.weight"}
    return tuple(sorted(key.removesuffix(".weight") for key in keys - {f"{name}.weight"}))


def reason_against(model: nn.Module, embedding: nn.Module, name: str, others: Sequence[str]) -> str:
    """Why an embedding cannot be stored in codes; empty if it can."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if scale_of(embedding) is None:
        return f"{type(embedding).__name__} does more than look rows up"
    if (stored := tied.get(f"{name}.weight")) is not None:
        return f"its weight is stored as {stored!r}"
    modules = dict(model.named_modules())
    if wrong := [path for path in others if not is_plain_linear(modules.get(path))]:
        return f"{wrong[0]!r} has the same weight and is no plain linear layer"
    return ""


def is_plain_linear(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def scale_of(embedding: nn.Module) -> float | Tensor | None:
    """What the rows of an embedding are multiplied by when they are looked up; None where something else is done.

    A tensor takes the dtype of the rows first, a number does not.
    """
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None or embedding.weight.dim() != 2:
        return None
    if type(embedding).forward is nn.Embedding.forward:
        return 1.0
    n, width = embedding.weight.shape
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    ids = torch.arange(n)[:: max(1, n // FEW)][None]
    # Tables that take no memory of their size: of ones, of different rows, of different columns.
    tables = [w.expand(n, width) for w in (torch.ones(1, 1).double(), random(n, 1), random(1, width))]
    try:
        with torch.no_grad():
            seen = [torch.func.functional_call(embedding, {"weight": table}, (ids,)) for table in tables]
    except Exception:  # whatever a model's own code raises
        return None
    scale = float(seen[0].flatten()[0])
    if not all(torch.allclose(y, scale * table[ids]) for y, table in zip(seen, tables, strict=True)):
        return None
    own = [buffer for buffer in embedding.buffers() if buffer.numel() == 1]
    return torch.tensor(scale, dtype=torch.float64) if own else scale


def embedding_shapes(graph: Graph, kept: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    """(rows, width) of every embedding and head after the cuts: channels of the hidden states are columns of them."""
    slices = remaining_slices(graph, kept)
    shapes = {}
    for name, site in graph.embeddings.items():
        columns = dict(slices.get(f"{name}.weight", ())).get(1)
        shapes[name] = (site.n_rows, site.width if columns is None else len(columns))
    return shapes
