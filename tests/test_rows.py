"""Rows: each text alone, prompts not predicted, what is filled up never counted."""

import json

import pytest
import torch

from qpruner.errors import CorpusError
from qpruner.model import load
from qpruner.model.corpus import Corpus, read_corpus, split_corpus
from qpruner.model.rows import rows_of


@pytest.fixture(scope="module")
def tokenizer():
    return load.load_tokenizer(load.inspect_source("pystdlib-5M"))


def alpaca(tmp_path, n=3):
    path = tmp_path / "instructions.jsonl"
    rows = [{"instruction": f"add {i} and {i}", "input": "", "output": f"the sum is {2 * i}"} for i in range(n)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_corpus(path, "calibration")


def test_what_is_predicted_is_the_answer_and_its_end(tmp_path, tokenizer):
    corpus = alpaca(tmp_path)
    rows = rows_of(corpus, tokenizer, length=512)
    for ids, predicted, text, prompt in zip(rows.ids, rows.predicted, corpus.documents, corpus.prompts, strict=True):
        said = tokenizer.decode(ids[predicted], skip_special_tokens=True)
        assert said == text[prompt:]
        assert text.startswith("Below is an instruction") and prompt < len(text)
    every = rows_of(corpus, tokenizer, length=512, mask_prompts=False)
    assert every.n_tokens_predicted > rows.n_tokens_predicted
    assert rows.covered_bytes == tuple(len(t) - p for t, p in zip(corpus.documents, corpus.prompts, strict=True))


def test_a_model_predicts_a_filled_up_row_as_it_does_alone(tokenizer):
    model = load.load_model(load.inspect_source("pystdlib-5M")).eval()
    texts = ("import os", "def squares(n):\n    return [i * i for i in range(n)]\n")
    rows = rows_of(Corpus("two", "evaluation", texts), tokenizer, length=64)
    assert not rows.predicted[0].all() and len(rows.ids) == 2
    n = int(rows.predicted[0].nonzero().max()) + 1
    with torch.inference_mode():
        together, alone = model(rows.ids).logits[0, :n], model(rows.ids[:1, :n]).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_the_end_of_a_long_row_is_cut_and_said(tokenizer):
    rows = rows_of(Corpus("one", "evaluation", ("x = 1\n" * 100,)), tokenizer, length=16)
    assert rows.ids.shape == (1, 16) and rows.cut == 1 and not rows.predicted[0, 0]


def test_parts_of_a_text_keep_their_prompts(tmp_path):
    whole = alpaca(tmp_path, n=40)
    asked = dict(zip(whole.documents, whole.prompts, strict=True))
    for part in split_corpus(whole).values():
        assert part.prompts == tuple(asked[document] for document in part.documents)


def test_rows_without_an_answer_are_refused(tmp_path, tokenizer):
    with pytest.raises(CorpusError, match="no row of two tokens"):
        rows_of(alpaca(tmp_path), tokenizer, length=5)
