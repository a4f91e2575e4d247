"""Whether one text was used where another should have been: equal documents, and words in a row that both have.

A model that is judged on text that shaped it looks better than it is, and a light edit does not change that. What
shaped an artifact leaves a fingerprint in its manifest, so that it is known later, too.
"""

from collections.abc import Mapping

from qpruner.errors import CorpusError
from qpruner.model import ngrams
from qpruner.model.corpus import Corpus, essence

# Of the shorter text's runs of words. Modules of one library share up to 4 %, stories of one collection 0.1 %; with
# every tenth word changed, 14 to 27 % of a text's runs are still there.
MOST_SHARED = 0.1
MOST_SKETCHED = 0.2  # of a sample of them: 4 % of the whole look like more in a few
FEWEST = 4  # runs: less is a quotation, or chance

MADE_WITH = ("calibration", "search")  # roles of texts that shape an artifact


def check_disjoint(*corpora: Corpus) -> None:
    """Refuse corpora of different roles that share a document, or much of their wording.

    Raises:
        CorpusError: it names the two corpora, and says what they share and how much.
    """
    for i, first in enumerate(corpora):
        for second in corpora[i + 1 :]:
            if first.role != second.role and (what := _shared(first, second)):
                raise CorpusError(
                    f"{_named(first)} and {_named(second)} {what}. A model judged on text that shaped it looks better "
                    "than it is: give another file for one of the two."
                )


def fingerprints(*corpora: Corpus) -> dict[str, dict]:
    """Of the corpora that shape an artifact, by role, as JSON: enough for `check_unseen`."""
    return {corpus.role: corpus.ngrams.sketch().to_json() for corpus in corpora if corpus.role in MADE_WITH}


def check_unseen(manifest: Mapping, corpus: Corpus) -> None:
    """Refuse to judge an artifact on text that it was made with.

    A text of a few pages out of a large one goes unnoticed: the fingerprint holds a thousand runs of words.

    Args:
        manifest: of the artifact. Those of earlier versions have digests alone, which tell equal texts.
    Raises:
        CorpusError: it says which text of the artifact this is, and how much of it.
    """
    digests = manifest.get("digests", {}).get("texts", {})
    fingerprints = manifest.get("fingerprints", {})
    for role in MADE_WITH:
        sketch = ngrams.Sketch.from_json(fingerprints[role]) if role in fingerprints else None
        if digests.get(role) == corpus.digest:
            what = "is"
        elif sketch is not None and _too_much(both := sketch.shared_with(corpus.ngrams), MOST_SKETCHED):
            what = f"shares about {_in_words(both, corpus)}, with"
        else:
            continue
        raise CorpusError(
            f"{corpus.name!r} {what} the {role} text that this artifact was made with. A model judged on text that "
            "shaped it looks better than it is: judge it on another file."
        )


def _too_much(both: ngrams.Shared, most: float) -> bool:
    return both.share >= most and len(both.hashes) >= FEWEST


def _shared(first: Corpus, second: Corpus) -> str | None:
    """What two corpora have in common, if that is too much."""
    if first.digest == second.digest:
        return "are the same text"
    equal = {essence(d): d for d in first.documents}.keys() & {essence(d) for d in second.documents}
    if equal:
        document = next(d for d in first.documents if essence(d) in equal).strip()[:40]
        return f"share {len(equal)} document(s), such as {document!r}"
    both = ngrams.shared(first.ngrams, second.ngrams)
    return f"share {_in_words(both, first)}" if _too_much(both, MOST_SHARED) else None


def _in_words(both: ngrams.Shared, corpus: Corpus) -> str:
    shown = ngrams.example(corpus.documents, both.hashes)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"{both.share:.0%} of the runs of {ngrams.WORDS} words that the shorter one has, such as {shown!r}"


def _named(corpus: Corpus) -> str:
    return f"{corpus.name!r} ({corpus.role})"
