"""Tables for the terminal."""

from collections import Counter

from rich.markup import escape
from rich.table import Table

from qpruner.report.joint import LIMITS_HEAD, JointFacts, joint_title, limit_rows


def inspection_table(found: dict) -> Table:
    """Groups of a model, alike layers in one row, and what a recipe would leave of it."""
    size = f"{found['parameters']:,} parameters, {found['bytes_16bit']:,} bytes at 16 bits"
    table = Table(title=f"{found['model']} ({found['architecture']}): {size}")
    for name in ("group", "layers", "units each", "kind", "can be pruned"):
        table.add_column(name)
    alike = Counter((_pattern(g["name"], g["layer"]), g["units"], g["kind"], g["prunable"]) for g in found["groups"])
    for (pattern, units, kind, prunable), count in alike.items():
        table.add_row(pattern, str(count), f"{units:,}", kind.replace("_", " "), "yes" if prunable else "no")
    notes = list(found["notes"])
    if predicted := found.get("predicted"):
        notes.append(
            f"{predicted['recipe']}: {predicted['layers']} decoder layers, {predicted['parameters']:,} parameters, "
            f"{predicted['bytes']:,} bytes of {predicted['limit_bytes']:,} allowed"
        )
    table.caption = "\n".join(notes) or None
    return table


def artifact_table(found: dict) -> Table:
    """Widths of an artifact's layers, alike ones in one row, and how it is stored."""
    table = Table(title=f"{found['model']} ({found['architecture']}), an artifact: {found['bytes']:,} bytes")
    for name in ("heads", "key/value heads", "channels", "layers"):
        table.add_column(name)
    for widths, count in Counter(tuple(layer.values()) for layer in found["layers"]).items():
        table.add_row(*(f"{n:,}" for n in widths), str(count))
    formats = found["formats"].items()
    table.caption = escape(", ".join(f"{n} linears of {s}" if isinstance(n, int) else f"{s}: {n}" for s, n in formats))
    return table


def loading_lines(found: dict) -> list[str]:
    """What a model loads in as it is, and what is predicted of a result: a line for each place, then its command."""
    predicted = found.get("predicted") or {}
    parts = [("loads in", found.get("loads_in") or []), ("the result will load in", predicted.get("loads_in") or [])]
    lines = []
    for title, rows in parts:
        lines += ["", f"{title}:"] if rows else []
        for row in rows:
            lines.append(f"  {row['target']}: {'yes' if row['loads'] else 'not as it is'}; {row['sentence']}")
            lines += [f"      {row['command']}"] if row["command"] else []
    return lines + ([predicted["note"]] if "note" in predicted else [])


def _pattern(name: str, layer: int) -> str:
    return ".".join("*" if part == str(layer) else part for part in name.split("."))


def mapping_table(found: dict) -> Table:
    """One row per value; nested values are indented under their name."""
    table = Table(show_header=False)
    for key, value in found.items():
        if isinstance(value, dict):
            table.add_row(key, "")
            for inner, number in value.items():
                table.add_row(f"  {inner}", _text(number))
        else:
            table.add_row(key, _text(value))
    return table


def study_table(
    columns: tuple[str, ...], cells: list[tuple[str, ...]], *, title: str | None = None, caption: str | None = None
) -> Table:
    table = Table(*columns, title=title and escape(title), caption=caption and escape(caption))
    for row in cells:
        table.add_row(*map(escape, row))  # a recipe's changes stand in brackets, which rich would read as a style
    return table


def _text(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def limits_table(facts: JointFacts) -> Table:
    """What a joint search found for each limit, and how to make it."""
    table = Table(title=escape(joint_title(facts)), title_justify="left")
    for name in LIMITS_HEAD:
        table.add_column(name)
    for row in limit_rows(facts):
        table.add_row(*map(escape, row))
    table.caption = "\n".join(escape(limit.command) for limit in facts.limits if limit.command) or None
    return table
