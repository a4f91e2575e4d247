"""Files and folders that are whole or absent: written beside their place under another name, then renamed."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that takes the place of `path` once it is written and on disk.

    What is written there may be a folder of files; it takes the place of an older one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        for written in [temporary] if temporary.is_file() else temporary.rglob("*"):
            if written.is_file():
                with written.open("rb") as file:
                    os.fsync(file.fileno())
        if path.is_dir():
            shutil.rmtree(path)  # no system call puts a folder in the place of one that is not empty
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def files_in(path: Path) -> list[Path]:
    """The file itself, or those of a folder by name."""
    return sorted(path.iterdir()) if path.is_dir() else [path]


def file_digest(path: Path) -> str:
    """Of a file, or of the names and contents of those in a folder."""
    if path.is_dir():
        names = "".join(f"{file.name} {file_digest(file)}\n" for file in files_in(path))
        return hashlib.sha256(names.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy(path: Path, to: Path) -> None:
    """A file, or a folder of files."""
    if path.is_dir():
        shutil.copytree(path, to)
    else:
        shutil.copyfile(path, to)
