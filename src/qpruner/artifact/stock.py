"""Which configuration an artifact gets: that of the stock model where it says everything, else one of our own type.

A stock configuration is one number of heads, channels and so on for all layers. It is not trusted to mean what its
words suggest: the model that transformers builds from it has to have the stored tensors, take them from a file, and
compute between its linear layers exactly what the narrowed original does.
"""

import json
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig

from qpruner.artifact.config import MODEL_TYPE, QPrunerConfig
from qpruner.artifact.widths import counts_after, dimensions
from qpruner.errors import ModelError
from qpruner.model import cost
from qpruner.model.depth import shortened_config
from qpruner.model.graph import Graph
from qpruner.model.load import UNBUILDABLE, Source, quiet
from qpruner.model.probe import record
from qpruner.model.skeleton import build_skeleton
from qpruner.model.surgery import narrow_
from qpruner.plan import Plan

TOLERANCE = dict(rtol=1e-4, atol=1e-5)  # both do the same float32 operations; another slope or scale changes digits


def configuration(
    source: Source,
    graph: Graph,
    plan: Plan,
    *,
    expected: dict[str, cost.TensorSpec],
    architecture: str,
    dtype: torch.dtype,
) -> PreTrainedConfig:
    """What an artifact's config.json says.

    Args:
        expected: the tensors that the plan predicts, name -> (dtype, shape).
        architecture: name of the original class.
        dtype: of what is stored in 16 bits.
    """
    original = shortened_config(source.config, plan.layers)
    base = original.to_dict()
    base |= {"architectures": [architecture], "dtype": str(dtype).removeprefix("torch.")}
    unused = {"_name_or_path"} if source.code else {"_name_or_path", "auto_map"}  # a stock class was used instead
    base = {k: v for k, v in base.items() if k not in unused}
    with quiet():
        stock = stock_config(original, base, graph, plan, expected, trust_remote_code=source.trust_remote_code)
    if stock is not None:
        return stock
    text = original.get_text_config(decoder=True)
    return QPrunerConfig(base_config=base, architectures=[architecture], dtype=dtype, **dimensions(text, graph, plan))


def stock_config(
    original: PreTrainedConfig,
    content: dict,
    graph: Graph,
    plan: Plan,
    expected: dict[str, cost.TensorSpec],
    *,
    trust_remote_code: bool = False,
) -> PreTrainedConfig | None:
    """The stock configuration under which the stored tensors are the whole model; None where there is none.

    Args:
        original: of the model before the cuts.
        content: the same as a config.json holds it, with what is to be stated of the result.
    """
    packs = plan.packed_embeddings or any(spec.bits < 16 for spec in plan.specs.values())
    if packs or (plan.adapter_ranks and plan.adapters == "beside"):
        return None
    counts = counts_after(original.get_text_config(decoder=True), graph.groups.values(), plan.kept)
    if counts is None:
        return None
    impossible = Exception if trust_remote_code else (ModelError, StrictDataclassError, *UNBUILDABLE)
    try:
        config = _read_back(original, content, counts)
        stock = build_skeleton(config, trust_remote_code=trust_remote_code)
        whole = _shapes(cost.named_tensors(stock)) == _shapes(expected) and finds_every_name(stock, expected)
    except impossible:  # a width that the class does not take, such as 24 heads of 4096
        return None
    if not whole:
        return None
    narrowed = build_skeleton(original, trust_remote_code=trust_remote_code)
    narrow_(narrowed, graph, plan.kept)
    return config if computes_the_same(narrowed, stock) else None


def _read_back(original: PreTrainedConfig, content: dict, counts: dict[str, int]) -> PreTrainedConfig:
    """The configuration with these counts as reading its file gives it, with all checks that transformers makes."""
    content = json.loads(json.dumps(content))
    text = original.get_text_config(decoder=True)
    part = content if text is original else content[next(k for k, v in vars(original).items() if v is text)]
    part |= {text.attribute_map.get(name, name): value for name, value in counts.items()}
    return type(original).from_dict(content, name_or_path=original.name_or_path)


def _shapes(tensors: dict[str, cost.TensorSpec]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, (_, shape) in tensors.items()}


def finds_every_name(stock: nn.Module, expected: dict[str, cost.TensorSpec]) -> bool:
    """Whether transformers' own loading finds a place for every stored name and misses none; no memory is taken."""
    state = {name: torch.empty(shape, device="meta") for name, (_, shape) in expected.items()}
    _, info = type(stock).from_pretrained(
        None, config=stock.config, state_dict=state, device_map="meta", output_loading_info=True
    )
    return not any(info.values())


def computes_the_same(narrowed: nn.Module, stock: nn.Module) -> bool:
    """Whether two models of equal tensors are one function of them.

    Both run with a random output in place of every linear's product, the same in both: if then every linear gets the
    same input and every layer gives the same output, all that is between linears is the same, slopes per head too.
    """
    buffers = [dict(model.named_buffers()) for model in (narrowed, stock)]
    if buffers[0].keys() != buffers[1].keys():
        return False
    if not all(torch.equal(tensor, buffers[1][name]) for name, tensor in buffers[0].items()):
        return False
    try:
        one, other = record(narrowed), record(stock)
    except ModelError:  # the same shapes, cut into heads in another way
        return False
    pairs = zip([*one.of_products(), *one.outputs], [*other.of_products(), *other.outputs], strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, **TOLERANCE) for a, b in pairs)


def how_to_load(folder: Path, name: str) -> tuple[str, str]:
    """Where an artifact loads, and the lines of Python that load it under the name of its final place."""
    config = json.loads((folder / "config.json").read_text())
    own, kind = config["model_type"] == MODEL_TYPE, config["model_type"]
    code = "auto_map" in config.get("base_config", config)
    options = ", trust_remote_code=True" if code else ""
    lines = "from transformers import AutoModelForCausalLM\n\n"
    lines += f"model = AutoModelForCausalLM.from_pretrained({name!r}{options})"
    which = "by the code that came with the original" if code else f"a stock model of type {kind!r}"
    if own:
        return (
            "transformers, once qpruner is imported, as an instance of the original class.",
            "import qpruner\n" + lines,
        )
    return f"transformers as it is: {which}.", lines
