"""Small random models and artifacts of them, for exports: widths in which K-types have a place."""

import itertools
from pathlib import Path

import torch
from tiny_folder import save
from transformers import AutoConfig, AutoModelForCausalLM

from qpruner import recipe
from qpruner import shape as shaping
from qpruner.artifact.save import save_artifact
from qpruner.do.quantize import Candidates
from qpruner.model import load
from qpruner.model.adapters import adapter_layers, factors
from qpruner.model.surgery import narrow_
from qpruner.plan import DENSE, QuantSpec

SIZES = dict(
    vocab_size=259, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
    tie_word_embeddings=True,
)  # fmt: skip


def random_model(family: str, *, seed: int = 0, **over) -> torch.nn.Module:
    """Of random weights, biases and norms, in bfloat16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | over))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(torch.bfloat16)


def folder_of(family: str, path: Path, *, tokenizer: bool = False, **over) -> Path:
    return save(random_model(family, **over), path, tokenizer=tokenizer)


def artifact_of(
    model: Path,
    path: Path,
    *,
    kv_groups: tuple[int, ...] = (4, 4, 4),
    channels: tuple[int, ...] = (512, 512, 512),
    specs: tuple[QuantSpec, ...] = (DENSE,),
    embeddings: QuantSpec | None = None,
    rank: int = 0,
    layers: tuple[int, ...] | None = None,
) -> Path:
    """layers: of the original that stay. Widths are of each of them; specs are dealt out to what is fused, in turn."""
    source = load.inspect_source(model)
    shape = shaping.shape_of(source).of_layers(layers)
    widths = {"kv_group": kv_groups, "channel": channels}
    kept = {
        name: list(range(g.n_units))[-widths[g.kind][g.layer] :] if g.kind in widths else list(range(g.n_units))
        for name, g in shape.graph.groups.items()
    }
    dealt = zip(shape.graph.projections, itertools.cycle(specs))
    named = {name: spec for projection, spec in dealt for name in projection.linears}
    plan = shape.plan(recipe.load(f"qpruner[adapter_rank={rank}]"), kept, dict.fromkeys(named, 16), embeddings={})
    coded = {name: embeddings for name in shape.graph.embeddings} if embeddings else {}
    plan = plan.model_copy(update={"specs": named, "embeddings": coded})
    made = load.load_model(source)
    if layers is not None:
        made.model.layers = torch.nn.ModuleList(made.model.layers[i] for i in layers)
    narrow_(made, shape.graph, plan.kept)
    candidates = Candidates(made, shape.graph, plan, adapter_dtype=torch.bfloat16)
    candidates.put_(plan.specs | coded)
    for layer in adapter_layers(made).values():
        for factor in factors(layer):
            factor.data.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    save_artifact(path, made, shape.graph, plan, expected=shape.stored(plan), dtype=torch.bfloat16, source=source)
    return path
