"""Texts that share their wording: what is found, what is none of it, and what an artifact remembers."""

import random
from pathlib import Path

import numpy as np
import pytest

from qpruner.errors import CorpusError
from qpruner.model import ngrams
from qpruner.model.corpus import Corpus, bundled_corpus, read_corpus
from qpruner.model.ngrams import COMMON, SKETCH, WORDS, Sketch, ngrams_of, shared
from qpruner.model.overlap import check_disjoint, check_unseen, fingerprints

DATA = Path(__file__).parents[2] / "shared/data"


def words(n: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(f"{draw.choice('abcdefgh')}{draw.randrange(300)}" for _ in range(n))


def edited(text: str, share: float) -> str:
    draw = random.Random(1)
    return " ".join("other" if draw.random() < share else word for word in text.split(" "))


def corpus(*documents: str, role="calibration", name="text") -> Corpus:
    return Corpus(name, role, documents)


def by_hand(documents) -> set[tuple[str, ...]]:
    found = set()
    for document in documents:
        each = "".join(c if c.isalnum() else " " for c in document.lower()).split()
        found |= {tuple(each[i : i + WORDS]) for i in range(len(each) - WORDS + 1)}
    return found


# --- runs of words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [40, 1000, 1 << 20])
def test_runs_are_those_that_are_counted_by_hand(monkeypatch, piece):
    """However the text is cut into pieces on the way, and whatever stands between the words."""
    monkeypatch.setattr(ngrams, "PIECE", piece)
    phrase = words(40, 7)
    first = [words(90), "short one", f"Ärger, {phrase.upper()}; straße!", "", words(13, 2), words(500, 3)]
    second = [f"so:\n\n{phrase.replace(' ', ' - ')}.", words(120, 4), words(13, 2)]
    a, b = by_hand(first), by_hand(second)
    assert len(a & b) == 28 + 1
    found = shared(ngrams_of(first), ngrams_of(second))
    assert len(ngrams_of(first).hashes) == len(a) and len(ngrams_of(second).hashes) == len(b)
    assert len(found.hashes) == len(a & b) and found.share == len(a & b) / len(b)


def test_sharing_has_no_direction_and_a_part_is_all_shared():
    whole = words(2000)
    a, b = ngrams_of([whole]), ngrams_of([" ".join(whole.split()[300:700])])
    assert shared(a, b).share == shared(b, a).share == 1.0
    assert shared(a, ngrams_of([words(2000, 1)])).share == 0.0
    assert shared(a, ngrams_of([])).share == shared(a, ngrams_of(["too short"])).share == 0.0


def test_order_of_documents_does_not_matter_and_copies_count_once():
    documents = [words(100, seed) for seed in range(30)]
    a, b = ngrams_of(documents), ngrams_of([*reversed(documents), *documents])
    assert np.array_equal(a.hashes, b.hashes) and np.array_equal(a.documents, b.documents)


def test_scripts_without_spaces_are_read_character_by_character():
    draw = random.Random(0)
    text = "".join(chr(draw.randrange(0x4E00, 0x9000)) for _ in range(3000))
    a = ngrams_of([text])
    assert len(a.hashes) == 3000 - WORDS + 1
    assert shared(a, ngrams_of([text[500:900]])).share == 1.0


@pytest.mark.parametrize("times, share", [(COMMON - 1, 0.32), (COMMON, 0.0)])
def test_what_many_documents_say_is_a_template(times, share):
    template = words(40)
    rows = [f"{template} {words(20, 1 + seed)}" for seed in range(times)]
    one = f"{template} {words(58, 99)}"
    found = shared(ngrams_of(rows), ngrams_of([one]))
    assert found.share == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("others", [(), (words(50, 2),)])
def test_a_document_that_repeats_itself_makes_no_template(others):
    phrase = words(40)
    found = ngrams_of([" , ".join([phrase] * (2 * COMMON)), *others])
    assert set(found.documents) == {1}
    assert shared(found, ngrams_of([phrase])).share == 1.0


def test_of_a_long_text_a_choice_is_kept_that_tells_the_same_share(monkeypatch):
    text = words(20_000)
    half = text[: len(text) // 2] + words(10_000, 5)
    exact = shared(ngrams_of([text]), ngrams_of([half])).share
    monkeypatch.setattr(ngrams, "MOST", 2000)
    monkeypatch.setattr(ngrams, "PIECE", 10_000)
    a, b = ngrams_of([text]), ngrams_of([half[:30_000]])
    assert len(a.hashes) <= 2000 and a.total == pytest.approx(20_000, rel=0.1)
    assert shared(a, ngrams_of([half])).share == pytest.approx(exact, abs=0.05) and exact > 0.4
    assert b.shift < a.shift and shared(a, b).share == shared(b, a).share == 1.0


# --- corpora ---------------------------------------------------------------------------------------------------------


def test_an_edited_a_shuffled_and_a_contained_text_are_refused():
    lines = [words(30, seed) for seed in range(100)]
    text = corpus("\n".join(lines), name="whole")
    part = lines[20:60]
    random.Random(0).shuffle(part)
    check_disjoint(text, corpus(words(3000, 999), role="search"))
    for other in (edited("\n".join(lines), 0.05), "\n".join(part), "before " + lines[50] + " after " + lines[3]):
        with pytest.raises(CorpusError, match=r"'whole' \(calibration\) and 'other' \(evaluation\) share \d+% of the"):
            check_disjoint(text, corpus(other, role="evaluation", name="other"))


def test_the_refusal_shows_the_words():
    phrase = words(20, 3)
    first = corpus(f"one {words(30, 1)} {phrase}", words(50, 2))
    second = corpus(f"two {words(5, 4)} {phrase} {words(5, 5)}", role="search")
    with pytest.raises(CorpusError, match=f"such as '{phrase[:77]}"):
        check_disjoint(first, second)


def test_a_quotation_is_no_overlap():
    phrase = words(20)
    check_disjoint(corpus(words(500, 1) + phrase), corpus(phrase + words(500, 2), role="search"))


def test_texts_that_belong_together_are_not_taken_for_one_another():
    parts = [bundled_corpus(role) for role in ("calibration", "search", "evaluation")]
    check_disjoint(*parts)
    made = {"fingerprints": fingerprints(*parts)}
    assert list(made["fingerprints"]) == ["calibration", "search"]
    check_unseen(made, parts[2])


PAIRS = {
    "wikitext2": ("valid.txt", "test_a.txt"),
    "tinystories": ("train.jsonl.gz", "dev.jsonl.gz"),
    "c4": ("calib.jsonl.gz", "dev.jsonl.gz"),
    "alpaca": ("train.jsonl.gz", "dev.jsonl.gz"),
}


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared texts are not beside this checkout")
@pytest.mark.parametrize("name", PAIRS)
def test_two_splits_of_a_published_text_pass_and_an_edit_of_one_does_not(name):
    first, second = PAIRS[name]
    first, second = read_corpus(DATA / name / first, "calibration"), read_corpus(DATA / name / second, "evaluation")
    check_disjoint(first, second)
    made = {"fingerprints": fingerprints(first)}
    check_unseen(made, second)
    copied = corpus(*(edited(document, 0.05) for document in first.documents), role="evaluation")
    with pytest.raises(CorpusError, match="of the runs of 13 words"):
        check_disjoint(first, copied)
    with pytest.raises(CorpusError, match="of the runs of 13 words"):
        check_unseen(made, copied)


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_a_sketch_tells_the_share_of_the_whole_and_survives_json():
    text = words(30_000)
    whole = ngrams_of([text])
    sketch = Sketch.from_json(whole.sketch().to_json())
    assert len(sketch.hashes) == SKETCH and np.array_equal(sketch.hashes, whole.sketch().hashes)
    for part in (text[:60_000], edited(text, 0.03)):
        other = ngrams_of([part])
        assert sketch.shared_with(other).share == pytest.approx(shared(whole, other).share, abs=0.05)
    assert sketch.shared_with(ngrams_of([words(30_000, 1)])).share == 0.0


def test_a_short_text_is_sketched_whole():
    short = ngrams_of([words(100)])
    assert short.sketch().shared_with(ngrams_of([f"{words(100)} {words(5000, 1)}"])).share == 1.0


def test_an_artifact_is_not_judged_on_what_it_was_made_with():
    texts = [corpus(words(5000, i), role=role) for i, role in enumerate(("calibration", "search", "evaluation"))]
    manifest = {"digests": {"texts": {text.role: text.digest for text in texts}}, "fingerprints": fingerprints(*texts)}
    old = {"digests": manifest["digests"]}
    again = corpus(*texts[2].documents, role="evaluation")
    check_unseen(manifest, again)  # the text that it was judged on may judge it again
    check_unseen({}, again)
    for role, text in zip(("calibration", "search"), texts, strict=False):
        same = corpus(*text.documents, role="evaluation", name="mine.txt")
        for each in (manifest, old):
            with pytest.raises(CorpusError, match=f"'mine.txt' is the {role} text that this artifact was made with"):
                check_unseen(each, same)
        touched = corpus(edited(text.documents[0], 0.04), role="evaluation", name="mine.txt")
        with pytest.raises(CorpusError, match=rf"'mine.txt' shares about \d+% of .*, with the {role} text that this"):
            check_unseen(manifest, touched)
        check_unseen(old, touched)


@pytest.mark.parametrize("change", [{"words": 8}, {"smallest": "?"}, {"smallest": "AAAA"}, {"total": None}])
def test_a_fingerprint_of_another_make_is_passed_over(change):
    made = fingerprints(corpus(words(500)))
    check_unseen({"fingerprints": {"calibration": made["calibration"] | change}}, corpus(words(500), role="evaluation"))
