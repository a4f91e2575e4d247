"""A page that needs nothing else: no network, no server, any screen, paper.

Every figure has a sentence on how to read it, a sentence that says what it shows, and its numbers as a table.
"""

import json
from dataclasses import dataclass
from html import escape

from qpruner.report.canvas import DARK


@dataclass(frozen=True)
class Numbers:
    """A chart for those who do not see it: what it shows in one sentence, and its values."""

    sentence: str
    head: tuple[str, ...]
    rows: list[tuple]


def sentence(parts: list[str]) -> str:
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."


def document(name: str, body: str) -> str:
    """A whole page that needs nothing else."""
    from plotly.offline import get_plotlyjs

    parts = dict(style=STYLE, body=body, policy=POLICY, dark=json_text(DARK), plotly=get_plotlyjs(), script=SCRIPT)
    return PAGE.format(title=escaped(name), **parts)


def drawing(name: str, heading: str, reading: str, figure, numbers: Numbers) -> str:
    """A figure with a sentence on how to read it, and its numbers in words and in a table."""
    wide = "wide" if any(trace.type == "heatmap" for trace in figure.data) else ""  # not readable at a phone's width
    said, height = escaped(f"{heading}. {numbers.sentence}"), figure.layout.height
    return (
        f"<figure id={name}><h3>{escaped(heading)}</h3><figcaption>{escaped(reading)}</figcaption>"
        f'<div class=scroll><div class="chart {wide}" role=img aria-label="{said}" style="height:{height}px">'
        "</div></div>"
        f"<script type=application/json>{json_text(figure.to_json())}</script>"
        f"<details><summary>In words and numbers</summary><p>{escaped(numbers.sentence)}</p>"
        f"<div class=tall>{html_table(numbers.head, numbers.rows)}</div></details></figure>"
    )


def html_table(head: tuple[str, ...], rows: list[tuple], kind: str = "numbers") -> str:
    top = "".join(f"<th scope=col>{escaped(h)}</th>" for h in head)
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
    return f"{value:,.5g}".replace("-", "\N{MINUS SIGN}") if isinstance(value, float) else escaped(value)


def escaped(text) -> str:
    return escape(str(text), quote=True)


def json_text(value) -> str:
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
section.first > div, .pair > div { min-width: 0 }
section.top { border: 0; padding: 0; margin-top: 2rem }
.pair { display: grid; gap: 0 3rem; grid-template-columns: repeat(2, minmax(0, 1fr)) }
.limits th, .limits td, .places th, .places td { white-space: normal; text-align: left; vertical-align: top }
.places th:first-child { width: 12rem }
.places th:nth-child(2) { width: 8rem }
.places code { font: .82rem/1.45 ui-monospace, monospace; overflow-wrap: anywhere }
.places { margin-top: 1.6rem; table-layout: fixed }
ul.absent { padding-left: 2.2rem }
.limits tbody th { font-weight: 650 }
.limits td:nth-child(2), .limits td:nth-child(3) { white-space: nowrap }
.limits code span { display: inline-block; max-width: 100% }
.limits code { font: .82rem/1.45 ui-monospace, monospace; overflow-wrap: anywhere }
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
@media (max-width: 68rem) { section.first, .pair { grid-template-columns: minmax(0, 1fr) } }
@media (max-width: 40rem) {
  main { padding: 1.5rem 1rem 3rem }
  h1 { font-size: 1.35rem }
  table { font-size: .84rem }
  th, td { padding-left: .6rem }
  .before-after td { white-space: normal }
  .chart.wide { min-width: 36rem }
  .limits thead, .places thead { display: none }
  .places tr { display: block; padding: .6rem 0; border-bottom: 1px solid var(--rule) }
  .places th, .places td { display: block; padding: .1rem 0; border: 0; width: auto !important }
  .limits tr { display: block; padding: .6rem 0; border-bottom: 1px solid var(--rule) }
  .limits th, .limits td { display: block; padding: .1rem 0; border: 0 }
  .limits td[data-head]:not(:empty)::before { content: attr(data-head) ": "; color: var(--muted) }
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
  .limits { font-size: 8.5pt }
  .limits td:last-child { min-width: 12rem }
}
"""

SCRIPT = """
const dark = JSON.parse(document.getElementById('dark').textContent);
const wanted = matchMedia('(prefers-color-scheme: dark)');
const coarse = matchMedia('(pointer: coarse)').matches;
const paper = 690;  // pixels between the margins of a sheet
let printing = false;
function draw() {
  for (const box of document.querySelectorAll('.chart')) {
    let text = box.closest('figure').querySelector('script').textContent;
    if (wanted.matches && !printing) text = text.replace(/"(#[0-9a-f]{6})"/g, (all, c) => '"' + (dark[c] || c) + '"');
    const figure = JSON.parse(text);
    if (coarse) figure.layout.dragmode = false;
    if (printing) figure.layout.width = Math.min(box.clientWidth, paper);
    Plotly.react(box, figure.data, figure.layout, {displayModeBar: false, displaylogo: false, responsive: true});
  }
}
draw();
wanted.addEventListener('change', draw);
addEventListener('beforeprint', () => { printing = true; draw() });
addEventListener('afterprint', () => { printing = false; draw() });
"""
