"""A run is a folder: every stage's result is in it whole or not at all, so the same command continues where it stopped.

    OUT.run/
      stages.json       for each finished stage: digest of its inputs, its file and that file's digest, seconds
      measurements/     one .json or .safetensors file per stage, or a folder of them
      trials.jsonl      one line per trial of the search, written as it ends
      events.jsonl      what happened when

A stage whose inputs have the digest of its stored result is read back instead of computed. `shared` is a second folder,
common to many runs, in which results are looked up by that digest (a study's runs have most of their stages in common).
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qpruner.errors import OutputError
from qpruner.files import copy, file_digest, replacing, write_text
from qpruner.model.memory import peak_bytes

WAIT = 0.1  # seconds between two looks whether another process has finished a stage


def digest_of(value: Any) -> str:
    """Of any JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Run:
    """An open run folder; one process at a time, and those that follow it.

    follows: this process was launched together with the one that leads. It computes nothing but what all of them
        compute together, writes nothing, and waits for each stage of the other.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shared: Path | None = None,
        on_stage: Callable[[str], None] | None = None,
        follows: bool = False,
    ):
        self.folder, self.shared, self.follows = folder, shared, follows
        self._on_stage = on_stage or (lambda name: None)
        self._measurements = folder / "measurements"
        self._measurements.mkdir(parents=True, exist_ok=True)
        self._file = folder / "stages.json"
        self._lock = (folder / "lock").open("a")
        try:
            if not follows:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise OutputError(
                f"another process is at work in {folder}. Wait for it, or choose another output."
            ) from None
        self.stages: dict[str, dict] = self._read_stages()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exc) -> None:
        self._lock.close()

    def values(self, stage: str, inputs: Mapping, compute: Callable[[], Any]) -> Any:
        """A JSON value: read back if this stage was done with these inputs, else computed and stored."""

        def write(path: Path, value: Any) -> None:
            path.write_text(json.dumps(value, indent=1))

        return self._stage(stage, inputs, compute, ".json", write, lambda path: json.loads(path.read_text()))

    def tensors(
        self, stage: str, inputs: Mapping, compute: Callable[[], dict[str, Tensor]], *, together: bool = False
    ) -> dict[str, Tensor]:
        """Tensors by name, likewise. together: processes that follow take part in computing them."""
        from safetensors.torch import load_file, save_file

        write = lambda path, value: save_file(value, path)
        return self._stage(stage, inputs, compute, ".safetensors", write, load_file, together)

    def files(self, stage: str, inputs: Mapping, compute: Callable[[Path], None]) -> Path:
        """A folder that `compute` puts files into, likewise: for what may not fit in memory all at once."""

        def write(path: Path, value: None) -> None:
            path.mkdir()
            compute(path)

        return self._stage(stage, inputs, lambda: None, "", write, lambda path: path)

    def event(self, what: str, **facts: Any) -> None:
        if self.follows:
            return
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": time.time(), "event": what, **facts}) + "\n")

    def seconds(self) -> dict[str, float]:
        return {name: entry["seconds"] for name, entry in self.stages.items()}

    def _stage(self, stage, inputs, compute, suffix, write, read, together=False):
        inputs_digest = digest_of({"stage": stage, **inputs})
        path = self._measurements / f"{stage}{suffix}"
        self._on_stage(stage)
        if self.follows:
            common = self.shared and (self.shared / f"{inputs_digest}{suffix}").exists()
            if together and not common and not self._holds(stage, inputs_digest, path):
                compute()
            while not self._holds(stage, inputs_digest, path):
                time.sleep(WAIT)
                self.stages = self._read_stages()
        elif not self._holds(stage, inputs_digest, path):
            start = time.monotonic()
            common = self.shared and self.shared / f"{inputs_digest}{suffix}"
            if common and common.exists():
                with replacing(path) as temporary:
                    copy(common, temporary)
            else:
                value = compute()
                with replacing(path) as temporary:
                    write(temporary, value)
                if common:
                    self.shared.mkdir(parents=True, exist_ok=True)
                    with replacing(common) as temporary:
                        copy(path, temporary)
            seconds = time.monotonic() - start
            self.stages[stage] = {"inputs": inputs_digest, "digest": file_digest(path), "seconds": round(seconds, 3)}
            write_text(self._file, json.dumps(self.stages, indent=1) + "\n")
            self.event("stage done", stage=stage, seconds=round(seconds, 3), peak_bytes=peak_bytes())
        # Always what the file holds: a resumed run must see exactly what the first one went on with.
        return read(path)

    def _read_stages(self) -> dict[str, dict]:
        return json.loads(self._file.read_text()) if self._file.is_file() else {}

    def _holds(self, stage: str, inputs_digest: str, path: Path) -> bool:
        entry = self.stages.get(stage)
        return bool(
            entry and entry["inputs"] == inputs_digest and path.exists() and file_digest(path) == entry["digest"]
        )


class Journal:
    """Lines of JSON under a header that names the inputs; each line is on disk before the next trial starts."""

    def __init__(self, path: Path, inputs: Mapping):
        self._path = path
        self._header = {"inputs": digest_of(inputs)}
        self.lines: list[dict] = []
        if path.is_file():
            stored = [self._line(text) for text in path.read_text().splitlines()]
            whole = stored[: stored.index(None)] if None in stored else stored  # a crash can cut the last line short
            if whole and whole[0] == self._header:
                self.lines = whole[1:]
            elif len(whole) > 1:  # of another search, whose trials took as long
                path.replace(path.with_suffix(f".before{path.suffix}"))
        write_text(path, "".join(json.dumps(line) + "\n" for line in [self._header, *self.lines]))

    @staticmethod
    def _line(text: str) -> dict | None:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return None

    def append(self, line: dict) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)
