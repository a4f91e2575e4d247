"""Loading an artifact through transformers: `AutoModelForCausalLM.from_pretrained(folder)` after `import qpruner`.

The skeleton of the original class is built without weights, narrowed by the plan, given packed linears, and filled from
safetensors. What comes back is an instance of the original class; adapters that are stored beside the base are applied.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from qpruner.artifact.compressed.reading import Unpacked, in_their_codes
from qpruner.artifact.config import QPrunerConfig
from qpruner.errors import ModelError, listed
from qpruner.model import adapters
from qpruner.model.check import check_plan
from qpruner.model.discover import discover
from qpruner.model.graph import Graph
from qpruner.model.packed import split
from qpruner.model.packed.embedding import PackedEmbedding, put_empty_embeddings_
from qpruner.model.packed.storage import EXACT
from qpruner.model.skeleton import build_skeleton
from qpruner.model.surgery import add_biases_, narrow_
from qpruner.plan import Plan

WEIGHTS, ADAPTER, PLAN, MANIFEST = "model.safetensors", "adapter", "plan.json", "manifest.json"


class QPrunerForCausalLM:
    """What transformers' auto class dispatches to; there are no instances of it."""

    config_class = QPrunerConfig

    @classmethod
    def from_pretrained(
        cls,
        folder,
        *args,
        config=None,
        dtype=None,
        torch_dtype=None,
        device_map=None,
        trust_remote_code=False,
        **kwargs,
    ) -> nn.Module:
        """The compressed model, in eval mode.

        Args:
            dtype: of activations and of what is not packed; by default as stored.
            device_map: a device, or `auto` for a GPU when there is one. A model is not split over devices.
            trust_remote_code: whether the code of an original that brought its own may run.
        """
        folder = _local(folder, kwargs)
        config = config or QPrunerConfig.from_pretrained(folder)
        dtype = dtype if dtype is not None else torch_dtype
        dtype = config.dtype if dtype in (None, "auto") else getattr(torch, dtype) if isinstance(dtype, str) else dtype
        model = assemble(folder, config, dtype=dtype, trust_remote_code=bool(trust_remote_code))
        if implementation := kwargs.get("attn_implementation"):
            model.set_attn_implementation(implementation)
        return model.to(_device(device_map))


def assemble(folder: Path, config: QPrunerConfig, *, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    model, _ = shell(folder, config, trust_remote_code=trust_remote_code)
    tensors = Unpacked.of(folder).all() if in_their_codes(config) else load_file(folder / WEIGHTS)
    _fill_(model, tensors, dtype, folder)
    if (folder / ADAPTER).is_dir():
        adapters.load_adapters_(model, folder / ADAPTER)
    model.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    return model.eval()


def shell(folder: Path, config: QPrunerConfig, *, trust_remote_code: bool = False) -> tuple[nn.Module, Graph]:
    """The model that the folder's plan makes of the original, without weights and adapters; the original's graph."""
    plan = Plan.read(folder / PLAN)
    original = config.original(folder, trust_remote_code=trust_remote_code)
    model = build_skeleton(original, trust_remote_code=trust_remote_code)
    graph = discover(model)
    check_plan(plan, graph)
    narrow_(model, graph, plan.kept)
    add_biases_(model, plan.added_biases)
    put_packed_(model, plan)
    put_empty_embeddings_(model, graph, plan.packed_embeddings)
    return model, graph


def put_packed_(model: nn.Module, plan: Plan) -> None:
    """Replace every linear that the plan quantizes by an empty packed one, on the meta device."""
    for name, spec in plan.specs.items():
        if spec.bits < 16:
            linear = model.get_submodule(name)
            d_out, d_in = _shape(linear)
            model.set_submodule(name, split.empty(d_out, d_in, linear.bias is not None, spec))


def _shape(linear: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a Linear, or of a Conv1D, whose weight is stored transposed."""
    rows, columns = linear.weight.shape
    return (columns, rows) if hasattr(linear, "nf") else (rows, columns)


def _fill_(model: nn.Module, tensors: dict[str, torch.Tensor], dtype: torch.dtype, folder: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not name.endswith(EXACT):
            tensors[name] = tensor.to(dtype)
    for module in model.modules():
        if isinstance(module, PackedEmbedding):
            module.to(dtype)  # of what it looks up
    result = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    absent = [n for n, t in model.state_dict().items() if t.is_meta]
    if absent or result.unexpected_keys:
        raise ModelError(
            f"{folder / WEIGHTS} does not fit its plan: missing {listed(absent) or 'nothing'}; "
            f"unexpected {listed(result.unexpected_keys) or 'nothing'}. The folder was changed after it was written."
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # buffers that are made by the model itself (rotary tables) keep their own precision


def _local(folder, kwargs: dict) -> Path:
    if Path(folder).is_dir():
        return Path(folder)
    from huggingface_hub import snapshot_download

    names = ("revision", "token", "cache_dir", "local_files_only")
    return Path(snapshot_download(str(folder), **{k: kwargs[k] for k in names if kwargs.get(k) is not None}))


def _device(device_map) -> torch.device:
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device_map, dict):
        devices = set(map(str, device_map.values()))
        if len(devices) != 1:
            raise ModelError(f"device_map names {listed(sorted(devices))}; a compressed model loads on one device.")
        device_map = devices.pop()
    return torch.device(f"cuda:{device_map}" if isinstance(device_map, int) else device_map or "cpu")


# As in config.py: known at the end of the import, whichever of this module and transformers' auto classes came first.
AutoModelForCausalLM.register(QPrunerConfig, QPrunerForCausalLM, exist_ok=True)
