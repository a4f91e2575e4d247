"""Named protocols: how a text is cut for a number that others can compare with theirs.

| protocol | text is | windows | first token |
|---|---|---|---|
| `windows` | tokenised by document, an end of sequence after each row of a file | 512 | `<s>` in front |
| `wikitext2-2048` | rows joined by blank lines, tokenised once | 2048 | the tokenizer's own, once in front of all |
| `llm-pruner-128` | the same | 128 | the same |
| `rows` | every document by itself, cut at the window | the context | `<s>` in front |

No window is longer than the model's context; the name then says what it was (`wikitext2-512`). In the second and third
the first token of a window is text, and not predicted; what does not fill a window at the end is dropped. With a stride
below the window, windows overlap, each predicts only what is new in it, and the last is what is left (as the
documentation of transformers does it).

Source: GPTQ (datautils.py, `"\\n\\n".join`), which AWQ, OmniQuant and SparseGPT follow; LLM-Pruner (ppl_dataset.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from qpruner.errors import CorpusError, listed
from qpruner.judge.sequences import Protocol, Sequences, digest_of
from qpruner.judge.wikitext import articles, by_article, detokenised, rows_of_text
from qpruner.model.corpus import Corpus, first_tokens, tokens_of
from qpruner.model.rows import Rows, rows_of

FEWEST_DOCUMENTS = 10  # with fewer, standard errors draw windows


class Rule(NamedTuple):
    """window: tokens, None for the model's context. joined: how documents become one text."""

    window: int | None
    joined: Literal["closing", "blank lines", "alone"]

    def named(self, name: str, window: int) -> str:
        """The protocol's name with the window that was used."""
        return f"{name}, in order" if self.joined != "blank lines" else f"{name.rpartition('-')[0]}-{window}"


PROTOCOLS = {
    "windows": Rule(512, "closing"),
    "wikitext2-2048": Rule(2048, "blank lines"),
    "llm-pruner-128": Rule(128, "blank lines"),
    "rows": Rule(None, "alone"),
}


@dataclass(frozen=True)
class Cut:
    """What a protocol may be given besides its name.

    window, stride: tokens; the protocol's own by default, at most the model's context. A stride counts tokens of text.
    n_windows, n_tokens: at most so many windows (rows), or predicted tokens, from the start; whole windows always.
    detokenised: undo WikiText's tokeniser first. Bits per byte are then still over the bytes of the text as it was.
    """

    protocol: str = "windows"
    window: int | None = None
    stride: int | None = None
    n_windows: int | None = None
    n_tokens: int | None = None
    detokenised: bool = False

    def __post_init__(self):
        if self.protocol not in PROTOCOLS:
            raise CorpusError(f"no protocol {self.protocol!r}. Accepted: {listed(PROTOCOLS, len(PROTOCOLS))}.")
        if self.stride is not None and self.protocol == "rows":
            raise CorpusError("protocol 'rows' has no stride: every row stands alone. Leave it out.")

    @property
    def rule(self) -> Rule:
        return PROTOCOLS[self.protocol]

    @property
    def keeps_blank_rows(self) -> bool:
        """Whether blank rows of a file are part of the text."""
        return self.rule.joined == "blank lines"


class Document(NamedTuple):
    text: str  # as it is tokenised, what joins it to the next included
    bytes_per_byte: float  # of the text as it was, for one of `text`


class Flow(NamedTuple):
    """Tokens one after the other, with the bytes that each stands for and the number of its document."""

    ids: np.ndarray
    sizes: np.ndarray
    documents: np.ndarray


def sequences(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, cut: Cut, *, context: int | None) -> Sequences:
    """The text as a protocol cuts it.

    Args:
        context: tokens that the model can see at once, where it has such a bound; longer windows are cut to it.
    Raises:
        CorpusError: the text is too short, or a stride or limit leaves nothing.
    """
    rule = cut.rule
    window = cut.window or rule.window or context or 512
    window = min(window, context or window)
    if rule.joined == "alone":
        return _rows(corpus, tokenizer, cut, window)
    bos = rule.joined == "closing" and tokenizer.bos_token_id is not None
    body = window - bos
    stride = body if cut.stride is None else cut.stride
    if not 1 <= stride <= body:
        raise CorpusError(f"stride {stride} is not between 1 and the {body} tokens of text in a window of {window}.")
    documents = _documents(corpus, cut)
    needed = _needed(cut, body, stride)
    if rule.joined == "closing" and corpus.closing:
        flow = _closed(documents, tokenizer, needed)
    else:
        flow = _once(documents, tokenizer, needed, special=not bos and rule.joined == "blank lines")
    first = "bos" if bos else "text"
    if rule.joined == "blank lines" and any(_framing(tokenizer)):
        first = "once"
    joined = {
        "blank lines": "rows joined by blank lines",
        "closing": "an end of sequence after each document" if corpus.closing else "one running text",
    }[rule.joined]
    found = _windows(flow, body, stride, cut, corpus, front=tokenizer.bos_token_id if bos else None)
    ids, predicted, owners, sizes = found
    protocol = Protocol(
        name=rule.named(cut.protocol, window), window=window, stride=stride, first_token=first, n_windows=len(ids),
        text=corpus.name, windows_digest=digest_of(ids), joined=joined, detokenised=cut.detokenised,
        n_documents=len(owners[predicted].unique()),
    )  # fmt: skip
    return _clustered(ids, predicted, owners, sizes, corpus, protocol)


# --- documents -------------------------------------------------------------------------------------------------------


def _documents(corpus: Corpus, cut: Cut) -> list[Document]:
    """Rows of a file are documents, or the articles that they make up; so are articles of a running text."""
    running, blank_lines = not corpus.closing, cut.rule.joined == "blank lines"
    if running:
        groups = [[article] for text in corpus.documents for article in articles(text)]
    elif blank_lines:
        groups = by_article(list(corpus.documents))
    else:
        groups = [[document] for document in corpus.documents]

    def joined(group: list[str], undo: Callable[[str], str]) -> str:
        undone = [undo(text) for text in group]
        if not blank_lines:
            return "".join(undone)
        rows = [row for text in undone for row in (rows_of_text(text) if running else [text])]
        return "\n\n".join(rows) + "\n\n"

    plain = [joined(group, str) for group in groups]
    texts = [joined(group, detokenised) for group in groups] if cut.detokenised else plain
    if blank_lines:  # nothing is joined to the last
        plain, texts = ([*each[:-1], each[-1].removesuffix("\n\n")] for each in (plain, texts))
    return [Document(text, _size(was) / max(1, _size(text))) for text, was in zip(texts, plain, strict=True)]


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _needed(cut: Cut, body: int, stride: int) -> int | None:
    """Tokens of text that surely give what was asked for; None for all."""
    bounds = []
    if cut.n_windows is not None:
        bounds.append(cut.n_windows * stride + body)
    if cut.n_tokens is not None:
        bounds.append(cut.n_tokens * stride // max(1, stride - 1) + 2 * body)
    return min(bounds, default=None)


def _closed(documents: list[Document], tokenizer: PreTrainedTokenizerBase, needed: int | None) -> Flow:
    """Each document tokenised by itself, and an end of sequence behind it."""
    parts, count = [], 0
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for number, document in enumerate(documents):
        tokens, whole = first_tokens(document.text, tokenizer, None if needed is None else needed - count)
        closing = end if whole else []
        sizes = np.diff(tokens.ends, prepend=0) * document.bytes_per_byte
        ids = np.concatenate([tokens.ids, np.array(closing, dtype=np.int64)])
        parts.append(Flow(ids, np.concatenate([sizes, np.zeros(len(closing))]), np.full(len(ids), number)))
        count += len(ids)
        if needed is not None and count >= needed:
            break
    return Flow(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _once(documents: list[Document], tokenizer: PreTrainedTokenizerBase, needed: int | None, *, special: bool) -> Flow:
    """All of it tokenised as one text; a token that reaches over an edge is of the document in which it ends."""
    tokens, whole = first_tokens("".join(document.text for document in documents), tokenizer, needed)
    edges = np.cumsum([_size(document.text) for document in documents])
    numbers = np.minimum(np.searchsorted(edges, tokens.ends, side="left"), len(documents) - 1)
    rates = np.array([document.bytes_per_byte for document in documents])
    sizes = np.diff(tokens.ends, prepend=0) * rates[numbers]
    before, after = _framing(tokenizer) if special else ((), ())
    after = after if whole else ()
    places = np.concatenate([np.zeros(len(before), np.int64), numbers, np.full(len(after), len(documents) - 1)])
    return Flow(
        np.concatenate([np.array(before, np.int64), tokens.ids, np.array(after, np.int64)]),
        np.concatenate([np.zeros(len(before)), sizes, np.zeros(len(after))]),
        places,
    )


def _framing(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Special tokens that the tokenizer itself puts in front of a text and behind it."""
    plain, framed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return tuple(framed[:start]), tuple(framed[start + len(plain) :])
    return (), ()


# --- windows ---------------------------------------------------------------------------------------------------------


def _windows(flow: Flow, body: int, stride: int, cut: Cut, corpus: Corpus, *, front: int | None):
    """Token ids, what is predicted, the document and the bytes of every token: four tensors of (windows, length)."""
    total = len(flow.ids)
    if stride == body:
        starts = np.arange(total // body) * body
    else:  # up to the first window that reaches the end
        starts = np.arange(0, max(0, total - body) + stride, stride) if total > 1 else np.array([], int)
    places = starts[:, None] + np.arange(body)
    there = places < total
    new = places >= np.concatenate([[0], starts[:-1] + body])[:, None] if len(starts) else there
    predicted = there & new
    if front is None:
        predicted[:, 0] = False
    counts = predicted.sum(1).cumsum()
    n = len(starts) if cut.n_windows is None else min(cut.n_windows, len(starts))
    if cut.n_tokens is not None:
        n = min(n, int((counts <= cut.n_tokens).sum()))
    if n == 0 or counts[n - 1] == 0:
        raise CorpusError(
            f"{corpus.name!r} ({corpus.role}) gives no window of {body} tokens of text: {total:,} tokens found"
            + ("" if cut.n_tokens is None else f", {cut.n_tokens:,} may be predicted")
            + ". Give a longer text, or ask for shorter windows."
        )
    places, predicted = np.minimum(places[:n], total - 1), predicted[:n]
    found = [flow.ids[places], predicted, flow.documents[places], flow.sizes[places]]
    if front is not None:
        found = [
            np.concatenate([np.full((n, 1), value, each.dtype), each], axis=1)
            for value, each in zip((front, False, 0, 0.0), found, strict=True)
        ]
    return tuple(torch.from_numpy(np.ascontiguousarray(each)) for each in found)


def _clustered(ids, predicted, owners, sizes, corpus: Corpus, protocol: Protocol) -> Sequences:
    """With documents as clusters where there are enough, and windows otherwise."""
    by_document = protocol.n_documents >= FEWEST_DOCUMENTS
    if by_document:
        values = owners[predicted].unique()
        clusters = torch.searchsorted(values, owners.contiguous()).clamp(max=len(values) - 1)
    else:
        clusters = torch.arange(len(ids))[:, None].expand(ids.shape)
    n = protocol.n_documents if by_document else len(ids)
    covered = torch.zeros(n, dtype=torch.float64).index_add_(0, clusters[predicted], sizes[predicted].double())
    return Sequences(
        ids=ids.long(), predicted=predicted, clusters=clusters, covered_bytes=tuple(covered.tolist()),
        cluster="document" if by_document else "window", corpus_digest=corpus.digest, protocol=protocol,
    )  # fmt: skip


# --- rows ------------------------------------------------------------------------------------------------------------


def _rows(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, cut: Cut, length: int) -> Sequences:
    """Every document by itself, all of it predicted, prompts too, without an end of sequence."""
    documents = [d for d in _documents(corpus, cut) if d.text.strip()]
    if cut.detokenised:  # so that rows and documents stay side by side
        least = 2 if tokenizer.bos_token_id is None else 1
        documents = [d for d in documents if len(tokens_of(d.text, tokenizer).ids) >= least]
    texts = replace(corpus, documents=tuple(d.text for d in documents), closing=False, prompts=())
    rows = _limited(texts, tokenizer, cut, length)
    found = Sequences.of(rows)
    protocol = replace(
        found.protocol, window=length, detokenised=cut.detokenised,
        joined="prompts predicted too" if corpus.prompts else "",
    )  # fmt: skip
    covered = rows.covered_bytes
    if cut.detokenised:
        covered = tuple(b * d.bytes_per_byte for b, d in zip(covered, documents, strict=False))
    return replace(found, protocol=protocol, covered_bytes=covered, corpus_digest=corpus.digest)


def _limited(texts: Corpus, tokenizer: PreTrainedTokenizerBase, cut: Cut, length: int) -> Rows:
    """Only as many rows are tokenised as may be needed."""
    n = cut.n_windows
    if cut.n_tokens is not None:
        tried = 16
        while True:
            tried = min(4 * tried, n or 4 * tried)
            rows = rows_of(texts, tokenizer, length=length, n_rows=tried)
            counts = rows.predicted.sum(1).cumsum(0)
            if counts[-1] > cut.n_tokens or len(counts) < tried or tried == n:
                break
        n = int((counts <= cut.n_tokens).sum())
        if n == 0:
            raise CorpusError(
                f"the first row of {texts.name!r} alone has more than the {cut.n_tokens:,} tokens that may be "
                "predicted. Allow more."
            )
    return rows_of(texts, tokenizer, length=length, n_rows=n)
