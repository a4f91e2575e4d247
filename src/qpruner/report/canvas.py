"""What all figures have in common: colours, an empty figure, and axes that several of them share.

Figures carry the colours of a light page; `DARK` gives each its counterpart, and the page swaps them.
"""

import math
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

DARK = {
    **{INK: "#e4e7eb", MUTED: "#9aa5b1", RULE: "#2c343c", FAINT: "#4b5661"},
    **{BLUE: "#56b4e9", ORANGE: "#ff8c42", GREEN: "#2fc79b", GOLD: "#f0c04a", PINK: "#e08fbf"},
    **dict(zip(BITS.values(), ("#1c2b38", "#203c53", "#285a80", "#4c9ad3", "#c2e3fb"), strict=True)),
    **dict(zip(DEPTH, ("#8088ff", "#a078f5", "#c866d4", "#e57099", "#f79a66", "#f5cf57"), strict=True)),
    **dict(zip(HEAT, ("#20262c", "#6b3d17", "#e98838", "#ffe4c2"), strict=True)),
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
    figure.update_annotations(font=dict(color=MUTED, size=12), **(dict(x=0, xanchor="left") if cols == 1 else {}))
    above = (26 if subplots.get("subplot_titles") else 6) / (height - 100)  # the legend stands over a panel's title
    figure.update_layout(
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
    axis = dict(
        gridcolor=RULE, linecolor=FAINT, zerolinecolor=FAINT, ticks="", tickfont=dict(color=MUTED), automargin=True
    )
    figure.update_xaxes(**axis, zeroline=False, title_font=dict(color=MUTED, size=12))
    figure.update_yaxes(**axis, title_font=dict(color=MUTED, size=12))
    return figure


def as_text(name: str) -> str:
    """plotly reads a little HTML in its texts; names are shown as they are."""
    return escape(name, quote=False)


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
