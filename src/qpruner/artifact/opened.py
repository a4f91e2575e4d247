"""A model or an artifact of ours, opened to be read layer by layer."""

from qpruner.artifact.config import MODEL_TYPE
from qpruner.artifact.loader import ADAPTER, WEIGHTS, shell
from qpruner.model import adapters
from qpruner.model.load import Source
from qpruner.model.skeleton import build_skeleton
from qpruner.model.stream import Stream
from qpruner.model.tensors import Named, Renamed, Stored


def open_stream(source: Source, **how) -> Stream:
    """A model or artifact that was looked at, ready to be read layer by layer.

    Args:
        how: dtype, device and residence of the stream.
    """
    if source.config.model_type != MODEL_TYPE:
        model = build_skeleton(source.config, trust_remote_code=source.trust_remote_code)
        return Stream(model, Named(model, Stored.of(source.folder)), **how)
    model = shell(source.folder, source.config, trust_remote_code=source.trust_remote_code)
    files, adapter = [source.folder / WEIGHTS], source.folder / ADAPTER
    if adapter.is_dir():
        ranks, alpha, dropout, _ = adapters.read_adapters(adapter)
        adapters.inject_adapters_(model, ranks, alpha=alpha, dropout=dropout)
        model.eval()
        files.append(adapter / adapters.TENSORS_FILE)
    return Stream(model, Renamed(Stored(files), adapters.stored_names(model)), **how)
