"""Small random models in folders, and ways to spoil them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 259
LLAMA = dict(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
GPT2 = dict(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)
FAMILIES = {
    "llama": LLAMA,
    "qwen3": LLAMA | dict(head_dim=4, tie_word_embeddings=False),
    "gpt_neox": {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"},
    "phi3": LLAMA | dict(pad_token_id=0),
    "opt": LLAMA | dict(ffn_dim=24, word_embed_proj_dim=16, pad_token_id=1),
    "gpt2": GPT2,
    "bloom": dict(vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1),
    "gemma3_text": LLAMA | dict(head_dim=4),
    "mixtral": LLAMA | dict(num_local_experts=2, num_experts_per_tok=1, pad_token_id=None),
}


def tiny_model(family: str = "llama", *, seed: int = 0, **changes) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(FAMILIES[family] | changes))
    return AutoModelForCausalLM.from_config(config).eval()


def save(model: torch.nn.Module, folder: Path, *, tokenizer: bool = False, **kwargs) -> Path:
    model.save_pretrained(folder, **kwargs)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer(**special) -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte; `<s>` is 0, `</s>` is 1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {letter: i + 3 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict(bos_token="<s>", eos_token="</s>") | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)


def edit_config(folder: Path, **changes) -> None:
    """Set keys of config.json; None removes one."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_tensors(folder: Path, change) -> None:
    """Replace the stored tensors by change(tensors)."""
    path = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    save_file(change(tensors), path, metadata={"format": "pt"})
