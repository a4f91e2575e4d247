"""llama.cpp, asked in a process of its own: what it computes from a file, and how it reads text.

As a program this file imports nothing of qpruner: it loads the GGUF file with llama.cpp's own loader, through the C
interface in the library of `xllamacpp`. Structs of that interface are handed on as they come, for their fields change
between versions: default parameters, so no more than 512 tokens, and one token after the other, as when text is made.
"""

import ctypes
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MOST_TOKENS = 512  # the context that default parameters give
OPAQUE_BYTES = 1024  # more than any struct has: what is read past its end is never used
LOG_ERROR = 4
SECONDS = 600


@dataclass(frozen=True)
class Answer:
    """logits: (tokens, vocabulary), float32. texts: the tokens of each text, special ones added as the file says."""

    logits: np.ndarray
    texts: list[list[int]]


class Refused(Exception):
    """llama.cpp does not take the file; the message is what it said."""


def installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def ask(path: Path, tokens: list[int], texts: list[str] = ()) -> Answer:
    """Logits after each token, and texts as tokens, by llama.cpp in a fresh process.

    Raises:
        Refused: the file does not load, or does not run.
    """
    assert 0 < len(tokens) <= MOST_TOKENS
    request = json.dumps({"path": str(path), "tokens": tokens, "texts": list(texts)})
    done = subprocess.run(
        [sys.executable, "-P", __file__], input=request.encode(), capture_output=True, timeout=SECONDS, check=False
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise Refused(said[-1] if said else f"the process ended with status {done.returncode}")
    head, _, data = done.stdout.partition(b"\n")
    found = json.loads(head)
    return Answer(np.frombuffer(data, np.float32).reshape(found["shape"]), found["texts"])


# --- in the other process --------------------------------------------------------------------------------------------


class Opaque(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * OPAQUE_BYTES)]


def answer(request: dict) -> tuple[np.ndarray, list[list[int]]]:
    said: list[str] = []
    library = ctypes.CDLL(importlib.import_module("xllamacpp.xllamacpp").__file__)

    def function(name: str, result, *arguments):
        found = getattr(library, name)
        found.restype, found.argtypes = result, arguments
        return found

    pointer, integer = ctypes.c_void_p, ctypes.c_int32
    listener = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)(
        lambda level, text, _: said.append(text.decode(errors="replace").strip()) if level == LOG_ERROR else None
    )
    function("llama_log_set", None, type(listener), pointer)(listener, None)
    function("llama_backend_init", None)()
    parameters = function("llama_model_default_params", Opaque)()
    load = function("llama_model_load_from_file", pointer, ctypes.c_char_p, Opaque)
    model = load(request["path"].encode(), parameters)
    if not model:
        sys.exit(" ".join(said[:2]) or "llama.cpp cannot load it")
    context = function("llama_init_from_model", pointer, pointer, Opaque)(
        model, function("llama_context_default_params", Opaque)()
    )
    if not context:
        sys.exit(" ".join(said[:2]) or "llama.cpp cannot make a context for it")
    vocabulary = function("llama_model_get_vocab", pointer, pointer)(model)
    n = function("llama_vocab_n_tokens", integer, pointer)(vocabulary)
    one = function("llama_batch_get_one", Opaque, pointer, integer)
    decode = function("llama_decode", integer, pointer, Opaque)
    logits_of = function("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), pointer, integer)
    rows = []
    for token in request["tokens"]:
        place = (integer * 1)(token)
        if status := decode(context, one(ctypes.addressof(place), 1)):
            sys.exit(" ".join(said[:2]) or f"llama.cpp cannot run it: status {status}")
        rows.append(np.ctypeslib.as_array(logits_of(context, -1), (n,)).copy())
    tokenize = function(
        "llama_tokenize", integer, pointer, ctypes.c_char_p, integer, pointer, integer, *2 * [ctypes.c_bool]
    )
    texts = []
    for text in request["texts"]:
        data = text.encode()
        room = (integer * (len(data) + 16))()
        count = tokenize(vocabulary, data, len(data), ctypes.addressof(room), len(room), True, True)
        texts.append(list(room[: max(count, 0)]))
    return np.stack(rows), texts


def main() -> None:
    logits, texts = answer(json.loads(sys.stdin.buffer.read()))
    sys.stdout.buffer.write(json.dumps({"shape": logits.shape, "texts": texts}).encode() + b"\n")
    sys.stdout.buffer.write(np.ascontiguousarray(logits, np.float32).tobytes())


if __name__ == "__main__":
    main()
