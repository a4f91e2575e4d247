"""Runs of words as numbers: what two texts have in common, in linear time and bounded memory.

Words are runs of letters and digits, lower-cased; in scripts that write no spaces between words every character is one.
Thirteen words in a row are what GPT-3's authors looked for in their training text (arXiv:2005.14165, appendix C); as
there, a run that occurs in ten documents or more is a template or a licence, and says nothing.

A run becomes 64 bits. Of a long text only runs with small numbers are kept: a choice that falls on the same runs in
every text, so that shares of what is kept are shares of the whole.
"""

import base64
import binascii
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

WORDS = 13  # in a run
COMMON = 10  # documents that have a run from which on it is a template
MOST = 1 << 21  # runs that are kept of one text
PIECE = 1 << 17  # characters that are looked at together: few enough for a processor's cache
WAITING = 1 << 20  # runs that may wait to be sorted among the others
SKETCH = 1 << 10  # runs that a sketch keeps

LETTER, ALONE = 1, 2  # part of a word, a word by itself
UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF),  # Thai and Lao, Burmese, Khmer
    (0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF),
)  # fmt: skip
LAST_LETTER = 0x323AF


@dataclass(frozen=True, eq=False)
class NGrams:
    """The runs of words in some documents.

    hashes: ascending, each once. documents: that have the run, for each. shift: only runs with so many leading zero
    bits are kept.
    """

    hashes: np.ndarray  # (n,) uint64
    documents: np.ndarray  # (n,) int64
    shift: int

    @property
    def total(self) -> int:
        """Different runs in the text, about."""
        return len(self.hashes) << self.shift

    def below(self, shift: int) -> "NGrams":
        """Those with so many leading zero bits."""
        if shift <= self.shift:
            return self
        n = int(np.searchsorted(self.hashes, np.uint64(1 << (64 - shift))))
        return NGrams(self.hashes[:n], self.documents[:n], shift)

    def sketch(self) -> "Sketch":
        return Sketch(self.hashes[self.documents < COMMON][:SKETCH], self.total)


class Shared(NamedTuple):
    """hashes: of runs that both texts have. share: of the runs of the text that has fewer."""

    hashes: np.ndarray
    share: float


@dataclass(frozen=True, eq=False)
class Sketch:
    """The runs with the smallest numbers of a text, enough to recognise it by. total: different runs in it, about.

    Source: bottom-k sketches, doi:10.1145/1281100.1281133.
    """

    hashes: np.ndarray  # (at most SKETCH,) uint64, ascending
    total: int

    def to_json(self) -> dict:
        smallest = base64.b64encode(self.hashes.astype("<u8").tobytes()).decode()
        return {"words": WORDS, "total": self.total, "smallest": smallest}

    @classmethod
    def from_json(cls, content: Mapping) -> "Sketch | None":
        """None for what was made in another way than here, or is damaged."""
        try:
            if content["words"] != WORDS:
                return None
            stored = base64.b64decode(content["smallest"], validate=True)
            return cls(np.frombuffer(stored, "<u8").astype(np.uint64), int(content["total"]))
        except (KeyError, TypeError, ValueError, binascii.Error):
            return None

    def shared_with(self, text: NGrams) -> Shared:
        """By as much of both as lies below where either ends."""
        ours, theirs = self.hashes, text.hashes[text.documents < COMMON]
        if len(ours) == SKETCH:  # else it has all runs of its text
            theirs = theirs[: np.searchsorted(theirs, ours[-1], side="right")]
        if text.shift:
            ours = ours[: np.searchsorted(ours, np.uint64(1 << (64 - text.shift)))]
        both = np.intersect1d(ours, theirs, assume_unique=True)
        return Shared(both, len(both) / max(1, min(len(ours), len(theirs))))


def shared(a: NGrams, b: NGrams) -> Shared:
    """The runs that two texts have in common, templates left out."""
    shift = max(a.shift, b.shift)
    a, b = a.below(shift), b.below(shift)
    both, in_a, in_b = np.intersect1d(a.hashes, b.hashes, assume_unique=True, return_indices=True)
    common = (a.documents[in_a] >= COMMON) | (b.documents[in_b] >= COMMON)
    # what is a template in one text is none of the other's own words either
    own = [
        int((text.documents < COMMON).sum() - (text.documents[here][common] < COMMON).sum())
        for text, here in ((a, in_a), (b, in_b))
    ]
    return Shared(both[~common], int((~common).sum()) / max(1, min(own)))


def ngrams_of(documents: Iterable[str]) -> NGrams:
    """Of documents that each count once. Runs do not reach from one into the next."""
    kept = _Kept()
    for batch in _batches(dict.fromkeys(documents)):
        kept.add(_of_one(batch[0]) if len(batch) == 1 else _of_many(batch))
    return kept.all()


def example(documents: Iterable[str], wanted: np.ndarray) -> str:
    """The first stretch of text whose runs are all among `wanted`, in lower case; empty where there is none."""
    for document in documents:
        for text in _pieces(document):
            text = _plain(text)
            words = _words(text)
            found = np.isin(_runs(words.hashes), wanted)
            if not found.any():
                continue
            first = int(found.argmax())
            n = int((~found[first:]).argmax()) or len(found) - first
            return " ".join(text[words.starts[first] : words.ends[first + n - 1 + WORDS - 1]].split())
    return ""


class _Kept:
    """Runs gathered so far; sorted together only when as many again are waiting, so that the work stays linear."""

    def __init__(self) -> None:
        self._waiting: list[NGrams] = []
        self._shift = 0

    def add(self, found: NGrams) -> None:
        self._shift = max(self._shift, found.shift)
        self._waiting.append(found.below(self._shift))
        if sum(len(part.hashes) for part in self._waiting[1:]) > max(WAITING, len(self._waiting[0].hashes)):
            self.all()

    def all(self) -> NGrams:
        hashes = np.concatenate([np.zeros(0, np.uint64), *(part.hashes for part in self._waiting)])
        documents = np.concatenate([np.zeros(0, np.int64), *(part.documents for part in self._waiting)])
        order = np.argsort(hashes)
        found = NGrams(*_counted(hashes[order], documents[order]), shift=0).below(self._shift)
        while len(found.hashes) > MOST:
            found = found.below(found.shift + 1)
        self._shift, self._waiting = found.shift, [found]
        return found


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Short documents together; a long one, and it may be all of the text, alone."""
    batch, size = [], 0
    for document in documents:
        if size and size + len(document) > PIECE:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document) + 1
    if batch:
        yield batch


def _of_one(document: str) -> NGrams:
    kept, before = _Kept(), np.zeros(0, np.uint64)
    for text in _pieces(document):
        hashes = np.concatenate([before, _words(_plain(text)).hashes])
        runs = np.unique(_runs(hashes))
        kept.add(NGrams(runs, np.ones(len(runs), np.int64), 0))
        before = hashes[1 - WORDS :]
    found = kept.all()
    return NGrams(found.hashes, np.ones(len(found.hashes), np.int64), found.shift)


def _of_many(documents: list[str]) -> NGrams:
    words = _words(_plain("\0".join(documents)))
    runs, last = _runs(words.hashes), words.documents[WORDS - 1 :]
    inside = words.documents[: len(last)] == last
    runs, last = runs[inside], last[inside]
    order = np.argsort(runs, kind="stable")  # documents of one run stay in order
    runs, last = runs[order], last[order]
    once = np.ones(len(runs), bool)
    once[1:] = (runs[1:] != runs[:-1]) | (last[1:] != last[:-1])
    return NGrams(*_counted(runs[once], np.ones(int(once.sum()), np.int64)), shift=0)


def _counted(hashes: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Equal neighbours become one, with the sum of their documents."""
    if not len(hashes):
        return hashes, documents
    starts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))
    return hashes[starts], np.add.reduceat(documents, starts)


def _pieces(document: str) -> Iterator[str]:
    """Cut at blanks, where there are any."""
    start = 0
    while len(document) - start > PIECE:
        stop = start + PIECE
        blank = max(document.rfind(" ", start, stop), document.rfind("\n", start, stop)) + 1
        yield document[start : blank or stop]
        start = blank or stop
    yield document[start:]


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


class _Words(NamedTuple):
    hashes: np.ndarray  # uint64
    starts: np.ndarray
    ends: np.ndarray
    documents: np.ndarray  # number of NUL characters before the word


def _words(text: str) -> _Words:
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _kinds()[np.minimum(points, LAST_LETTER + 1)]
    before = np.concatenate([np.zeros(1, np.uint8), kinds[:-1]])
    first = (kinds == ALONE) | ((kinds == LETTER) & (before != LETTER))
    starts = np.flatnonzero(first)
    if not len(starts):
        none = np.zeros(0, np.int64)
        return _Words(np.zeros(0, np.uint64), none, none, none)
    letters = np.flatnonzero(kinds)
    word = (np.cumsum(first) - 1)[letters]
    place = letters - starts[word]
    powers = np.cumprod(np.full(int(place.max()) + 1, 0x9E3779B97F4A7C15, np.uint64))
    firsts = np.searchsorted(word, np.arange(len(starts)))
    hashes = np.add.reduceat(_mixed(points[letters].astype(np.uint64)) * powers[place], firsts)
    ends = starts + np.diff(np.append(firsts, len(letters)))
    return _Words(_mixed(hashes), starts, ends, np.cumsum(points == 0)[starts])


def _runs(words: np.ndarray) -> np.ndarray:
    """The number of every WORDS words in a row, in order; (words - WORDS + 1,)."""
    n = max(0, len(words) - WORDS + 1)
    found = np.zeros(n, np.uint64)
    for k, factor in enumerate(_mixed(np.arange(1, WORDS + 1, dtype=np.uint64)) | np.uint64(1)):
        found += words[k : k + n] * factor
    return _mixed(found)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit of x: the last steps of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@cache
def _kinds() -> np.ndarray:
    """Of every character up to LAST_LETTER, and of all after it: LETTER, ALONE, or neither."""
    kinds = np.zeros(LAST_LETTER + 2, np.uint8)
    kinds[:-1] = [unicodedata.category(chr(i))[0] in "LMN" for i in range(LAST_LETTER + 1)]
    for low, high in UNSPACED:
        kinds[low : high + 1][kinds[low : high + 1] > 0] = ALONE
    return kinds
