"""A small decoder in the layout of Baichuan: q, k and v stacked in one linear `W_pack`, rotary positions or ALiBi.

The slopes of ALiBi are added to the attention mask, once for all layers, so that a layer sees them only there.
"""

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_wpack import WPackConfig
from .positions_wpack import alibi_slopes, rotate


class WPackRMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class WPackAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        self.hidden_size = self.num_heads * self.head_dim
        self.W_pack = nn.Linear(config.hidden_size, 3 * self.hidden_size, bias=False)
        self.o_proj = nn.Linear(self.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask, positions, past_key_values=None):
        batch, length, _ = hidden_states.shape
        packed = self.W_pack(hidden_states).unflatten(-1, (3, self.hidden_size)).unsqueeze(0).transpose(0, -2)
        q, k, v = (
            part.view(batch, length, self.num_heads, self.head_dim).transpose(1, 2) for part in packed.squeeze(-2)
        )
        if self.config.position == "rotary":
            q, k = rotate(q, positions), rotate(k, positions)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        scores = q @ k.transpose(-1, -2) / self.head_dim**0.5 + attention_mask
        out = scores.softmax(-1) @ v
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, self.hidden_size))


class WPackMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class WPackLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = WPackAttention(config, layer_idx)
        self.mlp = WPackMLP(config)
        self.input_layernorm = WPackRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = WPackRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, attention_mask, positions, past_key_values=None):
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(
            hidden_states=normed,
            attention_mask=attention_mask,
            positions=positions,
            past_key_values=past_key_values,
        )
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class WPackPreTrainedModel(PreTrainedModel):
    config_class = WPackConfig
    base_model_prefix = "model"
    _no_split_modules = ["WPackLayer"]

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.2)


class WPackModel(WPackPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(WPackLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = WPackRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, past_key_values=None, use_cache=True):
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        positions = torch.arange(past, past + hidden_states.shape[1], device=hidden_states.device)
        mask = self.mask(positions, attention_mask, hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, positions, past_key_values)
        return self.norm(hidden_states), past_key_values

    def mask(self, positions, attention_mask, dtype):
        """(batch or 1, heads or 1, queries, keys), added to the scores."""
        keys = torch.arange(positions[-1] + 1, device=positions.device)
        lowest = torch.finfo(dtype).min
        mask = torch.zeros(1, 1, len(positions), len(keys), dtype=dtype, device=positions.device)
        mask = mask.masked_fill(keys > positions[:, None], lowest)
        if self.config.position == "alibi":
            slopes = alibi_slopes(self.config.num_attention_heads).to(dtype).to(positions.device)
            mask = mask + slopes[:, None, None] * keys
        if attention_mask is not None:
            mask = mask.masked_fill(attention_mask[:, None, None, : len(keys)] == 0, lowest)
        return mask


class WPackForCausalLM(WPackPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = WPackModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        past_key_values=None,
        labels=None,
        use_cache=True,
        logits_to_keep=0,
        **kwargs,
    ):
        hidden_states, past_key_values = self.model(
            input_ids, attention_mask, inputs_embeds, past_key_values, use_cache=use_cache
        )
        kept = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        logits = self.lm_head(hidden_states[:, kept])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
