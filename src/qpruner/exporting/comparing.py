"""Logits of one model beside those of another: the proof that an export computes what it is to compute."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qpruner.artifact.dense import Dense
from qpruner.model.corpus import bundled_corpus, token_windows
from qpruner.model.load import TOKENIZER_FILES, Source, load_tokenizer
from qpruner.model.scratch import Scratch
from qpruner.model.whole import Streamable

TOKENS = 64  # of the text on which logits are compared


@dataclass(frozen=True)
class Off:
    """How far logits are from others: of all tokens, root mean square of the difference over that of the logits about
    their mean; KL in nats per token; how often both put the same token first."""

    relative: float
    kl: float
    same_first: float

    def __str__(self) -> str:
        return f"{self.relative:.2%} off, KL {self.kl:.5f}, same first choice {self.same_first:.0%}"


def sample(source: Source, dense: Dense) -> tuple[Tensor, list[str]]:
    """Tokens to compare logits on, (1, n), and lines of text to compare tokens on; random ones, and none, without a
    tokenizer."""
    n = min(TOKENS, source.context_length or TOKENS)
    if not any((source.folder / file).is_file() for file in TOKENIZER_FILES):
        vocabulary = dense.model.get_input_embeddings().num_embeddings
        return torch.randint(vocabulary, (1, n), generator=torch.Generator().manual_seed(0)), []
    text = bundled_corpus("evaluation")
    lines = [line for line in text.documents[0].splitlines() if line.strip()][:100]
    return token_windows(text, load_tokenizer(source), length=n, n_windows=1).ids, lines


def logits_of(stream: Streamable, ids: Tensor) -> Tensor:
    """(tokens, vocabulary) of one window, float32."""
    scratch = Scratch()
    stream.forward(ids, scratch)
    return next(iter(stream.logits(ids, scratch)))[0].float()


def off(logits: Tensor, expected: Tensor) -> Off:
    logits, expected = logits.double(), expected.double()
    log_p, log_q = expected.log_softmax(-1), logits.log_softmax(-1)
    size = (expected - expected.mean(-1, keepdim=True)).square().sum()
    return Off(
        relative=math.sqrt((logits - expected).square().sum() / size) if size else math.inf,
        kl=float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        same_first=float((logits.argmax(-1) == expected.argmax(-1)).double().mean()),
    )
