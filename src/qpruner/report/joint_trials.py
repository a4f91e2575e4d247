"""Figures of what a joint search tried: size against loss, convergence, and predictions beside what was measured."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qpruner.report.canvas import (
    BLUE,
    CATEGORICAL,
    DEPTH,
    FAINT,
    INK,
    MUTED,
    as_text,
    blank_figure,
    log_ticks,
)
from qpruner.report.facts import bytes_text, measured_text
from qpruner.report.joint import JointFacts, Point, Prediction, Trial

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Of who proposed a trial.
SYMBOLS = (
    "circle", "square", "diamond", "triangle-up", "cross", "star", "pentagon", "triangle-down", "hexagram",
)  # fmt: skip
DASHES = ("dash", "dot", "dashdot", "longdash", "longdashdot")
LOWEST = 1e-4  # of the largest loss: what is below it stands at the edge of a logarithmic axis
LOSS = "KL to the original, nats/token"
HOVER = "%{customdata[0]}<br>%{customdata[1]}<br>%{customdata[2]}<extra></extra>"


def draw_front(facts: JointFacts) -> "Figure":
    figure = blank_figure(600)
    controls = [p for points in facts.controls.values() for p in _front_of(points)]
    losses = [x.loss for x in (*facts.trials, *facts.limits, *controls) if x.loss is not None and math.isfinite(x.loss)]
    low, high = _range(losses)
    sizes = [x.size_bytes for x in (*facts.trials, *facts.limits, *controls)]
    sizes += [limit.stored_bytes for limit in facts.limits if limit.stored_bytes is not None]
    seen = lambda loss: max(loss, low)
    _add_trials(figure, facts, seen)
    for k, (name, points) in enumerate(facts.controls.items()):
        colour, _ = CATEGORICAL[1 + k % (len(CATEGORICAL) - 1)]  # the first is the search's own
        points = _front_of(points)
        figure.add_scatter(
            name=as_text(name),
            mode="lines+markers",
            x=[p.size_bytes for p in points],
            y=[seen(p.loss) for p in points],
            line=dict(color=colour, width=1.5, dash=DASHES[k % len(DASHES)]),
            marker=dict(color=colour, size=6),
            customdata=[[bytes_text(p.size_bytes), measured_text(p.loss)] for p in points],
            hovertemplate=f"control: {as_text(name)}<br>"
            "%{customdata[0]}, %{customdata[1]} nats/token<extra></extra>",
        )
    front = sorted((facts.trial(n) for n in facts.front), key=lambda t: t.size_bytes)
    figure.add_scatter(
        name="front",
        mode="lines",
        x=[t.size_bytes for t in front],
        y=[seen(t.loss) if t.measured else None for t in front],
        line=dict(color=BLUE, width=2.5, shape="hv"),
        hoverinfo="skip",
    )
    _add_chosen(figure, facts, seen)
    for limit in facts.limits:
        figure.add_shape(
            type="line",
            x0=limit.size_bytes,
            x1=limit.size_bytes,
            y0=0,
            y1=1,
            yref="paper",
            line=dict(color=FAINT, width=1, dash="dash"),
            layer="below",
        )
        figure.add_annotation(  # plotly places annotations on a logarithmic axis by the logarithm
            x=math.log10(limit.size_bytes),
            y=1,
            yref="paper",
            yanchor="top",
            xanchor="right",
            text=as_text(limit.text),
            showarrow=False,
            font=dict(color=MUTED, size=11),
        )
    beside = max(1.01, (max(sizes) / min(sizes)) ** 0.03)
    _log_axis(figure.update_xaxes, min(sizes) / beside, max(sizes) * beside, _size, most=5)
    figure.update_xaxes(title_text="stored size", showgrid=False)
    _log_axis(figure.update_yaxes, low / 1.3, high * 1.3, "{:.3g}".format)
    return figure.update_yaxes(title_text=LOSS)


def _add_chosen(figure: "Figure", facts: JointFacts, seen) -> None:
    """Rings: round where the loss was measured, square where it is predicted."""
    limits = [limit for limit in facts.limits if limit.stored_bytes is not None]
    for name, symbol, here in (
        ("chosen", "circle-open", [limit for limit in limits if limit.trial is not None]),
        ("chosen, loss predicted", "square-open", [limit for limit in limits if limit.trial is None]),
    ):
        if not here:
            continue
        losses = [limit.loss if limit.loss is not None and math.isfinite(limit.loss) else -math.inf for limit in here]
        figure.add_scatter(
            name=name,
            mode="markers",
            x=[limit.stored_bytes for limit in here],
            y=[seen(loss) for loss in losses],
            marker=dict(symbol=symbol, size=15, color=INK, line=dict(width=2.5)),
            customdata=[
                [
                    as_text(limit.text),
                    bytes_text(limit.stored_bytes),
                    "no loss known" if limit.loss is None else f"{measured_text(limit.loss)} nats/token",
                    limit.left_text(),
                ]
                for limit in here
            ],
            hovertemplate=f"%{{customdata[0]}}: {name}<br>%{{customdata[1]}}, %{{customdata[2]}}<br>%{{customdata[3]}}"
            "<extra></extra>",
        )


def _said(t: Trial, facts: JointFacts) -> tuple[str, str, str]:
    if t.loss is None:
        loss = "lost with its worker"
    else:
        given_up = "" if t.n_windows == facts.n_windows else ", given up early"
        loss = f"{measured_text(t.loss, t.standard_error)} nats/token on {t.n_windows} windows{given_up}"
    return (
        f"trial {t.number}, {as_text(t.origin)}",
        f"{bytes_text(t.size_bytes)}, {loss}",
        t.left_text(facts.n_layers),
    )


def _add_trials(figure: "Figure", facts: JointFacts, seen) -> None:
    """The symbol says who proposed a trial; it is open where the trial was given up early."""
    low = seen(-math.inf)
    for k, proposer in enumerate(dict.fromkeys(t.proposer for t in facts.trials)):
        here = [t for t in facts.trials if t.proposer == proposer and t.measured]
        symbol = SYMBOLS[k % len(SYMBOLS)]
        figure.add_scatter(
            name=as_text(proposer),
            mode="markers",
            x=[t.size_bytes for t in here],
            y=[seen(t.loss) for t in here],
            marker=dict(
                color=BLUE,
                size=8,
                opacity=0.45,
                symbol=[symbol if t.n_windows == facts.n_windows else f"{symbol}-open" for t in here],
            ),
            customdata=[_said(t, facts) for t in here],
            hovertemplate=HOVER,
        )
    if lost := [t for t in facts.trials if not t.measured]:
        figure.add_scatter(
            name="no loss known",
            mode="markers",
            x=[t.size_bytes for t in lost],
            y=[low / 1.2] * len(lost),
            marker=dict(color=MUTED, symbol="x-thin-open", size=8),
            customdata=[_said(t, facts) for t in lost],
            hovertemplate=HOVER,
        )


def draw_convergence(facts: JointFacts) -> "Figure":
    numbers = list(range(1, len(facts.trials) + 1))
    lines = [(limit, facts.best_so_far(limit.size_bytes)) for limit in facts.limits]
    controls = [facts.best_control(limit.size_bytes) for limit in facts.limits]
    known = [v for _, line in lines for v in line if math.isfinite(v)] + [c[1] for c in controls if c]
    low, high = _range(known)
    figure = blank_figure(400)
    for k, (limit, line) in enumerate(lines):
        colour = DEPTH[k * len(DEPTH) // len(lines)]
        figure.add_scatter(
            name=as_text(limit.text),
            mode="lines",
            x=numbers,
            y=[max(v, low) if math.isfinite(v) else None for v in line],
            line=dict(color=colour, width=2, shape="hv"),
            customdata=line,
            hovertemplate=f"within {as_text(limit.text)}, after %{{x}} trials: %{{customdata:.4g}}<extra></extra>",
        )
        if controls[k] is not None:
            name, loss = controls[k]
            figure.add_scatter(
                name="best control",
                showlegend=False,
                mode="markers",
                x=[len(numbers) * 1.02],
                y=[max(loss, low)],
                marker=dict(color=colour, symbol="diamond", size=8),
                customdata=[loss],
                hovertemplate=f"within {as_text(limit.text)}, {as_text(name)}: %{{customdata:.4g}}<extra></extra>",
            )
    if any(controls):
        marker = dict(color=MUTED, symbol="diamond", size=8)
        figure.add_scatter(name="best control", mode="markers", x=[None], y=[None], marker=marker, hoverinfo="skip")
    figure.update_xaxes(
        title_text="trials that ended", range=[0, 1.05 * len(numbers)], tickformat="d", nticks=12, showgrid=False
    )
    _log_axis(figure.update_yaxes, low / 1.12, high * 1.12, "{:.3g}".format)
    return figure.update_yaxes(title_text=LOSS)


def draw_predictions(predictions: Sequence[Prediction]) -> "Figure":
    figure = blank_figure(400)
    finite = lambda v: v is not None and math.isfinite(v)
    pairs = [p for p in predictions if finite(p.predicted) and finite(p.measured)]
    low, high = _range([v for p in pairs for v in (p.predicted, p.measured)])
    edges = [low / 1.2, high * 1.2]
    figure.add_scatter(
        name="exactly as predicted",
        mode="lines",
        x=edges,
        y=edges,
        line=dict(color=MUTED, width=1.5, dash="dash"),
        hoverinfo="skip",
    )
    figure.add_scatter(
        name="a plan",
        mode="markers",
        x=[max(p.predicted, low) for p in pairs],
        y=[max(p.measured, low) for p in pairs],
        marker=dict(color=BLUE, size=8, opacity=0.75),
        customdata=[[p.name, p.predicted, p.measured] for p in pairs],
        hovertemplate="%{customdata[0]}<br>predicted %{customdata[1]:.4g}, measured %{customdata[2]:.4g} nats/token"
        "<extra></extra>",
    )
    for update, name in ((figure.update_xaxes, "predicted"), (figure.update_yaxes, "measured")):
        _log_axis(update, *edges, "{:.3g}".format, most=5)
        update(title_text=f"{name}, nats/token")
    return figure


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Of a logarithmic axis: a loss of nothing, or next to it, does not stretch it."""
    positive = [v for v in values if v > 0] or [1.0]
    return max(min(positive), LOWEST * max(positive)), max(positive)


def _front_of(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in size and loss, smallest first."""
    front: list[Point] = []
    for p in sorted(points, key=lambda p: (p.size_bytes, p.loss)):
        if math.isfinite(p.loss) and (not front or p.loss < front[-1].loss):
            front.append(p)
    return front


def _size(tick: float) -> str:
    number, unit = bytes_text(tick).split()
    return f"{float(number.replace(',', '')):g} {unit}"


def _log_axis(update, low: float, high: float, words, most: int = 6) -> None:
    ticks = log_ticks(low, high, most)
    update(type="log", range=[math.log10(low), math.log10(high)], tickvals=ticks, ticktext=[words(t) for t in ticks])
