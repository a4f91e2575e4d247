"""A Llama whose layers have widths of their own, for transformers with trust_remote_code.

vLLM has a class of this name and does not run this file.
"""

import copy

from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaMLP

from .configuration_decilm import DeciLMConfig


class DeciLMForCausalLM(LlamaForCausalLM):
    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig):
        super().__init__(config)
        for index, (layer, block) in enumerate(zip(self.model.layers, config.block_configs, strict=True)):
            own = copy.copy(config)
            own.intermediate_size = block.ffn.intermediate_size
            own.num_key_value_heads = config.num_attention_heads // block.attention.n_heads_in_group
            own.attention_bias = config.qkv_bias
            layer.mlp = LlamaMLP(own)
            layer.self_attn = LlamaAttention(own, index)
            out = layer.self_attn.o_proj
            layer.self_attn.o_proj = nn.Linear(out.in_features, out.out_features, bias=config.attention_bias)
            layer.mlp.config = layer.self_attn.config = config
        self.post_init()
