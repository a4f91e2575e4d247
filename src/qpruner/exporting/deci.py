"""A finished Llama whose layers have widths of their own in DeciLM's form, which vLLM has a class for.

Codes lie in compressed-tensors' format, as in that export; the proof is the same, with DeciLM's class.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from qpruner.artifact import deci
from qpruner.artifact.compressed.writing import Shell
from qpruner.artifact.dense import Dense
from qpruner.body import body_of
from qpruner.errors import ModelError
from qpruner.exporting.compressed_tensors import Exported, to_compressed_tensors
from qpruner.model.load import Source
from qpruner.progress import OnProgress
from qpruner.vllm import head_dim_of


def to_deci(source: Source, path: Path, calibration: Path | None, on_progress: OnProgress, **options) -> Exported:
    """Options are those of `to_compressed_tensors`."""
    return to_compressed_tensors(source, path, calibration, on_progress, form=as_deci, **options)


def as_deci(source: Source, dense: Dense, coded: Iterable[str]) -> Shell:
    """Raises: ModelError: DeciLM does not hold the model."""
    body = body_of(source)
    if reason := body.why_not_in("deci", {}):
        raise ModelError(
            f"DeciLM does not hold {source.name!r}: {reason} Export --to compressed-tensors, whose code takes layers "
            "of any widths."
        )
    config = body.config.to_dict()
    return Shell(deci.configuration(config, body.widths, head_dim_of(config)), put_code=_put_code)


def _put_code(folder: Path) -> None:
    for file in deci.FILES:
        shutil.copyfile(file, folder / file.name)
