"""A finished model in the form that another program loads, opened there before it is called done."""

from pathlib import Path
from typing import Protocol

from qpruner.errors import ModelError, OutputError
from qpruner.exporting.compressed_tensors import to_compressed_tensors
from qpruner.exporting.gguf import to_gguf
from qpruner.model.load import inspect_source
from qpruner.progress import OnProgress, silent


class Exported(Protocol):
    """What an export left, and how it was seen to be right."""

    def to_json(self) -> dict: ...
    def lines(self) -> list[str]:
        """For people."""
        ...


def export(
    model: str | Path,
    to: str,
    output: str | Path | None = None,
    *,
    calibration: str | Path | None = None,
    trust_remote_code: bool = False,
    round_again: bool = False,
    on_progress: OnProgress = silent,
) -> Exported:
    """Write a model or an artifact for another program, and open it there.

    Args:
        model: as for `compress`; artifacts too.
        to: what is written; a name in `EXPORTERS`.
        output: by default the model's name beside it, with the ending of the format.
        calibration: a text; columns of weights then count, where they are rounded once more, as much as what they are
            multiplied with. Otherwise all columns count the same.
        round_again: of formats that take codes over as they are, whether those that they do not hold may be rounded
            once more; refused otherwise. GGUF has grids of its own, and its export says what it rounded.
    Raises:
        ModelError: the format does not hold the model, or does not compute what it computes; nothing was written.
    """
    if to not in EXPORTERS:
        raise OutputError(f"there is no export to {to!r}. Accepted: {', '.join(EXPORTERS)}.")
    write, ending = EXPORTERS[to]
    source = inspect_source(model, trust_remote_code=trust_remote_code)
    if source.folder is None or not source.tensors:
        raise ModelError(f"{source.name!r} is a configuration without weights; name the folder that holds both.")
    path = Path(output) if output is not None else Path.cwd() / f"{source.name.rpartition('/')[2]}{ending}"
    options = {"round_again": True} if round_again else {}
    if round_again and to not in TAKE_CODES_OVER:
        raise OutputError(f"round_again is for exports that take codes over as they are: {', '.join(TAKE_CODES_OVER)}.")
    return write(source, path, calibration and Path(calibration), on_progress, **options)


# name -> (what writes it, the ending of what it writes)
EXPORTERS = {"gguf": (to_gguf, ".gguf"), "compressed-tensors": (to_compressed_tensors, "-compressed-tensors")}
TAKE_CODES_OVER = ("compressed-tensors",)
