"""Texts: reading them, keeping their purposes apart, and cutting them into windows of tokens.

A corpus has one role for its whole life. Calibration text shapes the model, search text chooses among candidates,
evaluation text only judges; `overlap.check_disjoint` refuses a text that would serve two of them.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import LongTensor
from transformers import PreTrainedTokenizerBase

from qpruner.errors import CorpusError
from qpruner.model import pystdlib
from qpruner.model.ngrams import NGrams, ngrams_of
from qpruner.model.texts import read_documents

Role = Literal["calibration", "search", "evaluation"]
SHARES: dict[Role, float] = {"calibration": 0.8, "search": 0.1, "evaluation": 0.1}
FEWEST_DOCUMENTS = 20  # with fewer, a split cuts inside documents
STRETCH = 1 << 16  # characters of a long document that a seeded choice takes at a time
MARGIN = 1 << 10  # characters at the end of a prefix whose tokens are not trusted
POOL = 4  # a seeded choice is made among this many times the windows asked for, where the text has them


@dataclass(frozen=True)
class Corpus:
    """Documents with one purpose.

    closing: whether the tokenizer's end-of-sequence token follows every document.
    prompts: of every document, characters at its start that were given (an instruction); empty where none were.
    """

    name: str
    role: Role
    documents: tuple[str, ...]
    closing: bool = True
    prompts: tuple[int, ...] = ()

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(hashlib.sha256(_utf8(document)).digest())
        return digest.hexdigest()

    @property
    def size_bytes(self) -> int:
        return sum(len(_utf8(document)) for document in self.documents)

    @cached_property
    def ngrams(self) -> NGrams:
        return ngrams_of(self.documents)


def read_corpus(path: str | Path, role: Role, *, blank: bool = False) -> Corpus:
    """The documents of a `.txt`, `.jsonl`, `.jsonl.gz` or `.parquet` file; see `texts.read_documents`.

    Rows are separate documents and get an end-of-sequence token each; a plain text is one running text without.
    Blank rows are left out unless they are asked for.
    """
    path = Path(path).expanduser()
    documents = read_documents(path, blank=blank)
    prompts = tuple(document.prompt for document in documents)
    return Corpus(
        path.name, role, tuple(document.text for document in documents),
        closing=not path.name.lower().endswith(".txt"), prompts=prompts if any(prompts) else (),
    )  # fmt: skip


def bundled_corpus(role: Role) -> Corpus:
    """Modules of the running Python's standard library; for evaluation, those the bundled model never saw.

    A module whose text also serves a stricter role is left out: evaluation first, then search, then calibration.
    """
    return _bundled(role, pystdlib.stdlib_root())


@cache  # a study reads it for every cell
def _bundled(role: Role, root: Path) -> Corpus:
    heldout = pystdlib.heldout_modules(pystdlib.bundled_folder())
    taken: set[str] = set()
    for corpus in ("evaluation", "search", "calibration"):
        texts = [pystdlib.read(root, module) for module in pystdlib.corpus_modules(root, heldout, corpus)]
        documents = tuple(text for text in texts if text.strip() and essence(text) not in taken)
        if corpus == role:
            break
        taken.update(map(essence, texts))
    if not documents:
        raise CorpusError(
            f"this Python has no library sources under {root}, from which the bundled texts are read. "
            "Give a text of your own, or use a Python that carries its sources."
        )
    return Corpus(f"Python standard library, {role}", role, documents)


# --- keeping purposes apart ------------------------------------------------------------------------------------------


def split_corpus(corpus: Corpus) -> dict[Role, Corpus]:
    """Three disjoint corpora from one: 80 % of the bytes for calibration, 10 % each for search and evaluation.

    Whole documents, dealt out in order to whichever corpus is furthest below its share; a document that occurs twice
    counts once. With fewer than 20 documents, three contiguous stretches cut at line ends. No chance is involved.

    Raises:
        CorpusError: the text is too short to be cut in three.
    """
    documents = list({essence(document): document for document in corpus.documents}.values())
    parts = _dealt(documents) if len(documents) >= FEWEST_DOCUMENTS else _stretches(documents)
    if not all(parts.values()):
        raise CorpusError(
            f"{corpus.name} is too short to serve as calibration, search and evaluation text: {corpus.size_bytes:,} "
            "bytes without enough lines or words to cut in three. Give a longer text."
        )
    prompts = dict(zip(corpus.documents, corpus.prompts, strict=False))
    return {
        role: Corpus(
            f"{corpus.name}, {role} part", role, tuple(part), corpus.closing,
            prompts=tuple(prompts.get(document, 0) for document in part) if prompts else (),
        )
        for role, part in parts.items()
    }  # fmt: skip


def _dealt(documents: list[str]) -> dict[Role, list[str]]:
    parts: dict[Role, list[str]] = {role: [] for role in SHARES}
    lack = dict.fromkeys(SHARES, 0.0)  # bytes below the share, of all that was dealt so far
    for document in documents:
        size = len(_utf8(document))
        for role, share in SHARES.items():
            lack[role] += share * size
        poorest = max(lack, key=lack.__getitem__)
        lack[poorest] -= size
        parts[poorest].append(document)
    return parts


def _stretches(documents: list[str]) -> dict[Role, list[str]]:
    pieces = [(number, piece) for number, document in enumerate(documents) for piece in _pieces(document)]
    total = sum(len(piece) for _, piece in pieces)
    parts: dict[Role, list[str]] = {role: [] for role in SHARES}
    here, last = 0, None
    for number, piece in pieces:
        place = here / total
        role: Role = "calibration" if place < 0.8 else "search" if place < 0.9 else "evaluation"
        if (number, role) == last:
            parts[role][-1] += piece
        else:
            parts[role].append(piece)
        here, last = here + len(piece), (number, role)
    return parts


def _pieces(document: str) -> list[str]:
    """The lines of a document; its words, where it has next to no lines."""
    lines = document.splitlines(keepends=True)
    return lines if len(lines) >= 20 else re.findall(r"\S+\s*|^\s+", document)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def essence(document: str) -> str:
    """What two documents have in common that differ by blanks around them."""
    return hashlib.sha256(_utf8(document.strip())).hexdigest()


# --- windows of tokens -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Windows:
    """Sequences of one length, in each of which every token but the first is predicted.

    ids: (windows, length).
    first_token: `bos` where that token was put in front; `text` where it is part of the text, and not predicted.
    covered_bytes: per window, UTF-8 bytes of the text that its predicted tokens stand for.
    """

    ids: LongTensor
    first_token: Literal["bos", "text"]
    covered_bytes: tuple[int, ...]
    corpus_name: str
    corpus_digest: str
    seed: int | None = None

    def first(self, n: int) -> "Windows":
        """At most n of them, from the start."""
        return replace(self, ids=self.ids[:n], covered_bytes=self.covered_bytes[:n])

    @property
    def n_tokens_predicted(self) -> int:
        return self.ids.shape[0] * (self.ids.shape[1] - 1)


class Tokens(NamedTuple):
    ids: np.ndarray  # int64
    ends: np.ndarray  # int64: bytes of the text up to the end of each token; never decreasing


def token_windows(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    n_windows: int | None = None,
    fewest: int | None = None,
    seed: int | None = None,
    bos: bool = True,
) -> Windows:
    """Tokenise the documents without special tokens, join them, and cut windows that do not overlap.

    Every window is `length` tokens long: `<s>` and `length - 1` tokens of text where the tokenizer has a `<s>` and
    `bos` is true, else text alone. What is left over at the end is dropped. Only as much of a
    large corpus is tokenised as is needed.

    Args:
        n_windows: None for as many as the text gives.
        fewest: a shorter text will do if it gives this many; n_windows, or one, if not given.
        seed: None for the first windows in order; a number for a choice from all over the text, the same every time.
    Raises:
        CorpusError: the text has too few tokens.
    """
    if length < 2:
        raise ValueError(f"length={length}: a window needs at least 2 tokens")
    begin = tokenizer.bos_token_id if bos else None
    step = length - 1 if begin is not None else length
    wanted = max(1, n_windows or 1)
    pool = None if n_windows is None else wanted if seed is None else POOL * wanted
    ids, sizes = _joined(corpus, tokenizer, None if pool is None else pool * step, seed)
    found = len(ids) // step
    least = wanted if fewest is None else min(fewest, wanted)
    if found < least:
        raise CorpusError(
            f"{corpus.name!r} ({corpus.role}) is too short: {len(ids):,} tokens found, {least * step:,} needed "
            f"({least} window(s) of {step}). Give a longer text, or ask for fewer or shorter windows."
        )
    chosen = list(range(found)) if seed is None else random.Random(seed).sample(range(found), found)
    chosen = chosen if n_windows is None else chosen[:n_windows]
    rows = np.lib.stride_tricks.sliding_window_view(ids, step)[::step][chosen]
    bytes_per_token = np.lib.stride_tricks.sliding_window_view(sizes, step)[::step][chosen]
    if begin is not None:
        rows = np.concatenate([np.full((len(rows), 1), begin), rows], axis=1)
    else:
        bytes_per_token = bytes_per_token[:, 1:]
    return Windows(
        ids=torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int64)),
        first_token="text" if begin is None else "bos",
        covered_bytes=tuple(bytes_per_token.sum(axis=1).tolist()),
        corpus_name=corpus.name,
        corpus_digest=corpus.digest,
        seed=seed,
    )


def _joined(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, needed: int | None, seed: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of the documents one after the other, and the bytes each stands for, until there are enough.

    With a seed: of stretches of the documents, in seeded order.
    """
    parts = [(document, True) for document in corpus.documents]
    if seed is not None:
        parts = [part for document in corpus.documents for part in _cut(document)]
        random.Random(seed).shuffle(parts)
    end = tokenizer.eos_token_id if corpus.closing else None
    all_ids, all_sizes, count = [], [], 0
    for text, closed in parts:
        tokens, whole = first_tokens(text, tokenizer, None if needed is None else needed - count)
        all_ids.append(tokens.ids)
        all_sizes.append(np.diff(tokens.ends, prepend=0))
        count += len(tokens.ids)
        if whole and closed and end is not None:
            all_ids.append(np.array([end]))
            all_sizes.append(np.array([0]))
            count += 1
        if needed is not None and count >= needed:
            break
    return np.concatenate(all_ids), np.concatenate(all_sizes)


def _cut(document: str) -> Iterator[tuple[str, bool]]:
    """Stretches of about STRETCH characters that end at a line's end; True with the last of a document."""
    start = 0
    while len(document) - start > 2 * STRETCH:
        stop = document.rfind("\n", start, start + STRETCH) + 1 or start + STRETCH
        yield document[start:stop], False
        start = stop
    yield document[start:], True


def first_tokens(text: str, tokenizer: PreTrainedTokenizerBase, enough: int | None) -> tuple[Tokens, bool]:
    """At least `enough` tokens from the start of the text, or all; and whether these are all.

    Only a prefix of a long text is tokenised. Its last tokens may differ from those of the whole text, so as much as
    MARGIN characters give are thrown away.
    """
    limit = len(text) if enough is None else MARGIN + 8 * enough
    while limit < len(text):
        tokens = tokens_of(text[:limit], tokenizer)
        usable = np.searchsorted(tokens.ends, len(_utf8(text[: limit - MARGIN])), side="right")
        if usable >= enough:
            return Tokens(tokens.ids[:usable], tokens.ends[:usable]), False
        limit *= 2
    return tokens_of(text, tokenizer), True


def tokens_of(text: str, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    # `verbose=False` keeps the tokenizer from warning that the text is longer than the model's context.
    offsets = tokenizer.is_fast
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=offsets, return_attention_mask=False, verbose=False
    )
    ids = np.array(encoded["input_ids"], dtype=np.int64)
    size = len(_utf8(text))
    if not len(ids):
        return Tokens(ids, np.zeros(0, np.int64))
    if offsets:
        stops = np.array(encoded["offset_mapping"], dtype=np.int64)[:, 1]
        ends = np.maximum.accumulate(_byte_positions(text)[stops])
    else:  # a tokenizer that does not say where its tokens come from: spread the bytes evenly
        ends = np.arange(1, len(ids) + 1, dtype=np.int64) * size // len(ids)
    ends[-1] = size  # what a normaliser drops at the end is still text that was covered
    return Tokens(ids, ends)


def _byte_positions(text: str) -> np.ndarray:
    """For every character position, the UTF-8 bytes before it."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    widths = 1 + (points > 0x7F) + (points > 0x7FF).astype(np.int64) + (points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(widths)])
