"""Documents from files: plain text, JSON lines, parquet."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qpruner.errors import CorpusError, MissingExtraError, listed

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")

ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{context}### Response:\n"
)
ALPACA_PAIRED = ", paired with an input that provides further context"


class Document(NamedTuple):
    """One text. prompt: characters at its start that were given, and are not to be learned."""

    text: str
    prompt: int = 0


def read_documents(path: Path, *, blank: bool = False) -> list[Document]:
    """The documents of a file that hold more than blanks: a `.txt` is one, elsewhere every row is one.

    A row has its text in `text`, or is an instruction with its answer (`instruction`, `input`, `output`: the Alpaca
    template), or has one string and nothing else that is one.

    Args:
        blank: keep rows that hold nothing, where they are part of a text that is joined again; they come out empty.
    Raises:
        CorpusError: the file is absent, empty, unreadable, of another kind, or has no usable row.
        MissingExtraError: a parquet file, and pyarrow is not installed.
    """
    if not path.exists():
        raise CorpusError(f"there is no text file at {path}. Accepted: {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise CorpusError(f"{path} is a folder, not a text file. Name one file: {', '.join(SUFFIXES)}.")
    suffix = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        raise CorpusError(f"{path.name} is of no known kind of text file. Accepted: {', '.join(SUFFIXES)}, in UTF-8.")
    if path.stat().st_size == 0:
        raise CorpusError(f"{path} is empty (0 bytes). Give a file with text in it.")
    if suffix == ".txt":
        documents = [Document(_decoded(_bytes(path), path))]
    elif suffix == ".parquet":
        documents = list(_parquet_documents(path))
    else:
        documents = list(_json_documents(path))
    usable = [document for document in documents if document.text.strip()]
    if not usable:
        raise CorpusError(f"{path} holds no text: every {'line' if suffix == '.txt' else 'row'} of it is blank.")
    return [d if d.text.strip() else Document("") for d in documents] if blank else usable


def _bytes(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CorpusError(f"{path} is not a whole gzip file ({error}). Fetch or compress it again.") from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}.") from error


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{path} is not UTF-8 text: byte 0x{content[error.start]:02x} at position {error.start:,} is not valid. "
            "Convert it, for instance with `iconv -t UTF-8`."
        ) from error


def _json_documents(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_decoded(_bytes(path), path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(
                f"{path}, line {number}: not JSON ({error.msg}). Every line must be one object."
            ) from error
        if not isinstance(row, dict):
            raise CorpusError(f"{path}, line {number}: a {type(row).__name__}, not an object with a `text` field.")
        yield _row_document(row, f"{path}, line {number}")


def _parquet_documents(path: Path) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(
            f"reading {path.name} needs pyarrow: pip install 'qpruner[parquet]', or convert the file to .jsonl."
        ) from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            fields = {field.name: pyarrow.types.is_string(field.type) or pyarrow.types.is_large_string(field.type)
                      for field in file.schema_arrow}  # fmt: skip
            wanted = ["text"] if "text" in fields else [name for name, is_string in fields.items() if is_string]
            if not wanted:
                raise CorpusError(f"{path} has no column of text. Found: {listed(fields)}. Accepted: a column `text`.")
            for batch in file.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield _row_document(row, f"{path}, row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        message = str(error).splitlines()[0]
        raise CorpusError(f"{path} is not a readable parquet file: {message}. Fetch it again.") from error


def _row_document(row: dict, place: str) -> Document:
    """The text of one row; blank where the row has the field and nothing in it."""
    if "text" in row:
        return Document(_string(row["text"], "text", place))
    if "instruction" in row and "output" in row:
        field = {name: _string(row.get(name), name, place) for name in ("instruction", "input", "output")}
        paired, context = (ALPACA_PAIRED, f"### Input:\n{field['input']}\n\n") if field["input"] else ("", "")
        prompt = ALPACA.format(paired=paired, context=context, instruction=field["instruction"])
        return Document(prompt + field["output"], len(prompt))
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if len(strings) == 1:
        return Document(row[strings[0]])
    raise CorpusError(
        f"{place}: no field to take the text from. Found: {listed(row) or 'nothing'}. Accepted: `text`; "
        "`instruction` and `output` (and `input`); or a single string."
    )


def _string(value: object, field: str, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CorpusError(f"{place}: `{field}` is a {type(value).__name__}, not a string.")
    return value
