"""A model or an artifact as one GGUF file, for llama.cpp and what is built on it."""

import math
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from qpruner.artifact.dense import Dense
from qpruner.artifact.gguf.codes import bytes_as_coded
from qpruner.artifact.gguf.families import Anatomy, Architecture, anatomy, choose
from qpruner.artifact.gguf.layout import Entry, entries, order
from qpruner.artifact.gguf.types import Type, bytes_in, shape_in, type_of
from qpruner.artifact.gguf.vocabulary import write_vocabulary
from qpruner.errors import MissingExtraError
from qpruner.model.load import Source

FREQUENCIES = "rope_freqs.weight"
Importance = Callable[[str], Tensor | None]  # by the path of a linear: of each of its inputs
OnTensor = Callable[[int, int], None]  # tensors written, tensors in all


@dataclass(frozen=True)
class Instead:
    """A tensor whose rows have no place in the type that was asked for."""

    tensor: str
    columns: int
    wanted: str
    used: str

    def __str__(self) -> str:
        multiple = 32 if self.columns % 32 else 256
        return (
            f"{self.tensor} is {self.used}: rows of {self.columns} are no multiple of {multiple}, as {self.wanted} asks"
        )


@dataclass(frozen=True)
class Written:
    """What was written.

    types: number of tensors and bytes of each type. exact: matrices whose codes were taken over as they are.
    instead: matrices of another type than asked. notes: what a reader should know, in sentences.
    """

    path: Path
    size_bytes: int
    architecture: str
    types: dict[str, tuple[int, int]]
    exact: int
    instead: tuple[Instead, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict:
        return asdict(self) | {"path": str(self.path), "instead": [str(one) for one in self.instead]}


def require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise MissingExtraError("exporting to GGUF needs the gguf package: pip install 'qpruner[gguf]'") from None


def write_gguf(
    source: Source, path: Path, *, importance: Importance = lambda path: None, on_tensor: OnTensor = lambda *_: None
) -> Written:
    """Write the model that a folder holds; an artifact's codes decoded, adapters added.

    Args:
        importance: how much the squared error of each input's column counts when weights are rounded.
    Raises:
        ModelError: no architecture of llama.cpp holds the model; nothing was written.
        MissingExtraError: the gguf package is not installed.
    """
    require_gguf()
    import gguf

    dense = Dense(source)
    body = anatomy(dense.model)
    row = choose(body)
    tensors = [(entry, type_for(entry, dense)) for entry in entries(dense.model, body, row)]
    with closing(gguf.GGUFWriter(None, row.name)) as writer:
        describe(writer, body, row, source)
        notes = write_vocabulary(writer, source, body.vocabulary)
        if body.windows:
            notes.append(
                f"the context is {body.windows} tokens: llama.cpp would look back over more than the model does"
            )
        if any(spec.activation_bits < 16 for spec in dense.specs.values()):
            notes.append(
                "inputs of linears are not rounded as the artifact rounds them: llama.cpp does it in its own way"
            )
        counts, sizes = Counter(), Counter()
        if body.scaled:
            announce(writer, FREQUENCIES, "F32", tuple(body.frequencies.shape))
        for entry, of in tensors:
            size = announce(writer, entry.name, of.name, entry.shape)
            counts[of.name] += 1
            sizes[of.name] += size
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if body.scaled:
            writer.write_tensor_data(body.frequencies.numpy())
        for i, (entry, of) in enumerate(tensors):
            writer.write_tensor_data(encoded(entry, of, dense, importance))
            on_tensor(i + 1, len(tensors))
        writer.flush()
    return Written(
        path=path, size_bytes=path.stat().st_size, architecture=row.name,
        types={name: (counts[name], sizes[name]) for name in sorted(counts)},
        exact=sum(of.exact for _, of in tensors),
        instead=tuple(Instead(e.name, e.shape[-1], of.wanted, of.name) for e, of in tensors if of.wanted),
        notes=tuple(notes),
    )  # fmt: skip


def type_for(entry: Entry, dense: Dense) -> Type:
    """Of a tensor of the file; parts of one have the same spec, since fused linears do."""
    if not entry.matrix:
        return Type("F32")
    path = entry.parts[0].rpartition(".")[0]
    return type_of(dense.spec(path), entry.shape[-1], as_coded=all(dense.only_codes(p) for p in paths_of(entry)))


def paths_of(entry: Entry) -> list[str]:
    return [part.rpartition(".")[0] for part in entry.parts]


def announce(writer, name: str, kind: str, shape: tuple[int, ...]) -> int:
    """Tell the file of a tensor to come; its bytes."""
    import gguf

    stored, dtype = shape_in(kind, shape)
    size = math.prod(stored) * dtype.itemsize
    writer.add_tensor_info(name, stored, dtype, size, gguf.GGMLQuantizationType[kind])
    return size


def encoded(entry: Entry, of: Type, dense: Dense, importance: Importance) -> np.ndarray:
    arrays = []
    for part, path, heads in zip(entry.parts, paths_of(entry), entry.heads, strict=True):
        if of.exact:
            coded = dense.coded(path)
            rows = bytes_as_coded(getattr(coded, "matrix", coded))
        else:
            rows = bytes_in(dense.read(part), of.name, importance(path) if entry.matrix else None)
        # Every row is encoded by itself, so the order of rows may change afterwards.
        arrays.append(rows[order(len(rows), heads).numpy()] if heads else rows)
    return np.ascontiguousarray(np.concatenate(arrays)) if len(arrays) > 1 else np.ascontiguousarray(arrays[0])


def describe(writer, body: Anatomy, row: Architecture, source: Source) -> None:
    """What the file says of the model before its tensors."""
    import gguf

    each = lambda what: [getattr(layer, what) for layer in body.layers]
    numbers = lambda found: found if row.each_layer else found[0]
    writer.add_name(source.name)
    writer.add_quantization_version(2)
    writer.add_context_length(min(body.context, body.windows or body.context))
    writer.add_embedding_length(body.hidden)
    writer.add_block_count(len(body.layers))
    writer.add_feed_forward_length(numbers(each("channels")))
    writer.add_head_count(numbers(each("heads")))
    writer.add_head_count_kv(numbers(each("kv_heads")))
    writer.add_key_length(body.head_dim)
    writer.add_value_length(body.head_dim)
    writer.add_layer_norm_rms_eps(body.epsilon)
    writer.add_rope_dimension_count(body.head_dim)
    writer.add_rope_freq_base(body.base)
    factor = float(body.frequencies[0])
    if not body.scaled and not math.isclose(factor, 1, rel_tol=1e-5):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(factor)
    writer.add_vocab_size(body.vocabulary)
