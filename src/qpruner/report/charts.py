"""Facts as plotly figures. Every value drawn is a value of the facts; nothing is measured here."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpruner.report.canvas import (
    BLUE,
    CATEGORICAL,
    FAINT,
    HEAT,
    INK,
    MUTED,
    ORANGE,
    PART_COLOURS,
    as_text,
    blank_figure,
    colour_scale,
    layer_axis,
    marks_by_linear,
    require_plotly,
)
from qpruner.report.facts import Facts, bytes_text, label
from qpruner.report.losses import draw_damage
from qpruner.report.pruning import draw_fusion, draw_importance, draw_plan, draw_reconstruction
from qpruner.report.rounding import draw_rounding, draw_tuning

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


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
            name=as_text(name),
            mode="markers",
            x=[at[i] for i in here],
            y=[rows[i].nats for i in here],
            marker=dict(color=colour, symbol=symbol, size=9),
            customdata=[[as_text(rows[i].unit), rows[i].z, rows[i].null_mean, rows[i].null_std] for i in here],
            hovertemplate="%{customdata[0]}: %{y:.4f} nats, z %{customdata[1]:.1f}<br>"
            "shuffled %{customdata[2]:.4f} ± %{customdata[3]:.4f}<extra></extra>",
        )
    layer_axis(figure, [r.layer for r in rows])
    return figure.update_yaxes(title_text="mutual information, nats", rangemode="tozero")


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
            y=[as_text(name) for name in labels],
            z=[[value.get((name, layer, bits)) for layer in layers] for name in labels],
            coloraxis="coloraxis",
            xgap=2,
            ygap=2,
            texttemplate="%{z:.2g}" if len(layers) <= 16 else None,  # else too small to read
            hovertemplate=f"layer %{{x}}, %{{y}} at {bits} bits: %{{z:.5f}} nats/token<extra></extra>",
            hoverongaps=False,
        )
    figure.update_yaxes(autorange="reversed", showgrid=False)
    layer_axis(figure, layers)
    bar = dict(orientation="h", thickness=10, len=0.5, x=1, xanchor="right", y=1, yanchor="bottom", ypad=8, nticks=4)
    return figure.update_layout(
        margin=dict(t=70),
        coloraxis=dict(
            cmin=min(0.0, *finite, 0.0),
            cmax=max(*finite, 1e-9, 0.0),
            colorscale=colour_scale(HEAT),
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
            name=as_text(origin),
            mode="markers",
            x=[x(t) for t in here],
            y=[t.loss for t in here],
            marker=dict(color=colour, symbol=symbol, **marker),
            customdata=[[t.number, bytes_text(t.size_bytes)] for t in here],
            hovertemplate=f"trial %{{customdata[0]}}, {as_text(origin)}<br>"
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
    if recovery.validation:
        best = recovery.best_step
        figure.add_scatter(
            name="search text, the same loss",
            mode="lines+markers",
            x=[p.step for p in recovery.validation],
            y=[p.loss for p in recovery.validation],
            line=dict(color=ORANGE, width=1.5),
            marker=dict(color=ORANGE, size=[11 if p.step == best else 5 for p in recovery.validation]),
            hovertemplate="search text, step %{x}: %{y:.4f} nats/token<extra></extra>",
        )
    elif recovery.loss == "next-token" and recovery.loss_before is not None and recovery.loss_after is not None:
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
    said = "divergence from the original" if recovery.loss == "distillation" else "loss"
    return figure.update_yaxes(title_text=f"{said}, nats/token")


def _draw_loftq(facts: Facts) -> "Figure":
    starts = facts.recovery.starts
    series = (
        ("rounding alone", ORANGE, "square", [s.plain for s in starts]),
        ("LoftQ: rounding and adapter", BLUE, "circle", [s.loftq for s in starts]),
    )
    return marks_by_linear([(s.linear, s.layer) for s in starts], series, "|W − stored| / |W|")


CHARTS = {
    "sizes": Chart(
        "Asked, predicted, on disk",
        "Each bar is a size; the dashed line is the budget, and the last bar is split into what the files hold.",
        "There are no sizes to draw.",
        lambda f: True,
        _draw_sizes,
    ),
    "damage": Chart(
        "The loss after every stage",
        "Each bar is the loss once that stage was through, the first that of the original; orange is what came with a "
        "stage, hatched green what it took away.",
        "The loss after every stage is left out: this run did not measure it.",
        lambda f: f.damage is not None and bool(f.damage.stages),
        draw_damage,
    ),
    "plan": Chart(
        "What is left of each layer",
        "Bar heights are the share of units kept, hatched where a layer was protected; each cell below is one "
        "projection, and the number and colour in it are the bits of its weights.",
        "The plan as a picture is left out: this run lists no layers.",
        lambda f: bool(f.layers),
        draw_plan,
    ),
    "importance": Chart(
        "Importance and the cut",
        "Each curve is the scores of one group, lowest first; the grey part was removed, the coloured part stays.",
        "Importance is left out: this run scored no units.",
        lambda f: bool(f.importance),
        draw_importance,
    ),
    "fusion": Chart(
        "How far the fine score is trusted",
        "At 1 a unit counts by the sum over its weights, at 0 by what it does as a whole; a line that moves over the "
        "layers says that one is better early and the other late.",
        "The fusion of scores is left out: this run used one score.",
        lambda f: f.fusion is not None and bool(f.fusion.blend),
        draw_fusion,
    ),
    "reconstruction": Chart(
        "What least squares made up for",
        "For each linear that lost inputs, the square is the error of its weights as they were, the circle that of the "
        "refitted ones, on calibration text that they were not fitted to.",
        "Reconstruction is left out: this run refitted no linear.",
        lambda f: bool(f.reconstruction),
        draw_reconstruction,
    ),
    "rounding": Chart(
        "What rounding lost",
        "For each quantized linear, the square is the error of its output if weights are rounded to nearest on the "
        "same grid, the circle that of the codes that were found with text, before anything was learned.",
        "Errors of rounding are left out: this run rounded to nearest.",
        lambda f: bool(f.rounding),
        draw_rounding,
    ),
    "tuning": Chart(
        "Codes learned from predictions",
        "The line is the divergence from the original on the text that codes and scales are learned from, step by "
        "step; diamonds are text that was held out.",
        "This curve is left out: this run learned no codes.",
        lambda f: f.tuning is not None and bool(f.tuning.curve),
        draw_tuning,
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
        "The line falls as the adapters learn; the marks are the search text, which is not trained on; the "
        "largest of them is the step whose adapters stayed.",
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
