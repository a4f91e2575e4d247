"""A joint search as one HTML page, and as a section of the report of a run that took a plan from it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpruner.report import joint_words as words
from qpruner.report.canvas import require_plotly
from qpruner.report.document import Numbers, document, drawing, escaped, html_table
from qpruner.report.facts import bytes_text
from qpruner.report.joint import LIMITS_HEAD, JointFacts, joint_title, limit_rows
from qpruner.report.joint_costs import draw_gate_training, draw_gates, draw_sensitivities
from qpruner.report.joint_layers import draw_layers
from qpruner.report.joint_trials import draw_convergence, draw_front, draw_predictions

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MEANING = (
    "Loss is how far predictions move from those of the original (KL divergence, nats per token); 0 is no difference."
)


@dataclass(frozen=True)
class Picture:
    """reading: how to read it. missing: the sentence in its place when its facts are absent."""

    title: str
    reading: str
    missing: str
    present: Callable[[JointFacts], bool]
    draw: Callable[[JointFacts], "Figure"]
    numbers: Callable[[JointFacts], Numbers]


PICTURES = {
    "joint-front": Picture(
        "Size against loss",
        "Lower left is better. Each mark is a plan that was tried, open where it was given up early; the line is the "
        "best at each size, rings are the plans chosen (square where the loss is predicted), and the other lines are "
        "other ways of searching on the same text.",
        "There are no trials to draw.",
        lambda f: True,
        draw_front,
        words.front,
    ),
    "joint-sensitivities": Picture(
        "What each choice costs",
        "Each cell is how far predictions move when that choice alone is made and all else stays as it was; the "
        "scale of colours is logarithmic, and ≈ marks what was estimated from gradients and not measured.",
        "What each choice costs is left out: this search did not keep it.",
        lambda f: bool(f.sensitivities),
        draw_sensitivities,
        words.sensitivities,
    ),
    "joint-gate-training": Picture(
        "Training the gates",
        "The gates learn what to leave out while the size is pressed down; dashed lines are the sizes asked for.",
        "The training of gates is left out: this search trained none.",
        lambda f: f.gates is not None and bool(f.gates.curve),
        draw_gate_training,
        words.gate_training,
    ),
    "joint-gates": Picture(
        "What the gates left of each layer",
        "A row for each size asked for; the stronger a colour, the more weights (above) or bits (below).",
        "What gates left is left out: this search trained none.",
        lambda f: f.gates is not None and any(f.gates.at.values()),
        draw_gates,
        words.gates,
    ),
    "joint-random": Picture(
        "Predicted from single choices",
        "Each mark is a random plan: the nearer to the dashed line, the better its loss was foretold by what its "
        "choices cost one by one.",
        "This picture is left out: no random plans were predicted and measured.",
        lambda f: any(p.measured is not None for p in f.random_plans),
        lambda f: draw_predictions(f.random_plans),
        lambda f: words.predictions(f.random_plans),
    ),
    "joint-surrogate": Picture(
        "Predicted by the surrogate",
        "Each mark is a trial of the search, with the loss that its model of earlier trials foretold.",
        "This picture is left out: no trial was proposed by a surrogate.",
        lambda f: any(p.measured is not None for p in f.surrogate),
        lambda f: draw_predictions(f.surrogate),
        lambda f: words.predictions(f.surrogate),
    ),
    "joint-convergence": Picture(
        "Convergence",
        "For each size asked for, the lowest loss so far; a line that has long been flat would gain little from more "
        "trials. Diamonds are the best control at that size.",
        "Convergence is left out: no size was asked for.",
        lambda f: bool(f.limits),
        draw_convergence,
        words.convergence,
    ),
}  # fmt: skip
PAIRS = (("joint-gate-training", "joint-gates"), ("joint-random", "joint-surrogate"))


def joint_page(facts: JointFacts) -> str:
    """The whole search as HTML, plotly.js inside.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    require_plotly()
    body = "\n".join(
        [
            f"<header><h1>{escaped(joint_title(facts))}</h1><p class=lead>{escaped(_lead(facts))}</p></header>",
            _warnings(facts),
            f"<section class=top><h2>What each size costs</h2>{_limits(facts)}"
            f"<p class=small>{escaped(MEANING)} {escaped(facts.protocol)}</p></section>",
            f"<section><h2>Every plan that was tried</h2>"
            f"<p>{escaped(words.front(facts).sentence)}</p>{_figure('joint-front', facts)}"
            f"{_figure('joint-convergence', facts)}</section>",
            _chosen(facts.limits),
            f"<section><h2>Can predictions be trusted?</h2>{_trust(facts)}{_pair(PAIRS[1], facts)}</section>",
            f"<section><h2>What single layers can do without</h2>{_figure('joint-sensitivities', facts)}"
            f"{_pair(PAIRS[0], facts)}</section>",
            _run(facts),
        ]
    )
    return document(joint_title(facts), body)


def section(facts: JointFacts, size_bytes: int | None = None) -> str:
    """The search inside the page of a run. size_bytes: what was asked of it; the plan is drawn if the search has it."""
    return (
        f"<section><h2>The search behind it</h2>{_limits(facts)}<p class=small>{escaped(MEANING)} "
        f"{escaped(facts.protocol)}</p>{_figure('joint-front', facts)}{_figure('joint-convergence', facts)}</section>"
        + _chosen([limit for limit in facts.limits if limit.size_bytes == size_bytes])
        + f"<section><h2>What the search knew</h2>{_trust(facts)}{_pair(PAIRS[1], facts)}"
        f"{_figure('joint-sensitivities', facts)}{_pair(PAIRS[0], facts)}</section>"
    )


def _lead(facts: JointFacts) -> str:
    return (
        f"The original is stored in {bytes_text(facts.dense_bytes)}, at 16 bits in {bytes_text(facts.bytes_16bit)}, "
        f"and has {facts.n_layers} layers. Percentages are of the size at 16 bits; seed {facts.seed}."
    )


def _warnings(facts: JointFacts) -> str:
    if not facts.warnings:
        return ""
    items = "".join(f"<li>{escaped(s)}</li>" for s in facts.warnings)
    return f"<aside class=warnings aria-labelledby=warnings><h2 id=warnings>Warnings</h2><ul>{items}</ul></aside>"


def _limits(facts: JointFacts) -> str:
    """A row per limit; on a narrow screen each becomes a block, whose lines carry the heads."""
    head = (*LIMITS_HEAD, "make it")
    lines = ""
    for limit, row in zip(facts.limits, limit_rows(facts), strict=True):
        command = "".join(f"<span>{escaped(word)}</span> " for word in limit.command.split())  # breaks between words
        cells = [*map(escaped, row[1:]), f"<code>{command}</code>" if command else ""]
        lines += f"<tr><th scope=row>{escaped(row[0])}</th>"
        lines += "".join(
            f'<td data-head="{escaped(name)}">{cell}</td>' for name, cell in zip(head[1:], cells, strict=True)
        )
        lines += "</tr>"
    top = "".join(f"<th scope=col>{escaped(h)}</th>" for h in head)
    return f"<table class=limits><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"


def _figure(name: str, facts: JointFacts) -> str:
    p = PICTURES[name]
    if not p.present(facts):
        return f"<p class=absent>{escaped(p.missing)}</p>"
    return drawing(name, p.title, p.reading, p.draw(facts), p.numbers(facts))


def _trust(facts: JointFacts) -> str:
    said = (("Sensitivities", facts.random_plans), ("Surrogate", facts.surrogate))
    return "".join(f"<p>{escaped(f'{who}: {words.trust(p)}')}</p>" for who, p in said if p)


def _pair(names: tuple[str, str], facts: JointFacts) -> str:
    return f"<div class=pair>{''.join(f'<div>{_figure(name, facts)}</div>' for name in names)}</div>"


def _chosen(limits) -> str:
    drawn = [limit for limit in limits if limit.layers]
    if not drawn:
        return ""
    reading = (
        "A row for each layer. Bars are as long as the share of its units that stays, in a piece for each projection "
        "as wide as its share of the weights; colour and number are the bits."
    )
    figures = "".join(
        drawing(
            f"joint-layers-{i}", f"Chosen for {limit.text}", reading if i == 0 else "", draw_layers(limit),
            words.layers(limit),
        )
        for i, limit in enumerate(drawn)
    )  # fmt: skip
    return f"<section><h2>What stays, and at how many bits</h2>{figures}</section>"


def _run(facts: JointFacts) -> str:
    cost = ""
    if facts.passes_per_trial is not None:
        cost = f"<dt>Cost of a trial</dt><dd>{facts.passes_per_trial:.2f} passes over the search text on the mean</dd>"
    seconds = [(s.name, f"{s.seconds:,.1f}") for s in facts.stages]
    seconds.append(("all", f"{sum(s.seconds for s in facts.stages):,.1f}"))
    stages = html_table(("stage", "seconds"), seconds, "narrow") if facts.stages else ""
    notes = "".join(f"<li>{escaped(n)}</li>" for n in facts.notes)
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return (
        f"<section><h2>The run</h2><p>To repeat it:</p><pre><code>{escaped(facts.command)}</code></pre>"
        f"<dl>{cost}<dt>Machine</dt><dd>{escaped(facts.machine)}</dd><dt>Versions</dt><dd>{escaped(versions)}</dd>"
        f"<dt>Seed</dt><dd>{facts.seed}</dd></dl>{stages}"
        f"{f'<h3>Notes</h3><ul>{notes}</ul>' if notes else ''}</section>"
    )
