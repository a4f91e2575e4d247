"""A model or an artifact as a Hugging Face folder whose linears lie in compressed-tensors' format.

Where one configuration of a stock class says all widths, the folder is of that class and needs nothing of ours.
Otherwise it keeps our own model type, its plan, which says the integers that are stored, and Python files that build
layers of their own widths; or another form is asked for.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qpruner.artifact import standalone
from qpruner.artifact.compressed.encoding import (
    as_coded,
    encoded,
    exact_scales,
    require_compressed_tensors,
    tensor_specs,
)
from qpruner.artifact.compressed.schemes import (
    exact_scheme,
    nearest_scheme,
    out_of_reach,
    quantization_config,
    refused,
    why_not,
)
from qpruner.artifact.config import MODEL_TYPE
from qpruner.artifact.dense import Dense
from qpruner.artifact.loader import ADAPTER, PLAN, WEIGHTS
from qpruner.artifact.narrowed import told_of
from qpruner.artifact.save import TOKENIZER_FILES
from qpruner.artifact.stock import stock_config
from qpruner.errors import ModelError, listed
from qpruner.math import grids
from qpruner.model import cost
from qpruner.model.adapters import read_adapters
from qpruner.model.checkpoint import INDEX_FILE
from qpruner.model.cost import TORCH_NAMES, TensorSpec
from qpruner.model.load import Source, stored_dtype
from qpruner.model.skeleton import build_skeleton
from qpruner.model.tensors import write_safetensors
from qpruner.plan import DENSE, Plan
from qpruner.vllm import Scheme

SHARD_BYTES = 5 * 10**9
Importance = Callable[[str], Tensor | None]  # by the path of a linear: of each of its inputs
Form = Callable[[Source, Dense, Iterable[str]], "Shell"]  # of a model, some of whose linears are to lie in codes
OnTensor = Callable[[int, int], None]  # tensors written, tensors in all


@dataclass(frozen=True)
class Again:
    """A linear that was rounded once more."""

    linear: str
    spec: str
    scheme: str
    reason: str


@dataclass(frozen=True)
class Shell:
    """What stands around weights. config: the content of config.json, of weights at 16 bits. own: of qpruner's type.
    put_code: writes Python files that build the model into a folder that has a config.json; None where none are."""

    config: dict
    own: bool = False
    put_code: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Written:
    """What was written.

    own: of qpruner's model type. code: Python files in the folder build it. linears: number of them in each scheme.
    exact: those whose codes were taken over as they are. again: those that were rounded once more. adapter_rank: the
    largest of the adapters beside; 0 for none. notes: what a reader should know, in sentences.
    """

    path: Path
    size_bytes: int
    own: bool
    code: bool
    model_type: str
    dtype: str
    linears: dict[str, int]
    exact: int
    again: tuple[Again, ...]
    adapter_rank: int
    notes: tuple[str, ...]

    @property
    def stock(self) -> bool:
        """Whether transformers loads it as it is."""
        return not (self.own or self.code)

    def to_json(self) -> dict:
        return asdict(self) | {"path": str(self.path), "stock": self.stock}


def write_folder(
    source: Source,
    folder: Path,
    *,
    form: Form | None = None,
    round_again: bool = False,
    importance: Importance = lambda path: None,
    on_tensor: OnTensor = lambda *_: None,
) -> Written:
    """Write into a new folder.

    Args:
        form: what stands around the weights; by default a stock class, or our own type where there is none.
        round_again: linears that the format does not hold are rounded once more, to integers of as many bits; without
            it they are refused.
        importance: how much the squared error of each input's column counts where weights are rounded.
    Raises:
        ModelError: the format does not hold the model; nothing was written.
        MissingExtraError: compressed-tensors is not installed.
    """
    dense = Dense(source)
    chosen = schemes_of(dense, round_again)
    if chosen:
        require_compressed_tensors()
    shell = (form or stock_or_own)(source, dense, chosen)
    config = shell.config | coded_part(dense, chosen)
    dtype = stored_dtype(source)
    entries = entries_of(dense, chosen, TORCH_NAMES[dtype])
    rounded = Counter()
    folder.mkdir(parents=True)
    write_shards(folder, entries, lambda names: tensors_of(dense, names, chosen, dtype, importance, rounded), on_tensor)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in TOKENIZER_FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    rank = 0
    if source.config.model_type == MODEL_TYPE and (source.folder / ADAPTER).is_dir():
        shutil.copytree(source.folder / ADAPTER, folder / ADAPTER)
        rank = max(read_adapters(folder / ADAPTER)[0].values())
    if shell.own:
        (folder / PLAN).write_text(plan_of(source, chosen).to_json())
    if shell.put_code:
        shell.put_code(folder)
    return Written(
        path=folder, size_bytes=sum(path.stat().st_size for path in folder.rglob("*.safetensors")), own=shell.own,
        code=shell.put_code is not None, model_type=config["model_type"], dtype=str(dtype).removeprefix("torch."),
        linears=dict(Counter(scheme.name for scheme, _ in chosen.values())),
        exact=sum(again is None for _, again in chosen.values()),
        again=tuple(again for _, again in chosen.values() if again), adapter_rank=rank,
        notes=tuple(notes_of(dense, chosen, rounded, dtype, entries)),
    )  # fmt: skip


def schemes_of(dense: Dense, round_again: bool) -> dict[str, tuple[Scheme, Again | None]]:
    """How each linear of a decoder layer that lies in codes is stored. Embeddings and heads are decoded."""
    coded = {
        name: (spec, dense.model.get_submodule(name).in_features)
        for name, spec in dense.specs.items()
        if name in dense.graph.linears
    }
    if not round_again and (said := refused(coded)):
        raise ModelError(
            f"compressed-tensors does not hold all codes as they are. {said}. Compress with the integer grid for this "
            "target (recipe: grid=integer), or have them rounded once more to integers of as many bits "
            "(--round-again); the export then says how far predictions move."
        )
    found: dict[str, tuple[Scheme, Again | None]] = {}
    for name, (spec, d_in) in coded.items():
        if scheme := exact_scheme(spec, d_in):
            found[name] = scheme, None
        else:
            scheme = nearest_scheme(spec, d_in)
            found[name] = scheme, Again(name, str(spec), str(scheme.spec), why_not(spec, d_in))
    return found


def coded_part(dense: Dense, chosen: Mapping[str, tuple[Scheme, Again | None]]) -> dict:
    """What config.json says of codes."""
    if not chosen:
        return {}
    linears = [name for name, module in dense.model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return {"quantization_config": quantization_config({n: scheme for n, (scheme, _) in chosen.items()}, linears)}


def stock_or_own(source: Source, dense: Dense, coded: Iterable[str]) -> Shell:
    """Of the same model with weights of 16 bits. coded: linears that a stock class would have to take codes for."""
    as_it_is = json.loads((source.folder / "config.json").read_text())
    if source.config.model_type != MODEL_TYPE:
        return Shell(as_it_is)
    original = source.original
    skeleton = build_skeleton(original, trust_remote_code=source.trust_remote_code)
    if not out_of_reach(skeleton, coded):
        plan = Plan.read(source.folder / PLAN)
        plain = plan.model_copy(
            update={"specs": dict.fromkeys(plan.specs, DENSE), "embeddings": {}, "adapter_ranks": {}, "layers": None}
        )
        config = stock_config(
            original, source.config.base_config, dense.graph, plain, cost.named_tensors(dense.model),
            trust_remote_code=source.trust_remote_code,
        )  # fmt: skip
        if config is not None:
            return Shell(json.loads(config.to_json_string()))
    try:
        told = told_of(skeleton, dense.model, dense, coded=False)
    except ModelError:  # there is more to tell than the files know
        return Shell(as_it_is, own=True)
    put = lambda folder: standalone.put_beside(folder, told)
    return Shell(as_it_is, own=True, put_code=put)


def plan_of(source: Source, chosen: Mapping[str, tuple[Scheme, Again | None]]) -> Plan:
    """The plan of an artifact, with what is stored now."""
    plan = Plan.read(source.folder / PLAN)
    specs = plan.specs | {name: scheme.spec for name, (scheme, _) in chosen.items()}
    return plan.model_copy(update={"specs": specs, "embeddings": {}})


def entries_of(
    dense: Dense, chosen: Mapping[str, tuple[Scheme, Again | None]], dtype: str
) -> dict[str, dict[str, TensorSpec]]:
    """Name in the model -> the tensors that are stored for it."""
    found = {}
    for name, (_, shape) in cost.named_tensors(dense.model).items():
        path, _, part = name.rpartition(".")
        if part == "weight" and path in chosen:
            stored = tensor_specs(*shape, chosen[path][0])
            found[name] = {f"{path}.{of}": spec for of, spec in stored.items()}
        else:
            found[name] = {name: (dtype, shape)}
    return found


def tensors_of(
    dense: Dense,
    names: list[str],
    chosen: Mapping[str, tuple[Scheme, Again | None]],
    dtype: torch.dtype,
    importance: Importance,
    rounded: Counter,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """rounded: counts linears whose scales 16 bits do not hold exactly."""
    for name in names:
        path, _, part = name.rpartition(".")
        if part != "weight" or path not in chosen:
            yield name, {name: dense.base(name).to(dtype)}
            continue
        scheme, again = chosen[path]
        if again:
            weight = importance(path)
            weight = None if weight is None else weight[None].float()
            W = dense.base(name)
            made = encoded(grids.quantize(W.float(), scheme.spec, "mse", weight), scheme)
        else:
            layer = dense.coded(path)
            rounded["scales"] += not exact_scales(layer)
            made = as_coded(layer, scheme)
        yield name, {f"{path}.{of}": tensor for of, tensor in made.items()}


def write_shards(
    folder: Path,
    entries: Mapping[str, Mapping[str, TensorSpec]],
    read: Callable[[list[str]], Iterator[tuple[str, dict[str, Tensor]]]],
    on_tensor: OnTensor,
) -> None:
    """One file, or several of at most `SHARD_BYTES` with transformers' index; all that is stored of a linear in one."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, stored in entries.items():
        size = sum(map(cost.tensor_bytes, stored.values()))
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    done = 0

    def shown(names: list[str]) -> Iterator[tuple[str, Tensor]]:
        nonlocal done
        for _, tensors in read(names):
            yield from tensors.items()
            done += 1
            on_tensor(done, len(entries))

    places = {}
    for i, names in enumerate(shards):
        file = WEIGHTS if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        specs = {key: spec for name in names for key, spec in entries[name].items()}
        write_safetensors(folder / file, specs, shown(names))
        places |= dict.fromkeys(specs, file)
    if len(shards) > 1:
        total = sum(cost.tensor_bytes(spec) for stored in entries.values() for spec in stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def notes_of(
    dense: Dense,
    chosen: Mapping[str, tuple[Scheme, Again | None]],
    rounded: Counter,
    dtype: torch.dtype,
    entries: Mapping[str, Mapping[str, TensorSpec]],
) -> Iterator[str]:
    if not chosen:
        yield "nothing lies in codes: this is a plain folder of 16 bits"
    outside = [name for name in dense.specs if name not in dense.graph.linears]
    if outside:
        size = sum(cost.tensor_bytes(entries[f"{name}.weight"][f"{name}.weight"]) for name in outside)
        yield (
            f"{listed(outside)} lie in codes in the artifact and in 16 bits here, {size:,} bytes: transformers ties "
            "and looks up plain matrices"
        )
    if spread := [n for n, (s, again) in chosen.items() if not again and s.group_size != stated_group(dense, n)]:
        yield f"{listed(spread)}: their groups do not divide the inputs, so each scale is written several times"
    if rounded["scales"]:
        yield f"scales of {rounded['scales']} linears are products of few bits, rounded to float16 here"
    if chosen and dtype != torch.float16:
        yield f"scales are float16; loaded in {str(dtype).removeprefix('torch.')}, they keep 8 of their 11 bits"
    if any(spec.activation_bits < 16 for spec in dense.specs.values()):
        yield "inputs of linears are not rounded as the artifact rounds them: only weights are described"


def stated_group(dense: Dense, name: str) -> int | None:
    spec, d_in = dense.spec(name), dense.model.get_submodule(name).in_features
    return None if spec.group_size is None or spec.group_size >= d_in else spec.group_size
