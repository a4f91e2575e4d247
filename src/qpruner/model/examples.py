"""What adapters are trained on and validated with: sequences of tokens, and which of them are to be predicted."""

import hashlib
from dataclasses import dataclass

import torch
from torch import BoolTensor, LongTensor
from transformers import PreTrainedTokenizerBase

from qpruner.model.corpus import Corpus, Windows, token_windows
from qpruner.model.rows import Rows, rows_of


@dataclass(frozen=True, eq=False)
class Examples:
    """ids: (examples, length). predicted: (examples, length), never the first of an example. Final."""

    ids: LongTensor
    predicted: BoolTensor

    @classmethod
    def of(cls, text: Windows | Rows) -> "Examples":
        """Of a window every token counts but the first; of a row, those that it says."""
        if isinstance(text, Rows):
            return cls(text.ids, text.predicted)
        predicted = torch.ones_like(text.ids, dtype=torch.bool)
        predicted[:, 0] = False
        return cls(text.ids, predicted)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def digest(self) -> str:
        parts = (self.ids, self.predicted)
        found = hashlib.sha256(repr([tuple(part.shape) for part in parts]).encode())
        for part in parts:
            found.update(part.contiguous().numpy().tobytes())
        return found.hexdigest()


def examples_of(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    n: int,
    fewest: int,
    seed: int,
    mask_prompts: bool = True,
) -> Examples:
    """Rows where the corpus has prompts (instructions with answers), windows of running text where it has none.

    Args:
        length: tokens of a window, and the most of a row. n: at most so many. fewest: windows that will do.
        mask_prompts: prompts are not predicted.
    Raises:
        CorpusError: the text is too short.
    """
    if any(corpus.prompts):
        rows = rows_of(corpus, tokenizer, length=length, n_rows=n, seed=seed, mask_prompts=mask_prompts)
        return Examples.of(rows)
    return Examples.of(token_windows(corpus, tokenizer, length=length, n_windows=n, fewest=fewest, seed=seed))
