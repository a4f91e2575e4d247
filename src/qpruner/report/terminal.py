"""Tables for the terminal."""

from collections import Counter

from rich.markup import escape
from rich.table import Table

from qpruner.report.joint import LIMITS_HEAD, JointFacts, joint_title, limit_rows
from qpruner.report.tasks import CHANGES_HEAD, SCORES_HEAD, change_rows, score_rows, scores_note


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


LOSS_ROWS = (
    ("loss", "nats/token", "loss", "standard_error"),
    ("perplexity", "", "perplexity", "perplexity_standard_error"),
    ("bits per byte", "bits", "bits_per_byte", "bits_per_byte_standard_error"),
)
DISTANCE_ROWS = (
    ("KL from the reference", "nats/token", "kl", "standard_error"),
    ("same first choice", "%", "top1_agreement", "top1_agreement_standard_error"),
    ("right tokens now wrong", "%", "right_to_wrong", "right_to_wrong_standard_error"),
    ("wrong tokens now right", "%", "wrong_to_right", "wrong_to_right_standard_error"),
    ("flips, of all tokens", "%", "flips", "flips_standard_error"),
)
SPEED_ROWS = (
    ("prefill", "tokens/s", "prefill_tokens_per_second"),
    ("decode", "tokens/s", "decode_tokens_per_second"),
    ("time to first token", "s", "seconds_to_first_token"),
    ("tensor bytes in memory", "bytes", "tensor_bytes"),
    ("resident bytes of loading", "bytes", "resident_bytes"),
    ("peak memory", "bytes", "peak_bytes"),
)


def evaluation_tables(found: dict) -> list[Table]:
    """What a model loses on a text with standard errors, and its protocol; its speed in a table of its own."""
    table = Table(title=escape(found["model"]), title_justify="left", caption_justify="left")
    for name in ("measure", "unit", "value", "standard error"):
        table.add_column(name, justify="right" if name in ("value", "standard error") else "left")
    parts = [(LOSS_ROWS, found)] + ([(DISTANCE_ROWS, found["kl"])] if "kl" in found else [])
    for rows, values in parts:
        for name, unit, key, error in rows:
            scale = 100 if unit == "%" else 1
            table.add_row(name, unit, *(_decimal(values[k], scale) for k in (key, error)))
    caption = f"{found['protocol']}\n{found['n_tokens']:,} tokens; standard errors: {found['standard_error_by']}"
    table.caption = escape(caption + (f"\nreference: {found['kl']['reference']}" if "kl" in found else ""))
    tables = [table]
    if "tasks" in found:
        tables.append(study_table(SCORES_HEAD, score_rows(found["tasks"]), caption=scores_note(found["tasks"])))
    if "changes" in found:
        shown = [CHANGES_HEAD.index(name) for name in ("task", "before", "after", "change ± s.e.", "p", "flips")]
        head, *rows = (tuple(row[i] for i in shown) for row in (CHANGES_HEAD, *change_rows(found["changes"])))
        tables.append(study_table(head, rows, title="from the reference to the model, the same questions"))
    return [*tables, *([speed_table(found["speed"])] if "speed" in found else [])]


def speed_table(found: dict) -> Table:
    """Medians over rounds; the ratio to the reference with its smallest and largest."""
    names = [name for name in ("model", "reference") if name in found]
    head = ["speed", "unit", *names, *(["ratio (smallest to largest)"] if len(names) > 1 else [])]
    table = Table(*head, caption_justify="left")
    for name, unit, key in SPEED_ROWS:
        ratio = found.get("ratios", {}).get(key)
        said = [f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else ""]
        table.add_row(name, unit, *(_paced(found[n], key) for n in names), *said[: len(names) - 1])
    first = found[names[0]]
    table.caption = (
        f"{found['rounds']} rounds in turn, each in a fresh process; one sequence, {first['prompt_tokens']} tokens and "
        f"{first['new_tokens']} new ones, {first['dtype']}, {first['threads']} threads"
    )
    return table


def _paced(values: dict, key: str) -> str:
    if values[key] is None:
        return "none"
    if key.endswith("bytes"):
        return f"{values[key]:,.0f}"
    error = values.get(f"{key}_standard_error")
    return f"{values[key]:,.4g}" + (f" ± {error:,.2g}" if error else "")


def _decimal(value: float | None, scale: float) -> str:
    return "none" if value is None else f"{scale * value:,.4f}"


def study_table(
    columns: tuple[str, ...], cells: list[tuple[str, ...]], *, title: str | None = None, caption: str | None = None
) -> Table:
    table = Table(*columns, title=title and escape(title), caption=caption and escape(caption))
    for row in cells:
        table.add_row(*map(escape, row))  # a recipe's changes stand in brackets, which rich would read as a style
    return table


def limits_table(facts: JointFacts) -> Table:
    """What a joint search found for each limit, and how to make it."""
    table = Table(title=escape(joint_title(facts)), title_justify="left")
    for name in LIMITS_HEAD:
        table.add_column(name)
    for row in limit_rows(facts):
        table.add_row(*map(escape, row))
    table.caption = "\n".join(escape(limit.command) for limit in facts.limits if limit.command) or None
    return table
