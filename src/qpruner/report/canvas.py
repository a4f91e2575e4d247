"""What all figures have in common: colours, an empty figure, and axes that several of them share.

Figures carry the colours of a light page; `DARK` gives each its counterpart, and the page swaps them.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from qpruner.errors import MissingExtraError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

INK, MUTED, RULE, FAINT = "#1f2933", "#66727f", "#e3e7eb", "#c3cad1"
BLUE, ORANGE, GREEN, GOLD, PINK = "#0072b2", "#d55e00", "#009e73", "#c98a00", "#b85c93"  # after Okabe and Ito
BITS = {2: "#e3eef5", 3: "#c9dfed", 4: "#a3cae2", 8: "#3787bd", 16: "#0b4674"}  # darker is more
DEPTH = ("#0d0887", "#5b02a3", "#9a179b", "#cb4679", "#ea7457", "#d99b16")  # first layers to last
HEAT = ("#f4f5f7", "#f7c899", "#d9650b", "#6e2a00")
KEPT = ("#f2f5f4", "#b5dccc", "#57b592", "#0c6b4e")  # more is darker

DARK = {
    **{INK: "#e4e7eb", MUTED: "#9aa5b1", RULE: "#2c343c", FAINT: "#4b5661"},
    **{BLUE: "#56b4e9", ORANGE: "#ff8c42", GREEN: "#2fc79b", GOLD: "#f0c04a", PINK: "#e08fbf"},
    **dict(zip(BITS.values(), ("#1c2b38", "#203c53", "#285a80", "#4c9ad3", "#c2e3fb"), strict=True)),
    **dict(zip(DEPTH, ("#8088ff", "#a078f5", "#c866d4", "#e57099", "#f79a66", "#f5cf57"), strict=True)),
    **dict(zip(HEAT, ("#20262c", "#6b3d17", "#e98838", "#ffe4c2"), strict=True)),
    **dict(zip(KEPT, ("#1f2725", "#1f4f40", "#2f8f70", "#a9f0d6"), strict=True)),
}
CATEGORICAL = ((BLUE, "circle"), (ORANGE, "square"), (GREEN, "diamond"), (PINK, "triangle-up"), (GOLD, "cross"))
PART_COLOURS = {"linears": BLUE, "embeddings": GREEN, "other": PINK, "adapters": ORANGE, "headers": MUTED}
KINDS = {
    "kv_group": "attention: kv groups",
    "query_head": "attention: query heads inside kv groups",
    "channel": "MLP: channels",
    "expert": "MLP: whole experts",
    "residual": "hidden states: channels",
}


def require_plotly():
    try:
        import plotly.graph_objects
        import plotly.subplots
    except ImportError:
        raise MissingExtraError(
            "the report's charts need plotly, which is not installed: pip install 'qpruner[report]'"
        ) from None
    return plotly


def blank_figure(height: int, rows: int = 1, cols: int = 1, **subplots) -> "Figure":
    plotly = require_plotly()
    figure = plotly.subplots.make_subplots(rows=rows, cols=cols, **subplots)
    title = dict(font=dict(color=MUTED, size=12))
    left = dict(x=0, xanchor="left") if cols == 1 else {}
    axis = dict(
        gridcolor=RULE, linecolor=FAINT, zerolinecolor=FAINT, ticks="", tickfont=dict(color=MUTED), automargin=True,
        title=title,
    )  # fmt: skip
    above = (26 if subplots.get("subplot_titles") else 6) / (height - 100)  # the legend stands over a panel's title
    layout = figure.layout.to_plotly_json()  # changed as a dictionary: plotly's updates of it take thrice the time
    for name, given in layout.items():
        if name.startswith("xaxis"):
            layout[name] = given | axis | dict(zeroline=False)
        elif name.startswith("yaxis"):
            layout[name] = given | axis
    layout["annotations"] = [note | title | left for note in layout.get("annotations", ())]
    figure.layout = layout | dict(
        template=plotly.graph_objects.layout.Template(),
        height=height,
        autosize=True,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font=dict(family="system-ui, sans-serif", size=13, color=INK),
        margin=dict(l=8, r=16, t=40, b=8),
        legend=dict(
            orientation="h",
            x=0,
            y=1 + above,
            yanchor="bottom",
            traceorder="normal",
            font=dict(color=INK),
        ),
        hoverlabel=dict(bgcolor=RULE, bordercolor=MUTED, font=dict(color=INK)),
        bargap=0.3,
    )
    return figure


def as_text(name: str) -> str:
    """plotly reads a little HTML in its texts; names are shown as they are."""
    return escape(name, quote=False)


def bits_step(bits: int) -> int:
    """The key of `BITS` whose colour so many bits have."""
    return next((step for step in BITS if bits <= step), max(BITS))


def colour_scale(colours: Sequence[str]) -> list[list]:
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most so many round numbers for a logarithmic axis; both its ends where it is too short for two of them."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [t for d in decades for m in digits if low <= (t := float(f"{m}e{d}")) <= high]
        if len(ticks) <= most:
            return ticks if len(ticks) > 1 else [low, high]
    return ticks[:: math.ceil(len(ticks) / most)]


def layer_axis(figure: "Figure", layers) -> "Figure":
    """Layers along the bottom, a label for at most a dozen of them."""
    layers = sorted(set(layers))
    figure.update_xaxes(
        range=[layers[0] - 0.5, layers[-1] + 0.5], tickvals=layers[:: math.ceil(len(layers) / 12)], showgrid=False
    )
    *_, lowest = figure.select_xaxes()
    lowest.title.text = "layer"
    return figure


def legend_square(figure: "Figure", name: str, colour: str, pattern: str = "") -> None:
    figure.add_bar(
        name=name, x=[None], y=[None], marker=dict(color=colour, pattern=dict(shape=pattern)), hoverinfo="skip"
    )


def marks_by_linear(
    linears: Sequence[tuple[str, int]], series: Sequence[tuple[str, str, str, Sequence[float | None]]], y_title: str
) -> "Figure":
    """A mark per linear and series, layers along the bottom.

    linears: name and layer, in order. series: name, colour, symbol, a value per linear.
    """
    figure, at = blank_figure(360), list(range(len(linears)))
    for name, colour, symbol, values in series:
        figure.add_scatter(
            name=name,
            mode="markers",
            x=at,
            y=values,
            marker=dict(color=colour, symbol=symbol, size=7),
            customdata=[as_text(linear) for linear, _ in linears],
            hovertemplate=f"%{{customdata}}, {name}: %{{y:.4f}}<extra></extra>",
        )
    firsts = [i for i in at if i == 0 or linears[i][1] != linears[i - 1][1]]
    firsts = firsts[:: math.ceil(len(firsts) / 16)]
    figure.update_xaxes(title_text="linears, by layer", tickvals=firsts, ticktext=[str(linears[i][1]) for i in firsts])
    return figure.update_yaxes(title_text=y_title, rangemode="tozero")
