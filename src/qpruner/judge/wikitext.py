"""WikiText as the field reads it: its rows, its articles, and its tokeniser undone.

WikiText is published as running text with spaces around punctuation, a line for each paragraph and for each heading.
"""

import re

ARTICLE = re.compile(r" = [^=\n](?:.*[^=\n])? = \n?")  # the heading of an article, as a row

# In this order, as Megatron-LM and lm-evaluation-harness have them (tasks/wikitext/preprocess_wikitext.py).
RULES: tuple[tuple[str, str], ...] = tuple(
    (re.escape(old), new.replace("\\", r"\\")) for old, new in (
        ("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."),
        (" : ", ": "), (" ; ", "; "), (" . ", ". "), (" ! ", "! "), (" ? ", "? "), (" , ", ", "),
    )
) + (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"), (r"\[\s*([^\]]*?)\s*\]", r"[\1]"), (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'), (r"'\s*([^']*?)\s*'", r"'\1'"),
) + tuple(
    (re.escape(old), new) for old, new in (
        ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"),
        (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
    )
)  # fmt: skip


def detokenised(text: str) -> str:
    """The text without what WikiText's tokeniser put in: spaces before punctuation, @-@ inside words, and the like."""
    for pattern, new in RULES:
        text = re.sub(pattern, new, text)
    return text


def rows_of_text(text: str) -> list[str]:
    """Rows as the data set's loader gives them: lines with their ends, and nothing at all for a blank line."""
    return [line if line.strip() else "" for line in _lines(text)]


def by_article(rows: list[str]) -> list[list[str]]:
    """Rows in groups that begin at the heading of an article; each by itself where there are no headings.

    What stands before the first heading goes with the first article.
    """
    starts = _headings(rows)
    if not starts:
        return [[row] for row in rows]
    bounds = [0, *starts[1:], len(rows)]
    return [rows[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]


def articles(text: str) -> list[str]:
    """A running text in pieces that begin at the heading of an article; whole where there are no headings."""
    lines = _lines(text)
    return ["".join(group) for group in by_article(lines)] if _headings(lines) else [text]


def _headings(rows: list[str]) -> list[int]:
    """Numbers of the rows that are headings of articles; none where there is only one."""
    found = [number for number, row in enumerate(rows) if ARTICLE.fullmatch(row)]
    return found if len(found) > 1 else []


def _lines(text: str) -> list[str]:
    """With their ends, as a file gives them: `splitlines` would also cut at characters inside a paragraph."""
    lines = text.split("\n")
    return [line + "\n" for line in lines[:-1]] + [line for line in lines[-1:] if line]
