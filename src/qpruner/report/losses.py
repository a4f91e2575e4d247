"""The loss after every stage of a run as bars."""

import math
from typing import TYPE_CHECKING

from qpruner.report.canvas import BLUE, FAINT, GREEN, INK, ORANGE, as_text, blank_figure
from qpruner.report.facts import Facts

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def draw_damage(facts: Facts) -> "Figure":
    """A bar for each stage, from the top; what rose since the stage before it is orange, what fell is green."""
    stages = facts.damage.stages
    figure = blank_figure(140 + 34 * len(stages))
    names = [as_text(s.stage) for s in stages]
    losses = [s.loss if math.isfinite(s.loss) else 0.0 for s in stages]  # a broken model has no bar
    before = [losses[0], *losses[:-1]]
    parts = (
        ("loss", [min(pair) for pair in zip(losses, before, strict=True)], [FAINT, *[BLUE] * (len(stages) - 1)]),
        ("more than the stage before", [max(0.0, new - old) for new, old in zip(losses, before, strict=True)], ORANGE),
        ("less than the stage before", [max(0.0, old - new) for new, old in zip(losses, before, strict=True)], GREEN),
    )
    for name, widths, colour in parts:
        pattern = dict(shape="/" if name == "less than the stage before" else "")
        figure.add_bar(
            name=name,
            orientation="h",
            y=names,
            x=widths,
            marker=dict(color=colour, pattern=pattern),
            customdata=[[s.loss, s.kl] for s in stages],
            hovertemplate="%{y}: loss %{customdata[0]:.4f}, KL %{customdata[1]:.4f} nats/token<extra></extra>",
            showlegend=name != "loss",
        )
    for name, stage, reach in zip(names, stages, map(max, losses, before), strict=True):
        text = f"{stage.loss:.3f}" if math.isfinite(stage.loss) else "not finite"
        figure.add_annotation(
            x=reach, y=name, text=text, showarrow=False, xanchor="left", xshift=4, font=dict(color=INK)
        )
    figure.update_xaxes(title_text="loss on the search text, nats/token", range=[0, 1.15 * max(losses)])
    figure.update_yaxes(autorange="reversed", showgrid=False, tickfont=dict(color=INK))
    return figure.update_layout(barmode="stack")
