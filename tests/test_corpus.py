import gzip
import json
import sys

import numpy as np
import pytest
import torch
from tiny_folder import byte_tokenizer
from tokenizers import normalizers

from qpruner.errors import CorpusError, MissingExtraError
from qpruner.model import corpus as corpus_module
from qpruner.model import pystdlib
from qpruner.model.corpus import Corpus, bundled_corpus, read_corpus, split_corpus, token_windows
from qpruner.model.load import inspect_source, load_tokenizer
from qpruner.model.overlap import check_disjoint

BOS, EOS = 0, 1


@pytest.fixture(scope="session")
def tokenizer():
    """The bundled model's: a real byte-level BPE."""
    return load_tokenizer(inspect_source("bundled"))


@pytest.fixture
def refused(tmp_path):
    """Writes a file and reads it: `refused(name, content)` is the one message."""

    def message(name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CorpusError) as caught:
            read_corpus(tmp_path / name, "calibration")
        assert name in str(caught.value)
        return str(caught.value)

    return message


def texts(*documents, role="calibration", closing=True):
    return Corpus("texts", role, documents, closing)


def lines(n, seed=0):
    words = np.random.default_rng(seed).integers(0, 1000, (n, 8))
    return "".join(" ".join(f"w{word}" for word in row) + "\n" for row in words)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_documents(tmp_path):
    import pyarrow
    import pyarrow.parquet

    documents = ("one\ntwo", "drei, vier: ä €", "  five")
    rows = "".join(json.dumps({"text": d, "id": i}) + "\n" for i, d in enumerate((*documents, "", None)))
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(("\ufeff" + rows + "\n\n").encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": [*documents, None], "n": [1] * 4}), tmp_path / "c.parquet")
    pyarrow.parquet.write_table(
        pyarrow.table({"story": pyarrow.array(documents), "n": [1] * 3}), tmp_path / "d.parquet"
    )
    found = [read_corpus(tmp_path / f, "search") for f in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.parquet")]
    assert {c.documents for c in found} == {documents} and len({c.digest for c in found}) == 1
    assert all(c.closing and c.role == "search" for c in found)


def test_a_text_file_is_one_running_text(tmp_path):
    (tmp_path / "a.TXT").write_bytes("one\r\n\n\ntwo".encode("utf-8-sig"))
    corpus = read_corpus(tmp_path / "a.TXT", "calibration")
    assert (corpus.documents, corpus.closing) == (("one\r\n\n\ntwo",), False)


def test_instructions_are_put_in_the_alpaca_template(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paired, plain = read_corpus(tmp_path / "a.jsonl", "calibration").documents
    assert paired == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n3"
    )
    assert plain == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSay hi.\n\n### Response:\nhi"
    )


def test_a_single_string_needs_no_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"sentence": "hello", "label": 1}\n')
    assert read_corpus(tmp_path / "a.jsonl", "calibration").documents == ("hello",)


def test_the_digest_keeps_documents_apart():
    assert texts("ab", "c").digest != texts("a", "bc").digest
    assert texts("ab", "c").digest == texts("ab", "c", role="search").digest


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("a.txt", b"", "is empty (0 bytes)"),
        ("a.txt", b" \n\t\n", "every line of it is blank"),
        ("a.txt", b"abc\xff", "is not UTF-8 text: byte 0xff at position 3"),
        ("a.csv", b"a,b", "Accepted: .txt, .jsonl, .jsonl.gz, .parquet"),
        ("noname", b"a", "of no known kind"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", b'"text"\n', "line 1: a str, not an object"),
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n', "every row of it is blank"),
        ("a.jsonl", b'{"text": 7}\n', "line 1: `text` is a int, not a string"),
        (
            "a.jsonl",
            b'\n{"q": "a", "r": "b", "s": 1, "t": 2}\n',
            "line 2: no field to take the text from. Found: 'q', ",
        ),
        ("a.jsonl", b"{}\n", "Found: nothing"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "not a whole gzip file"),
        ("a.jsonl.gz", b'{"text": "a"}\n', "not a whole gzip file"),
        ("a.parquet", b"PAR1 but no more", "not a readable parquet file"),
    ],
)
def test_files_that_cannot_be_used(name, content, part, refused):
    assert part in refused(name, content)


def test_a_damaged_gzip_body(refused):
    whole = bytearray(gzip.compress(json.dumps({"text": lines(50)}).encode()))
    whole[len(whole) // 2] ^= 0xFF
    assert "not a whole gzip file" in refused("a.jsonl.gz", bytes(whole))


def test_a_parquet_file_without_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"a": [1], "b": [2.0]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match="no column of text. Found: 'a', 'b'"):
        read_corpus(tmp_path / "a.parquet", "calibration")


def test_parquet_needs_its_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'qpruner\[parquet\]'"):
        read_corpus(tmp_path / "a.parquet", "calibration")


def test_nothing_there_or_a_folder(tmp_path):
    with pytest.raises(CorpusError, match="there is no text file at"):
        read_corpus(tmp_path / "absent.txt", "calibration")
    with pytest.raises(CorpusError, match="is a folder"):
        read_corpus(tmp_path, "calibration")


# --- keeping purposes apart ------------------------------------------------------------------------------------------


def test_the_bundled_texts_are_disjoint_and_evaluation_is_what_was_held_out():
    parts = {role: bundled_corpus(role) for role in ("calibration", "search", "evaluation")}
    check_disjoint(*parts.values())
    root, heldout = pystdlib.stdlib_root(), pystdlib.heldout_modules(pystdlib.bundled_folder())
    # What is one file in one Python is a folder of the same name in the next.
    files = [root / name for name in heldout if (root / name).is_file()]
    files += [file for name in heldout for file in (root / name.removesuffix(".py")).rglob("*.py")]
    expected = [file.read_text(encoding="utf-8", errors="replace") for file in sorted(files)]
    assert list(parts["evaluation"].documents) == expected
    assert parts["calibration"].size_bytes > 5 * parts["search"].size_bytes > 10**6


def test_a_python_without_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(pystdlib, "stdlib_root", lambda: tmp_path)
    with pytest.raises(CorpusError, match="no library sources"):
        bundled_corpus("search")


@pytest.mark.parametrize(
    "corpus",
    [
        texts(lines(300)),
        texts(lines(40).replace("\n", " ")),
        texts(*(lines(20, seed) for seed in range(7))),
        texts(*(lines(1 + seed % 9, seed) for seed in range(60))),
        texts(*(lines(5, seed) for seed in range(60)), *(lines(5, seed) for seed in range(60))),
    ],
    ids=["lines", "one line", "few documents", "many documents", "twice"],
)
def test_a_split_keeps_the_shares_and_shares_nothing(corpus):
    parts = split_corpus(corpus)
    check_disjoint(*parts.values())
    assert parts == split_corpus(corpus)
    assert [part.role for part in parts.values()] == ["calibration", "search", "evaluation"] == list(parts)
    kept = [document for part in parts.values() for document in part.documents]
    distinct = list(dict.fromkeys(corpus.documents))
    assert sum(map(len, kept)) == sum(map(len, distinct)), "nothing is lost and nothing is said twice"
    total = sum(part.size_bytes for part in parts.values())
    shares = [part.size_bytes / total for part in parts.values()]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.03)


def test_a_split_keeps_documents_whole_or_cuts_at_line_ends():
    many = texts(*(lines(3, seed) for seed in range(40)))
    assert {d for part in split_corpus(many).values() for d in part.documents} == set(many.documents)
    one = texts(lines(100))
    pieces = [part.documents for part in split_corpus(one).values()]
    assert "".join(d for documents in pieces for d in documents) == one.documents[0]
    assert all(d.endswith("\n") for documents in pieces for d in documents)


def test_too_short_to_split():
    with pytest.raises(CorpusError, match="too short to serve as calibration, search and evaluation"):
        split_corpus(texts("two words"))


def test_one_text_cannot_serve_two_purposes():
    a = texts("alpha", "beta")
    check_disjoint(a, a, texts("gamma", role="search"))  # the same corpus twice in one role is no conflict
    with pytest.raises(CorpusError, match=r"'texts' \(calibration\) and 'texts' \(search\) are the same text"):
        check_disjoint(a, texts("alpha", "beta", role="search"))
    with pytest.raises(CorpusError, match=r"share 1 document\(s\), such as 'beta'"):
        check_disjoint(a, texts("gamma", role="search"), texts(" beta\n", "delta", role="evaluation"))


# --- windows ---------------------------------------------------------------------------------------------------------


def by_hand(corpus, tokenizer, step, *, bos=BOS):
    """Everything tokenised, joined and cut, in the obvious way."""
    ids = []
    for document in corpus.documents:
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + [EOS] * corpus.closing
    front = [] if bos is None else [bos]
    return torch.tensor([front + ids[i : i + step] for i in range(0, len(ids) - step + 1, step)])


@pytest.mark.parametrize("closing", [True, False])
def test_windows_are_the_joined_documents_cut(tokenizer, closing):
    corpus = texts(*(lines(9, seed) for seed in range(5)), closing=closing)
    windows = token_windows(corpus, tokenizer, length=32)
    assert torch.equal(windows.ids, by_hand(corpus, tokenizer, 31))
    assert windows.first_token == "bos" and windows.n_tokens_predicted == 31 * len(windows.ids)
    plain = token_windows(corpus, tokenizer, length=32, bos=False)
    assert torch.equal(plain.ids, by_hand(corpus, tokenizer, 32, bos=None)) and plain.first_token == "text"
    beginless = token_windows(corpus, byte_tokenizer(bos_token=None), length=32)
    assert torch.equal(beginless.ids, by_hand(corpus, byte_tokenizer(), 32, bos=None))


def test_only_the_start_of_a_long_text_is_tokenised(tokenizer, monkeypatch):
    """And it gives the tokens of the whole."""
    document = bundled_corpus("evaluation").documents[0] * 20
    corpus, sizes = texts(document), []
    whole = by_hand(corpus, tokenizer, 63)[:8]
    real = corpus_module.tokens_of
    monkeypatch.setattr(corpus_module, "tokens_of", lambda t, k: sizes.append(len(t)) or real(t, k))
    assert torch.equal(token_windows(corpus, tokenizer, length=64, n_windows=8).ids, whole)
    assert sum(sizes) < len(document) / 10
    sizes.clear()
    many = texts(*[lines(20, seed) for seed in range(100)])
    token_windows(many, tokenizer, length=64, n_windows=8, seed=3)
    assert sum(sizes) < many.size_bytes / 3


def test_a_prefix_that_is_too_short_is_lengthened(tokenizer):
    document = "    " * 20_000 + lines(3000)  # runs of blanks: few tokens for many characters
    corpus = texts(document)
    windows = token_windows(corpus, tokenizer, length=256, n_windows=30)
    assert torch.equal(windows.ids, by_hand(corpus, tokenizer, 255)[:30])


@pytest.mark.parametrize("enough", [1, 50, 333, 2000])
def test_a_prefix_gives_the_first_tokens_of_the_whole(tokenizer, enough):
    text = bundled_corpus("evaluation").documents[0]
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    tokens, complete = corpus_module.first_tokens(text, tokenizer, enough)
    assert not complete and enough <= len(tokens.ids) < len(whole)
    assert tokens.ids.tolist() == whole[: len(tokens.ids)]


def test_a_seed_chooses_windows_from_all_over(tokenizer):
    corpus = texts(lines(4000))
    draw = lambda seed: token_windows(corpus, tokenizer, length=64, n_windows=6, seed=seed)
    assert torch.equal(draw(1).ids, draw(1).ids) and not torch.equal(draw(1).ids, draw(2).ids)
    rows = {tuple(row.tolist()) for row in draw(1).ids}
    assert len(rows) == 6 and all(row[0] == BOS for row in rows)
    choices = {frozenset(tuple(row.tolist()) for row in draw(seed).ids) for seed in range(4)}
    assert len(choices) == 4, "other windows, not the same in another order"
    one_stretch = texts(lines(800))
    chosen = [token_windows(one_stretch, tokenizer, length=64, n_windows=6, seed=seed).ids for seed in (1, 2)]
    assert {tuple(row) for row in chosen[0].tolist()} != {tuple(row) for row in chosen[1].tolist()}
    short = texts(lines(40))
    everything = {tuple(row.tolist()) for row in by_hand(short, tokenizer, 63)}
    drawn = token_windows(short, tokenizer, length=64, seed=5)
    assert {tuple(row.tolist()) for row in drawn.ids} == everything


@pytest.mark.parametrize("document", ["plain text ", "äöü €uro 𝔘nicode ", "a\u0301\r\n\t  "])
@pytest.mark.parametrize("seed", [None, 4])
@pytest.mark.parametrize("make", ["bundled", "bytes"])
def test_covered_bytes_of_a_whole_text_are_its_bytes(document, seed, make, tokenizer):
    tokenizer = tokenizer if make == "bundled" else byte_tokenizer()
    corpus = texts(document * 7, document * 5, closing=True)
    count = by_hand(corpus, tokenizer, 1).shape[0]
    windows = token_windows(corpus, tokenizer, length=count + 1, seed=seed)
    assert windows.covered_bytes == (corpus.size_bytes,)


def test_a_seed_reaches_the_last_documents(tokenizer):
    corpus = texts(*(chr(ord("a") + number) * 400 for number in range(26)))
    drawn = [token_windows(corpus, tokenizer, length=8, n_windows=1, seed=seed).ids[0, -1:] for seed in range(20)]
    letters = {tokenizer.decode(ids)[0] for ids in drawn}
    assert len(letters) > 8 and max(letters) > "t"


def test_covered_bytes_are_those_of_the_decoded_windows(tokenizer):
    windows = token_windows(texts(lines(60), lines(20, 1)), tokenizer, length=32)
    for ids, size in zip(windows.ids, windows.covered_bytes, strict=True):
        assert len(tokenizer.decode([i for i in ids.tolist() if i > EOS]).encode()) == size
    plain = token_windows(texts(lines(60)), tokenizer, length=32, bos=False)
    for ids, size in zip(plain.ids, plain.covered_bytes, strict=True):
        assert len(tokenizer.decode([i for i in ids[1:].tolist() if i > EOS]).encode()) == size


def test_text_that_a_normaliser_drops_is_covered_too():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    windows = token_windows(texts("  äbc  ", closing=False), tokenizer, length=5)
    assert windows.ids.shape == (1, 5) and windows.covered_bytes == (8,)


def test_byte_positions():
    text = "a\x7f\x80ß\u07ff\u0800\u0905€\uffff𝔘z"
    assert corpus_module._byte_positions(text).tolist() == [len(text[:i].encode()) for i in range(len(text) + 1)]


def test_a_tokenizer_without_offsets_still_covers_the_whole_text(monkeypatch):
    tokenizer = byte_tokenizer()
    encode = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))

    def slow(self, *args, return_offsets_mapping, **kwargs):
        assert not return_offsets_mapping
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", slow)
    windows = token_windows(texts("äbc" * 9, closing=False), tokenizer, length=37)
    assert windows.covered_bytes == (36,)


def test_too_short_for_what_is_asked(tokenizer):
    corpus = texts("x = 1\n", role="evaluation", closing=False)
    found = len(tokenizer("x = 1\n", add_special_tokens=False)["input_ids"])
    with pytest.raises(CorpusError, match=rf"'texts' \(evaluation\) is too short: {found} tokens found, 5,110 needed"):
        token_windows(corpus, tokenizer, length=512, n_windows=10)
    with pytest.raises(CorpusError, match=r"511 needed \(1 window"):
        token_windows(corpus, tokenizer, length=512, seed=0)


def test_long_texts_raise_no_warning_of_the_tokenizer(capfd, caplog):
    tokenizer = byte_tokenizer()  # for contexts of 64 tokens
    token_windows(texts(lines(50)), tokenizer, length=64)
    assert capfd.readouterr() == ("", "") and not caplog.records
