"""Configuration of a small decoder in the layout of Baichuan, as a model that brings its own code has it beside it."""

import os
from pathlib import Path

from transformers import PreTrainedConfig

# Tests look for this file: nothing here runs unless it was asked for.
if marker := os.environ.get("WPACK_WAS_IMPORTED"):
    Path(marker).touch()


class WPackConfig(PreTrainedConfig):
    """position: `rotary` as in the 7B, `alibi` as in the 13B. head_dim: hidden size over heads if not given."""

    model_type = "wpack"

    def __init__(
        self,
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=None,
        position="rotary",
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.head_dim = head_dim
        self.position = position
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        super().__init__(**kwargs)
