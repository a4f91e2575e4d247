"""What those that serve a model can load: the widths and formats that a plan has to stay within.

transformers   with qpruner's loader: everything
vllm           0.33: widths of each layer through its transformers backend, codes as compressed-tensors' pack-quantized
deci           DeciLM's class in vLLM: channels of each layer, one number of query heads for all
gguf           llama.cpp of 2026-10: widths of each layer where the architecture maps to `deci` or `openelm`
any            what transformers, vllm and gguf can

What is known from the sources of these versions, or was run, is refused flatly. What is only probable is refused too,
and its sentence says so.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qpruner.errors import ModelError, listed
from qpruner.fields import EXPERTS
from qpruner.plan import DENSE, QuantSpec

Target = Literal["transformers", "vllm", "deci", "gguf", "any"]

# Weights in a block of llama.cpp's types: of 2, 3 and 6 bits there are only K-types; 4, 5 and 8 bits have types with
# smaller blocks, which it falls back to.
K_BLOCK, BLOCK = 256, 32
ONLY_IN_K = (2, 3, 6)
GGUF_BITS = (2, 3, 4, 5, 6, 8)
# By transformers' model_type. RMSNorm, SwiGLU and rotary positions, without norms of heads: `deci` computes the same.
DECI = ("llama", "mistral", "qwen2")
# With norms of heads, and the embedding as head: `openelm` does.
OPENELM = ("qwen3",)
DECI_ROPE, OPENELM_ROPE = ("default", "llama3"), ("default",)

# What vLLM's Marlin kernels take, (bits, symmetric) and groups (None for whole rows). Other widths go to the kernels of
# humming-kernels, which it brings along; none of those was run.
MARLIN = ((4, True), (8, True), (4, False))
MARLIN_GROUPS = (None, 32, 64, 128)
WORD_BITS = 32


@dataclass(frozen=True)
class LayerWidths:
    """What is left in a decoder layer; zero heads for one without attention, zero channels for one without MLP."""

    heads: int
    kv_heads: int
    channels: int

    def __str__(self) -> str:
        return f"{self.heads} heads, {self.kv_heads} key/value heads, {self.channels} channels"


@dataclass(frozen=True)
class Rules:
    """What a target asks of a plan for one model.

    uniform_widths: every layer as wide as the others. uniform_heads: as many query heads as the others.
    channel_multiple: of the MLP channels that stay, where some go, so that every spec on offer can store their reader.
    head_columns_multiple: the same of kept heads times their size.
    packs_embeddings: whether embedding and head may lie in codes.
    drops_layers, drops_attention, drops_mlp: what may go as a whole. Layers are numbered anew; of a layer's two parts
        one may go without the other.
    first_attention: the first layer that stays keeps its attention.
    reasons: field -> why it is so, where the target is not free in it; begins a sentence.
    formats: whose formats linears have to fit.
    """

    target: Target
    uniform_widths: bool = False
    uniform_heads: bool = False
    channel_multiple: int = 1
    head_columns_multiple: int = 1
    packs_embeddings: bool = True
    drops_layers: bool = True
    drops_attention: bool = True
    drops_mlp: bool = True
    first_attention: bool = False
    reasons: tuple[tuple[str, str], ...] = ()
    formats: tuple[Literal["vllm", "gguf"], ...] = ()

    def accepts(self, spec: QuantSpec, d_in: int | None = None) -> bool:
        """Whether a linear with so many inputs can be stored so; without `d_in`, whether any can."""
        return self.why_not(spec, d_in) is None

    def why_not(self, spec: QuantSpec, d_in: int | None = None) -> str | None:
        """What speaks against storing a linear so."""
        found = (FORMATS[name](spec, d_in) for name in self.formats if spec != DENSE)
        return next((reason for reason in found if reason), None)

    def kv_group_step(self, columns: int) -> int:
        """In what steps kv groups go, each with so many columns of the output projection."""
        return self.head_columns_multiple // math.gcd(self.head_columns_multiple, columns)

    def reason(self, field: str) -> str:
        return dict(self.reasons).get(field, f"{self.target} has no place for it")


def rules_of(target: Target, config: Mapping[str, Any], *, tied: bool, specs: Sequence[QuantSpec] = ()) -> Rules:
    """The rules for a model.

    Args:
        config: its configuration, as transformers writes it.
        tied: whether embedding and head are one tensor.
        specs: how linears may be stored; multiples are those at which all that are accepted can store all that is kept.
    Raises:
        ModelError: the target computes something else than models of this type do.
    """
    if target == "transformers":
        return Rules(target)
    if target == "vllm":
        return _vllm(config, specs)
    if target == "deci":
        return _deci(config, specs)
    if target == "gguf":
        return _gguf(config, tied, specs)
    return _both(_vllm(config, specs), _gguf(config, tied, specs))


def held(target: Target, specs: Iterable[QuantSpec]) -> tuple[QuantSpec, ...]:
    """The specs as a target stores them: as they are, or else as plain integers of as many bits, in groups of the next
    size that it takes, symmetric where it knows no zero points; left out where it has none of so many bits."""
    checks = [FORMATS[name] for name in FORMATS_OF[target]]
    takes = lambda spec: spec == DENSE or all(check(spec, None) is None for check in checks)
    found = (next(filter(takes, _kin(spec)), None) for spec in specs)
    return tuple(dict.fromkeys(spec for spec in found if spec))


def _kin(spec: QuantSpec) -> Iterator[QuantSpec]:
    yield spec
    if spec.bits in GGUF_BITS:
        larger = [g for g in MARLIN_GROUPS if g and spec.group_size and g > spec.group_size]
        for group_size in (spec.group_size, *larger):
            for symmetric in dict.fromkeys((spec.symmetric, True)):
                yield QuantSpec(bits=spec.bits, grid="integer", group_size=group_size, symmetric=symmetric)


def refused(
    rules: Rules,
    widths: Sequence[LayerWidths],
    specs: Mapping[str, tuple[QuantSpec, int]],
    *,
    n_layers: int | None = None,
) -> list[str]:
    """Why the target would not load what a plan makes, or not as the plan says: a sentence for each reason.

    Args:
        widths: of the layers that stay, in order.
        specs: linear -> how it is stored, and its inputs that stay.
        n_layers: that the model had; None for as many as there are.
    """
    said = []
    if n_layers is not None and len(widths) < n_layers and not rules.drops_layers:
        said.append(f"{n_layers - len(widths)} of {n_layers} layers go, and {rules.reason('drops_layers')}.")
    odd = next((i for i, layer in enumerate(widths) if layer != widths[0]), None)
    if rules.uniform_widths and odd is not None:
        said.append(f"layer 0 keeps {widths[0]}, and layer {odd} {widths[odd]}; {rules.reason('uniform_widths')}.")
    odd = next((i for i, layer in enumerate(widths) if layer.heads != widths[0].heads), None)
    if rules.uniform_heads and odd is not None:
        said.append(
            f"layer 0 keeps {widths[0].heads} heads, and layer {odd} {widths[odd].heads}; "
            f"{rules.reason('uniform_heads')}."
        )
    parts = (("drops_attention", "heads", "attention"), ("drops_mlp", "channels", "MLP"))
    for field, width, name in parts:
        without = [i for i, layer in enumerate(widths) if not getattr(layer, width)]
        if without and not getattr(rules, field):
            said.append(f"layer(s) {listed(without)} have no {name}, and {rules.reason(field)}.")
    if rules.first_attention and widths and not widths[0].heads:
        said.append(f"layer 0 has no attention, and {rules.reason('first_attention')}.")
    by_reason: dict[str, list[str]] = {}
    for name, (spec, d_in) in specs.items():
        if reason := rules.why_not(spec, d_in):
            by_reason.setdefault(reason, []).append(name)
    return said + [f"{listed(names)}: {reason}." for reason, names in by_reason.items()]


def _vllm(config: Mapping[str, Any], specs: Sequence[QuantSpec]) -> Rules:
    attention = "vLLM's transformers backend wants attention in every layer"
    mixture = "vLLM does not load a mixture of experts whose layers differ"
    groups = [spec.group_size or 1 for spec in specs if _pack_quantized(spec, None) is None]
    multiple = math.lcm(BLOCK, *groups)  # whole words of codes, and whole groups
    return Rules(
        "vllm",
        uniform_widths=is_mixture(config),
        channel_multiple=multiple,
        head_columns_multiple=multiple,
        packs_embeddings=False,
        drops_attention=False,
        drops_mlp=False,
        reasons=(
            ("uniform_widths", mixture),
            ("drops_attention", attention),
            ("drops_mlp", "vLLM is not known to load a layer without MLP (not verified)"),
        ),
        formats=("vllm",),
    )


def _deci(config: Mapping[str, Any], specs: Sequence[QuantSpec]) -> Rules:
    kind = config["model_type"]
    if kind not in DECI or not _plain_llama(config):
        raise ModelError(
            f"DeciLM computes what Llama does, without windows and with SiLU, and so do {', '.join(DECI)} as they "
            f"mostly are; {kind!r} does not, or not with this configuration."
        )
    heads = "DeciLM has one number of query heads for all layers (--target deci keeps to it)"
    whole = "a layer without one of its parts was never opened in vLLM's DeciLM"
    reasons = (("uniform_heads", heads), ("drops_attention", whole), ("drops_mlp", whole))
    return replace(_vllm(config, specs), target="deci", uniform_heads=True, reasons=reasons)


def _gguf(config: Mapping[str, Any], tied: bool, specs: Sequence[QuantSpec]) -> Rules:
    multiple = K_BLOCK if any(spec.bits in ONLY_IN_K and _ggml(spec, None) is None for spec in specs) else BLOCK
    common = dict(channel_multiple=multiple, head_columns_multiple=multiple, drops_mlp=False, formats=("gguf",))
    kind = config["model_type"]
    layered = _layered_in_gguf(config, tied)
    if layered == "deci":
        reasons = (
            ("drops_mlp", "llama.cpp's `deci` leaves out the attention of a layer without MLP, and says nothing"),
            ("first_attention", "llama.cpp's `deci` takes the size of all heads from layer 0"),
        )
        return Rules("gguf", first_attention=True, reasons=reasons, **common)
    if layered == "openelm":
        whole = "llama.cpp's `openelm` has both parts in every layer"
        reasons = (("drops_attention", whole), ("drops_mlp", whole))
        return Rules("gguf", drops_attention=False, reasons=reasons, **common)
    whole = f"llama.cpp has both parts in every layer of {kind!r}"
    reasons = (
        ("uniform_widths", f"llama.cpp loads layers of {kind!r} only where all are equally wide"),
        (
            "drops_layers",
            f"llama.cpp takes the kind of attention of each layer of {kind!r} from its number (not verified)",
        ),
        ("drops_attention", whole),
        ("drops_mlp", whole),
    )
    drops_layers = len(set(config.get("layer_types") or ())) < 2
    return Rules(
        "gguf", uniform_widths=True, drops_layers=drops_layers, drops_attention=False, reasons=reasons, **common
    )


def _both(a: Rules, b: Rules) -> Rules:
    """What both allow; of the reasons, those of the one that is not free."""
    strict = {"uniform_widths": True, "first_attention": True} | dict.fromkeys(
        ("packs_embeddings", "drops_layers", "drops_attention", "drops_mlp"), False
    )
    found = {
        field: value if value in (getattr(a, field), getattr(b, field)) else not value
        for field, value in strict.items()
    }
    reasons = {
        field: rules.reason(field)
        for rules in (a, b)
        for field, value in strict.items()
        if getattr(rules, field) == value
    }
    return Rules(
        "any",
        channel_multiple=math.lcm(a.channel_multiple, b.channel_multiple),
        head_columns_multiple=math.lcm(a.head_columns_multiple, b.head_columns_multiple),
        reasons=tuple(reasons.items()),
        formats=(*a.formats, *b.formats),
        **found,
    )


def _layered_in_gguf(config: Mapping[str, Any], tied: bool) -> Literal["deci", "openelm"] | None:
    """The architecture of llama.cpp that computes the same and has widths of each layer."""
    kind = config["model_type"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    plain = _plain_llama(config) and not config.get("mlp_bias")
    if plain and kind in DECI and rope_type in DECI_ROPE:
        return "deci"
    if plain and kind in OPENELM and tied and not config.get("attention_bias") and rope_type in OPENELM_ROPE:
        return "openelm"
    return None


def _plain_llama(config: Mapping[str, Any]) -> bool:
    """No window, SiLU, and all of a head is rotated."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rotated = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return not _slides(config) and config.get("hidden_act", "silu") == "silu" and rotated in (None, 1, 1.0)


def _slides(config: Mapping[str, Any]) -> bool:
    """Whether attention of some layer is of a sliding window."""
    if config.get("layer_types"):
        return any(kind != "full_attention" for kind in config["layer_types"])
    return bool(config.get("sliding_window")) and config.get("use_sliding_window", True)


def is_mixture(config: Mapping[str, Any]) -> bool:
    """Whether layers have experts."""
    return any(config.get(word) for word in EXPERTS)


def _pack_quantized(spec: QuantSpec, d_in: int | None) -> str | None:
    """Why compressed-tensors' pack-quantized, as vLLM reads it, does not hold this."""
    if reason := _plain_integers(spec, "compressed-tensors' pack-quantized"):
        return reason
    if spec.scale_bits != 16:
        return f"compressed-tensors' scales have 16 bits, and these {spec.scale_bits}"
    if spec.group_size is not None and d_in is not None and d_in % spec.group_size:
        return f"{d_in} inputs are no whole groups of {spec.group_size}, which compressed-tensors asks for"
    if spec.group_size not in MARLIN_GROUPS:
        return (
            f"vLLM's Marlin takes groups of 32, 64 or 128 or whole rows, not of {spec.group_size}; others: not verified"
        )
    if (spec.bits, spec.symmetric) not in MARLIN:
        zeros = "" if spec.symmetric else " with zero points"
        return (
            f"vLLM's Marlin takes codes of 4 and 8 bits, with zero points of 4; of {spec.bits} bits{zeros} Humming may "
            "(not verified)"
        )
    if d_in is not None and d_in * spec.bits % WORD_BITS:
        return f"{d_in} codes of {spec.bits} bits do not fill whole words of {WORD_BITS} (not verified)"
    return None


def _ggml(spec: QuantSpec, d_in: int | None) -> str | None:
    """Why llama.cpp has no type of so many bits for this. Its types have groups and scales of their own."""
    if reason := _plain_integers(spec, "GGUF"):
        return reason
    if spec.bits not in GGUF_BITS:
        return f"GGUF has no type of {spec.bits} bits that stands for this grid"
    if d_in is not None and d_in % BLOCK:
        return f"{d_in} inputs are no multiple of {BLOCK}, and llama.cpp would store 16 bits"
    if d_in is not None and d_in % K_BLOCK and spec.bits in ONLY_IN_K:
        return f"{d_in} inputs are no multiple of {K_BLOCK}, and llama.cpp has {spec.bits} bits only in such blocks"
    return None


def _plain_integers(spec: QuantSpec, where: str) -> str | None:
    if spec.grid != "integer":
        return f"{where} has no {spec.grid} grid"
    if spec.salient:
        return f"{where} has one width for each linear, and {spec.salient} channels here have {spec.salient_bits} bits"
    if spec.activation_bits != 16:
        return f"{where} leaves inputs alone, and these are rounded to {spec.activation_bits} bits"
    return None


FORMATS_OF = {"transformers": (), "vllm": ("vllm",), "deci": ("vllm",), "gguf": ("gguf",), "any": ("vllm", "gguf")}
FORMATS = {"vllm": _pack_quantized, "gguf": _ggml}
