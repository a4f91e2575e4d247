"""A finished model in the form that another program loads, opened there before it is called done."""

from pathlib import Path
from typing import Protocol

from qpruner.errors import ModelError, OutputError
from qpruner.exporting.compressed_tensors import to_compressed_tensors
from qpruner.exporting.deci import to_deci
from qpruner.exporting.gguf import to_gguf
from qpruner.exporting.hf import to_hf
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
    on_progress: OnProgress = silent,
    **options: bool | str | Path | None,
) -> Exported:
    """Write a model or an artifact for another program, and open it there.

    Args:
        model: as for `compress`; artifacts too.
        to: what is written; a name in `EXPORTERS`.
        output: by default the model's name beside it, with the ending of the format.
        calibration: a text; columns of weights then count, where they are rounded once more, as much as what they are
            multiplied with. Otherwise all columns count the same.
        options: that the format has, by name; see `OPTIONS` and the function that writes it.
    Raises:
        ModelError: the format does not hold the model, or does not compute what it computes; nothing was written.
    """
    if to not in EXPORTERS:
        raise OutputError(f"there is no export to {to!r}. Accepted: {', '.join(EXPORTERS)}.")
    write, ending = EXPORTERS[to]
    asked = {name: value for name, value in options.items() if value}
    if others := [name for name in asked if name not in OPTIONS.get(to, ())]:
        having = [f"{format} ({', '.join(names)})" for format, names in OPTIONS.items()]
        raise OutputError(f"the export to {to} has no option {others[0]!r}. Options: {'; '.join(having)}.")
    source = inspect_source(model, trust_remote_code=trust_remote_code)
    if source.folder is None or not source.tensors:
        raise ModelError(f"{source.name!r} is a configuration without weights; name the folder that holds both.")
    path = Path(output) if output is not None else Path.cwd() / f"{source.name.rpartition('/')[2]}{ending}"
    return write(source, path, calibration and Path(calibration), on_progress, **asked)


# name -> (what writes it, the ending of what it writes)
EXPORTERS = {
    "hf": (to_hf, "-hf"),
    "gguf": (to_gguf, ".gguf"),
    "compressed-tensors": (to_compressed_tensors, "-compressed-tensors"),
    "deci": (to_deci, "-deci"),
}
OPTIONS = {
    "hf": ("padded", "with_code", "adapters_beside", "vllm"),
    "compressed-tensors": ("round_again", "vllm"),
    "deci": ("round_again", "vllm"),
}
