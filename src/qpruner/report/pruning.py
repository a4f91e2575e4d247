"""Figures of what was cut: the plan, the scores, how they were fused, and what least squares made up for."""

from typing import TYPE_CHECKING

from qpruner.report.canvas import (
    BITS,
    BLUE,
    CATEGORICAL,
    DEPTH,
    FAINT,
    GOLD,
    GREEN,
    KINDS,
    ORANGE,
    as_text,
    bits_step,
    blank_figure,
    layer_axis,
    legend_square,
    marks_by_linear,
)
from qpruner.report.facts import Facts, label

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def draw_plan(facts: Facts) -> "Figure":
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
        legend_square(figure, "protected layer", FAINT, pattern="/")
    if labels:
        _add_bits(figure, facts, labels, row=3)
    return layer_axis(figure, layers)


def _add_bits(figure: "Figure", facts: Facts, labels: list[str], row: int) -> None:
    """One heat map: the colour is the step of `BITS` that holds the bits, and the number stands in the cell."""
    steps = list(BITS)
    cell = {(label(p.name), p.layer): p for p in facts.projections}
    layers = sorted({p.layer for p in facts.projections})
    rows = [[cell.get((name, layer)) for layer in layers] for name in labels]
    step_of = lambda bits: steps.index(bits_step(bits))
    edges = [(i / len(steps), (i + 1) / len(steps)) for i in range(len(steps))]
    figure.add_heatmap(
        row=row,
        col=1,
        name="bits",
        x=layers,
        y=[as_text(name) for name in labels],
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
        legend_square(figure, f"{steps[step]} bits", BITS[steps[step]])


def draw_importance(facts: Facts) -> "Figure":
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


def draw_fusion(facts: Facts) -> "Figure":
    """The learned blend where there is one, and the chosen one where it is another."""
    fusion, figure = facts.fusion, blank_figure(360)
    kinds = [kind for kind in KINDS if any(b.kind == kind and b.layer >= 0 for b in fusion.blend)]
    ways = [("learned", "solid", "circle"), (fusion.way, "dot", "circle-open")]
    ways = [w for w in ways[: 1 if fusion.way == "learned" else 2] if any(b.way == w[0] for b in fusion.blend)]
    for kind, (colour, _) in zip(kinds, CATEGORICAL, strict=False):
        for way, dash, symbol in ways:
            here = sorted((b for b in fusion.blend if (b.kind, b.way) == (kind, way)), key=lambda b: b.layer)
            figure.add_scatter(
                name=f"{KINDS[kind]}, {way}",
                mode="lines+markers",
                x=[b.layer for b in here],
                y=[b.fine for b in here],
                line=dict(color=colour, width=2, dash=dash),
                marker=dict(color=colour, symbol=symbol, size=8),
                hovertemplate=f"layer %{{x}}, {KINDS[kind]}, {way}: %{{y:.2f}} fine<extra></extra>",
            )
    layer_axis(figure, [b.layer for b in fusion.blend if b.layer >= 0])
    return figure.update_yaxes(title_text="weight of the fine score", range=[-0.03, 1.03])


def draw_reconstruction(facts: Facts) -> "Figure":
    rows = facts.reconstruction
    series = (
        ("sliced", ORANGE, "square", [r.error_sliced for r in rows]),
        ("refitted", BLUE, "circle", [r.error for r in rows]),
    )
    return marks_by_linear([(r.linear, r.layer) for r in rows], series, "squared error / target, held out")
