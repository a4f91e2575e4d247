"""vLLM, asked in a process of its own what it computes from an exported folder."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qpruner.errors import ModelError, OutputError
from qpruner.exporting import vllm_program
from qpruner.exporting.comparing import Off, off
from qpruner.model.adapters import read_adapters
from qpruner.vllm import serve_options

SECONDS = 1800
# Of logits in float32 on the same weights: only the order of sums differs.
MOST_OFF = 1e-3
# Nats per token between what vLLM serves and the model: of another arithmetic, not of another model.
MOST_KL = 0.1
NO_KERNEL, NO_MEMORY = "Failed to find a kernel", "memory"
SAID = 600  # characters of what vLLM said that are handed on
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM accepts as --max-lora-rank


@dataclass(frozen=True)
class Answer:
    """model_class: that vLLM made of the folder. logits: (tokens, vocabulary), float32. kernels: that multiplied codes;
    none for plain weights."""

    model_class: str
    logits: np.ndarray
    kernels: tuple[str, ...]
    version: str


@dataclass(frozen=True)
class Served:
    """What vLLM made of a folder.

    exact: its logits in float32, with products of codes written out, against those of the same weights here; None where
    it has no memory for that. as_served: in the folder's dtype with its own kernels, against the model that was
    exported; None where it has none for these codes on this machine.
    """

    version: str
    model_class: str
    exact: Off | None
    as_served: Off | None
    kernels: tuple[str, ...]

    def lines(self) -> list[str]:
        exact = self.exact or "it has no memory for float32"
        said = [f"vLLM {self.version}, as {self.model_class}, against torch on the weights of the folder: {exact}"]
        if self.as_served is None:
            return [*said, "vLLM has no kernel for these codes on this machine: their products were written out"]
        by = f" ({', '.join(self.kernels)})" if self.kernels else ""
        return [*said, f"as vLLM serves it{by}, against the artifact: {self.as_served}"]


class Refused(Exception):
    """vLLM does not take the folder; the message is what it said."""


def interpreter(named: str | Path | None) -> Path | None:
    """The Python that has vLLM: the one that is named, or this one; None where this one has none.

    Raises:
        OutputError: the one that is named has none.
    """
    if named is None:
        return Path(sys.executable) if importlib.util.find_spec("vllm") else None
    ask = "import importlib.util, sys; sys.exit(not importlib.util.find_spec('vllm'))"
    try:
        found = subprocess.run([named, "-c", ask], capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise OutputError(f"{named} does not run ({error}). Name the Python of an environment that has vLLM.") from None
    if not found:
        raise OutputError(f"{named} has no vLLM. Name the Python of an environment that has it.")
    return Path(named)


def served(
    python: Path,
    folder: Path,
    ids: Tensor,
    dtype: str,
    *,
    weights: Tensor,
    artifact: Tensor,
    most: float = MOST_OFF,
    adapter: Path | None = None,
    code: bool = False,
) -> Served:
    """Open a folder in vLLM, twice, and compare.

    Args:
        ids: (1, tokens). dtype: that it is served in. weights, artifact: logits to compare with, (tokens, vocabulary).
        most: relative difference in float32 that is allowed. adapter: a PEFT folder to put on it.
        code: Python files in the folder may run; they are ours.
    Raises:
        ModelError: it does not load there, or computes something else.
    """
    rank = max(read_adapters(adapter)[0].values()) if adapter else 0
    how = dict(adapter=adapter, rank=lora_rank(rank), code=code)
    plain = _unless(NO_MEMORY, python, folder, ids, "float32", written_out=True, **how)
    exact = plain and off(torch.from_numpy(plain.logits), weights)
    if exact and not exact.relative < most:
        raise ModelError(f"vLLM computes something else from the exported folder ({exact}). Nothing was written.")
    own = _unless(NO_KERNEL if plain else None, python, folder, ids, dtype, written_out=False, **how)
    as_served = own and off(torch.from_numpy(own.logits), artifact)
    if as_served and not as_served.kl < MOST_KL:
        raise ModelError(f"vLLM serves something else ({as_served}). Nothing was written.")
    one = plain or own
    return Served(one.version, one.model_class, exact, as_served, own.kernels if own else ())


def _unless(reason: str | None, python: Path, folder: Path, ids: Tensor, dtype: str, **how) -> "Answer | None":
    """What `ask` answers; None where it is refused for this reason."""
    try:
        return ask(python, folder, ids[0].tolist(), dtype, **how)
    except Refused as error:
        if reason and reason in str(error):
            return None
        raise ModelError(f"vLLM does not take the exported folder: {error}. Nothing was written.") from None


def lora_rank(rank: int) -> int:
    """The smallest of vLLM's maximal ranks that holds adapters of this one."""
    return next(most for most in LORA_RANKS if most >= rank)


def ask(
    python: Path,
    folder: Path,
    tokens: Sequence[int],
    dtype: str,
    *,
    written_out: bool = False,
    adapter: Path | None = None,
    rank: int = 0,
    code: bool = False,
) -> Answer:
    """Logits after each token.

    Args:
        written_out: products of codes in plain torch, in place of vLLM's kernels.
        adapter, rank: a PEFT folder to put on it, and the largest rank to make room for.
        code: Python files in the folder may run; they are ours.
    Raises:
        Refused: the folder does not load, or does not run.
    """
    options = serve_options(json.loads((folder / "config.json").read_text()))
    request = dict(
        model_impl="transformers" if "transformers" in options else "auto",
        folder=str(folder.absolute()), tokens=list(tokens), dtype=dtype, written_out=written_out, code=code, rank=rank,
        adapter=adapter and str(adapter.absolute()), threads=torch.get_num_threads(),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        asked, answer = Path(place) / "request.json", Path(place) / "answer"
        asked.write_text(json.dumps(request))
        # Not isolated from the environment: vLLM is told where its libraries are through it.
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment["HF_MODULES_CACHE"] = f"{place}/modules"
        done = subprocess.run(
            [python, vllm_program.__file__, asked, answer], capture_output=True, timeout=SECONDS, check=False,
            env=environment, cwd=place,
        )  # fmt: skip
        if not answer.is_file():
            said = done.stderr.decode(errors="replace").split("\n")
            last = next((line for line in reversed(said) if line.strip()), "nothing")
            raise Refused(f"it ended with status {done.returncode} and said: {last.strip()}")
        head, _, data = answer.read_bytes().partition(b"\n")
    found = json.loads(head)
    if "refused" in found:
        raise Refused(" ".join(found["refused"].split())[:SAID])
    logits = np.frombuffer(data, np.float32).reshape(found["shape"]).copy()
    return Answer(found["class"], logits, tuple(found["kernels"]), found["version"])
