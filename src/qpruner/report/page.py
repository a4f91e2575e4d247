"""Facts as one HTML page that needs nothing else: no network, no server, any screen, paper.

Every chart has a sentence on how to read it, a sentence that says what it shows, and its numbers as a table.
"""

import json
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from qpruner.report.canvas import DARK, KINDS
from qpruner.report.charts import CHARTS, absent, charts
from qpruner.report.facts import Facts, all_warnings, before_after, bytes_text, title

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Numbers:
    """A chart for those who do not see it: what it shows in one sentence, and its values."""

    sentence: str
    head: tuple[str, ...]
    rows: list[tuple]


def _sizes(facts: Facts) -> Numbers:
    sizes = facts.sizes
    whole = {"16-bit original": sizes.original_16bit, "asked": sizes.asked, "predicted": sizes.predicted}
    whole["on disk"] = sizes.on_disk
    rows = [(name, size) for name, size in whole.items()]
    rows += [(f"on disk: {name}", size) for name, size in sizes.parts().items()]
    return Numbers("; ".join(f"{n} {bytes_text(v)}" for n, v in whole.items()) + ".", ("size", "bytes"), rows)


def _plan(facts: Facts) -> Numbers:
    said = []
    for word, counts in (
        ("kv groups", [(la.kv_groups_kept, la.kv_groups_total) for la in facts.layers]),
        ("channels", [(la.channels_kept, la.channels_total) for la in facts.layers]),
    ):
        shares = [kept / total for kept, total in counts if total]
        if shares:
            said.append(f"layers keep {min(shares):.0%} to {max(shares):.0%} of their {word}")
    for bits in sorted({p.bits for p in facts.projections}):
        said.append(f"{sum(p.bits == bits for p in facts.projections)} projections at {bits} bits")
    rows = []
    for la in facts.layers:
        bits = facts.bits_per_weight(la.index)
        kept = (f"{la.kv_groups_kept} of {la.kv_groups_total}", f"{la.channels_kept} of {la.channels_total}")
        rows.append((f"layer {la.index}", *kept, "protected" if la.protected else "", "", bits, None, None))
        for p in facts.projections:
            if p.layer == la.index:
                rows.append((p.name, "", "", "", p.bits, p.bits_per_weight, p.parameters, p.size_bytes))
    head = (
        "where",
        "kv groups kept",
        "channels kept",
        "",
        "bits",
        "bits per weight, scales included",
        "weights",
        "bytes",
    )
    return Numbers(_sentence(said), head, rows)


def _importance(facts: Facts) -> Numbers:
    rows, overlap = [], 0
    for g in facts.importance:
        points = list(zip(g.curve.score, g.curve.kept, strict=True))
        removed = max((s for s, k in points if not k), default=None)
        stays = min((s for s, k in points if k), default=None)
        overlap += removed is not None and stays is not None and removed > stays
        scores = (min(g.curve.score), removed, stays, max(g.curve.score))
        rows.append((g.group, KINDS[g.kind], f"{g.curve.n_kept} of {g.curve.n_units}", *scores))
    cut = sum(g.curve.n_kept < g.curve.n_units for g in facts.importance)
    said = [f"{cut} of {len(rows)} groups were cut", f"in {overlap} of them a removed unit scores above a kept one"]
    return Numbers(
        _sentence(said), ("group", "kind", "kept", "lowest score", "highest removed", "lowest kept", "highest"), rows
    )


def _fusion(facts: Facts) -> Numbers:
    fusion = facts.fusion
    said = [f"taken: {fusion.way}"]
    said += [f"{way} {loss:.4f}" for way, loss in sorted(fusion.losses.items(), key=lambda item: item[1])]
    said = [said[0], "losses on the search text: " + ", ".join(said[1:])] if fusion.losses else said
    rows = [(b.group, KINDS[b.kind], b.way, b.fine) for b in fusion.blend if b.way in ("learned", fusion.way)]
    return Numbers(_sentence(said), ("group", "kind", "way", "weight of the fine score"), rows)


def _reconstruction(facts: Facts) -> Numbers:
    rows = [
        (r.linear, r.choice, r.damping, r.condition, r.error_sliced, r.error, r.tokens) for r in facts.reconstruction
    ]
    refitted = [r for r in facts.reconstruction if r.choice != "sliced" and r.error_sliced]
    stacks = [r for r in facts.reconstruction if r.experts is not None]
    said = [f"{len(refitted)} of {len(rows)} linears{' and stacks of experts' if stacks else ''} were refitted"]
    if refitted:
        gone = sum(1 - r.error / r.error_sliced for r in refitted) / len(refitted)
        said.append(f"on the mean {gone:.0%} of their squared error is gone")
    head = ("linear", "choice", "damping", "condition number", "error, sliced", "error, refitted", "tokens")
    if stacks:
        head += ("experts refitted",)
        rows = [(*row, r.experts) for row, r in zip(rows, facts.reconstruction, strict=True)]
    return Numbers(_sentence(said), head, rows)


def _rounding(facts: Facts) -> Numbers:
    known = [r for r in facts.rounding if r.tokens and r.error_nearest]
    rows = [(r.linear, r.spec, r.damping, r.error_nearest, r.error, r.tokens) for r in facts.rounding]
    said = [f"{len(known)} of {len(rows)} quantized linears were rounded for the inputs that they get"]
    if known:
        gone = sum(1 - r.error / r.error_nearest for r in known) / len(known)
        said.append(f"on the mean {gone:.0%} of the squared error of rounding to nearest is gone")
    return Numbers(_sentence(said), ("linear", "stored as", "damping", "error, nearest", "error", "tokens"), rows)


def _tuning(facts: Facts) -> Numbers:
    t = facts.tuning
    said = [f"divergence from the original on held-out calibration text from {t.before:.4f} to {t.after:.4f}"]
    if t.after >= t.before:
        said.append("that is no gain, so codes and scales stayed as rounding found them")
    return Numbers(_sentence(said), ("step", "divergence, nats/token"), [(p.step, p.loss) for p in t.curve])


def _information(facts: Facts) -> Numbers:
    rows = [(r.unit, r.nats, r.null_mean, r.null_std, r.z) for r in facts.information]
    most = max(facts.information, key=lambda r: r.nats)
    above = sum(r.z > 2 for r in facts.information)
    said = [
        f"{above} of {len(rows)} units stand more than 2 std above shuffled pairs",
        f"the most is in {most.unit}, {most.nats:.3g} nats",
    ]
    return Numbers(_sentence(said), ("unit", "nats", "shuffled mean", "shuffled std", "z"), rows)


def _sensitivities(facts: Facts) -> Numbers:
    most = max(facts.sensitivities, key=lambda r: r.nats)
    said = f"The costliest is {most.unit} at {most.bits} bits, {most.nats:.3g} nats per token."
    return Numbers(
        said, ("unit", "bits", "KL divergence, nats/token"), [(r.unit, r.bits, r.nats) for r in facts.sensitivities]
    )


def _search(facts: Facts) -> Numbers:
    search = facts.search
    rows = [
        (
            t.number,
            t.origin,
            t.size_bytes,
            t.loss,
            best,
            "yes" if t.number in search.front else "",
            "yes" if t.number == search.chosen else "",
        )
        for t, best in zip(search.trials, search.best_so_far(), strict=True)
    ]
    best = min(search.trials, key=lambda t: t.loss)
    said = [
        f"{len(rows)} trials, the lowest loss {best.loss:.4f} nats per token in trial {best.number} ({best.origin})",
        f"{len(search.front)} on the Pareto front",
    ]
    return Numbers(
        _sentence(said), ("trial", "origin", "bytes", "loss, nats/token", "best so far", "on the front", "chosen"), rows
    )


def _recovery(facts: Facts) -> Numbers:
    r = facts.recovery
    said = [
        f"training loss from {r.curve[0].loss:.3f} to {r.curve[-1].loss:.3f} nats per token in {len(r.curve)} steps"
    ]
    if r.loss_before is not None and r.loss_after is not None:
        said.append(f"loss on the search text from {r.loss_before:.4f} to {r.loss_after:.4f}")
    return Numbers(_sentence(said), ("step", "training loss, nats/token"), [(p.step, p.loss) for p in r.curve])


def _loftq(facts: Facts) -> Numbers:
    starts = facts.recovery.starts
    lower = sum(s.loftq < s.plain for s in starts)
    rows = [(s.linear, s.plain, s.loftq) for s in starts]
    return Numbers(
        f"LoftQ starts nearer in {lower} of {len(rows)} linears.", ("linear", "rounding alone", "LoftQ"), rows
    )


NUMBERS = {
    "sizes": _sizes,
    "plan": _plan,
    "importance": _importance,
    "fusion": _fusion,
    "reconstruction": _reconstruction,
    "rounding": _rounding,
    "tuning": _tuning,
    "information": _information,
    "sensitivities": _sensitivities,
    "search": _search,
    "pareto": _search,
    "recovery": _recovery,
    "loftq": _loftq,
}
SECTIONS = (
    ("What was cut and rounded", ("plan", "importance", "fusion", "reconstruction", "rounding", "tuning")),
    ("What the layers carry", ("information", "sensitivities")),
    ("The search", ("search", "pareto")),
    ("Recovery", ("recovery", "loftq")),
)


def _sentence(parts: list[str]) -> str:
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."


def page(facts: Facts) -> str:
    """The whole report as HTML, plotly.js inside.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    drawn, missing = charts(facts), absent(facts)
    figures = {name: _chart(name, figure, facts) for name, figure in drawn.items()}
    figures |= {name: f"<p class=absent>{_e(sentence)}</p>" for name, sentence in missing.items()}
    body = "\n".join(
        [
            f"<header><h1>{_e(title(facts))}</h1><p class=lead>{_e(_lead(facts))}</p></header>",
            _warnings(facts),
            "<section class=first>",
            f"<div><h2>Before and after</h2>{_before_after(facts)}<p class=small>{_e(facts.protocol)}</p></div>",
            f"<div><h2>Size</h2>{figures['sizes']}</div>",
            "</section>",
            f"<section><h2>Use it</h2><p>{_e(facts.loads_in)}</p><pre><code>{_e(facts.snippet)}</code></pre></section>",
            *(
                f"<section><h2>{_e(head)}</h2>{''.join(figures[n] for n in names)}</section>"
                for head, names in SECTIONS
            ),
            _run(facts),
        ]
    )
    return document(title(facts), body)


def document(name: str, body: str) -> str:
    """A whole page that needs nothing else."""
    from plotly.offline import get_plotlyjs

    parts = dict(style=STYLE, body=body, policy=POLICY, dark=_json(DARK), plotly=get_plotlyjs(), script=SCRIPT)
    return PAGE.format(title=_e(name), **parts)


def _lead(facts: Facts) -> str:
    share = facts.sizes.on_disk / facts.sizes.original_16bit if facts.sizes.original_16bit else 0
    return (
        f"Recipe {facts.recipe}, seed {facts.seed}. The files hold {share:.1%} of the bytes of the 16-bit original; "
        f"{facts.parameters_before:,} parameters before, {facts.parameters_after:,} after."
    )


def _warnings(facts: Facts) -> str:
    sentences = all_warnings(facts)
    if not sentences:
        return ""
    items = "".join(f"<li>{_e(s)}</li>" for s in sentences)
    return f"<aside class=warnings aria-labelledby=warnings><h2 id=warnings>Warnings</h2><ul>{items}</ul></aside>"


def _before_after(facts: Facts) -> str:
    whole = lambda text: text.replace("± ", "±\N{NO-BREAK SPACE}").replace(" %", "\N{NO-BREAK SPACE}%")
    rows = [(name, *map(whole, values)) for name, *values in before_after(facts)]
    return html_table(("", "before", "after", "change"), rows, "before-after")


def _chart(name: str, figure, facts: Facts) -> str:
    return drawing(name, CHARTS[name].title, CHARTS[name].reading, figure, NUMBERS[name](facts))


def drawing(name: str, heading: str, reading: str, figure, numbers: Numbers) -> str:
    """A figure with a sentence on how to read it, and its numbers in words and in a table."""
    wide = "wide" if any(trace.type == "heatmap" for trace in figure.data) else ""  # not readable at a phone's width
    said, height = _e(f"{heading}. {numbers.sentence}"), figure.layout.height
    return (
        f"<figure id={name}><h3>{_e(heading)}</h3><figcaption>{_e(reading)}</figcaption>"
        f'<div class=scroll><div class="chart {wide}" role=img aria-label="{said}" style="height:{height}px">'
        "</div></div>"
        f"<script type=application/json>{_json(figure.to_json())}</script>"
        f"<details><summary>In words and numbers</summary><p>{_e(numbers.sentence)}</p>"
        f"<div class=tall>{html_table(numbers.head, numbers.rows)}</div></details></figure>"
    )


def html_table(head: tuple[str, ...], rows: list[tuple], kind: str = "numbers") -> str:
    top = "".join(f"<th scope=col>{_e(h)}</th>" for h in head)
    lines = "".join(
        f"<tr><th scope=row>{_cell(row[0])}</th>" + "".join(f"<td>{_cell(v)}</td>" for v in row[1:]) + "</tr>"
        for row in rows
    )
    return f"<div class=scroll><table class={kind}><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.5g}".replace("-", "\N{MINUS SIGN}") if isinstance(value, float) else _e(value)


def _run(facts: Facts) -> str:
    seconds = [(s.name, s.seconds) for s in facts.stages] + [("all", sum(s.seconds for s in facts.stages))]
    stages = (
        html_table(("stage", "seconds"), [(name, f"{s:,.1f}") for name, s in seconds], "narrow") if facts.stages else ""
    )
    notes = "".join(f"<li>{_e(n)}</li>" for n in facts.notes)
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return (
        "<section><h2>The run</h2>"
        f"<p>To repeat it:</p><pre><code>{_e(facts.command)}</code></pre>"
        f"<dl><dt>Machine</dt><dd>{_e(facts.machine)}</dd><dt>Versions</dt><dd>{_e(versions)}</dd>"
        f"<dt>Seed</dt><dd>{facts.seed}</dd></dl>{stages}"
        f"{f'<h3>Notes</h3><ul>{notes}</ul>' if notes else ''}</section>"
    )


def text_table(facts: Facts) -> "Table":
    """The before/after table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title(facts)), title_justify="left")
    table.add_column("")
    for head in ("before", "after", "change"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in before_after(facts):
        table.add_row(*(Text(cell) for cell in row))
    return table


def _e(text) -> str:
    return escape(str(text), quote=True)


def _json(value) -> str:
    """JSON that cannot end the script element it stands in."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# Nothing may be fetched from anywhere: the browser itself holds the page to that.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

PAGE = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy content="{policy}">
<meta name=color-scheme content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<noscript><p>The charts need JavaScript; their numbers are in the tables.</p></noscript>
<script type=application/json id=dark>{dark}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root {
  --ink: #1f2933; --muted: #5b6672; --rule: #dde2e7; --page: #ffffff; --box: #f5f7f9;
  --warn: #a34700; --warn-box: #fff5ea
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e7eb; --muted: #9aa5b1; --rule: #2f3841; --page: #14181c; --box: #1c2127;
    --warn: #ffb070; --warn-box: #2b2118
  }
}
* { box-sizing: border-box }
html { color-scheme: light dark; -webkit-text-size-adjust: 100% }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 76rem; margin: 0 auto; padding: 3rem 2rem 5rem }
h1 {
  font-size: 1.55rem; line-height: 1.25; font-weight: 650; margin: 0 0 .5rem;
  overflow-wrap: anywhere; text-wrap: balance
}
h2 { font-size: 1.2rem; font-weight: 650; margin: 0 0 .9rem }
h3 { font-size: 1rem; font-weight: 650; margin: 0 }
p { margin: 0 0 .8rem; max-width: 50rem; text-wrap: pretty }
section { margin-top: 3.2rem; padding-top: 1.6rem; border-top: 1px solid var(--rule) }
section.first {
  border: 0; padding: 0; margin-top: 2rem; display: grid; gap: 2.5rem 3.5rem;
  grid-template-columns: minmax(0, 1.3fr) minmax(0, 1fr)
}
section.first > div { min-width: 0 }
.lead, .small, figcaption, dt, .absent { color: var(--muted) }
.small { font-size: .86rem; margin-top: .7rem }
.lead { max-width: none; overflow-wrap: anywhere }
.absent { overflow-wrap: anywhere; padding: .7rem 1rem; background: var(--box); border-radius: 6px; max-width: none }
.warnings {
  margin-top: 1.6rem; padding: 1rem 1.3rem; border-left: 4px solid var(--warn);
  background: var(--warn-box); border-radius: 0 6px 6px 0
}
.warnings h2 { font-size: 1rem; margin: 0 0 .3rem; color: var(--warn) }
.warnings ul { margin: 0; padding-left: 1.2rem }
figure { margin: 0 0 3rem }
figcaption { max-width: 50rem; text-wrap: pretty; margin: .15rem 0 .5rem; font-size: .93rem }
.chart { width: 100%; overflow: hidden }
section > h3, .narrow { margin-top: 1.6rem }
.scroll { overflow-x: auto }
.tall { max-height: 26rem; overflow-y: auto }
table { border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums }
th, td {
  text-align: right; padding: .42rem 0 .42rem 1rem; border-bottom: 1px solid var(--rule);
  white-space: nowrap; font-weight: 400
}
th:first-child { text-align: left; padding-left: 0 }
.before-after th:first-child { white-space: normal }
thead th { color: var(--muted); font-size: .86rem }
table.narrow { width: auto; min-width: 16rem }
details { font-size: .9rem; margin-top: .4rem }
details p { margin-top: .5rem }
summary { color: var(--muted); cursor: pointer; width: max-content }
pre {
  background: var(--box); border-radius: 6px; padding: 1rem 1.2rem; overflow-x: auto;
  font: .88rem/1.5 ui-monospace, monospace
}
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.4rem }
dd { margin: 0; overflow-wrap: anywhere }
:focus-visible { outline: 2px solid #3787bd; outline-offset: 2px }
@media (max-width: 68rem) { section.first { grid-template-columns: minmax(0, 1fr) } }
@media (max-width: 40rem) {
  main { padding: 1.5rem 1rem 3rem }
  h1 { font-size: 1.35rem }
  table { font-size: .84rem }
  th, td { padding-left: .6rem }
  .before-after td { white-space: normal }
  .chart.wide { min-width: 36rem }
  dl { grid-template-columns: 1fr; gap: 0 }
  dd { margin-bottom: .6rem }
}
@media print {
  html { color-scheme: light }
  main { max-width: none; padding: 0 }
  section { margin-top: 1.4rem; padding-top: 1rem }
  figure { margin-bottom: 1.2rem }
  body { font-size: 10.5pt }
  figure, tr, pre, .warnings { break-inside: avoid }
  h2, h3 { break-after: avoid }
  pre { white-space: pre-wrap }
  details:not([open]) { display: none }
  .tall { max-height: none }
}
"""

SCRIPT = """
const dark = JSON.parse(document.getElementById('dark').textContent);
const wanted = matchMedia('(prefers-color-scheme: dark)');
const coarse = matchMedia('(pointer: coarse)').matches;
let printing = false;
function draw() {
  for (const box of document.querySelectorAll('.chart')) {
    let text = box.closest('figure').querySelector('script').textContent;
    if (wanted.matches && !printing) text = text.replace(/"(#[0-9a-f]{6})"/g, (all, c) => '"' + (dark[c] || c) + '"');
    const figure = JSON.parse(text);
    if (coarse) figure.layout.dragmode = false;
    Plotly.react(box, figure.data, figure.layout, {displayModeBar: false, displaylogo: false, responsive: true});
  }
}
draw();
wanted.addEventListener('change', draw);
addEventListener('beforeprint', () => { printing = true; draw() });
addEventListener('afterprint', () => { printing = false; draw() });
"""
