"""Writing an artifact: a Hugging Face folder whose files have exactly the predicted size."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from qpruner.artifact.config import QPrunerConfig
from qpruner.artifact.loader import ADAPTER, PLAN, WEIGHTS
from qpruner.model import adapters
from qpruner.model.checkpoint import TORCH_DTYPES
from qpruner.model.cost import TensorSpec
from qpruner.model.graph import Graph
from qpruner.model.load import Source
from qpruner.model.tensors import write_safetensors
from qpruner.plan import Plan

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip

WIDTHS = {"kv_group": ("num_attention_heads", "num_key_value_heads"), "channel": ("intermediate_size",)}


def save_artifact(
    folder: Path,
    model: nn.Module,
    graph: Graph,
    plan: Plan,
    *,
    expected: Mapping[str, TensorSpec],
    dtype: torch.dtype,
    source: Source,
) -> None:
    """`write_artifact` of a model in memory, on which the plan was carried out."""
    write_artifact(
        folder, tensors_of(model, expected), lambda: adapters.adapter_state(model, dtype), graph, plan,
        expected=expected, architecture=type(model).__name__, dtype=dtype, source=source,
    )  # fmt: skip


def write_artifact(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    adapter_state: Callable[[], Mapping[str, Tensor]],
    graph: Graph,
    plan: Plan,
    *,
    expected: Mapping[str, TensorSpec],
    architecture: str,
    dtype: torch.dtype,
    source: Source,
) -> None:
    """Write weights, adapters, configuration, plan and tokenizer into a new folder.

    Args:
        tensors: of the weights file, one by one, in any order.
        adapter_state: asked after that for the adapters under PEFT's names, if the plan has them beside the base.
        expected: the tensors that the plan predicts, name -> (dtype, shape); anything else is a fault of ours.
        architecture: name of the original class.
        dtype: of what is stored in 16 bits.
        source: the original; its configuration and tokenizer are taken over.
    """
    folder.mkdir(parents=True)
    write_safetensors(folder / WEIGHTS, expected, tensors)
    if plan.adapter_ranks and plan.adapters == "beside":
        config = adapters.lora_config(
            plan.adapter_ranks, alpha=plan.recovery.adapter_alpha, dropout=plan.recovery.adapter_dropout
        )
        adapters.write_adapters(folder / ADAPTER, adapter_state(), config)
    whole = dimensions(source.config)
    layers = per_layer_widths(whole, graph, plan)
    base = {k: v for k, v in source.config.to_dict().items() if k != "_name_or_path"}
    QPrunerConfig(
        base_config=base | {"dtype": str(dtype).removeprefix("torch.")},
        **whole,
        **({"per_layer_config": layers} if layers else {}),
        architectures=[architecture],
        dtype=dtype,
    ).save_pretrained(folder)
    (folder / PLAN).write_text(plan.to_json())
    for name in TOKENIZER_FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)


def tensors_of(model: nn.Module, expected: Mapping[str, TensorSpec]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model in memory under their own names, adapters left out, as they are stored."""
    for name, tensor in adapters.base_state(model).items():
        if name in expected:
            yield name, tensor.detach().to("cpu", TORCH_DTYPES[expected[name][0]])


def dimensions(original: PreTrainedConfig) -> dict[str, int]:
    """The dimensions that the original configuration states, in transformers' common words for them."""
    text = original.get_text_config(decoder=True)
    names = ("num_hidden_layers", "hidden_size", "vocab_size", *(n for kind in WIDTHS.values() for n in kind))
    return {n: getattr(text, n) for n in names if isinstance(getattr(text, n, None), int)}


def per_layer_widths(whole: dict[str, int], graph: Graph, plan: Plan) -> dict[str, dict[str, int]]:
    """What differs from the original's dimensions in each layer."""
    widths: dict[str, dict[str, int]] = {}
    for name, group in graph.groups.items():
        kept = len(plan.kept[name])
        for attribute in WIDTHS[group.kind]:
            if attribute in whole and kept < group.n_units:
                widths.setdefault(str(group.layer), {})[attribute] = whole[attribute] * kept // group.n_units
    return widths


def write_manifest(folder: Path, manifest: dict) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def weight_bytes(folder: Path) -> int:
    """Of all weight files in the folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
