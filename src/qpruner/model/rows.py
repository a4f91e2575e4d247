"""Texts that stand alone, one sequence each: instructions with answers, stories, documents that are judged by row.

Sequences are filled up at the end. With causal attention nothing that is predicted sees what comes behind it, so a
model needs no attention mask for them.
"""

import random
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import BoolTensor, LongTensor
from transformers import PreTrainedTokenizerBase

from qpruner.errors import CorpusError
from qpruner.model.corpus import Corpus, tokens_of


@dataclass(frozen=True, eq=False)
class Rows:
    """Sequences of different lengths, filled up to one.

    ids: (rows, length). predicted: (rows, length), tokens that count: not the first of a row, nor its prompt, nor what
        it is filled up with.
    covered_bytes: per row, UTF-8 bytes of the text that its predicted tokens stand for.
    cut: rows that were longer than the model's context and lost their end.
    first_token: `bos` where that token was put in front; `text` where it is part of the text, and not predicted.
    """

    ids: LongTensor
    predicted: BoolTensor
    covered_bytes: tuple[int, ...]
    corpus_name: str
    corpus_digest: str
    cut: int = 0
    seed: int | None = None
    first_token: Literal["bos", "text"] = "bos"

    def first(self, n: int) -> "Rows":
        """At most n of them, from the start."""
        return replace(self, ids=self.ids[:n], predicted=self.predicted[:n], covered_bytes=self.covered_bytes[:n])

    @property
    def n_tokens_predicted(self) -> int:
        return int(self.predicted.sum())


def rows_of(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    n_rows: int | None = None,
    seed: int | None = None,
    mask_prompts: bool = True,
) -> Rows:
    """Every document by itself: `<s>` where the tokenizer has one, the text, its end of sequence; cut at `length`.

    Without a `<s>` the first token of a document is not predicted. Rows in which nothing would be are left out.

    Args:
        n_rows: at most so many. seed: None for the first in order; a number for a choice from all over the text.
        mask_prompts: what the corpus says was given is not predicted.
    Raises:
        CorpusError: no row has a token to predict.
    """
    order = list(range(len(corpus.documents)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id if corpus.closing else None
    sequences: list[list[int]] = []
    predictions: list[list[bool]] = []
    covered, n_cut = [], 0
    for number in order:
        if n_rows is not None and len(sequences) == n_rows:
            break
        text = corpus.documents[number]
        prompt_chars = corpus.prompts[number] if corpus.prompts and mask_prompts else 0
        prompt_bytes = len(text[:prompt_chars].encode("utf-8", "surrogatepass"))
        tokens = tokens_of(text, tokenizer)
        ids, ends = tokens.ids.tolist(), [0, *tokens.ends.tolist()]
        # A token belongs to the prompt if it ends inside it: one that reaches beyond has something of the answer.
        counts = [stop > prompt_bytes for stop in ends[1:]]
        sizes = [stop - start for start, stop in zip(ends, ends[1:], strict=False)]
        if end is not None:
            ids, counts, sizes = [*ids, end], [*counts, True], [*sizes, 0]
        if begin is not None:
            ids, counts, sizes = [begin, *ids], [False, *counts], [0, *sizes]
        n_cut += len(ids) > length
        ids, counts, sizes = ids[:length], [False, *counts[1:length]], sizes[:length]
        if not any(counts):
            continue
        sequences.append(ids)
        predictions.append(counts)
        covered.append(sum(size for size, counted in zip(sizes, counts, strict=True) if counted))
    if not sequences:
        raise CorpusError(
            f"{corpus.name!r} ({corpus.role}) has no row of two tokens, of which one is no prompt. Give other rows."
        )
    longest = max(map(len, sequences))
    filling = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end or 0
    filled = lambda rows, value: torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
    return Rows(
        ids=filled(sequences, filling),
        predicted=filled(predictions, False),
        covered_bytes=tuple(covered),
        corpus_name=corpus.name,
        corpus_digest=corpus.digest,
        cut=n_cut,
        seed=seed,
        first_token="text" if begin is None else "bos",
    )
