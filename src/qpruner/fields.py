"""What configurations call their sizes: most families' words first, then those of others, such as GPT-2 and BLOOM."""

LAYERS = ("num_hidden_layers", "n_layer")
HIDDEN = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")
HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
CHANNELS = (
    "intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "moe_intermediate_size",
    "shared_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
)  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
