"""A study as Markdown, as tables for a terminal, and as a page with plots. Every value is one of the study's summary.

In a label such as `A + B` the plots take B for a variant of A: both stand on one line, in different colours.
"""

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from qpruner.report.canvas import CATEGORICAL, INK, MUTED, blank_figure, require_plotly
from qpruner.report.document import Numbers, document, drawing, html_table

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

LONGEST_LABEL = 44
MOST_LINES = 12  # of a plot in which they can still be told apart
VARIANT_STEP = 0.24  # of the distance between two lines
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
WIDE_RANGE = 8  # highest over lowest value above which an axis is logarithmic


@dataclass(frozen=True)
class Section:
    """The lines of one model at one limit. failures: sentences."""

    title: str
    lead: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    failures: list[str]


def sections(found: dict) -> list[Section]:
    """One per model and limit, in the order of the study."""
    places = dict.fromkeys((row["model"], row["limit"]) for row in found["rows"])
    return [_section(found, model, limit) for model, limit in places]


def _section(found: dict, model: str, limit: str) -> Section:
    rows = [row for row in found["rows"] if (row["model"], row["limit"]) == (model, limit)]
    varied = [] if found["varied"] is None else [found["varied"]]
    head = (
        "recipe",
        *varied,
        "kept",
        "bytes",
        "loss",
        "increase ± s.e.",
        "spread",
        "by seed",
        "against baseline ± s.e.",
    )
    done = [row for row in rows if row["seeds"]]
    lead = f"Nothing was computed; the baseline is {found['baseline']}."
    if done:
        lead = (
            f"The original loses {done[0]['original_loss']:.4f} nats per token on {done[0]['windows']} windows; up to "
            f"{found['seeds']} seeds; the baseline is {found['baseline']}."
        )
    failures = [f"{_line(row)}, seed {seed}: {sentence}" for row in rows for seed, sentence in row["failed"].items()]
    return Section(f"{model}, {limit}", lead, head, [_texts(row, found) for row in rows], failures)


def _line(row: dict) -> str:
    return row["recipe"] + ("" if row["value"] is None else f" at {row['value']}")


def _texts(row: dict, found: dict) -> tuple[str, ...]:
    names = (row["recipe"],) if found["varied"] is None else (row["recipe"], f"{row['value']}")
    if not row["seeds"]:
        return (*names, "", "", "failed", "", "", "", "")
    against = "baseline"
    if row["recipe"] != found["baseline"]:
        against = _with_error(row.get("against_baseline"), row.get("against_baseline_error"))
    return (
        *names,
        f"{row['kept']:.1%}",
        f"{row['bytes']:,.0f}",
        f"{row['loss']:.4f}",
        _with_error(row["loss_increase"], row["loss_increase_error"]),
        "" if row["seed_spread"] is None else f"{row['seed_spread']:.4f}",
        " ".join(f"{loss:.4f}" for loss in row["loss_by_seed"]),
        against,
    )


def _with_error(value: float | None, error: float | None) -> str:
    return "" if value is None else f"{value:+.4f} ± {error:.4f}"


def markdown(found: dict) -> str:
    """All sections. Losses are in nats per token; the spread is the standard deviation over seeds."""
    parts = []
    for section in sections(found):
        lines = [section.head, tuple("---" for _ in section.head), *section.rows]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        failed = "".join(f"\n* failed: {sentence}" for sentence in section.failures)
        parts.append(f"### {section.title}\n\n{section.lead}\n\n{table}\n" + (failed and f"{failed}\n"))
    return "\n".join(parts)


def page(found: dict) -> str:
    """The study as one HTML page, plotly.js inside.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    require_plotly()
    title = f"Study of {', '.join(found['models'])}"
    seeds = "1 seed" if found["seeds"] == 1 else f"{found['seeds']} seeds"
    lead = f"{len(found['recipes'])} recipes, {seeds}; compared with {found['baseline']}, window by window."
    figures = "".join(drawing(*drawn) for drawn in drawings(found))
    tables = "".join(
        f"<section><h2>{_e(s.title)}</h2><p>{_e(s.lead)}</p>{html_table(s.head, s.rows)}"
        + "".join(f"<p class=absent>failed: {_e(sentence)}</p>" for sentence in s.failures)
        + "</section>"
        for s in sections(found)
    )
    return document(
        title, f"<header><h1>{_e(title)}</h1><p class=lead>{_e(lead)}</p></header><section>{figures}</section>{tables}"
    )


def drawings(found: dict) -> "list[tuple[str, str, str, Figure, Numbers]]":
    """Id, heading, how to read it, the figure and its numbers, for every plot that the study has the values for."""
    done = [row for row in found["rows"] if row["seeds"]]
    drawn = []
    if found["varied"] is None:
        for i, model in enumerate(found["models"]):
            for key, heading, reading, figure in _dots(found, [row for row in done if row["model"] == model]):
                drawn.append((f"{key}-{i}", f"{model}: {heading}", reading, figure, _numbers(done, model, key)))
    else:
        for i, model in enumerate(found["models"]):
            rows = [row for row in done if row["model"] == model]
            if rows:
                reading = f"Each line is a recipe, from few to many {found['varied']}; bars are one standard error."
                figure = _lines(rows, lambda row: row["value"], found["varied"])
                numbers = _numbers(done, model, "loss_increase")
                drawn.append((f"varied-{i}", f"{model}: loss against {found['varied']}", reading, figure, numbers))
    sizes = {row["parameters_before"] for row in done}
    if found["varied"] is None and len(sizes) > 1 and len(found["recipes"]) <= MOST_LINES:
        reading = "Each line is a recipe, from small to large models; bars are one standard error."
        figure = _lines(done, lambda row: row["parameters_before"], "parameters of the original")
        drawn.append(("scale", "Loss against model size", reading, figure, _numbers(done, None, "loss_increase")))
    return drawn


def _numbers(rows: list[dict], model: str | None, key: str) -> Numbers:
    rows = [row for row in rows if model in (None, row["model"]) and row.get(key) is not None]
    best = min(rows, key=lambda row: row[key], default=None)
    said = (
        best and f"The lowest is {_line(best)} on {best['model']} at {best['limit']}, {best[key]:+.4f} nats per token."
    )
    lines = [(f"{row['model']}, {row['limit']}, {_line(row)}", row[key], row[f"{key}_error"]) for row in rows]
    return Numbers(said or "There is nothing to compare.", ("line", "nats/token", "standard error"), lines)


def _dots(found: dict, rows: list[dict]) -> "list[tuple[str, str, str, Figure]]":
    """Per model: what each recipe loses, and how that differs from the baseline; a panel per limit."""
    compared = [row for row in rows if row.get("against_baseline") is not None and row["recipe"] != found["baseline"]]
    drawn = []
    if rows:
        reading = "Further left is better. Bars are one standard error over windows; small marks are single seeds."
        figure = _panels(found, rows, "loss_increase", "increase of the loss, nats/token")
        drawn.append(("loss_increase", "what pruning cost", reading, figure))
    if compared:
        reading = f"Left of the line is better than {found['baseline']}; bars are one standard error of the difference."
        figure = _panels(found, compared, "against_baseline", "difference of the loss, nats/token")
        drawn.append(("against_baseline", f"against {found['baseline']}", reading, figure))
    return drawn


def _panels(found: dict, rows: list[dict], key: str, axis: str) -> "Figure":
    limits = list(dict.fromkeys(row["limit"] for row in rows))
    bases = list(dict.fromkeys(_apart(row["recipe"])[0] for row in rows))
    variants = list(dict.fromkeys(_apart(recipe)[1] for recipe in found["recipes"]))  # of one colour in all plots
    figure = blank_figure(
        (20 + 8 * len(variants)) * len(bases) + 150,
        cols=len(limits),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=limits,
    )
    for column, limit in enumerate(limits, start=1):
        for k, variant in enumerate(variants):
            here = [row for row in rows if row["limit"] == limit and _apart(row["recipe"])[1] == variant]
            beside = VARIANT_STEP * (k - (len(variants) - 1) / 2)
            heights = [bases.index(_apart(row["recipe"])[0]) + beside for row in here]
            name = (variant or "as it is") if column == 1 and len(variants) > 1 else None
            _add_dots(figure, here, heights, key, CATEGORICAL[k % len(CATEGORICAL)], column, name)
        if key == "against_baseline":
            figure.add_vline(x=0, line=dict(color=MUTED, width=1.5, dash="dash"), row=1, col=column)
    figure.update_xaxes(title_text=axis, rangemode="normal" if key == "against_baseline" else "tozero")
    figure.update_yaxes(
        tickvals=list(range(len(bases))), ticktext=[escape(_short(base), quote=False) for base in bases],
        range=[len(bases) - 0.4, -0.6], zeroline=False, tickfont=dict(color=INK),
    )  # fmt: skip
    return figure.update_layout(margin=dict(t=70))


def _add_dots(
    figure: "Figure",
    rows: list[dict],
    heights: list[float],
    key: str,
    mark: tuple[str, str],
    column: int,
    name: str | None,
) -> None:
    """One variant in one panel; name: of the line in the legend, if it has one."""
    colour, symbol = mark
    seeds = [(at, value) for at, row in zip(heights, rows, strict=True) for value in row[f"{key}_by_seed"]]
    figure.add_scatter(
        row=1, col=column, mode="markers", x=[v for _, v in seeds], y=[at for at, _ in seeds], showlegend=False,
        marker=dict(color=colour, symbol="line-ns-open", size=7, opacity=0.5), hoverinfo="skip",
    )  # fmt: skip
    figure.add_scatter(
        row=1,
        col=column,
        name=name and escape(name, quote=False),
        showlegend=name is not None,
        mode="markers",
        x=[row[key] for row in rows],
        y=heights,
        error_x=dict(array=[row[f"{key}_error"] for row in rows], color=colour, thickness=1.5, width=3),
        marker=dict(color=colour, symbol=symbol, size=8),
        customdata=[[escape(row["recipe"], quote=False), row["seeds"]] for row in rows],
        hovertemplate="%{customdata[0]}: %{x:+.4f} nats/token, %{customdata[1]} seeds<extra></extra>",
    )


def _lines(rows: list[dict], x, axis: str) -> "Figure":
    """What each recipe loses against a number; a panel per limit, one below the other."""
    limits = list(dict.fromkeys(row["limit"] for row in rows))
    labels = list(dict.fromkeys(row["recipe"] for row in rows))
    height = 300 * len(limits) + 100 + 12 * len(labels)  # the legend takes a line for two or three recipes
    spacing = dict(vertical_spacing=70 / height) if len(limits) > 1 else {}
    figure = blank_figure(height, rows=len(limits), subplot_titles=limits, **spacing)
    bases = list(dict.fromkeys(_apart(label)[0] for label in labels))
    for panel, limit in enumerate(limits, start=1):
        for label in labels:
            line = sorted((row for row in rows if row["limit"] == limit and row["recipe"] == label), key=x)
            base, variant = _apart(label)
            colour, symbol = CATEGORICAL[bases.index(base) % len(CATEGORICAL)]
            figure.add_scatter(
                row=panel,
                col=1,
                name=escape(_short(label), quote=False),
                legendgroup=label,
                showlegend=panel == 1,
                mode="lines+markers",
                x=[x(row) for row in line],
                y=[row["loss_increase"] for row in line],
                error_y=dict(array=[row["loss_increase_error"] for row in line], color=colour, thickness=1.2, width=3),
                line=dict(color=colour, width=1.8, dash=_dash(bases.index(base), variant)),
                marker=dict(color=colour, symbol=symbol, size=8),
                hovertemplate="%{x}: %{y:+.4f} nats/token<extra>" + escape(_short(label), quote=False) + "</extra>",
            )
    values = [x(row) for row in rows]
    wide = min(values) > 0 and max(values) / min(values) > WIDE_RANGE
    ticks = sorted(set(values))
    figure.update_xaxes(type="log" if wide else "linear", tickvals=ticks, ticktext=[_number(value) for value in ticks])
    figure.update_xaxes(title_text=axis, row=len(limits), col=1)
    return figure.update_yaxes(title_text="increase of the loss, nats/token", rangemode="tozero")


def _dash(base: int, variant: str) -> str:
    """Variants are dashed; beyond the colours that there are, so are other recipes."""
    return DASHES[(base // len(CATEGORICAL) + (1 if variant else 0)) % len(DASHES)]


def _apart(label: str) -> tuple[str, str]:
    base, _, variant = label.partition(" + ")
    return base, variant


def _number(value: float) -> str:
    """Three digits of a large number, all of a small one."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e4)):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:g}"


def _short(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"


def _e(text: str) -> str:
    return escape(text, quote=True)
