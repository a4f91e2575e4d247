"""Zero-shot scores as rows of a table, from their JSON form: of one model, or of two on the same questions."""

import math
from collections.abc import Mapping

SCORES_HEAD = ("task", "questions", "acc ± s.e.", "acc_norm ± s.e.", "perplexity ± s.e.")
CHANGES_HEAD = ("task", "metric", "questions", "before", "after", "change ± s.e.", "p", "lost", "gained", "flips")


def score_rows(report: Mapping) -> list[tuple[str, ...]]:
    """Of `TaskReport.to_dict()`: one row per task, and the mean of the metric that papers print for each."""
    tasks = report["tasks"]
    rows = [
        (
            name,
            f"{task['n']:,}",
            _measured(task, "acc", 4),
            _measured(task, "acc_norm", 4),
            _measured(task, "perplexity", 2),
        )
        for name, task in tasks.items()
    ]
    if len(rows) > 1:
        total = sum(task["n"] for task in tasks.values())
        rows.append(("mean", f"{total:,}", _measured(report, "mean", 4), "", ""))
    return rows


def scores_note(report: Mapping) -> str:
    """What the numbers are, for the line below the table."""
    tasks = report["tasks"]
    plain = [name for name, task in tasks.items() if task["metric"] == "acc"]
    by = f"acc for {', '.join(plain)} and acc_norm for the others" if plain else "acc_norm"
    by = "acc" if len(plain) == len(tasks) else by
    cut = sum(task["cut"] for task in tasks.values())
    long = f"; {cut:,} question(s) longer than the model's context lost their beginning" if cut else ""
    return f"zero-shot, {report['harness']}, {report['origin']}" + (f"; mean by {by}" if len(tasks) > 1 else "") + long


def change_rows(comparison: Mapping) -> list[tuple[str, ...]]:
    """Of `TaskComparison.to_dict()`: one row per task, and all of them."""
    tasks = comparison["tasks"]
    rows = [
        (
            name,
            task["metric"],
            f"{task['n']:,}",
            f"{task['before']:.4f}",
            f"{task['after']:.4f}",
            _difference(task),
            f"{task['p_value']:.3f}",
            f"{task['lost']:,}",
            f"{task['gained']:,}",
            f"{task['flips']:.1%}",
        )
        for name, task in tasks.items()
    ]
    if len(rows) > 1:
        n, lost, gained = (sum(task[key] for task in tasks.values()) for key in ("n", "lost", "gained"))
        before, after = (sum(task[key] for task in tasks.values()) / len(tasks) for key in ("before", "after"))
        p, flips = f"{comparison['p_value']:.3f}", f"{comparison['flips']:.1%}"
        means = (f"{before:.4f}", f"{after:.4f}", _difference(comparison))
        rows.append(("mean", "", f"{n:,}", *means, p, f"{lost:,}", f"{gained:,}", flips))
    return rows


def _measured(values: Mapping, name: str, decimals: int) -> str:
    if name not in values:
        return ""
    value, error = values[name], values[f"{name}_error"]
    text = f"{math.inf if value is None else value:,.{decimals}f}"
    return text if error is None else f"{text} ± {error:,.{decimals}f}"


def _difference(values: Mapping) -> str:
    error = values["standard_error"]
    return f"{values['difference']:+.4f}" + ("" if error is None else f" ± {error:.4f}")
