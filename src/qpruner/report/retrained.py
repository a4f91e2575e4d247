"""The report of `recover`: what training beside a finished artifact gained, as facts, a table and a page."""

from typing import TYPE_CHECKING, Literal

from qpruner.report.charts import CHARTS
from qpruner.report.document import document, drawing, escaped, html_table
from qpruner.report.facts import Metric, Recovered, Saved, Stage, before_after, bytes_text, measured_text
from qpruner.report.page import NUMBERS, before_after_table

if TYPE_CHECKING:
    from rich.table import Table


class RetrainedFacts(Saved):
    """Everything in the report of `recover`.

    model_name: of the artifact that was trained. teacher: the original whose predictions were learned, if any.
    adapters: how they are stored now; losses: on the search text, of every way that was tried.
    original_loss: of the teacher on the evaluation text. metrics: before and after training.
    """

    format_version: Literal[1] = 1
    model_name: str
    teacher: str | None
    recipe: str
    seed: int
    versions: dict[str, str]
    machine: str
    command: str
    size_before: int
    size_after: int
    adapters: Literal["beside", "merged"]
    losses: dict[str, float]
    trained_parameters: int
    original_loss: float | None
    metrics: tuple[Metric, ...]
    protocol: str
    recovery: Recovered
    stages: tuple[Stage, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    loads_in: str
    snippet: str

    def metric(self, name: str) -> Metric | None:
        return next((m for m in self.metrics if m.name == name), None)

    @property
    def recovered(self) -> float | None:
        """Of what the artifact had lost to the original on the evaluation text, the fraction that came back."""
        loss = self.metric("loss")
        if self.original_loss is None or loss is None or None in (loss.before, loss.after):
            return None
        lost = loss.before - self.original_loss
        return (loss.before - loss.after) / lost if lost > 0 else None


def retrained_title(facts: RetrainedFacts) -> str:
    loss = facts.metric("loss")
    return f"{facts.model_name}, trained: loss {loss.before:.4f} → {loss.after:.4f} {loss.unit}"


def sentences(facts: RetrainedFacts) -> list[str]:
    """What came of it."""
    said = []
    if facts.recovered is not None:
        said.append(
            f"{facts.recovered:.0%} of what the artifact had lost came back: the original's loss is "
            f"{measured_text(facts.original_loss)} nats per token."
        )
    how = {"beside": "stored beside the base", "merged": "merged into the base"}[facts.adapters]
    said.append(
        f"{facts.trained_parameters:,} parameters of adapters were trained and are {how}; the files hold "
        f"{bytes_text(facts.size_after)}, {bytes_text(facts.size_before)} before."
    )
    if len(facts.losses) > 1:
        tried = ", ".join(f"{way} {loss:.4f}" for way, loss in facts.losses.items())
        said.append(f"Loss on the search text of what was tried: {tried}.")
    return said


def retrained_table(facts: RetrainedFacts) -> "Table":
    """For a terminal."""
    from rich.text import Text

    table = before_after_table(retrained_title(facts), before_after(facts))
    said = [*(f"Warning: {sentence}" for sentence in facts.warnings), *sentences(facts)]
    table.caption = Text("\n".join(said), style="not italic")
    return table


def retrained_page(facts: RetrainedFacts) -> str:
    """The whole report as HTML, plotly.js inside."""
    taught = f"Taught by {facts.teacher}" if facts.teacher else "Trained on the next token"
    paragraphs = "".join(f"<p>{escaped(s)}</p>" for s in sentences(facts))
    warned = "".join(f"<li>{escaped(s)}</li>" for s in facts.warnings)
    body = "\n".join(
        [
            f"<header><h1>{escaped(retrained_title(facts))}</h1>"
            f"<p class=lead>{escaped(f'{taught}; recipe {facts.recipe}, seed {facts.seed}.')}</p></header>",
            f"<aside class=warnings aria-labelledby=warnings><h2 id=warnings>Warnings</h2><ul>{warned}</ul></aside>"
            if warned
            else "",
            "<section class=top><h2>Before and after</h2>",
            html_table(("", "before", "after", "change"), before_after(facts), "before-after"),
            f"<p class=small>{escaped(facts.protocol)}</p>{paragraphs}</section>",
            f"<section><h2>Training</h2>{_curve(facts)}</section>",
            f"<section><h2>Use it</h2><p>{escaped(facts.loads_in)}</p>"
            f"<pre><code>{escaped(facts.snippet)}</code></pre></section>",
            _run(facts),
        ]
    )
    return document(retrained_title(facts), body)


def _curve(facts: RetrainedFacts) -> str:
    chart = CHARTS["recovery"]
    if not facts.recovery.curve:
        return f"<p class=absent>{escaped(chart.missing)}</p>"
    return drawing("recovery", chart.title, chart.reading, chart.draw(facts), NUMBERS["recovery"](facts))


def _run(facts: RetrainedFacts) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    stages = html_table(("stage", "seconds"), [(s.name, f"{s.seconds:,.1f}") for s in facts.stages], "narrow")
    notes = "".join(f"<li>{escaped(n)}</li>" for n in facts.notes)
    return (
        f"<section><h2>The run</h2><p>To repeat it:</p><pre><code>{escaped(facts.command)}</code></pre>"
        f"<dl><dt>Machine</dt><dd>{escaped(facts.machine)}</dd><dt>Versions</dt><dd>{escaped(versions)}</dd>"
        f"<dt>Seed</dt><dd>{facts.seed}</dd></dl>{stages}"
        f"{f'<h3>Notes</h3><ul>{notes}</ul>' if notes else ''}</section>"
    )
