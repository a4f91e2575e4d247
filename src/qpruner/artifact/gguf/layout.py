"""Which tensors a GGUF file has, and which of the model's tensors each is made of.

Entry   a tensor of the file: its name there, and the model's tensors that lie one below the other in it
order   where each row of the file's tensor comes from: llama.cpp turns neighbouring rows of a head together, where
        transformers turns a row of the first half with one of the second
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qpruner.artifact.gguf.families import Anatomy, Architecture

# name in the file -> path in a decoder layer
LINEARS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
FUSED = {"attn_qkv": ("attn_q", "attn_k", "attn_v")}


@dataclass(frozen=True)
class Entry:
    """parts: the model's tensors. heads: so many, of each part whose rows are in another order; 0 for the same."""

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    heads: tuple[int, ...] = (0,)

    @property
    def matrix(self) -> bool:
        return len(self.shape) > 1


def entries(model: nn.Module, body: Anatomy, row: Architecture) -> list[Entry]:
    """Every tensor that comes from the model, in the order of the file."""
    base = f"{model.base_model_prefix}."
    shape = lambda *names: _stacked([tuple(model.get_parameter(name).shape) for name in names])
    plain = lambda name, source: Entry(name, (source,), shape(source))
    found = [plain("token_embd.weight", f"{base}embed_tokens.weight")]
    for i, layer in enumerate(body.layers):
        path, place = f"{base}layers.{i}.", f"blk.{i}."
        norms = NORMS | (HEAD_NORMS if row.head_norms else {})
        found += [plain(f"{place}{name}.weight", f"{path}{of}.weight") for name, of in norms.items()]
        turned = {"attn_q": layer.heads, "attn_k": layer.kv_heads} if row.permuted else {}
        fused = FUSED if row.fused else {}
        names = {name: (name,) for name in LINEARS if name not in sum(fused.values(), ())} | fused
        for name, of in names.items():
            parts = tuple(f"{path}{LINEARS[one]}.weight" for one in of)
            heads = tuple(turned.get(one, 0) for one in of)
            found.append(Entry(f"{place}{name}.weight", parts, shape(*parts), heads))
            bias = f"{path}{LINEARS[of[0]]}.bias"
            if LINEARS[of[0]].rpartition(".")[2] in layer.biases:
                found.append(Entry(f"{place}{name}.bias", (bias,), shape(bias), heads))
    found.append(plain("output_norm.weight", f"{base}norm.weight"))
    if not body.tied:
        found.append(plain("output.weight", "lm_head.weight"))
    return found


def _stacked(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return sum(shape[0] for shape in shapes), *shapes[0][1:]


def order(rows: int, heads: int) -> Tensor:
    """The model's row for every row of the file."""
    return torch.arange(rows).view(heads, 2, -1).mT.flatten()


def restored(rows: int, heads: int) -> Tensor:
    """The file's row for every row of the model."""
    return torch.arange(rows).view(heads, -1, 2).mT.flatten()
