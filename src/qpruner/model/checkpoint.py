"""Weight files on disk: which they are, what their headers say, whether they are whole, and whether they fit a model.

Only safetensors are read, and only `checked_digest` and `weights_digest` look beyond the headers.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from qpruner.errors import ModelError, listed
from qpruner.model.cost import TORCH_NAMES

TORCH_DTYPES = {name: dtype for dtype, name in TORCH_NAMES.items()}
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")

# Buffers that older checkpoints carry and transformers passes over in silence.
OLD_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$", r"attn\.(masked_)?bias$", r"attention\.(masked_)?bias$")


PIECE_BYTES = 1 << 24  # of a file in memory at once; a multiple of every dtype's size


@dataclass(frozen=True)
class Place:
    """Where in which file a tensor lies."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    n_bytes: int


class Header(NamedTuple):
    """What a safetensors file says of a tensor before any of it is read."""

    shape: tuple[int, ...]
    dtype: str


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would read, in the order of their names."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{INDEX_FILE} in {folder.name!r} is not a readable index. Fetch it again.") from error
        absent = [shard for shard in shards if not (folder / shard).is_file()]
        if absent or not shards:
            raise ModelError(
                f"{INDEX_FILE} in {folder.name!r} names {len(absent)} of {len(shards)} weight file(s) that are not "
                f"there: {listed(absent)}. Fetch them, or the whole folder, again."
            )
        return [folder / shard for shard in shards]
    raise _no_safetensors(folder)


def places_in(path: Path) -> dict[str, Place]:
    """Every tensor of a safetensors file whose header `read_headers` has found sound."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        dtype, shape = TORCH_DTYPES[entry["dtype"]], tuple(entry["shape"])
        places[name] = Place(path, dtype, shape, 8 + length + start, end - start)
    return places


def _no_safetensors(folder: Path) -> ModelError:
    pickles = sorted({path.name for pattern in PICKLES for path in folder.glob(pattern)})
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if pickles:
        return ModelError(
            f"{folder.name!r} has its weights only as {listed(pickles)}: formats that can run code when they are "
            "read. Accepted: safetensors. If you trust the file, convert it once: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
        )
    if others:
        return ModelError(
            f"{folder.name!r} has {listed(others)} but neither {SINGLE_FILE} nor {INDEX_FILE}. "
            "Fetch the missing index, or save the model again with save_pretrained."
        )
    return ModelError(
        f"{folder.name!r} has a config.json but no weights. Accepted: {SINGLE_FILE}, or shards with {INDEX_FILE}. "
        "To look at the shape alone, name its config.json."
    )


def read_headers(folder: Path) -> dict[str, Header]:
    """Shape and dtype of every stored tensor. Opening a file also checks that it is as long as its header says."""
    found: dict[str, Header] = {}
    for path in weight_files(folder):
        with _opened(path) as file:
            for key in file.keys():
                part = file.get_slice(key)
                found[key] = Header(tuple(part.get_shape()), part.get_dtype())
    if not found:
        raise ModelError(f"the weight files of {folder.name!r} hold no tensor. Fetch or save them again.")
    return found


@contextmanager
def _opened(path: Path):
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        with path.open("rb") as raw:
            pointer = raw.read(24).startswith(b"version https://git-lfs")
        cause = "it is a Git LFS pointer; run `git lfs pull`" if pointer else f"cut short or damaged ({error})"
        raise ModelError(f"{path.name} in {path.parent.name!r} cannot be read: {cause}. Fetch it again.") from error
    with file:
        yield file


def check_against(skeleton: nn.Module, shapes: dict[str, tuple], tensors: Mapping[str, Header], name: str) -> None:
    """Compare the headers with the architecture, as far as names can be compared without loading.

    Architectures whose checkpoints are renamed or fused on loading are left to `load_model`, which asks transformers.
    """
    if get_model_conversion_mapping(skeleton, add_legacy=False):
        return
    prefix = getattr(skeleton, "base_model_prefix", "") + "."
    renamed = {_own_name(_modern_name(key), shapes, prefix): header for key, header in tensors.items()}
    same_tensor: dict[int, set[str]] = {}
    for key, parameter in skeleton.named_parameters(remove_duplicate=False):
        same_tensor.setdefault(id(parameter), set()).add(key)
    absent = [min(keys) for keys in same_tensor.values() if not keys & renamed.keys()]
    absent = not_matching(absent, getattr(skeleton, "_keys_to_ignore_on_load_missing", None))
    ignored = [*(getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()), *OLD_BUFFERS]
    unexpected = not_matching(sorted(renamed.keys() - shapes.keys()), ignored)
    wrong = [
        f"{key}: {list(renamed[key].shape)} instead of {list(shape)}"
        for key, shape in shapes.items()
        if key in renamed and renamed[key].shape != shape
    ]
    refuse_mismatch(name, absent, unexpected, wrong)


def _modern_name(key: str) -> str:
    return key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _own_name(key: str, known: Mapping, prefix: str) -> str:
    """A checkpoint saved from the bare decoder lacks the prefix of the one with a head, or the other way round."""
    if key in known:
        return key
    return next((name for name in (key.removeprefix(prefix), prefix + key) if name in known), key)


def not_matching(keys: list[str], patterns) -> list[str]:
    return [key for key in keys if not any(re.search(pattern, key) for pattern in patterns or ())]


def refuse_mismatch(name: str, absent: list, unexpected: list, wrong: list) -> None:
    said = [
        f"{len(keys)} {what}: {listed(sorted(keys))}"
        for keys, what in ((absent, "missing"), (unexpected, "unexpected"), (wrong, "of another shape"))
        if keys
    ]
    if said:
        raise ModelError(
            f"the weights of {name!r} do not match its config.json: tensors {'; '.join(said)}. "
            "Give the configuration and the weights of one and the same model."
        )


def checked_digest(folder: Path) -> str:
    """`weights_digest`, with every value looked at on the way, so that each file is read once.

    Raises:
        ModelError: at least one stored value is not finite.
    """
    read_headers(folder)  # refuses damaged files
    digest, bad = hashlib.sha256(), {}
    for path in weight_files(folder):
        of_file = hashlib.sha256()
        for name, dtype, piece in _pieces(path):
            of_file.update(piece)
            if dtype is not None and dtype.is_floating_point and not _finite(torch.frombuffer(piece, dtype=dtype)):
                bad[name] = True
        digest.update(f"{path.name}\0{of_file.hexdigest()}\n".encode())
    if bad:
        raise ModelError(
            f"{len(bad)} tensor(s) of {folder.name!r} hold NaN or infinite values: {listed(bad)}. "
            "Such a model computes nothing that could be kept; fetch it again or use an earlier checkpoint."
        )
    return digest.hexdigest()


def _pieces(path: Path) -> Iterator[tuple[str, torch.dtype | None, memoryview]]:
    """A file from first byte to last, tensor by tensor, the header without a dtype; pieces share their memory."""
    places = sorted(places_in(path).items(), key=lambda item: item[1].start)
    memory = memoryview(bytearray(PIECE_BYTES))
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
        file.seek(0)
        for name, dtype, left in (("", None, header), *((n, p.dtype, p.n_bytes) for n, p in places)):
            while left:
                piece = memory[: min(left, PIECE_BYTES)]
                if file.readinto(piece) != len(piece):
                    raise ModelError(f"{path.name} in {path.parent.name!r} is cut short. Fetch it again.")
                yield name, dtype, piece
                left -= len(piece)


def _finite(tensor: torch.Tensor) -> bool:
    tensor = tensor.float() if tensor.element_size() == 1 else tensor  # isfinite knows no 8-bit floats
    return bool(tensor.isfinite().all())


def weights_digest(folder: Path) -> str:
    """sha256 over the names and contents of the weight files, read in pieces."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
