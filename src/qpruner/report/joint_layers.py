"""The plan chosen at a limit of a joint search, as a picture: how much of each layer stays, and at how many bits."""

from typing import TYPE_CHECKING

from qpruner.report.canvas import (
    BITS,
    FAINT,
    MUTED,
    RULE,
    as_text,
    bits_step,
    blank_figure,
    legend_square,
)
from qpruner.report.facts import bytes_text, label
from qpruner.report.joint import Layer, Limit, Stored

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PARTS = {"kv_group": "attention", "channel": "MLP", None: "other"}
UNITS = {"kv_group": "kv groups", "channel": "channels"}
ROW = 22  # pixels of a layer


def draw_layers(limit: Limit) -> "Figure":
    """A row per layer; a bar per part of it, as long as the share of units that stays, in a piece per projection."""
    present = {p.units for layer in limit.layers for p in layer.projections}
    parts = [units for units in PARTS if units in present] or ["kv_group", "channel"]
    above = len(limit.embeddings)
    heights = [ROW * above, ROW * len(limit.layers)] if above else [ROW * len(limit.layers)]
    columns = [{} for _ in parts]
    whole = [{"colspan": len(parts)}, *[None] * (len(parts) - 1)]
    titles = ["embeddings and head"] * bool(above) + [PARTS[units] for units in parts]
    height = sum(heights) + 130 + 50 * bool(above)
    figure = blank_figure(
        height,
        rows=len(heights),
        cols=len(parts),
        specs=[whole, columns] if above else [columns],
        row_heights=heights,
        horizontal_spacing=0.04,
        vertical_spacing=50 / (height - 100) if above else 0,
        subplot_titles=titles,
    )
    if above:
        _add_embeddings(figure, limit.embeddings)
    for column, units in enumerate(parts, start=1):
        _add_part(figure, limit.layers, units, row=len(heights), col=column)
        figure.update_yaxes(
            row=len(heights),
            col=column,
            range=[max(la.index for la in limit.layers) + 0.5, min(la.index for la in limit.layers) - 0.5],
            tickvals=[la.index for la in limit.layers],
            showticklabels=column == 1,
            title_text="layer" if column == 1 else None,
            showgrid=False,
            zeroline=False,
        )
        figure.update_xaxes(row=len(heights), col=column, range=[0, 1.01], tickvals=[0.5, 1], tickformat=".0%")
    stored = [*limit.embeddings, *(p for layer in limit.layers for p in layer.projections)]
    for step in sorted({bits_step(p.bits) for p in stored}):
        legend_square(figure, f"{step} bits", BITS[step])
    if any(not layer.stays for layer in limit.layers):
        legend_square(figure, "layer goes", FAINT, pattern="/")
    return figure.update_layout(barmode="stack", bargap=0.22, margin=dict(t=70))


def _add_part(figure: "Figure", layers: tuple[Layer, ...], units: str | None, row: int, col: int) -> None:
    place = dict(row=row, col=col)
    gone = [layer.index for layer in layers if not layer.stays]
    figure.add_bar(
        **place,
        orientation="h",
        name="goes",
        showlegend=False,
        y=gone,
        x=[1.0] * len(gone),
        marker=dict(color=RULE, pattern=dict(shape="/", fgcolor=MUTED), line=dict(color=FAINT, width=1)),
        hovertemplate="layer %{y} goes as a whole<extra></extra>",
    )
    pieces = {layer.index: [p for p in layer.projections if p.units == units] for layer in layers if layer.stays}
    for slot in range(max(map(len, pieces.values()), default=0)):
        here = [(layer, pieces[layer.index]) for layer in layers if len(pieces.get(layer.index, ())) > slot]
        figure.add_bar(
            **place,
            orientation="h",
            name=PARTS[units],
            showlegend=False,
            y=[layer.index for layer, _ in here],
            x=[layer.kept(units) * _share(inside, slot) for layer, inside in here],
            **_look([inside[slot] for _, inside in here]),
            customdata=[_words(inside[slot], _kept_words(layer, units)) for layer, inside in here],
            hovertemplate="layer %{y}, %{customdata}<extra></extra>",
        )


def _share(inside: list[Stored], slot: int) -> float:
    weights = sum(p.parameters for p in inside)
    return inside[slot].parameters / weights if weights else 1 / len(inside)


def _add_embeddings(figure: "Figure", embeddings: tuple[Stored, ...]) -> None:
    figure.add_bar(
        row=1,
        col=1,
        orientation="h",
        name="embeddings",
        showlegend=False,
        y=[as_text(p.name.rpartition(".")[2]) for p in embeddings],
        x=[1.0] * len(embeddings),
        **_look(embeddings),
        customdata=[_words(p, "") for p in embeddings],
        hovertemplate="%{customdata}<extra></extra>",
    )
    figure.update_yaxes(row=1, col=1, autorange="reversed", showgrid=False)
    figure.update_xaxes(row=1, col=1, range=[0, 1.01], visible=False)


def _look(stored) -> dict:
    return dict(
        marker=dict(color=[BITS[bits_step(p.bits)] for p in stored], line=dict(color=FAINT, width=1)),
        text=[str(p.bits) for p in stored],
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        constraintext="inside",
    )


def _kept_words(layer: Layer, units: str | None) -> str:
    if units is None:
        return ""
    kept, total = (
        (layer.kv_groups_kept, layer.kv_groups_total)
        if units == "kv_group"
        else (layer.channels_kept, layer.channels_total)
    )
    return f"<br>{kept:,} of {total:,} {UNITS[units]} stay" if total else ""


def _words(p: Stored, kept: str) -> str:
    return f"{as_text(label(p.name))}: {as_text(p.spec)}{kept}<br>{p.parameters:,} weights, {bytes_text(p.size_bytes)}"
