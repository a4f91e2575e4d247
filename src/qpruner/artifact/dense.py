"""A model or an artifact read as plain matrices: codes decoded, adapters added, one tensor in memory at a time."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qpruner.artifact.config import MODEL_TYPE
from qpruner.artifact.loader import ADAPTER, WEIGHTS, shell
from qpruner.model.adapters import read_adapters
from qpruner.model.discover import discover
from qpruner.model.load import Source
from qpruner.model.skeleton import build_skeleton
from qpruner.model.tensors import Named, Stored, Tensors
from qpruner.model.whole import Streamable, opened
from qpruner.plan import DENSE, QuantSpec


class Dense:
    """What a model computes with, as floats. `Tensors` of its own names. Final.

    model: of the original class, on the meta device, narrowed, with plain linears. specs: how the modules that lie in
    codes are stored, by path.
    """

    def __init__(self, source: Source, *, adapters: bool = True):
        """adapters: whether those that lie beside the weights are added into them."""
        own = source.config.model_type == MODEL_TYPE
        self._corrections: Mapping[str, tuple[Tensor, Tensor, float]] = {}
        if own:
            self.model, self.graph = shell(source.folder, source.config, trust_remote_code=source.trust_remote_code)
            self._stored: Tensors = Stored([source.folder / WEIGHTS])
            if adapters and (source.folder / ADAPTER).is_dir():
                ranks, alpha, _, factors = read_adapters(source.folder / ADAPTER)
                self._corrections = {name: (*factors[name], alpha / rank) for name, rank in ranks.items()}
        else:
            self.model = build_skeleton(source.config, trust_remote_code=source.trust_remote_code)
            self.graph = discover(self.model)
            self._stored = Named(self.model, Stored.of(source.folder))
        self._coded: dict[str, nn.Module] = {}
        for name, module in coded_modules(self.model).items():
            made = plain(module)
            self.model.set_submodule(name, made)
            # a head in the codes of the embedding is tied to it again
            first = next((n for n, m in self._coded.items() if m._buffers is module._buffers), None)
            if first is None:
                self._coded[name] = module
            else:
                made.weight = self.model.get_submodule(first).weight

    @property
    def bytes_read(self) -> int:
        return self._stored.bytes_read

    @property
    def specs(self) -> dict[str, QuantSpec]:
        return {name: module.spec for name, module in self._coded.items()}

    def spec(self, name: str) -> QuantSpec:
        return self._coded[name].spec if name in self._coded else DENSE

    def read(self, name: str) -> Tensor:
        path, _, part = name.rpartition(".")
        return self.corrected(path, self.base(name)) if part == "weight" else self.base(name)

    def base(self, name: str) -> Tensor:
        """Without what adapters add."""
        path, _, part = name.rpartition(".")
        if part == "weight" and path in self._coded:
            return self.coded(path).dequantize(torch.float32)
        return self._stored.read(name)

    def corrected(self, path: str, W: Tensor) -> Tensor:
        """A weight with what the adapter beside it adds, if there is one."""
        if path not in self._corrections:
            return W
        A, B, scaling = self._corrections[path]
        added = scaling * (B.double() @ A.double())
        transposed = isinstance(self.model.get_submodule(path), Conv1D)
        return (W.double() + (added.T if transposed else added)).float()

    def as_original(self, name: str) -> Tensor:
        """As the original's class holds it, which for some keeps the transpose; linears in codes are plain here."""
        path, _, part = name.rpartition(".")
        site = self.graph.linears.get(path)
        transposed = part == "weight" and path in self._coded and site is not None and site.transposed
        return self.read(name).T.contiguous() if transposed else self.read(name)

    def coded(self, path: str) -> nn.Module:
        """The packed module of this path, filled."""
        module = copy.deepcopy(self._coded[path])
        module.load_state_dict({key: self._stored.read(f"{path}.{key}") for key in module.state_dict()}, assign=True)
        return module

    def only_codes(self, path: str) -> bool:
        """Whether all that the model computes with there are its codes."""
        return path in self._coded and path not in self._corrections

    def stream(self, tensors: Tensors | None = None, **how) -> Streamable:
        """To be read layer by layer, from other tensors if wanted."""
        return opened(self.model, tensors or self, self.graph, **how)


def coded_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that are stored in codes, by path, without the parts of which some consist."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "spec", None), QuantSpec) and name.rpartition(".")[0] not in found:
            found[name] = module
    return found


def plain(coded: nn.Module) -> nn.Module:
    """A module that takes the place of a coded one and holds its weight as floats."""
    if isinstance(coded, nn.Embedding):
        return nn.Embedding(coded.num_embeddings, coded.embedding_dim, padding_idx=coded.padding_idx, device="meta")
    bias = coded.bias is not None
    return nn.Linear(coded.in_features, coded.out_features, bias=bias, device="meta")
