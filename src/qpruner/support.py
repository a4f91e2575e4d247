"""Which architectures of transformers are served: the sweep over all of them, and its table."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qpruner.errors import ModelError, listed
from qpruner.progress import OnProgress, silent
from qpruner.testing import Row, check_architecture, check_loading

KINDS = {"kv_group": "key/value groups", "query_head": "query heads", "channel": "channels", "expert": "experts"}
COLUMNS = ("model type", "class", *KINDS.values(), "kept whole", "in memory", "result")
MARK = "<!-- made by: qpruner support --sweep -o docs/models.md -->"  # what follows it in a page is the table


def support(only: Sequence[str] = (), *, sweep: bool = False, on_progress: OnProgress = silent) -> list[Row]:
    """A row for every causal language model of transformers, or for those of some model types.

    Args:
        sweep: prove every row, a second each; otherwise only look for what can be cut.
    Raises:
        ModelError: `only` names a type that transformers has no causal language model for.
    """
    known = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if strangers := [name for name in only if name not in known]:
        raise ModelError(
            f"transformers {transformers.__version__} has no causal language model of type {listed(strangers)}. "
            f"Accepted: {listed(known)}."
        )
    rows, types = [], list(only) or known
    with tempfile.TemporaryDirectory() as folder:
        place = lambda model_type: Path(folder) / model_type
        for i, model_type in enumerate(types):
            rows.append(check_architecture(model_type, place(model_type) if sweep else None))
            on_progress("sweep" if sweep else "looking", i + 1, len(types))
        return with_loading(rows, place) if sweep else rows


def with_loading(rows: list[Row], place) -> list[Row]:
    """The rows again, after their artifacts were loaded in a process of its own."""
    faults = dict.fromkeys(row.model_type for row in rows if row.passes)
    if faults:
        faults = dict(zip(faults, check_loading([place(name) for name in faults]), strict=True))
    wrong = {name: fault for name, fault in faults.items() if fault}
    return [
        replace(row, passes=False, reason=wrong[row.model_type]) if row.model_type in wrong else row for row in rows
    ]


def cells(row: Row) -> tuple[str, ...]:
    units = (", ".join(row.units.get(kind, ())) or "-" for kind in KINDS)
    in_memory = "-" if not row.passes else f"all: {row.exchanges[0]}" if row.exchanges else "one layer"
    result = "passes" + (f" {row.remark}" if row.remark else "") if row.passes else row.reason
    return row.model_type, row.model_class, *units, ", ".join(row.whole) or "-", in_memory, result


def page(rows: Sequence[Row], above: str) -> str:
    """A Markdown page: what is in `above` up to the mark, and the table."""
    lines = [" | ".join(("", *cell, "")).strip() for cell in (COLUMNS, ["---"] * len(COLUMNS))]
    lines += [" | ".join(("", *(text.replace("|", "\\|") for text in cells(row)), "")).strip() for row in rows]
    return f"{above.partition(MARK)[0].rstrip()}\n\n{MARK}\n\n{summary(rows)}\n\n" + "\n".join(lines) + "\n"


def summary(rows: Sequence[Row]) -> str:
    passing = sum(row.passes for row in rows)
    one_layer = sum(row.passes and not row.exchanges for row in rows)
    return (
        f"{passing} of {len(rows)} model types pass, {one_layer} of them with one layer in memory, with transformers "
        f"{transformers.__version__}."
    )
