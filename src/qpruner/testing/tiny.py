"""Small configurations and random models of any architecture that transformers can build.

What a configuration calls its widths differs; `TABLE` names them all, and `ROWS` holds what that table cannot get right
for a type. Nothing here decides what can be pruned.
"""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

N_LAYERS = 4  # so that hybrids have a layer of each kind

LAYER_COUNTS = (
    "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks encoder_layers "
    "num_encoder_layers"
)
# A size, and what configurations call what is given it.
TABLE: tuple[tuple[object, str], ...] = (
    (61, "vocab_size unpadded_vocab_size decoder_vocab_size vocab_size_per_layer_input"),
    (64, "max_position_embeddings n_positions max_seq_len n_ctx context_length"),
    (N_LAYERS, LAYER_COUNTS),
    (32, "hidden_size d_model n_embd emb_dim embedding_dim word_embed_proj_dim embedding_size"),
    (40, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size n_inner dff dim_ff d_inner"),
    (40, "intermediate_size_mlp dense_intermediate_size feed_forward_size"),
    (20, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size"),
    (20, "moe_shared_expert_intermediate_size shared_experts_intermediate_size"),
    (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads encoder_attention_heads"),
    (4, "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads"),
    (4, "linear_num_value_heads linear_num_heads index_n_heads"),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads"),
    (8, "head_dim swa_head_dim global_head_dim linear_key_head_dim linear_value_head_dim qk_nope_head_dim"),
    (8, "linear_head_dim index_head_dim kv_channels"),
    (4, "qk_rope_head_dim rotary_dim"),
    (6, "v_head_dim"),
    (10, "q_lora_rank"),
    (12, "kv_lora_rank o_lora_rank"),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"),
    (2, "num_experts_per_tok moe_topk moe_k num_experts_per_token n_group num_expert_group"),
    (1, "n_shared_experts num_shared_experts moe_num_shared_experts topk_group"),
    (1, "first_k_dense_replace num_dense_layers moe_layer_start_index"),
    (4, "sliding_window window_size sliding_window_size local_attention attention_chunk_size"),
    (8, "mamba_d_state ssm_state_size state_size mamba_d_head mamba_head_dim"),
    (8, "mamba_n_heads mamba_num_heads n_mamba_heads"),
    (4, "mamba_dt_rank time_step_rank"),
    (2, "n_groups"),
    (0, "bos_token_id forced_bos_token_id decoder_start_token_id"),
    (1, "eos_token_id forced_eos_token_id"),
    (2, "pad_token_id"),
    (True, "is_decoder"),
)
SIZES = {name: size for size, names in TABLE for name in names.split()}

# Latent attention has as many key heads as query heads, and its head_dim is that of the rotary part.
LATENT = {"num_key_value_heads": 4, "head_dim": 4}

ROWS: dict[str, dict[str, object]] = {
    "big_bird": dict(attention_type="original_full"),  # else it replaces its attention while it runs
    "bamba": dict(attn_layer_indices=[1, 3]),
    "codegen": dict(n_head=8),  # its heads come in four parts
    "cohere_compass_text": dict(
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            "full_attention": None,
        },
    ),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8),
        ffn_config=dict(hidden_size=32, ffn_hidden_size=20, moe_top_k=2),
    ),
    "dots3_note_text": dict(
        layer_types=["indexed_attention", "sliding_attention"] * 2, swa_num_attention_heads=4,
        swa_num_key_value_heads=4, swa_q_lora_rank=10, swa_kv_lora_rank=12, swa_head_dim=12, swa_qk_nope_head_dim=8,
        swa_v_head_dim=6, swa_qk_rope_head_dim=4,
    ),
    "falcon_h1": dict(mamba_d_ssm=64),
    "gemma3n_text": dict(
        num_kv_shared_layers=2, activation_sparsity_pattern=[0.0] * N_LAYERS, intermediate_size=[40] * N_LAYERS
    ),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 2),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "laguna": dict(num_attention_heads_per_layer=[4, 6, 4, 6]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "mamba2": dict(num_heads=8),
    "nemotron_h": dict(layers_block_type=["linear_attention", "moe", "full_attention", "mlp"]),
    "qwen4_exp_text": dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=2
    ),
    "reformer": dict(
        axial_pos_shape=[4, 4], axial_pos_embds_dim=[16, 16], attn_layers=["local"] * N_LAYERS, attention_head_size=8,
        local_attn_chunk_length=4, num_hidden_layers=N_LAYERS,
    ),
    "xlstm": dict(hidden_size=128, embedding_dim=128),  # its cache rounds widths up to 64
    "xmod": dict(default_language="en_XX"),
    "zaya": dict(num_experts_per_tok=1),
}  # fmt: skip


def tiny_config(model_type: str, **over) -> PreTrainedConfig:
    """A small valid configuration of any model type: the defaults of its class, every width shrunk.

    over: fields that replace what the tables say.
    """
    known = CONFIG_MAPPING[model_type]().to_dict()
    fields = {name: value for name, value in SIZES.items() if name in known}
    if "qk_rope_head_dim" in known:
        fields |= {name: value for name, value in LATENT.items() if name in known}
    n_layers = next((known[name] for name in LAYER_COUNTS.split() if name in known), None)
    for name, value in known.items():
        if isinstance(value, list) and len(value) == n_layers:
            fields[name] = one_of_each(value)
    return AutoConfig.for_model(model_type, **(fields | ROWS.get(model_type, {}) | over))


class Held:
    """The tensors of a model in memory, given out as copies, as if they were read from files."""

    def __init__(self, model: nn.Module):
        self.state, self.bytes_read = model.state_dict(), 0
        self.names: list[str] = []  # as they were asked for

    def read(self, name: str) -> Tensor:
        self.names.append(name)
        self.bytes_read += self.state[name].nbytes
        return self.state[name].detach().clone()


def one_of_each(values: list) -> list:
    """One entry for each layer of the small model, every value that occurs among them."""
    distinct = list(dict.fromkeys(values))
    return [distinct[i % len(distinct)] for i in range(N_LAYERS)]


def tiny_model(config: PreTrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The causal language model of a configuration with random weights, norms and biases included, in eval mode.

    Experts are computed one by one: torch's fused product of them knows no float64.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype) + 0.1 * torch.randn_like(parameter, dtype=dtype)
    model.config._experts_implementation = "eager"
    return model
