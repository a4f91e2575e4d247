"""What a model is judged on: sequences of tokens, which of them count, and the protocol that says how they came about.

Windows of a running text and rows that stand alone are both of this kind, so every number is measured in one way.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import BoolTensor, LongTensor

from qpruner.model.corpus import Windows
from qpruner.model.rows import Rows

First = Literal["bos", "text", "once"]
Cluster = Literal["document", "window"]
FIRST_WORDS: dict[First, str] = {
    "bos": "<s> in front",
    "text": "first token not predicted",
    "once": "the tokenizer's own special tokens once, in front of the whole text; first token not predicted",
}


@dataclass(frozen=True)
class Protocol:
    """What has to be the same before two numbers may be compared.

    window: tokens that the model sees at once, at most. stride: tokens of text between the starts of two windows.
    first_token: what stands first in a window and is not predicted: `bos`, put there; a token of the `text`; or that,
        with special tokens `once` in front of the whole text.
    windows_digest: of the token ids, in order.
    joined: how one text was made of several; None where that is not known.
    detokenised: whether what WikiText's tokeniser did was undone first.
    n_documents: None where it is not known.
    cut: rows that were longer than a window and lost their end.
    """

    name: str
    window: int
    stride: int
    first_token: First
    n_windows: int
    text: str
    windows_digest: str
    joined: str | None = None
    detokenised: bool = False
    n_documents: int | None = None
    alone: bool = False
    cut: int = 0

    @classmethod
    def of(cls, text: "Windows | Rows | Sequences") -> "Protocol":
        return Sequences.of(text).protocol

    def __str__(self) -> str:
        if self.alone:
            cut = f", {self.cut} cut there" if self.cut else ""
            said = [f"{self.n_windows} rows, each alone, of at most {self.window} tokens{cut}"]
        elif self.name.startswith("windows"):
            said = [f"{self.n_windows} {self.name}, of {self.window} tokens, stride {self.stride}"]
        else:
            said = [f"{self.name}: {self.n_windows} windows, of {self.window} tokens, stride {self.stride}"]
        said.append(FIRST_WORDS[self.first_token])
        if not self.alone:
            body = self.window - (self.first_token == "bos")
            overlap = self.stride < body
            said.append("new tokens alone predicted where windows overlap" if overlap else "no overlap")
        if self.joined is not None:
            said += [self.joined] if self.joined else []
            said.append("detokenised" if self.detokenised else "raw text")
        if self.n_documents is not None and not self.alone:
            said.append(f"{self.n_documents} document{'' if self.n_documents == 1 else 's'}")
        return f"{self.text}: {', '.join(said)}, digest {self.windows_digest[:12]}"


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences of one length, filled up at the end where they are shorter.

    ids: (sequences, length). predicted: (sequences, length), tokens that count; never the first.
    clusters: (sequences, length), of each predicted token the number of what is drawn as one for standard errors.
    covered_bytes: per cluster, UTF-8 bytes of the text that its predicted tokens stand for.
    cluster: what these are: documents, or sequences where documents are unknown or fewer than ten.
    """

    ids: LongTensor
    predicted: BoolTensor
    clusters: LongTensor
    covered_bytes: tuple[float, ...]
    cluster: Cluster
    corpus_digest: str
    protocol: Protocol

    @classmethod
    def of(cls, text: "Windows | Rows | Sequences") -> "Sequences":
        if isinstance(text, Sequences):
            return text
        order = "in order" if text.seed is None else f"chosen with seed {text.seed}"
        alone = isinstance(text, Rows)
        predicted = text.predicted if alone else torch.ones_like(text.ids, dtype=torch.bool)
        if not alone:
            predicted[:, 0] = False
        n, length = text.ids.shape
        protocol = Protocol(
            name="rows" if alone else f"windows, {order}",
            window=length,
            stride=length - 1 if text.first_token == "bos" else length,
            first_token=text.first_token,
            n_windows=n,
            text=text.corpus_name,
            windows_digest=digest_of(text.ids),
            n_documents=n if alone else None,
            alone=alone,
            cut=text.cut if alone else 0,
        )
        rows = torch.arange(n)[:, None].expand(n, length)
        kind: Cluster = "document" if alone else "window"
        return cls(text.ids, predicted, rows, text.covered_bytes, kind, text.corpus_digest, protocol)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Predicted tokens of each cluster."""
        return tuple(torch.bincount(self.clusters[self.predicted], minlength=len(self.covered_bytes)).tolist())

    @property
    def n_tokens_predicted(self) -> int:
        return int(self.predicted.sum())

    @property
    def standard_error_by(self) -> str:
        kind = "row" if self.protocol.alone else self.cluster
        return f"bootstrap of {len(self.covered_bytes)} {kind}{'' if len(self.covered_bytes) == 1 else 's'}"


Text = Windows | Rows | Sequences


def digest_of(ids: LongTensor) -> str:
    return hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()
