"""Figures of what a joint search learned of single layers: what the gates left of them, and what each choice costs."""

import math
from typing import TYPE_CHECKING

from qpruner.report.canvas import (
    BITS,
    BLUE,
    FAINT,
    HEAT,
    KEPT,
    MUTED,
    as_text,
    blank_figure,
    colour_scale,
    layer_axis,
    log_ticks,
)
from qpruner.report.facts import bytes_text, label
from qpruner.report.joint import JointFacts, Option, Sensitivity

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ROW = 22  # pixels of an option
READABLE = 16  # layers side by side, with a number in each cell
DEEPEST = 1e-4  # of the highest sensitivity: what is below it has the same colour


def draw_gate_training(facts: JointFacts) -> "Figure":
    curve = facts.gates.curve
    figure = blank_figure(
        430,
        rows=2,
        shared_xaxes=True,
        vertical_spacing=0.14,
        subplot_titles=["KL to the original, nats/token", "expected size"],
    )
    steps = [p.step for p in curve]
    for row, name, values, words in (
        (1, "loss", [p.loss for p in curve], [f"{p.loss:.4g} nats/token" for p in curve]),
        (2, "size", [p.size_bytes for p in curve], [bytes_text(p.size_bytes) for p in curve]),
    ):
        figure.add_scatter(
            row=row,
            col=1,
            name=name,
            showlegend=False,
            mode="lines",
            x=steps,
            y=values,
            line=dict(color=BLUE, width=2),
            customdata=words,
            hovertemplate="step %{x}: %{customdata}<extra></extra>",
        )
    for limit in facts.limits:
        figure.add_hline(
            y=limit.size_bytes, row=2, col=1, line=dict(color=FAINT, width=1, dash="dash"),
            annotation=dict(
                text=as_text(limit.text), font=dict(color=MUTED, size=11), xanchor="right", yanchor="bottom"
            ),
        )  # fmt: skip
    if positive := [p.loss for p in curve if 0 < p.loss < math.inf]:
        if max(positive) > 8 * min(positive):
            low, high = min(positive) / 1.1, max(positive) * 1.1
            ticks = log_ticks(low, high, 5)
            figure.update_yaxes(
                row=1, col=1, type="log", range=[math.log10(low), math.log10(high)], tickvals=ticks,
                ticktext=[f"{t:g}" for t in ticks],
            )  # fmt: skip
    figure.update_yaxes(row=2, col=1, tickformat="~s", ticksuffix="B", nticks=6)
    figure.update_xaxes(tickformat="d", showgrid=False)
    figure.update_xaxes(title_text="step", row=2, col=1)
    return figure


def draw_gates(facts: JointFacts) -> "Figure":
    """Limits down, layers across: how much of each layer the gates left, and at how many bits."""
    texts = [limit.text for limit in facts.limits if limit.text in facts.gates.at]
    cells = {(text, g.layer): g for text in texts for g in facts.gates.at[text]}
    layers = sorted({layer for _, layer in cells})
    panel = 26 * len(texts) + 10
    figure = blank_figure(
        2 * panel + 190,
        rows=2,
        shared_xaxes=True,
        vertical_spacing=46 / (2 * panel + 90),
        subplot_titles=["weights kept", "mean bits of those"],
    )
    scales = [KEPT, list(BITS.values())]
    read = (lambda g: g.kept, lambda g: g.bits)
    words = (lambda v: f"{v:.0%}", lambda v: f"{v:.1f}")
    for row, (colours, value, word, said) in enumerate(
        zip(scales, read, words, ("of its weights kept", "bits per weight"), strict=True), start=1
    ):
        z = [[value(cells[t, la]) if (t, la) in cells else None for la in layers] for t in texts]
        known = [v for line in z for v in line if v is not None]
        top = 1.0 if row == 1 else max(known, default=1.0)
        figure.add_heatmap(
            row=row,
            col=1,
            name=said,
            x=layers,
            y=[as_text(t) for t in texts],
            z=z,
            zmin=0 if row == 1 else min(known, default=0.0),
            zmax=top if row == 1 or top > min(known, default=0.0) else top + 1,
            colorscale=colour_scale(colours),
            showscale=False,
            xgap=2,
            ygap=2,
            text=[["" if v is None else word(v) for v in line] for line in z],
            texttemplate="%{text}" if len(layers) <= READABLE else None,  # else too small to read
            hovertemplate=f"%{{y}}, layer %{{x}}: %{{text}} {said}<extra></extra>",
            hoverongaps=False,
        )
        figure.update_yaxes(row=row, col=1, autorange="reversed", showgrid=False, type="category")
    return layer_axis(figure, layers)


def draw_sensitivities(facts: JointFacts) -> "Figure":
    """A panel per choice that layers have in common, options down, layers across; embeddings have one wide cell."""
    panels: dict[str, list[Sensitivity]] = {}
    for s in sorted(facts.sensitivities, key=lambda s: s.layer >= 0):  # the lowest panel has the layers under it
        panels.setdefault(_choice(s), []).append(s)
    rows = {name: _options(inside) for name, inside in panels.items()}
    layers = sorted({s.layer for s in facts.sensitivities if s.layer >= 0}) or [0]
    values = [o.best for s in facts.sensitivities for o in s.options if o.best is not None and math.isfinite(o.best)]
    high = max((v for v in values if v > 0), default=1.0)
    low = max(min((v for v in values if v > 0), default=high), DEEPEST * high)
    low = low if low < high else high / 10
    heights = [ROW * len(options) for options in rows.values()]
    height = sum(heights) + 32 * len(heights) + 112
    figure = blank_figure(
        height,
        rows=len(panels),
        row_heights=heights,
        vertical_spacing=32 / (height - 100) if len(panels) > 1 else 0,
        subplot_titles=[as_text(name) for name in panels],
    )
    for row, (name, inside) in enumerate(panels.items(), start=1):
        of_model = all(s.layer < 0 for s in inside)
        columns = [-1] if of_model else layers
        cells = {(s.layer, o.words): (s, o) for s in inside for o in s.options}
        grid = [[cells.get((layer, words)) for layer in columns] for words in rows[name]]
        number = lambda cell: None if cell is None else cell[1].best
        figure.add_heatmap(
            row=row,
            col=1,
            name=as_text(name),
            x=[layers[0] - 0.5, layers[-1] + 0.5] if of_model else columns,
            y=[as_text(words) for words in rows[name]],
            z=[[_log(number(c), low) for c in line] for line in grid],
            coloraxis="coloraxis",
            xgap=2,
            ygap=2,
            text=[["" if number(c) is None else _short(c[1]) for c in line] for line in grid],
            texttemplate="%{text}" if len(layers) <= READABLE or of_model else None,
            customdata=[["" if c is None else _told(*c) for c in line] for line in grid],
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=False,
        )
        figure.update_yaxes(row=row, col=1, autorange="reversed", showgrid=False, type="category")
        figure.update_xaxes(row=row, col=1, showticklabels=row == len(panels) and not of_model)
    layer_axis(figure, layers)
    ticks = log_ticks(low, high, 4)
    bar = dict(orientation="h", thickness=10, len=0.5, x=1, xanchor="right", y=1, yanchor="bottom", ypad=8)
    return figure.update_layout(
        margin=dict(t=70),
        coloraxis=dict(
            cmin=math.log10(low),
            cmax=math.log10(high),
            colorscale=colour_scale(HEAT),
            colorbar=dict(
                **bar,
                tickvals=[math.log10(t) for t in ticks],
                ticktext=[f"{t:g}" for t in ticks],
                title=dict(text="nats/token", font=dict(color=MUTED, size=12)),
                tickfont=dict(color=MUTED),
            ),
        ),
    )


def _choice(s: Sensitivity) -> str:
    return {"layer": "the whole layer", "width": f"{label(s.name)}: units kept"}.get(s.kind, f"{label(s.name)}: bits")


def _options(inside: list[Sensitivity]) -> list[str]:
    """Words of all options that cost something anywhere, smallest first as far as layers agree on that."""
    places: dict[str, list[float]] = {}
    for s in inside:
        for i, o in enumerate(s.options):
            if o.best:
                places.setdefault(o.words, []).append(i / len(s.options))
    return sorted(places, key=lambda words: sum(places[words]) / len(places[words])) or [inside[0].options[0].words]


def _log(value: float | None, low: float) -> float | None:
    return None if value is None or not math.isfinite(value) else math.log10(max(value, low))


def _short(o: Option) -> str:
    return f"{o.best:.2g}" if o.measured is not None else f"≈{o.best:.2g}"


def _told(s: Sensitivity, o: Option) -> str:
    numbers = [f"{word} {v:.4g}" for word, v in (("measured", o.measured), ("estimated", o.estimated)) if v is not None]
    where = f"layer {s.layer}, " if s.layer >= 0 else ""
    return f"{where}{as_text(label(s.name))}: {as_text(o.words)}<br>{', '.join(numbers) or 'not known'} nats/token"
