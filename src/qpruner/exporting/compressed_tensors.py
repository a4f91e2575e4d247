"""A finished model in compressed-tensors' format for vLLM and transformers, and the proof that it is the same there."""

import json
import time
from dataclasses import asdict, dataclass
from dataclasses import replace as changed
from pathlib import Path

import psutil
import torch
from torch import Tensor

from qpruner.artifact.compressed.reading import Unpacked
from qpruner.artifact.compressed.writing import Form, Written, write_folder
from qpruner.artifact.dense import Dense
from qpruner.artifact.loader import ADAPTER
from qpruner.errors import ModelError, OutputError
from qpruner.exporting import fresh, served
from qpruner.exporting.comparing import Off, logits_of, off, sample
from qpruner.exporting.gguf import importance_of
from qpruner.files import replacing
from qpruner.model.cost import named_tensors, parameter_count
from qpruner.model.load import Source
from qpruner.progress import OnProgress
from qpruner.vllm import Verdict, serve_options, vllm_verdict

# Between transformers and torch on the same weights, both in float32: only the order of sums differs.
MOST_OFF = 1e-3
# Between the folder's weights and the artifact's where nothing was rounded again: embeddings out of codes, and products
# of few-bit scales, are rounded to 16 bits.
MOST_MOVED = 2e-2


@dataclass(frozen=True)
class Exported:
    """What an export left, and how it was seen to be right.

    moved: logits of the folder's weights against the artifact's, both in torch, float32. loaded: logits of transformers
    in a fresh process against those of the folder's weights, float32; None where memory does not suffice. as_stored:
    the same against the artifact, in the dtype that the folder says. vllm: what its rules say; serve_options: what it
    has to be told. served: what vLLM made
    of it; None where it was not at hand.
    """

    written: Written
    moved: Off
    loaded: Off | None
    as_stored: Off | None
    corrected: bool
    versions: dict[str, str]
    vllm: tuple[Verdict, ...]
    serve_options: tuple[str, ...]
    served: served.Served | None
    seconds: float

    def to_json(self) -> dict:
        return asdict(self) | {"written": self.written.to_json()}

    def lines(self) -> list[str]:
        """For people."""
        w = self.written
        stored = ", ".join(f"{n} in {name}" for name, n in w.linears.items()) or "none in codes"
        said = [f"{w.path}: {w.size_bytes:,} bytes, model type {w.model_type!r}; linears: {stored}"]
        said += [f"codes taken over as they are: {w.exact} linears"] if w.exact else []
        for reason in dict.fromkeys(one.reason for one in w.again):
            found = [one for one in w.again if one.reason == reason]
            said.append(
                f"rounded once more: {len(found)} linears, such as {found[0].linear} from {found[0].spec} to "
                f"{found[0].scheme}: {reason}"
            )
        said += w.notes
        said.append(f"weights of the folder against the artifact: {self.moved}")
        by = ", by the code in the folder" if w.code else ", with qpruner imported" if w.own else ""
        loader = f"transformers in a fresh process{by}"
        if self.loaded is None:
            said.append(f"{loader} was not asked: it holds the whole model in float32, and there is no memory for that")
        else:
            said.append(f"{loader} against torch on the weights of the folder: {self.loaded}")
            said.append(f"the same in {w.dtype}, against the artifact: {self.as_stored}")
        if self.corrected:
            said.append(
                f"compressed-tensors {self.versions.get('compressed_tensors')} does not load zero points as it "
                "packs them itself: it was corrected for this check, and plain transformers refuses the folder "
                "with it; symmetric=true loads everywhere"
            )
        if w.adapter_rank and not w.own:
            said.append(
                "adapters lie beside, in PEFT's format; in transformers, after a first pass: "
                f"PeftModel.from_pretrained(model, '{w.path / ADAPTER}')"
            )
        said += [str(verdict) for verdict in self.vllm]
        said += self.served.lines() if self.served else []
        imports = "import qpruner; " if w.own and not w.code else ""
        trusted = ", trust_remote_code=True" if w.code else ""
        load = f"{imports}AutoModelForCausalLM.from_pretrained('{w.path}'{trusted})"
        said.append(f"load it with: {load}" + (", or without that after import qpruner" if w.own and w.code else ""))
        if all(verdict.holds for verdict in self.vllm):
            rank = served.lora_rank(w.adapter_rank)
            lora = f" --enable-lora --max-lora-rank {rank} --lora-modules recovered={w.path / ADAPTER}"
            serve = " ".join(("vllm serve", str(w.path), *self.serve_options))
            said.append(f"serve it with: {serve}{lora if w.adapter_rank else ''}")
        return said


def to_compressed_tensors(
    source: Source,
    path: Path,
    calibration: Path | None,
    on_progress: OnProgress,
    *,
    form: Form | None = None,
    round_again: bool = False,
    vllm: str | Path | None = None,
) -> Exported:
    """Args:
    form: what stands around the weights, as `write_folder` has it.
    round_again: what the format does not hold is rounded once more.
    vllm: a Python that has it, to open the folder there; by default this one, where it has.
    """
    start = time.monotonic()
    python = served.interpreter(vllm)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise OutputError(f"{path} is there already; name a folder that is not, or is empty.")
    if source.code:
        raise ModelError(
            f"{source.name!r} comes with Python code of its own, and transformers is asked here without it. Load it "
            "with qpruner and trust_remote_code=True."
        )
    dense = Dense(source)
    importance = importance_of(dense, source, calibration if round_again else None, on_progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        show = lambda done, total: on_progress("writing", done, total)
        written = write_folder(
            source, temporary, form=form, round_again=round_again, importance=importance, on_tensor=show
        )
        ids, _ = sample(source, dense)
        on_progress("comparing", 0, 3)
        ours = logits_of(dense.stream(), ids)
        on_progress("comparing", 1, 3)
        tied = getattr(dense.model, "all_tied_weights_keys", None)
        theirs = logits_of(dense.stream(Adapted(Unpacked.of(temporary, tied), dense)), ids)
        moved = off(theirs, ours)
        if not written.again and not moved.relative < MOST_MOVED:
            raise ModelError(f"the exported weights compute something else ({moved}). Nothing was written.")
        on_progress("comparing", 2, 3)
        loaded, as_stored, answer = None, None, fresh.Answer("", {}, False, {})
        if memory_for(dense):
            answer = opened(temporary, ids, written)
            loaded = off(torch.from_numpy(answer.logits["float32"].copy()), theirs)
            if not loaded.relative < MOST_OFF:
                raise ModelError(
                    f"transformers computes something else from the exported folder ({loaded}). Nothing was written."
                )
            as_stored = off(torch.from_numpy(answer.logits[written.dtype].copy()), ours)
        config = json.loads((temporary / "config.json").read_text())
        verdicts, options = tuple(vllm_verdict(config)), serve_options(config)
        there = None
        if python and all(verdict.holds for verdict in verdicts):
            on_progress("opening in vLLM", 0, 1)
            there = served.served(
                python, temporary, ids, written.dtype, weights=theirs, artifact=ours,
                adapter=temporary / ADAPTER if written.adapter_rank else None, code=written.code,
            )  # fmt: skip
        on_progress("comparing", 3, 3)
    return Exported(
        changed(written, path=path), moved, loaded, as_stored, answer.corrected, answer.versions, verdicts,
        options, there, time.monotonic() - start,
    )  # fmt: skip


class Adapted:
    """`Tensors` of a folder with what the artifact's adapters add."""

    def __init__(self, tensors: Unpacked, dense: Dense):
        self._tensors, self._dense = tensors, dense

    @property
    def bytes_read(self) -> int:
        return self._tensors.bytes_read

    def read(self, name: str) -> Tensor:
        path, _, part = name.rpartition(".")
        found = self._tensors.read(name)
        return self._dense.corrected(path, found) if part == "weight" else found


def memory_for(dense: Dense) -> bool:
    """Whether another process can hold the model in float32, beside what is stored of it."""
    needed = 6 * parameter_count(named_tensors(dense.model))
    return psutil.virtual_memory().available > needed


def opened(folder: Path, ids: Tensor, written: Written) -> fresh.Answer:
    adapter = folder / ADAPTER if written.adapter_rank and not written.own else None  # our type puts them there itself
    try:
        return fresh.ask(
            folder, ids[0].tolist(), dtypes=("float32", written.dtype), adapter=adapter, code=written.code,
            own=written.own and not written.code,
        )  # fmt: skip
    except fresh.Refused as error:
        raise ModelError(f"transformers does not take the exported folder: {error}. Nothing was written.") from None
