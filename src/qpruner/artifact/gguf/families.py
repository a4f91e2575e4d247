"""What llama.cpp can run: architectures of GGUF files as rows of data, and which of them takes a given model.

An architecture is right for a model if nothing speaks against it: every reason why not is a sentence. Facts of
llama.cpp are of October 2026; that they hold is seen by running the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qpruner.errors import ModelError, listed

ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """name: as the file says it.

    each_layer: heads and channels may differ from layer to layer.
    permuted: rows of q and k go from halves of a head to pairs, since llama.cpp turns neighbours.
    biases: linears that may have one. head_norms: q and k are normalised head by head.
    square: q is as wide as the hidden states. fused: q, k and v are one tensor.
    untied: the head may be another matrix than the embedding.
    frequencies: rotary frequencies may be given one by one, where they are scaled.
    """

    name: str
    each_layer: bool = False
    permuted: bool = False
    biases: tuple[str, ...] = ()
    head_norms: bool = False
    square: bool = False
    fused: bool = False
    untied: bool = True
    frequencies: bool = False


LLAMA = Architecture("llama", permuted=True, biases=ATTENTION + FEED_FORWARD, frequencies=True)
DECI = Architecture("deci", each_layer=True, permuted=True, biases=ATTENTION + FEED_FORWARD, frequencies=True)
QWEN2 = Architecture("qwen2", biases=ATTENTION[:3], square=True)
QWEN3 = Architecture("qwen3", head_norms=True)
OPENELM = Architecture("openelm", each_layer=True, head_norms=True, fused=True, untied=False)

# model_type of transformers -> architectures that compute the same, the most usual first
FAMILIES = {
    "llama": (LLAMA, DECI),
    "mistral": (LLAMA, DECI),
    "qwen2": (QWEN2, LLAMA, DECI),
    "qwen3": (QWEN3, OPENELM),
}


@dataclass(frozen=True)
class Layer:
    """Heads, key/value heads and channels of one decoder layer; linears that have a bias."""

    heads: int
    kv_heads: int
    channels: int
    biases: tuple[str, ...]


@dataclass(frozen=True)
class Anatomy:
    """What the choice of an architecture depends on, and its settings.

    frequencies: what divides each rotary frequency, (head_dim / 2,).
    """

    model_type: str
    hidden: int
    vocabulary: int
    head_dim: int
    layers: tuple[Layer, ...]
    head_norms: bool
    tied: bool
    activation: str
    epsilon: float
    base: float
    frequencies: Tensor
    context: int
    windows: int | None

    @property
    def uniform(self) -> bool:
        return len({(layer.heads, layer.kv_heads, layer.channels) for layer in self.layers}) == 1

    @property
    def scaled(self) -> bool:
        """Whether rotary frequencies are divided, and not all by the same."""
        return not torch.allclose(self.frequencies, self.frequencies[:1], rtol=1e-5)


def anatomy(model: nn.Module) -> Anatomy:
    """Of a narrowed model on the meta device.

    Raises:
        ModelError: its family is not one that is known here, or it is turned in a way that depends on the text.
    """
    text = model.config.get_text_config(decoder=True)
    if text.model_type not in FAMILIES:
        raise ModelError(
            f"models of type {text.model_type!r} are not exported to GGUF yet. Accepted: {', '.join(FAMILIES)}. "
            "Load the artifact in transformers, or convert a 16-bit one with llama.cpp's own converter."
        )
    decoder = model.get_submodule(model.base_model_prefix)
    layers = tuple(_layer(layer) for layer in decoder.layers)
    attention = decoder.layers[0].self_attn
    norms = tuple(hasattr(layer.self_attn, "q_norm") for layer in decoder.layers)
    return Anatomy(
        model_type=text.model_type,
        hidden=decoder.norm.weight.shape[0],
        vocabulary=decoder.embed_tokens.num_embeddings,
        head_dim=attention.head_dim,
        layers=layers,
        head_norms=any(norms),
        tied=_tied(model),
        activation=text.hidden_act,
        epsilon=decoder.norm.variance_epsilon,
        base=text.rope_parameters["rope_theta"],
        frequencies=_frequencies(decoder.rotary_emb, attention.head_dim, text.rope_parameters),
        context=text.max_position_embeddings,
        windows=_window(text),
    )


def _layer(layer: nn.Module) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    of = {name: getattr(attention, name) for name in ATTENTION} | {name: getattr(mlp, name) for name in FEED_FORWARD}
    return Layer(
        heads=of["q_proj"].out_features // attention.head_dim,
        kv_heads=of["k_proj"].out_features // attention.head_dim,
        channels=of["gate_proj"].out_features,
        biases=tuple(name for name, linear in of.items() if linear.bias is not None),
    )


def _tied(model: nn.Module) -> bool:
    return bool(model.config.get_text_config(decoder=True).tie_word_embeddings)


def _window(text) -> int | None:
    """How far attention looks back, if not all the way."""
    used = getattr(text, "use_sliding_window", True)
    window = getattr(text, "sliding_window", None)
    return window if used and window and window < text.max_position_embeddings else None


def _frequencies(rotary: nn.Module, head_dim: int, rope: dict) -> Tensor:
    kind = rope.get("rope_type", "default")
    if kind in ("dynamic", "longrope") or getattr(rotary, "attention_scaling", 1.0) != 1.0:
        raise ModelError(
            f"rotary embeddings of type {kind!r} change with the length of the text or scale the attention; they are "
            "not exported to GGUF. Accepted: default, linear, llama3."
        )
    plain = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    found = rotary.inv_freq.float().cpu()
    if found.shape != plain.shape:
        raise ModelError("only a part of each head is turned by its position; such models are not exported to GGUF.")
    return plain / found


def choose(body: Anatomy) -> Architecture:
    """The first architecture that nothing speaks against.

    Raises:
        ModelError: there is none; the message says why.
    """
    rows = FAMILIES[body.model_type]
    reasons = {row.name: list(objections(body, row)) for row in rows}
    for row in rows:
        if not reasons[row.name]:
            return row
    why = "; ".join(f"{name!r}: {', '.join(found)}" for name, found in reasons.items())
    raise ModelError(
        f"no GGUF architecture holds this model of type {body.model_type!r}. {why}. "
        "Give every layer the same widths (a recipe with uniform widths), or load the artifact in transformers."
    )


def objections(body: Anatomy, row: Architecture) -> Iterator[str]:
    """Why not, in words that follow the name of the architecture."""
    if not row.each_layer and not body.uniform:
        yield f"all layers have the same widths, and here they have {_widths(body)}"
    if body.head_norms != row.head_norms:
        yield "it has no norms of single heads" if body.head_norms else "every head has a norm"
    if row.square and any(layer.heads * body.head_dim != body.hidden for layer in body.layers):
        yield "heads together are as wide as the hidden states"
    if body.tied < (not row.untied):
        yield "the head is the embedding, and here it is another matrix"
    if others := sorted({name for layer in body.layers for name in layer.biases} - set(row.biases)):
        yield f"it has no bias for {listed(others)}"
    if row.name == "qwen2" and any(set(row.biases) - set(layer.biases) for layer in body.layers):
        yield "q, k and v have biases"
    if body.scaled and not row.frequencies:
        yield "rotary frequencies are not scaled one by one"
    if body.activation not in ("silu", "swish"):
        yield f"the activation is SiLU, and here it is {body.activation!r}"


def _widths(body: Anatomy) -> str:
    of = lambda what: sorted({getattr(layer, what) for layer in body.layers})
    words = {"heads": "heads", "kv_heads": "key/value heads", "channels": "channels"}
    return ", ".join(f"{of(k)[0]} to {of(k)[-1]} {word}" for k, word in words.items() if len(of(k)) > 1)
