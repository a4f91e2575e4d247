"""Protocols give the field's numbers: each against the few lines in which others compute it, or a published table."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_folder import byte_tokenizer, tiny_model
from torch.nn import functional as F

from qpruner.errors import CorpusError
from qpruner.judge.divergence import kl_to
from qpruner.judge.loss import Streamed, evaluate_loss, paired_difference
from qpruner.judge.protocols import PROTOCOLS, Cut, sequences
from qpruner.judge.wikitext import articles, detokenised, rows_of_text
from qpruner.model.corpus import Corpus, bundled_corpus, read_corpus, token_windows
from qpruner.model.load import inspect_source, load_model, load_tokenizer
from qpruner.model.rows import Rows
from qpruner.model.scratch import Scratch

SHARED = Path(__file__).parents[2] / "shared"
WORDS = (
    "the lobster , known as a species of crab @-@ like animal ; it ' s found in 1 @,@ 000 rivers ( often ) .".split()
)


def article(name: str, n: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    words = [WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator)]
    return f" = {name} = \n \n {' '.join(words[: n // 2])} \n \n = = Part = = \n \n {' '.join(words[n // 2 :])} \n"


@pytest.fixture(scope="module")
def wiki():
    return Corpus(
        "wiki.txt", "evaluation", (" \n" + "".join(article(f"A {i}", 40, i) for i in range(12)),), closing=False
    )


@pytest.fixture(scope="module")
def stories():
    texts = tuple(f"Once upon a time, number {i} " + "went on and on. " * (1 + 3 * (i % 5)) for i in range(14))
    return Corpus("stories.jsonl", "evaluation", texts)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=1, max_position_embeddings=256).double()


def losses(model, ids):
    """Of every token but the first."""
    with torch.no_grad():
        return F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")


def field_ids(corpus, tokenizer):
    """The text as GPTQ, AWQ and LLM-Pruner read it from the data set's rows."""
    rows = [line if line.strip() else "" for line in re.findall(r"[^\n]*\n|[^\n]+", corpus.documents[0])]
    return torch.tensor([tokenizer.bos_token_id, *tokenizer("\n\n".join(rows), add_special_tokens=False)["input_ids"]])


def with_special(tokenizer):
    """One that puts <s> in front by itself, as that of LLaMA does."""
    from tokenizers.processors import TemplateProcessing

    framed = byte_tokenizer()
    begin = framed.bos_token
    framed.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, framed.bos_token_id)]
    )
    return framed


# --- against the field's own lines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, window", [("wikitext2-2048", 96), ("llm-pruner-128", None)])
def test_rows_joined_by_blank_lines(model, wiki, tokenizer, name, window):
    framed = with_special(tokenizer)
    ids = field_ids(wiki, framed)
    length = window or 128
    windows = [ids[i * length : (i + 1) * length] for i in range(len(ids) // length)]
    expected = torch.cat([losses(model, each) for each in windows])
    cut = sequences(wiki, framed, Cut(name, window=window), context=256)
    report = evaluate_loss(model, cut)
    assert torch.equal(cut.ids, torch.stack(windows))
    assert report.loss == pytest.approx(expected.mean().item(), abs=1e-12) and report.n_tokens == len(expected)
    assert cut.protocol.name == f"{name.rpartition('-')[0]}-{length}" and cut.protocol.first_token == "once"
    plain = sequences(wiki, tokenizer, Cut(name, window=window), context=256)
    assert torch.equal(plain.ids, ids[1:][: len(plain.ids) * length].view(-1, length)), "a tokenizer that puts none in"
    assert plain.protocol.first_token == "text"


@pytest.mark.parametrize("stride", [16, 32, 63])
def test_overlapping_windows_predict_what_is_new(model, wiki, tokenizer, stride):
    """As the documentation of transformers has it."""
    framed, length = with_special(tokenizer), 64
    ids = field_ids(wiki, framed)
    nats, previous = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        nats.append(losses(model, ids[begin:end])[-(end - previous) :])
        previous = end
        if end == len(ids):
            break
    cut = sequences(wiki, framed, Cut("wikitext2-2048", window=length, stride=stride), context=256)
    report = evaluate_loss(model, cut)
    assert report.n_tokens == len(ids) - 1 and report.loss == pytest.approx(torch.cat(nats).mean().item(), abs=1e-12)
    assert "new tokens alone predicted" in str(report.protocol) and f"stride {stride}" in str(report.protocol)


def test_overlap_predicts_every_token_once(wiki, tokenizer):
    """To the end of the text, whatever the stride; what the last window is filled up with does not count."""
    everything = torch.tensor(tokenizer(wiki.documents[0], add_special_tokens=False)["input_ids"])
    for stride in (7, 20, 63):
        cut = sequences(wiki, tokenizer, Cut("windows", window=65, stride=stride), context=256)
        assert torch.equal(cut.ids[cut.predicted], everything)
        assert sum(cut.covered_bytes) == len(wiki.documents[0].encode())


def test_rows_stand_alone(model, stories, tokenizer):
    cut = sequences(stories, tokenizer, Cut("rows"), context=64)
    begin = tokenizer.bos_token_id
    each = [[begin, *tokenizer(text, add_special_tokens=False)["input_ids"]][:64] for text in stories.documents]
    expected = [losses(model, torch.tensor(ids)) for ids in each]
    report = evaluate_loss(model, cut, batch_size=4)
    total = torch.cat(expected)
    assert report.loss == pytest.approx(total.mean().item(), abs=1e-12) and report.n_tokens == len(total)
    assert report.window_losses == pytest.approx([e.mean().item() for e in expected])
    covered = sum(len(ids) - 1 for ids in each)  # a byte a token
    assert report.bits_per_byte == pytest.approx(total.sum().item() / math.log(2) / covered)
    assert report.standard_error_by == "bootstrap of 14 rows"
    assert cut.protocol.cut == sum(len(text) > 63 for text in stories.documents) > 0


def test_windows_are_those_that_compress_judges_on(wiki, stories, tokenizer):
    for corpus in (wiki, stories):
        windows, cut = (
            token_windows(corpus, tokenizer, length=64),
            sequences(corpus, tokenizer, Cut(window=64), context=256),
        )
        assert torch.equal(cut.ids, windows.ids) and cut.n_tokens_predicted == windows.n_tokens_predicted
        assert sum(cut.covered_bytes) == sum(windows.covered_bytes)


# --- what standard errors draw ---------------------------------------------------------------------------------------


def test_documents_are_drawn_whole(model, wiki, tokenizer):
    cut = sequences(wiki, tokenizer, Cut(window=50), context=256)
    report = evaluate_loss(model, cut)
    assert report.standard_error_by == "bootstrap of 12 documents" and cut.protocol.n_documents == 12
    text, edges = wiki.documents[0], []
    for piece in articles(text):
        edges.append((edges[-1] if edges else 0) + len(piece))
    # by hand: the document of every predicted byte
    text_ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = text_ids[: len(cut.ids) * 49].view(-1, 49)
    nats = torch.zeros(12, dtype=torch.float64)
    for w, row in enumerate(ids):
        each = losses(model, torch.cat([torch.tensor([tokenizer.bos_token_id]), row]))
        for k, loss in enumerate(each):
            nats[next(i for i, edge in enumerate(edges) if w * 49 + k < edge)] += loss
    assert report.totals.sums == pytest.approx(nats.tolist())
    assert sum(report.totals.tokens) == report.n_tokens


def test_few_documents_leave_windows_to_draw(model, tokenizer):
    corpus = Corpus("t", "evaluation", ("one long line of text " * 50, "and another " * 50))
    report = evaluate_loss(model, sequences(corpus, tokenizer, Cut(window=50), context=256))
    assert re.fullmatch(r"bootstrap of \d+ windows", report.standard_error_by)


def test_a_paired_difference_is_by_document(model, wiki, tokenizer):
    near = tiny_model(seed=1, max_position_embeddings=256).double()
    near.lm_head.weight.data += 0.01
    cut = sequences(wiki, tokenizer, Cut(window=50), context=256)
    a, b = evaluate_loss(model, cut), evaluate_loss(near, cut)
    mean, error = paired_difference(a, b)
    assert mean == pytest.approx(a.loss - b.loss, abs=1e-12) and error < a.standard_error


def test_flips_are_counted_token_by_token(model):
    """On a text of which each of two models wrote a part, so that both are right now and then."""
    other, generator = tiny_model(seed=2, max_position_embeddings=256).double(), torch.Generator().manual_seed(0)
    ids, turns = torch.full((12, 20), 5), torch.randint(4, (12, 20), generator=generator)
    for at in range(1, 20):
        ids[:, at] = torch.randint(3, 259, (12,), generator=generator)
        for writer, turn in ((model, 0), (other, 1), (other, 2)):
            with torch.no_grad():
                ids[:, at] = torch.where(turns[:, at] == turn, writer(ids[:, :at]).logits[:, -1].argmax(-1), ids[:, at])
    lengths = torch.randint(10, 20, (12, 1), generator=generator)
    places = torch.arange(20)
    rows = Rows(ids, (places > 0) & (places < lengths), (30,) * 12, "written", "digest")
    report = kl_to(model, other, rows, batch_size=5)
    counts = torch.zeros(4)
    with torch.no_grad():
        for row, n in zip(ids, lengths, strict=True):
            now, before = (m(row[None, :n]).logits[0, :-1].argmax(-1) == row[1:n] for m in (model, other))
            counts += torch.tensor([before.sum(), (before & ~now).sum(), (~before).sum(), (~before & now).sum()])
    right, lost, wrong, gained = counts.tolist()
    assert min(right - lost, lost, gained) > 0
    assert report.right_to_wrong == pytest.approx(lost / right)
    assert report.wrong_to_right == pytest.approx(gained / wrong)
    assert report.flips == pytest.approx((lost + gained) / (right + wrong))
    assert 0 < report.right_to_wrong_standard_error < 1 and report.top1_agreement_standard_error > 0
    same = kl_to(model, model, rows)
    assert (same.flips, same.kl, same.top1_agreement) == (0, 0, 1)


# --- larger than memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["rows", "windows"])
def test_what_is_filled_up_streams_as_well(stories, tokenizer, tmp_path, protocol):
    from tiny_stream import streamed

    model, other = (tiny_model(seed=s, max_position_embeddings=256) for s in (1, 2))
    cut = sequences(
        stories, tokenizer, Cut(protocol, window=60, stride=20 if protocol == "windows" else None), context=256
    )
    layer_by_layer = lambda m, name: Streamed(streamed(m), Scratch(tmp_path / name))
    assert evaluate_loss(layer_by_layer(model, "a"), cut).totals == evaluate_loss(model, cut).totals
    ours = kl_to(layer_by_layer(model, "b"), layer_by_layer(other, "c"), cut)
    assert ours.totals == kl_to(model, other, cut).totals


# --- limits and refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("n_tokens", [130, 400])
def test_a_limit_takes_whole_windows_from_the_start(wiki, stories, tokenizer, protocol, n_tokens):
    corpus = stories if protocol == "rows" else wiki
    whole = sequences(corpus, tokenizer, Cut(protocol, window=64), context=256)
    cut = sequences(corpus, tokenizer, Cut(protocol, window=64, n_tokens=n_tokens), context=256)
    n = len(cut.ids)
    counts = whole.predicted.sum(1).cumsum(0)
    assert counts[n - 1] <= n_tokens < counts[n] and cut.n_tokens_predicted == counts[n - 1]
    length = cut.ids.shape[1]
    assert torch.equal(cut.ids[cut.predicted], whole.ids[:n, :length][whole.predicted[:n, :length]])


def test_a_context_that_is_shorter_shows_in_the_name(wiki, tokenizer):
    cut = sequences(wiki, tokenizer, Cut("wikitext2-2048"), context=200)
    assert cut.protocol.name == "wikitext2-200" and "wikitext2-200" in str(cut.protocol)
    assert cut.protocol.windows_digest[:12] in str(cut.protocol) and "raw text" in str(cut.protocol)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(protocol="wikitext"), "no protocol 'wikitext'. Accepted: 'windows', 'wikitext2-2048'"),
        (dict(protocol="rows", stride=3), "has no stride"),
        (dict(stride=512), "stride 512 is not between 1 and the 255 tokens of text in a window of 256"),
        (dict(n_tokens=20), "20 may be predicted"),
        (dict(protocol="rows", n_tokens=2), "first row of 'wiki.txt' alone has more than the 2 tokens"),
    ],
)
def test_what_cannot_be_cut_is_refused(wiki, tokenizer, options, message):
    with pytest.raises(CorpusError, match=re.escape(message)):
        sequences(wiki, tokenizer, Cut(**options), context=256)


def test_a_short_text_is_refused(tokenizer):
    with pytest.raises(CorpusError, match="gives no window of 127 tokens of text: 6 tokens found"):
        sequences(Corpus("t", "evaluation", ("short",)), tokenizer, Cut(window=128), context=256)


# --- WikiText --------------------------------------------------------------------------------------------------------


def test_the_tokeniser_is_undone_as_in_the_harness(wiki):
    harness = pytest.importorskip(
        "lm_eval.tasks.wikitext.preprocess_wikitext", reason="the extra `eval` is not installed"
    )
    text = (
        wiki.documents[0]
        + " \" quoted words \" [ x ] { y } 30 ° C N = = = A = = = boys ' toys ' s end 5 @.@ 5 ! ? : \\1"
    )
    assert detokenised(text) == harness.wikitext_detokenizer({"page": text}) != text


def test_bits_per_byte_are_of_the_bytes_that_were_there(model, wiki, tokenizer):
    """With everything predicted, undoing the tokeniser leaves the denominator as it was."""
    cut = lambda **how: sequences(wiki, tokenizer, Cut("windows", window=65, stride=63, **how), context=256)
    raw, undone = cut(), cut(detokenised=True)
    assert sum(undone.covered_bytes) == pytest.approx(sum(raw.covered_bytes)) == len(wiki.documents[0].encode())
    assert undone.n_tokens_predicted < raw.n_tokens_predicted and "detokenised" in str(undone.protocol)
    rows = Corpus("rows", "evaluation", tuple(articles(wiki.documents[0])))
    raw, undone = (sequences(rows, tokenizer, Cut("rows", detokenised=d), context=2000) for d in (False, True))
    assert undone.covered_bytes == pytest.approx(raw.covered_bytes)


def test_rows_of_a_file_are_the_loaders(wiki):
    rows = rows_of_text(wiki.documents[0])
    assert rows[:3] == ["", " = A 0 = \n", ""] and "".join(articles(wiki.documents[0])) == wiki.documents[0]
    assert len(articles(wiki.documents[0])) == 12 and articles("a = b\nc") == ["a = b\nc"]
    assert rows_of_text("a\u2028b\nc") == ["a\u2028b\n", "c"], "only a new line ends a row"


# --- trained models --------------------------------------------------------------------------------------------------


def test_the_bundled_model_against_a_plain_loop():
    source = inspect_source("bundled")
    model, tokenizer, corpus = load_model(source), load_tokenizer(source), bundled_corpus("evaluation")
    corpus = replace(corpus, documents=corpus.documents[:3])
    text = "\n\n".join(corpus.documents)
    ids = torch.tensor(tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"])[: 4 * 512].view(4, 512)
    expected = torch.cat([losses(model, row) for row in ids]).double().mean().exp().item()
    report = evaluate_loss(model, sequences(corpus, tokenizer, Cut("wikitext2-2048", n_windows=4), context=512))
    assert report.perplexity == pytest.approx(expected, abs=1e-4)


@pytest.mark.shared
@pytest.mark.parametrize("text, protocol, n_tokens, loss, bits_per_byte", [
    ("tinystories/dev.jsonl.gz", "rows", 19_820, 1.6000, 1.153),
    ("alpaca/dev.jsonl.gz", "rows", 19_850, 4.3492, 3.923),
    ("wikitext2/valid.txt", "windows", 19_929, 5.5174, 4.939),
])  # fmt: skip
def test_the_shared_models_table(text, protocol, n_tokens, loss, bits_per_byte):
    if not SHARED.is_dir():
        pytest.skip("the shared models are not beside this checkout")
    source = inspect_source(SHARED / "models/stories260K")
    model, tokenizer = load_model(source), load_tokenizer(source)
    corpus = read_corpus(SHARED / "data" / text, "evaluation")
    cut = sequences(corpus, tokenizer, Cut(protocol, n_tokens=20_000), context=source.context_length)
    report = evaluate_loss(model, cut)
    assert report.n_tokens == n_tokens and report.loss == pytest.approx(loss, abs=6e-5)
    assert report.bits_per_byte == pytest.approx(bits_per_byte, abs=6e-4)
    independent = [losses(model, row[: int(p.sum()) + 1]) for row, p in zip(cut.ids, cut.predicted, strict=True)]
    perplexity = torch.cat(independent).double().mean().exp().item()
    assert report.perplexity == pytest.approx(perplexity, abs=1e-4 * max(1.0, perplexity / 5))
