"""Tokenizers in GGUF files: llama.cpp cuts text into the tokens that the model knows."""

import json
import random

import pytest
from tiny_folder import tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qpruner import exporting
from qpruner.artifact.gguf import llamacpp
from qpruner.artifact.gguf.vocabulary import CUTS, cut_name
from qpruner.errors import ModelError
from qpruner.exporting import gguf as gguf_export

gguf = pytest.importorskip("gguf")

SPECIAL = ["<unk>", "<s>", "</s>"]
TEXTS = (
    "The quick brown fox doesn't jump over 12345 lazy dogs; why?\n\n    def f(x):\n        return x**2  # ok\n" * 3,
    "Grüße aus Köln, 日本語, émigré — naïve façade… \U0001f600 it's I'll\tx\r\ny " * 3,
)
_DRAW = random.Random(0)
# letters in another order than in the texts: then it matters which pair is merged first
SHUFFLED = ["".join(_DRAW.choices("the quickbrownfxjmpsvlazydg  ", k=60)) for _ in range(20)]
LINES = [line for text in TEXTS for line in text.splitlines()] + ["  two spaces", "a  b", "12 34", "x=1", "<s> is text"]
LINES += SHUFFLED
OURS = r" *\n\s*| ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]+|\s+"


def in_bytes(steps: list) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return tokenizer


def split(rule: str) -> list:
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [pre_tokenizers.Split(Regex(rule), "isolated"), bytes_alone]


def like_sentencepiece(prefix: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    first = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    numbers = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer.train_from_iterator([TEXTS[0]], trainers.BpeTrainer(vocab_size=420, special_tokens=[*SPECIAL, *numbers]))
    return tokenizer


WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
CASES = {
    "gpt-2": lambda: in_bytes([WORDS]),
    "smollm": lambda: in_bytes([pre_tokenizers.Digits(individual_digits=True), WORDS]),
    **{name: (lambda rule=rule: in_bytes(split(rule))) for rule, name in CUTS.items()},
    "rule without a name": lambda: in_bytes(split(OURS)),
    "sentencepiece": lambda: like_sentencepiece(True),
    "sentencepiece without a space in front": lambda: like_sentencepiece(False),
}


def folder_with(tokenizer: Tokenizer, path, *, bos: bool = True):
    if bos:
        pair = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[pair])
    tiny_model("llama", vocab_size=448).save_pretrained(path)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    ).save_pretrained(path)
    return path


@pytest.mark.parametrize("case", CASES)
def test_text_becomes_the_same_tokens(case, tmp_path, monkeypatch):
    folder = folder_with(CASES[case](), tmp_path / "m", bos="2" not in case)
    # without a name, tokens of several characters are found only where each of these is a token
    lines = [line for line in LINES if case != "rule without a name" or "日" not in line]
    sample = gguf_export.sample
    monkeypatch.setattr(gguf_export, "sample", lambda *args: (sample(*args)[0], lines))
    result = exporting.export(folder, "gguf", tmp_path / "m.gguf")
    if llamacpp.installed():
        assert result.same_tokens == 1
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 448
    assert fields["tokenizer.ggml.add_bos_token"].contents() == ("2" not in case)
    assert bool(result.written.notes) == (case == "rule without a name")
    if "gpt2" in fields["tokenizer.ggml.model"].contents():
        assert fields["tokenizer.ggml.pre"].contents() == case


def test_a_rule_is_known_by_all_of_it():
    for rule, name in CUTS.items():
        tokenizer = in_bytes(split(rule))
        content = json.loads(tokenizer.to_str())["pre_tokenizer"]
        assert cut_name(content) == name
        content["pretokenizers"][0]["pattern"]["Regex"] += "|x"
        assert cut_name(content) is None
    assert cut_name(None) is None


def test_a_tokenizer_without_bytes_is_refused(tmp_path):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL))
    with pytest.raises(ModelError, match="neither bytes nor a fallback"):
        exporting.export(folder_with(tokenizer, tmp_path / "m"), "gguf", tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
