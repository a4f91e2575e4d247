"""A finished model as a GGUF file for llama.cpp, and the proof that it computes the same there."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qpruner.artifact.dense import Dense
from qpruner.artifact.gguf import llamacpp
from qpruner.artifact.gguf.reading import Decoded
from qpruner.artifact.gguf.writing import Written, require_gguf, write_gguf
from qpruner.decide.columns import mean_squares
from qpruner.errors import ModelError, OutputError
from qpruner.exporting.comparing import Off, logits_of, off, sample
from qpruner.files import replacing
from qpruner.model.corpus import read_corpus, token_windows
from qpruner.model.load import Source, load_tokenizer
from qpruner.progress import OnProgress

CALIBRATION_WINDOWS, CALIBRATION_LENGTH = 32, 256
# Between llama.cpp and torch on the same weights: llama.cpp rounds what goes into a product of codes to 8 bits, and
# keys and values to float16. On trained models that is 0.1% without codes and up to 2% with them; on random ones, which
# make more of every difference, it was 9%.
MOST_OFF, MOST_OFF_IN_CODES = 0.01, 0.2


@dataclass(frozen=True)
class Exported:
    """What an export left, and how it was seen to be right.

    moved: logits of the file's weights against the artifact's, both in torch. loaded: logits of the loader against
    those of the file's weights in torch; None where the loader is not installed. same_tokens: of lines of text, the
    fraction that the loader cuts into the tokens that the model knows; None without a loader or a tokenizer.
    """

    written: Written
    moved: Off
    loaded: Off | None
    same_tokens: float | None
    seconds: float

    def to_json(self) -> dict:
        return asdict(self) | {"written": self.written.to_json()}

    def lines(self) -> list[str]:
        """For people."""
        w = self.written
        types = ", ".join(f"{n} {name}" for name, (n, _) in w.types.items())
        said = [f"{w.path}: {w.size_bytes:,} bytes, llama.cpp architecture {w.architecture!r}, {types}"]
        said += [f"codes taken over as they are: {w.exact} matrices"] if w.exact else []
        said += map(str, w.instead)
        said += w.notes
        said.append(f"weights of the file against the artifact: {self.moved}")
        if self.loaded is None:
            said.append(
                "llama.cpp is not installed (pip install 'qpruner[llamacpp]'), so the file was read back by the gguf "
                "package alone"
            )
        else:
            said.append(f"llama.cpp against torch on the weights of the file: {self.loaded}")
        if self.same_tokens is not None:
            said.append(f"lines that llama.cpp cuts into the same tokens: {self.same_tokens:.0%}")
        return said + [f"run it with: llama-cli -m {w.path}"]


def to_gguf(source: Source, path: Path, calibration: Path | None, on_progress: OnProgress) -> Exported:
    start = time.monotonic()
    require_gguf()
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file.")
    dense = Dense(source)
    importance = importance_of(dense, source, calibration, on_progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        show = lambda done, total: on_progress("writing", done, total)
        written = replace(write_gguf(source, temporary, importance=importance, on_tensor=show), path=path)
        ids, lines = sample(source, dense)
        on_progress("comparing", 0, 3)
        ours = logits_of(dense.stream(), ids)
        on_progress("comparing", 1, 3)
        theirs = logits_of(dense.stream(Decoded(temporary, dense.model)), ids)
        on_progress("comparing", 2, 3)
        loaded, same_tokens = None, None
        if llamacpp.installed():
            most = MOST_OFF if written.types.keys() <= {"F16", "F32"} else MOST_OFF_IN_CODES
            loaded, same_tokens = opened(temporary, ids, theirs, lines, source, most)
        on_progress("comparing", 3, 3)
    return Exported(written, off(theirs, ours), loaded, same_tokens, time.monotonic() - start)


def importance_of(
    dense: Dense, source: Source, calibration: Path | None, on_progress: OnProgress
) -> Callable[[str], Tensor | None]:
    if calibration is None:
        return lambda path: None
    text = read_corpus(calibration, "calibration")
    length = min(CALIBRATION_LENGTH, source.context_length or CALIBRATION_LENGTH)
    windows = token_windows(
        text, load_tokenizer(source), length=length, n_windows=CALIBRATION_WINDOWS, fewest=1, seed=0
    )
    show = lambda done, total, pace: on_progress("measuring inputs", done, total, str(pace))
    return mean_squares(dense.stream(), windows.ids, on_layer=show).get


def opened(
    path: Path, ids: Tensor, expected: Tensor, lines: list[str], source: Source, most: float
) -> tuple[Off, float | None]:
    """What llama.cpp makes of the file in a process of its own, and of text.

    Args:
        most: that it may be off.
    """
    try:
        answer = llamacpp.ask(path, ids[0].tolist(), lines)
    except llamacpp.Refused as error:
        raise ModelError(f"llama.cpp does not take the exported file: {error}. Nothing was written.") from None
    found = off(torch.from_numpy(answer.logits.copy()), expected)
    if not found.relative < most:
        raise ModelError(f"llama.cpp computes something else from the exported file ({found}). Nothing was written.")
    if not lines:
        return found, None
    tokenizer = load_tokenizer(source)
    same = [tokenizer(line)["input_ids"] == tokens for line, tokens in zip(lines, answer.texts, strict=True)]
    return found, sum(same) / len(same)
