"""Random models of a few thousand parameters, one per family that is told apart by how it couples its weights."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

COMMON = dict(vocab_size=61, bos_token_id=0, eos_token_id=1, pad_token_id=None)
WIDTHS = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4)
GQA = WIDTHS | dict(num_key_value_heads=2)

# kv groups, query heads where they share keys, and channels: what discovery has to find in every layer.
TINY: dict[str, dict] = {
    "llama": GQA | dict(kv_groups=2, query_heads=4, channels=40),
    "qwen3": GQA | dict(
        head_dim=8, num_attention_heads=6, num_key_value_heads=3, kv_groups=3, query_heads=6, channels=40,
    ),
    "gpt_neox": WIDTHS | dict(kv_groups=4, channels=40),
    "bloom": dict(hidden_size=24, n_layer=3, n_head=4, kv_groups=4, channels=96),
    "phi3": GQA | dict(kv_groups=2, query_heads=4, channels=40),
    "opt": dict(
        hidden_size=24, ffn_dim=40, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=24,
        kv_groups=4, channels=40,
    ),
    "gpt2": dict(n_embd=24, n_inner=40, n_layer=3, n_head=4, kv_groups=4, channels=40),
}  # fmt: skip
EXPECTED = ("kv_groups", "query_heads", "channels")


def tiny_config(family: str, **over) -> PreTrainedConfig:
    fields = COMMON | TINY.get(family, GQA) | over
    return AutoConfig.for_model(family, **{k: v for k, v in fields.items() if k not in EXPECTED})


def tiny(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **over) -> PreTrainedModel:
    """A model of random weights, biases and norms included; `over` overrides fields of its configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **over)).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.config._experts_implementation = "eager"  # torch's fused product of experts knows no float64
    return model
