"""Facts as plotly figures. Every value drawn is a value of the facts; nothing is measured here.

Figures carry the colours of a light page; `DARK` gives each its counterpart, and the page swaps them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from qpruner.errors import MissingExtraError
from qpruner.report.facts import Facts, bytes_text, label

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


@dataclass(frozen=True)
class Chart:
    """reading: one sentence on how to read it. missing: the sentence in its place when its facts are absent."""

    title: str
    reading: str
    missing: str
    present: Callable[[Facts], bool]
    draw: Callable[[Facts], "Figure"]


def charts(facts: Facts) -> "dict[str, Figure]":
    """A figure for every chart whose facts are there, in the order of `CHARTS`."""
    require_plotly()
    return {name: chart.draw(facts) for name, chart in CHARTS.items() if chart.present(facts)}


def absent(facts: Facts) -> dict[str, str]:
    """For every chart that cannot be drawn, a sentence that says why."""
    return {name: chart.missing for name, chart in CHARTS.items() if not chart.present(facts)}


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


def _text(name: str) -> str:
    """plotly reads a little HTML in its texts; names are shown as they are."""
    return escape(name, quote=False)


def _draw_sizes(facts: Facts) -> "Figure":
    sizes, figure = facts.sizes, blank_figure(300)
    whole = {"16-bit original": sizes.original_16bit, "asked": sizes.asked, "predicted": sizes.predicted}
    figure.add_bar(
        name="whole",
        orientation="h",
        y=list(whole),
        x=list(whole.values()),
        marker=dict(color=[FAINT, FAINT, BLUE]),
        text=[bytes_text(v) for v in whole.values()],
        textposition="outside",
        cliponaxis=False,
        customdata=[f"{v:,} bytes" for v in whole.values()],
        hovertemplate="%{y}: %{customdata}<extra></extra>",
        showlegend=False,
    )
    for name, size in sizes.parts().items():
        figure.add_bar(
            name=name,
            orientation="h",
            y=["on disk"],
            x=[size],
            marker=dict(color=PART_COLOURS[name]),
            customdata=[f"{size:,} bytes"],
            hovertemplate=f"on disk, {name}: %{{customdata}}<extra></extra>",
        )
    figure.add_annotation(
        x=sizes.on_disk, y="on disk", text=bytes_text(sizes.on_disk), showarrow=False, xanchor="left", xshift=4
    )
    figure.add_vline(x=sizes.asked, line=dict(color=ORANGE, width=1.5, dash="dash"))
    longest = max(sizes.on_disk, *whole.values())
    figure.update_xaxes(range=[0, 1.28 * longest], tickformat="~s", ticksuffix="B", nticks=6)
    figure.update_yaxes(autorange="reversed", showgrid=False, tickfont=dict(color=INK))
    return figure.update_layout(barmode="stack")


def _draw_plan(facts: Facts) -> "Figure":
    labels = list(dict.fromkeys(label(p.name) for p in facts.projections))
    heights = [110, 110, 26 * len(labels) + 20] if labels else [110, 110]
    figure = blank_figure(
        sum(heights) + 190,
        rows=len(heights),
        shared_xaxes=True,
        row_heights=heights,
        vertical_spacing=48 / (sum(heights) + 120),
        subplot_titles=["kv groups kept", "MLP channels kept", "bits of each projection"][: len(heights)],
    )
    layers = [layer.index for layer in facts.layers]
    for row, word, colour, counts in (
        (1, "kv groups", GREEN, [(la.kv_groups_kept, la.kv_groups_total) for la in facts.layers]),
        (2, "channels", GOLD, [(la.channels_kept, la.channels_total) for la in facts.layers]),
    ):
        figure.add_bar(
            row=row,
            col=1,
            name=word,
            x=layers,
            y=[kept / total if total else None for kept, total in counts],
            marker=dict(color=colour, pattern=dict(shape=["/" if la.protected else "" for la in facts.layers])),
            customdata=[
                f"{kept} of {total}" + (", protected" if la.protected else "")
                for la, (kept, total) in zip(facts.layers, counts, strict=True)
            ],
            hovertemplate=f"layer %{{x}}: %{{customdata}} {word}<extra></extra>",
            showlegend=False,
        )
        figure.update_yaxes(row=row, col=1, range=[0, 1.02], tickvals=[0, 0.5, 1], tickformat=".0%")
    if any(la.protected for la in facts.layers):
        _legend_square(figure, "protected layer", FAINT, pattern="/")
    if labels:
        _add_bits(figure, facts, labels, row=3)
    return _layer_axis(figure, layers)


def _add_bits(figure: "Figure", facts: Facts, labels: list[str], row: int) -> None:
    """One heat map: the colour is the step of `BITS` that holds the bits, and the number stands in the cell."""
    steps = list(BITS)
    cell = {(label(p.name), p.layer): p for p in facts.projections}
    layers = sorted({p.layer for p in facts.projections})
    rows = [[cell.get((name, layer)) for layer in layers] for name in labels]
    step_of = lambda bits: next((i for i, s in enumerate(steps) if bits <= s), len(steps) - 1)
    edges = [(i / len(steps), (i + 1) / len(steps)) for i in range(len(steps))]
    figure.add_heatmap(
        row=row,
        col=1,
        name="bits",
        x=layers,
        y=[_text(name) for name in labels],
        z=[[None if p is None else step_of(p.bits) for p in line] for line in rows],
        zmin=-0.5,
        zmax=len(steps) - 0.5,
        colorscale=[[at, BITS[s]] for s, pair in zip(steps, edges, strict=True) for at in pair],
        showscale=False,
        xgap=2,
        ygap=2,
        text=[["" if p is None else str(p.bits) for p in line] for line in rows],
        texttemplate="%{text}",
        customdata=[
            ["" if p is None else f"{p.size_bytes:,} bytes, {p.parameters:,} weights" for p in line] for line in rows
        ],
        hovertemplate="layer %{x}, %{y}: %{text} bits, %{customdata}<extra></extra>",
        hoverongaps=False,
    )
    figure.update_yaxes(row=row, col=1, autorange="reversed", showgrid=False)
    for step in sorted({step_of(p.bits) for p in facts.projections}):
        _legend_square(figure, f"{steps[step]} bits", BITS[steps[step]])


def _legend_square(figure: "Figure", name: str, colour: str, pattern: str = "") -> None:
    figure.add_bar(
        name=name, x=[None], y=[None], marker=dict(color=colour, pattern=dict(shape=pattern)), hoverinfo="skip"
    )


def _draw_importance(facts: Facts) -> "Figure":
    kinds = [kind for kind in KINDS if any(g.kind == kind for g in facts.importance)]
    figure = blank_figure(
        110 + 270 * len(kinds), rows=len(kinds), vertical_spacing=0.16, subplot_titles=[KINDS[k] for k in kinds]
    )
    layers = sorted({g.layer for g in facts.importance})
    band_of = lambda layer: len(DEPTH) * layers.index(layer) // len(layers)
    named = set()
    for g in sorted(facts.importance, key=lambda g: g.layer):
        band, row, curve = band_of(g.layer), 1 + kinds.index(g.kind), g.curve
        share = [(at + 0.5) / curve.n_units for at in curve.position]
        members = [la for la in layers if band_of(la) == band]
        for stays in (False, True):
            figure.add_scatter(
                row=row,
                col=1,
                name=f"layer {members[0]}" if len(members) == 1 else f"layers {members[0]} to {members[-1]}",
                legendgroup=band,
                showlegend=stays and band not in named,
                mode="lines+markers",
                x=share,
                y=[s if k == stays else None for s, k in zip(curve.score, curve.kept, strict=True)],
                line=dict(color=DEPTH[band] if stays else FAINT, width=1.5),
                marker=dict(size=4, symbol="circle" if stays else "circle-open"),
                hovertemplate=f"layer {g.layer}, {'kept' if stays else 'removed'}: score %{{y:.3g}}<extra></extra>",
            )
        named.add(band)
    for row, kind in enumerate(kinds, start=1):
        scores = [s for g in facts.importance if g.kind == kind for s in g.curve.score]
        positive = [s for s in scores if s > 0]
        figure.update_yaxes(row=row, col=1, title_text="score")
        if len(positive) >= 0.9 * len(scores):  # a score of zero has no place on this axis; it is in the table
            wide = max(positive) >= 100 * min(positive)
            figure.update_yaxes(row=row, col=1, type="log", exponentformat="power", dtick=1 if wide else "D2")
    figure.update_xaxes(tickformat=".0%", range=[-0.01, 1.01], showgrid=False)
    figure.update_xaxes(title_text="units of the group, lowest score first", row=len(kinds), col=1)
    return figure


def _spread(rows) -> tuple[list[str], dict[int, float]]:
    """Labels of the units, and for every row (by its place) an x near its layer, units of a layer side by side."""
    labels = list(dict.fromkeys(label(r.unit) for r in rows))
    width = 0.7 / len(labels)
    return labels, {
        i: r.layer + width * (labels.index(label(r.unit)) - (len(labels) - 1) / 2) for i, r in enumerate(rows)
    }


def _draw_information(facts: Facts) -> "Figure":
    rows, figure = facts.information, blank_figure(380)
    labels, place = _spread(rows)
    at = [place[i] for i in range(len(rows))]
    figure.add_scatter(
        name="shuffled pairs, mean ± 2 std",
        mode="markers",
        x=at,
        y=[r.null_mean for r in rows],
        error_y=dict(
            type="data",
            array=[2 * r.null_std for r in rows],
            color=MUTED,
            thickness=1.5,
            width=4 if len(rows) <= 60 else 0,
        ),
        marker=dict(color=MUTED, symbol="line-ew-open", size=8),
        hoverinfo="skip",
    )
    for k, name in enumerate(labels):
        colour, symbol = CATEGORICAL[k % len(CATEGORICAL)]
        here = [i for i, r in enumerate(rows) if label(r.unit) == name]
        figure.add_scatter(
            name=_text(name),
            mode="markers",
            x=[at[i] for i in here],
            y=[rows[i].nats for i in here],
            marker=dict(color=colour, symbol=symbol, size=9),
            customdata=[[_text(rows[i].unit), rows[i].z, rows[i].null_mean, rows[i].null_std] for i in here],
            hovertemplate="%{customdata[0]}: %{y:.4f} nats, z %{customdata[1]:.1f}<br>"
            "shuffled %{customdata[2]:.4f} ± %{customdata[3]:.4f}<extra></extra>",
        )
    _layer_axis(figure, [r.layer for r in rows])
    return figure.update_yaxes(title_text="mutual information, nats", rangemode="tozero")


def _layer_axis(figure: "Figure", layers) -> "Figure":
    """Layers along the bottom, a label for at most a dozen of them."""
    layers = sorted(set(layers))
    figure.update_xaxes(
        range=[layers[0] - 0.5, layers[-1] + 0.5], tickvals=layers[:: math.ceil(len(layers) / 12)], showgrid=False
    )
    *_, lowest = figure.select_xaxes()
    lowest.title.text = "layer"
    return figure


def _draw_sensitivities(facts: Facts) -> "Figure":
    rows = facts.sensitivities
    labels, layers = list(dict.fromkeys(label(r.unit) for r in rows)), sorted({r.layer for r in rows})
    widths = sorted({r.bits for r in rows})
    value = {(label(r.unit), r.layer, r.bits): r.nats for r in rows}
    panel = 26 * len(labels) + 20
    height = 130 + (panel + 44) * len(widths)
    figure = blank_figure(
        height,
        rows=len(widths),
        shared_xaxes=True,
        vertical_spacing=40 / height if len(widths) > 1 else 0,
        subplot_titles=[f"{bits} bits" for bits in widths],
    )
    finite = [r.nats for r in rows if math.isfinite(r.nats)]
    for row, bits in enumerate(widths, start=1):
        figure.add_heatmap(
            row=row,
            col=1,
            name=f"{bits} bits",
            x=layers,
            y=[_text(name) for name in labels],
            z=[[value.get((name, layer, bits)) for layer in layers] for name in labels],
            coloraxis="coloraxis",
            xgap=2,
            ygap=2,
            texttemplate="%{z:.2g}" if len(layers) <= 16 else None,  # else too small to read
            hovertemplate=f"layer %{{x}}, %{{y}} at {bits} bits: %{{z:.5f}} nats/token<extra></extra>",
            hoverongaps=False,
        )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    _layer_axis(figure, layers)
    bar = dict(orientation="h", thickness=10, len=0.5, x=1, xanchor="right", y=1, yanchor="bottom", ypad=8, nticks=4)
    return figure.update_layout(
        margin=dict(t=70),
        coloraxis=dict(
            cmin=min(0.0, *finite, 0.0),
            cmax=max(*finite, 1e-9, 0.0),
            colorscale=[[i / (len(HEAT) - 1), colour] for i, colour in enumerate(HEAT)],
            colorbar=dict(
                **bar, title=dict(text="nats/token", font=dict(color=MUTED, size=12)), tickfont=dict(color=MUTED)
            ),
        ),
    )


def _add_trials(figure: "Figure", facts: Facts, x: Callable, **marker) -> None:
    for k, origin in enumerate(dict.fromkeys(t.origin for t in facts.search.trials)):
        colour, symbol = CATEGORICAL[k % len(CATEGORICAL)]
        here = [t for t in facts.search.trials if t.origin == origin]
        figure.add_scatter(
            name=_text(origin),
            mode="markers",
            x=[x(t) for t in here],
            y=[t.loss for t in here],
            marker=dict(color=colour, symbol=symbol, **marker),
            customdata=[[t.number, bytes_text(t.size_bytes)] for t in here],
            hovertemplate=f"trial %{{customdata[0]}}, {_text(origin)}<br>"
            "%{y:.4f} nats/token, %{customdata[1]}<extra></extra>",
        )


def _ring_chosen(figure: "Figure", facts: Facts, x: Callable) -> None:
    for t in facts.search.trials:
        if t.number == facts.search.chosen:
            ring = dict(symbol="circle-open", size=17, color=INK, line=dict(width=2))
            figure.add_scatter(name="chosen", mode="markers", x=[x(t)], y=[t.loss], marker=ring, hoverinfo="skip")


def _draw_search(facts: Facts) -> "Figure":
    figure = blank_figure(380)
    figure.add_scatter(
        name="best so far",
        mode="lines",
        x=[t.number for t in facts.search.trials],
        y=[None if math.isinf(b) else b for b in facts.search.best_so_far()],
        line=dict(color=MUTED, width=2, shape="hv"),
        hoverinfo="skip",
    )
    _add_trials(figure, facts, lambda t: t.number, size=9)
    _ring_chosen(figure, facts, lambda t: t.number)
    figure.update_xaxes(title_text="trial", tickformat="d", nticks=16, showgrid=False)
    return figure.update_yaxes(title_text="loss on the search text, nats/token")


def _draw_pareto(facts: Facts) -> "Figure":
    figure = blank_figure(400)
    front = sorted((t for t in facts.search.trials if t.number in facts.search.front), key=lambda t: t.size_bytes)
    figure.add_scatter(
        name="Pareto front",
        mode="lines",
        x=[t.size_bytes for t in front],
        y=[t.loss for t in front],
        line=dict(color=INK, width=1.5, shape="hv"),
        hoverinfo="skip",
    )
    _add_trials(figure, facts, lambda t: t.size_bytes, size=9, opacity=0.85)
    _ring_chosen(figure, facts, lambda t: t.size_bytes)
    figure.add_vline(
        x=facts.sizes.asked,
        line=dict(color=ORANGE, width=1.5, dash="dash"),
        annotation=dict(text="budget", font=dict(color=MUTED, size=12), xanchor="right", yanchor="top", xshift=-2),
    )
    figure.update_xaxes(title_text="stored size", tickformat="~s", ticksuffix="B", nticks=7)
    return figure.update_yaxes(title_text="loss on the search text, nats/token")


def _draw_recovery(facts: Facts) -> "Figure":
    recovery, figure = facts.recovery, blank_figure(360)
    steps, losses = [p.step for p in recovery.curve], [p.loss for p in recovery.curve]
    half = len(losses) // 20
    figure.add_scatter(
        name="training loss, each step",
        mode="lines",
        x=steps,
        y=losses,
        line=dict(color=FAINT if half else BLUE, width=1.5),
        hovertemplate="step %{x}: %{y:.4f} nats/token<extra></extra>",
    )
    if half:
        windows = [losses[max(0, i - half) : i + half + 1] for i in range(len(losses))]
        figure.add_scatter(
            name=f"mean of {2 * half + 1} steps",
            mode="lines",
            x=steps,
            y=[sum(w) / len(w) for w in windows],
            line=dict(color=BLUE, width=2.5),
            hoverinfo="skip",
        )
    if recovery.loss_before is not None and recovery.loss_after is not None:
        figure.add_scatter(
            name="search text, before and after",
            mode="lines+markers",
            x=[min(steps), max(steps)],
            y=[recovery.loss_before, recovery.loss_after],
            line=dict(color=ORANGE, width=1.5, dash="dot"),
            marker=dict(color=ORANGE, symbol="diamond", size=10),
            hovertemplate="search text: %{y:.4f} nats/token<extra></extra>",
        )
    figure.update_xaxes(title_text="step", tickformat="d", showgrid=False)
    return figure.update_yaxes(title_text="loss, nats/token")


def _draw_loftq(facts: Facts) -> "Figure":
    starts, figure = facts.recovery.starts, blank_figure(360)
    at = list(range(len(starts)))
    for name, colour, symbol, values in (
        ("rounding alone", ORANGE, "square", [s.plain for s in starts]),
        ("LoftQ: rounding and adapter", BLUE, "circle", [s.loftq for s in starts]),
    ):
        figure.add_scatter(
            name=name,
            mode="markers",
            x=at,
            y=values,
            marker=dict(color=colour, symbol=symbol, size=7),
            customdata=[_text(s.linear) for s in starts],
            hovertemplate=f"%{{customdata}}, {name}: %{{y:.4f}}<extra></extra>",
        )
    firsts = [i for i in at if i == 0 or starts[i].layer != starts[i - 1].layer]
    firsts = firsts[:: math.ceil(len(firsts) / 16)]
    figure.update_xaxes(
        title_text="linears, by layer", tickvals=firsts, ticktext=[str(starts[i].layer) for i in firsts]
    )
    return figure.update_yaxes(title_text="|W − stored| / |W|", rangemode="tozero")


CHARTS = {
    "sizes": Chart(
        "Asked, predicted, on disk",
        "Each bar is a size; the dashed line is the budget, and the last bar is split into what the files hold.",
        "There are no sizes to draw.",
        lambda f: True,
        _draw_sizes,
    ),
    "plan": Chart(
        "What is left of each layer",
        "Bar heights are the share of units kept, hatched where a layer was protected; each cell below is one "
        "projection, and the number and colour in it are the bits of its weights.",
        "The plan as a picture is left out: this run lists no layers.",
        lambda f: bool(f.layers),
        _draw_plan,
    ),
    "importance": Chart(
        "Importance and the cut",
        "Each curve is the scores of one group, lowest first; the grey part was removed, the coloured part stays.",
        "Importance is left out: this run scored no units.",
        lambda f: bool(f.importance),
        _draw_importance,
    ),
    "information": Chart(
        "Mutual information",
        "A point well above its grey bar carries information that shuffled pairs do not; inside it may be chance.",
        "Mutual information is left out: this run did not measure it.",
        lambda f: bool(f.information),
        _draw_information,
    ),
    "sensitivities": Chart(
        "Sensitivity to rounding",
        "Each cell is how far predictions move (KL divergence) when that projection alone is stored at so few bits.",
        "Sensitivities are left out: this run did not measure them.",
        lambda f: bool(f.sensitivities),
        _draw_sensitivities,
    ),
    "search": Chart(
        "Convergence",
        "Each mark is one evaluated plan, the line is the lowest loss so far, and the ring is the plan chosen.",
        "The search's convergence is left out: this run searched no plans.",
        lambda f: f.search is not None,
        _draw_search,
    ),
    "pareto": Chart(
        "Size against loss",
        "Lower left is better; no plan that was tried is both smaller and better than one on the line.",
        "The Pareto front is left out: this run searched no plans.",
        lambda f: f.search is not None,
        _draw_pareto,
    ),
    "recovery": Chart(
        "Training the adapters",
        "The line falls as the adapters learn; the diamonds are the loss on the search text, which is not trained on.",
        "The recovery curve is left out: this run trained no adapters.",
        lambda f: f.recovery is not None and bool(f.recovery.curve),
        _draw_recovery,
    ),
    "loftq": Chart(
        "Where the adapters start",
        "For each linear the circle is the error that remains with LoftQ's adapter; it should lie below the square.",
        "LoftQ's start is left out: this run did not use it.",
        lambda f: f.recovery is not None and bool(f.recovery.starts),
        _draw_loftq,
    ),
}
