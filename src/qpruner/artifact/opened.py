"""A model or an artifact of ours, opened to be read layer by layer."""

import json
from pathlib import Path

from qpruner.artifact.config import MODEL_TYPE
from qpruner.artifact.loader import ADAPTER, MANIFEST, WEIGHTS, shell
from qpruner.files import file_digest
from qpruner.model import adapters, checkpoint
from qpruner.model.discover import discover
from qpruner.model.graph import Graph
from qpruner.model.load import Source, is_artifact
from qpruner.model.skeleton import build_skeleton
from qpruner.model.tensors import Named, Renamed, Stored
from qpruner.model.whole import Streamable, opened
from qpruner.run import digest_of


def artifact_digest(folder: Path, *, weights: str | None = None) -> str:
    """sha256 of what a model or an artifact holds: the same base with other adapters beside it is another model.

    Args:
        weights: digest of the weight files, where it is known.
    """
    weights, beside = weights or checkpoint.weights_digest(folder), folder / ADAPTER
    return digest_of([weights, file_digest(beside)]) if beside.is_dir() else weights


def manifest_of(source: Source) -> dict:
    """What an artifact says of itself; empty for any other model."""
    if source.folder is None or not is_artifact(source.folder):
        return {}
    return json.loads((source.folder / MANIFEST).read_text())


def open_stream(source: Source, *, graph: Graph | None = None, **how) -> Streamable:
    """A model or artifact that was looked at, ready to be read layer by layer.

    Args:
        graph: of the model, where it was discovered before.
        how: dtype, device and residence of the stream.
    """
    if source.config.model_type != MODEL_TYPE:
        model = build_skeleton(source.config, trust_remote_code=source.trust_remote_code)
        return opened(model, Named(model, Stored.of(source.folder)), graph or discover(model), **how)
    model, graph = shell(source.folder, source.config, trust_remote_code=source.trust_remote_code)
    files, adapter = [source.folder / WEIGHTS], source.folder / ADAPTER
    if adapter.is_dir():
        ranks, alpha, dropout, _ = adapters.read_adapters(adapter)
        adapters.inject_adapters_(model, ranks, alpha=alpha, dropout=dropout)
        model.eval()
        files.append(adapter / adapters.TENSORS_FILE)
    return opened(model, Renamed(Stored(files), adapters.stored_names(model)), graph, **how)
