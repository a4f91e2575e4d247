"""Writing an artifact: a Hugging Face folder whose files have exactly the predicted size."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qpruner.artifact.loader import ADAPTER, PLAN, WEIGHTS
from qpruner.artifact.stock import configuration
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

CARD = "README.md"
LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")  # of the original


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
    config = configuration(source, graph, plan, expected=expected, architecture=architecture, dtype=dtype)
    config.save_pretrained(folder)
    (folder / PLAN).write_text(plan.to_json())
    for name in (*TOKENIZER_FILES, *LICENSES):
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    for path in source.code:
        shutil.copyfile(path, folder / path.name)


def tensors_of(model: nn.Module, expected: Mapping[str, TensorSpec]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model in memory under their own names, adapters left out, as they are stored."""
    for name, tensor in adapters.base_state(model).items():
        if name in expected:
            yield name, tensor.detach().to("cpu", TORCH_DTYPES[expected[name][0]])


def write_manifest(folder: Path, manifest: dict) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def weight_bytes(folder: Path) -> int:
    """Of all weight files in the folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
