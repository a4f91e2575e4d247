"""DeciLM's form of a Llama whose layers have MLPs of their own widths, which vLLM has a class for.

vLLM and transformers read `block_configs`; transformers with the Python files here, which are copied beside the
weights and never imported. The number of query heads is one for all layers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qpruner.targets import LayerWidths

FILES = tuple(sorted(Path(__file__).parent.glob("*_decilm.py")))
MODEL_TYPE, ARCHITECTURE = "nemotron-nas", "DeciLMForCausalLM"
AUTO_MAP = {
    "AutoConfig": "configuration_decilm.DeciLMConfig",
    "AutoModelForCausalLM": f"modeling_decilm.{ARCHITECTURE}",
}
# Of Llama's configuration; the rest of it says nothing that a decoder computes.
FIELDS = (
    "vocab_size", "hidden_size", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "rope_theta",
    "rope_scaling", "attention_bias", "attention_dropout", "mlp_bias", "dtype", "torch_dtype", "use_cache",
)  # fmt: skip


def configuration(config: dict[str, Any], widths: Sequence[LayerWidths], head_dim: int) -> dict[str, Any]:
    """The content of config.json for a model of `targets.DECI` whose layers have equally many query heads.

    Args:
        config: of the original. widths: of the layers that stay.
    """
    found = {name: config[name] for name in FIELDS if name in config}
    heads = widths[0].heads
    blocks = [
        {
            "attention": {"n_heads_in_group": heads // layer.kv_heads, "no_op": False},
            "ffn": {"intermediate_size": layer.channels, "no_op": False},
        }
        for layer in widths
    ]
    return found | {
        "model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], "auto_map": AUTO_MAP, "block_configs": blocks,
        "num_hidden_layers": len(widths), "num_attention_heads": heads, "head_dim": head_dim,
        "num_key_value_heads": max(layer.kv_heads for layer in widths),
        "intermediate_size": max(layer.channels for layer in widths),
        "qkv_bias": config["model_type"] in WITH_BIAS or bool(config.get("attention_bias")),
    }  # fmt: skip


WITH_BIAS = ("qwen2",)  # whose q, k and v have one, whatever the configuration says
