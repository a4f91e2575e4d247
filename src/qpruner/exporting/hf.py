"""A finished model as a folder for transformers alone, opened there in a fresh process before it is called done.

by default   the stock class at 16 bits: for one width everywhere; codes are decoded
padded       the same for layers of different widths, filled up with zeros
with code    the artifact as it is, with Python files beside the weights for trust_remote_code
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from qpruner import body
from qpruner.artifact import standalone
from qpruner.artifact.config import MODEL_TYPE
from qpruner.artifact.dense import Dense
from qpruner.artifact.loader import ADAPTER, MANIFEST, PLAN, WEIGHTS, shell
from qpruner.artifact.narrowed import told_of
from qpruner.artifact.opened import open_stream
from qpruner.artifact.save import CARD, LICENSES, TOKENIZER_FILES, weight_bytes
from qpruner.artifact.stock import finds_every_name
from qpruner.errors import ModelError, OutputError
from qpruner.exporting import fresh, served
from qpruner.exporting.comparing import Off, logits_of, off, sample
from qpruner.exporting.padding import padded as with_zeros
from qpruner.files import replacing
from qpruner.loading import TARGETS, loading, loads_in
from qpruner.model import cost, memory
from qpruner.model.checkpoint import TORCH_DTYPES, read_headers
from qpruner.model.load import Source, inspect_source, stored_dtype
from qpruner.model.skeleton import build_skeleton
from qpruner.model.surgery import cuts_of
from qpruner.model.tensors import Tensors, write_safetensors
from qpruner.model_card import card_of
from qpruner.plan import Plan
from qpruner.progress import OnProgress
from qpruner.vllm import vllm_verdict

# Of logits in float32, between two programs on the same weights; and where weights were rounded to 16 bits, or inputs
# to few, which a digit of their last can move by a step.
MOST_OFF, MOST_OFF_ROUNDED = 1e-3, 0.05


@dataclass(frozen=True)
class Exported:
    """What an export left, and how it was seen to be right.

    architecture: the class that transformers makes of it. bytes_before, bytes_after: of all weight files; bytes_uniform
    of the stock class without zeros, where zeros were added. moved: logits of the export's weights against the
    artifact's, in torch; None where they are the same bytes. loaded: logits in a fresh process that has transformers
    alone against those of the same weights here; None where they do not fit in memory there. served: what vLLM made of
    it; None where it was not at hand, or where its rules speak against it.
    """

    path: Path
    architecture: str
    bytes_before: int
    bytes_after: int
    bytes_of_zeros: int
    moved: Off | None
    loaded: Off | None
    served: served.Served | None
    notes: tuple[str, ...]
    commands: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict:
        return asdict(self) | {"path": str(self.path)}

    def lines(self) -> list[str]:
        """For people."""
        said = [f"{self.path}: {self.architecture}, {self.bytes_after:,} bytes; before {self.bytes_before:,}"]
        said += [f"of these {self.bytes_of_zeros:,} are zeros for units that went"] if self.bytes_of_zeros else []
        said += self.notes
        said += [f"weights of the export against the artifact: {self.moved}"] if self.moved else []
        if self.loaded is None:
            said.append("not opened in a fresh process: its memory would not do")
        else:
            said.append(f"transformers alone, in a fresh process: {self.loaded}")
        said += self.served.lines() if self.served else []
        return [*said, *(f"load it with: {command}" for command in self.commands)]


def to_hf(
    source: Source,
    path: Path,
    calibration: Path | None,
    on_progress: OnProgress,
    *,
    padded: bool = False,
    with_code: bool = False,
    adapters_beside: bool = False,
    vllm: str | Path | None = None,
) -> Exported:
    """Args:
    padded: fill layers up with zeros to one width, where the class takes that.
    with_code: the artifact as it is, with Python files for trust_remote_code.
    adapters_beside: adapters stay a folder in PEFT's format; by default they are added into the weights.
    vllm: a Python that has it, to open the folder there; by default this one, where it has.
    """
    _check(source, path, calibration, padded, with_code, adapters_beside)
    python = served.interpreter(vllm)
    start = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.mkdir()
        if with_code:
            made = _with_code(source, temporary, on_progress)
        else:
            made = _stock(source, temporary, padded, adapters_beside, on_progress)
        notes, of_zeros, moved, expected, most, ids = made
        loaded, architecture = None, json.loads((temporary / "config.json").read_text())["architectures"][0]
        on_progress("opening in a fresh process", 0, 1)
        if memory.fits(read_headers(temporary), None):
            beside = temporary / ADAPTER if adapters_beside else None
            try:
                answer = fresh.ask(temporary, ids[0].tolist(), adapter=beside, code=with_code)
            except fresh.Refused as error:
                raise ModelError(
                    f"transformers alone does not load the exported folder: {error}. Nothing was written."
                ) from None
            architecture = answer.model_class
            loaded = off(torch.from_numpy(answer.logits["float32"].copy()), expected)
            if not loaded.relative < most:
                raise ModelError(f"transformers computes something else from it ({loaded}). Nothing was written.")
        on_progress("opening in a fresh process", 1, 1)
        there, speaks_against = None, [v.sentence for v in vllm_verdict(temporary) if not v.holds]
        if python and speaks_against:
            notes = (*notes, f"vLLM was not asked: {speaks_against[0]}")
        elif python:
            on_progress("opening in vLLM", 0, 1)
            dtype = str(stored_dtype(inspect_source(temporary))).removeprefix("torch.")
            beside = temporary / ADAPTER if (temporary / ADAPTER).is_dir() else None
            there = served.served(
                python, temporary, ids, dtype, weights=expected, artifact=expected, most=most, adapter=beside,
                code=with_code,
            )  # fmt: skip
        commands = _finish(source, temporary, path, with_code, adapters_beside)
        before, after = weight_bytes(source.folder), weight_bytes(temporary)
    seconds = time.monotonic() - start
    return Exported(path, architecture, before, after, of_zeros, moved, loaded, there, notes, commands, seconds)


def _check(source, path: Path, calibration, padded: bool, with_code: bool, adapters_beside: bool) -> None:
    own = source.config.model_type == MODEL_TYPE
    if path.exists():
        raise OutputError(f"{path} is there already. Name another folder, or remove it.")
    if calibration is not None:
        raise OutputError("the export to hf rounds nothing by text; leave out the calibration text.")
    if with_code and (padded or adapters_beside):
        other = "padded" if padded else "adapters_beside"
        raise OutputError(f"with_code keeps the artifact as it is, and {other} changes it. Ask for one of them.")
    if padded and adapters_beside:
        raise OutputError("adapters do not fit layers that are filled up. Leave out adapters_beside: they are merged.")
    if with_code and not own:
        raise OutputError(f"{source.name!r} is a stock model of type {source.config.model_type!r}: it needs no code.")
    if adapters_beside and not (own and (source.folder / ADAPTER).is_dir()):
        raise OutputError(f"{source.name!r} has no adapters beside its weights; leave out adapters_beside.")
    if source.code:
        raise ModelError(
            f"{source.name!r} comes with Python code of its own, so no class of transformers holds it. Load it with "
            "qpruner and trust_remote_code=True."
        )


# --- the stock class -------------------------------------------------------------------------------------------------


def _stock(source: Source, folder: Path, padded: bool, adapters_beside: bool, on_progress: OnProgress) -> tuple:
    dense = Dense(source, adapters=not adapters_beside)
    own = source.config.model_type == MODEL_TYPE
    notes, of_zeros, cuts, wider = [], 0, {}, {}
    if own:
        plan = Plan.read(source.folder / PLAN)
        dtype = cost.TORCH_NAMES[source.config.dtype]
        config, expected, kept = _one_width(source, dense, plan, padded, dtype)
        if kept != plan.kept:
            cuts, wider = cuts_of(dense.graph, plan.kept), cuts_of(dense.graph, kept)
            of_zeros = cost.safetensors_size(expected) - cost.safetensors_size(
                cost.stored_tensors(_whole(source), dense.graph, body.plain_plan(plan), dtype)
            )
        elif padded:
            notes.append("all layers are equally wide: nothing was filled up")
        notes += _notes(plan, adapters_beside)
    else:
        dtype = cost.TORCH_NAMES[stored_dtype(source)]
        config = source.config
        config.dtype = TORCH_DTYPES[dtype]
        narrow = lambda kind: dtype if kind in cost.WIDE else kind
        expected = {name: (narrow(kind), shape) for name, (kind, shape) in cost.named_tensors(dense.model).items()}
        if not finds_every_name(dense.model, expected):
            raise ModelError(f"transformers does not find all tensors of {source.name!r} under their names here.")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for done, (name, (kind, shape)) in enumerate(expected.items()):
            on_progress("writing", done, len(expected))
            tensor = dense.as_original(name).to(TORCH_DTYPES[kind])
            yield name, with_zeros(tensor, cuts[name], wider.get(name, ()), shape) if name in cuts else tensor

    write_safetensors(folder / WEIGHTS, expected, tensors())
    config.save_pretrained(folder)
    on_progress("comparing", 0, 2)
    ids, _ = sample(source, dense)
    ours = logits_of(open_stream(source), ids)
    on_progress("comparing", 1, 2)
    if adapters_beside:  # which are added in the fresh process
        shutil.copytree(source.folder / ADAPTER, folder / ADAPTER)
        return tuple(notes), of_zeros, None, ours, MOST_OFF_ROUNDED, ids
    rounded = logits_of(dense.stream(Rounded(dense, {n: TORCH_DTYPES[k] for n, (k, _) in expected.items()})), ids)
    on_progress("comparing", 2, 2)
    return tuple(notes), of_zeros, off(rounded, ours), rounded, MOST_OFF, ids


@dataclass
class Rounded:
    """`Tensors` as a file of these dtypes holds them."""

    tensors: Tensors
    dtypes: dict[str, torch.dtype]

    def read(self, name: str) -> Tensor:
        tensor = self.tensors.read(name)
        return tensor.to(self.dtypes[name]).to(tensor.dtype) if name in self.dtypes else tensor

    @property
    def bytes_read(self) -> int:
        return self.tensors.bytes_read


def _whole(source: Source) -> dict[str, cost.TensorSpec]:
    return cost.named_tensors(build_skeleton(source.original))


def _one_width(
    source: Source, dense: Dense, plan: Plan, padded: bool, dtype: str
) -> tuple[PreTrainedConfig, dict[str, cost.TensorSpec], dict]:
    """The stock configuration, its tensors, and the units that every group then has."""
    if found := body.stock_form(source.original, dense.graph, plan, dtype=dtype):
        return *found, plan.kept
    what = body.Body(source.name, source.original, dense.model, dense.graph, plan)
    if not padded:
        raise ModelError(
            f"no stock class holds {source.name!r}: {what.why_not_stock()}. Fill layers up with zeros (--padded), put "
            "code beside the weights (--with-code), or load it with qpruner imported as it is."
        )
    if found := body.filled_form(source.original, dense.graph, plan, dtype=dtype):
        return found
    raise ModelError(
        f"no stock class holds {source.name!r}, filled up or not: {what.why_not_stock()}. Put code beside the weights "
        "(--with-code), or load it with qpruner imported as it is."
    )


def _notes(plan: Plan, adapters_beside: bool) -> Iterator[str]:
    specs = [*plan.specs.values(), *plan.packed_embeddings.values()]
    if any(spec.bits < 16 for spec in specs):
        yield "codes were decoded to 16 bits"
    if rounded := {spec.activation_bits for spec in specs} - {16}:
        yield f"inputs that the artifact rounds to {' and '.join(map(str, sorted(rounded)))} bits are not rounded there"
    if plan.adapter_ranks and plan.adapters == "beside":
        yield "adapters are beside the weights, for PEFT" if adapters_beside else "adapters were added into the weights"


# --- with code -------------------------------------------------------------------------------------------------------


def _with_code(source: Source, folder: Path, on_progress: OnProgress) -> tuple:
    """The files of the artifact, the code, and what it has to be told in config.json."""
    narrowed, _ = shell(source.folder, source.config)
    original = build_skeleton(source.original)
    dense = Dense(source)
    told = told_of(original, narrowed, dense, coded=any(spec.bits < 16 for spec in dense.specs.values()))
    shutil.copytree(source.folder, folder, dirs_exist_ok=True)
    standalone.put_beside(folder, told)
    on_progress("comparing", 0, 1)
    ids, _ = sample(source, dense)
    ours = logits_of(open_stream(source), ids)
    on_progress("comparing", 1, 1)
    rounds = any(spec.activation_bits < 16 for spec in Plan.read(source.folder / PLAN).specs.values())
    notes = ("weights and codes are those of the artifact; Python files load them with trust_remote_code=True",)
    return notes, 0, None, ours, MOST_OFF_ROUNDED if rounds else MOST_OFF, ids


# --- what lies beside the weights ------------------------------------------------------------------------------------


def _finish(source: Source, folder: Path, path: Path, with_code: bool, adapters_beside: bool) -> tuple[str, ...]:
    """Tokenizer, licences and card; the commands that load the folder under its final name."""
    if not with_code:
        for file in (*TOKENIZER_FILES, *LICENSES):
            if (source.folder / file).is_file():
                shutil.copyfile(source.folder / file, folder / file)
    made = body.body_of(inspect_source(folder))
    if (source.folder / MANIFEST).is_file():
        manifest = json.loads((source.folder / MANIFEST).read_text())
        (folder / CARD).write_text(card_of(manifest, body.body_of(source), loading(made, "OUT"), source.folder / CARD))
    elif (source.folder / CARD).is_file():
        shutil.copyfile(source.folder / CARD, folder / CARD)
    if adapters_beside:
        lines = "from peft import PeftModel; from transformers import AutoModelForCausalLM as A"
        return (f"python -c \"{lines}; PeftModel.from_pretrained(A.from_pretrained('{path}'), '{path}/{ADAPTER}')\"",)
    return (loads_in(TARGETS[2 if with_code else 1], made, str(path)).command,)
