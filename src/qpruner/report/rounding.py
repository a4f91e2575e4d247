"""Figures of how weights found their codes: what rounding with feedback gained, and what was learned afterwards."""

from typing import TYPE_CHECKING

from qpruner.report.canvas import BLUE, ORANGE, blank_figure, marks_by_linear
from qpruner.report.facts import Facts

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def draw_rounding(facts: Facts) -> "Figure":
    rows = facts.rounding
    series = (
        ("to nearest, same grid", ORANGE, "square", [r.error_nearest for r in rows]),
        ("as it ships", BLUE, "circle", [r.error for r in rows]),
    )
    return marks_by_linear([(r.linear, r.layer) for r in rows], series, "squared error / target")


def draw_tuning(facts: Facts) -> "Figure":
    tuning, figure = facts.tuning, blank_figure(360)
    steps = [p.step for p in tuning.curve]
    figure.add_scatter(
        name="learned from",
        mode="lines",
        x=steps,
        y=[p.loss for p in tuning.curve],
        line=dict(color=BLUE, width=2),
        hovertemplate="step %{x}: %{y:.4f} nats/token<extra></extra>",
    )
    figure.add_scatter(
        name="held out, before and after",
        mode="lines+markers",
        x=[0, max(steps)],
        y=[tuning.before, tuning.after],
        line=dict(color=ORANGE, width=1.5, dash="dot"),
        marker=dict(color=ORANGE, symbol="diamond", size=10),
        hovertemplate="held out: %{y:.4f} nats/token<extra></extra>",
    )
    figure.update_xaxes(title_text="step", tickformat="d", showgrid=False)
    return figure.update_yaxes(title_text="divergence from the original, nats/token", rangemode="tozero")
