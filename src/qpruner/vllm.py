"""What vLLM would say to a folder, from its configuration alone; vLLM itself is not asked.

Rules are read from the sources of vLLM 0.33.0 and of its dependencies compressed-tensors 0.17.0 and humming-kernels
0.1.19. Folders were opened in vLLM 0.32.0 on a CPU (`qpruner export --vllm`): its classes, its transformers backend and
how it reads codes of every width were run there; kernels of a GPU and several devices were not.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpruner.errors import listed
from qpruner.fields import CHANNELS, HEADS, HIDDEN, KV_HEADS, LAYERS
from qpruner.plan import QuantSpec
from qpruner.targets import MARLIN, MARLIN_GROUPS, WORD_BITS, LayerWidths, is_mixture

VERSION = "0.33"
TENSOR_PARALLEL = (1, 2, 4, 8)
OWN_TYPE = "qpruner"

# Classes of its own for decoders, one width for all layers; others go through its transformers backend.
NATIVE = (
    "ApertusForCausalLM", "BloomForCausalLM", "CohereForCausalLM", "Cohere2ForCausalLM", "Ernie4_5ForCausalLM",
    "FalconForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Glm4ForCausalLM",
    "GPT2LMHeadModel", "GPTJForCausalLM", "GraniteForCausalLM", "LlamaForCausalLM", "Ministral3ForCausalLM",
    "MistralForCausalLM", "MixtralForCausalLM", "NemotronForCausalLM", "OlmoeForCausalLM", "OPTForCausalLM",
    "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
    "StableLmForCausalLM",
)  # fmt: skip
# Of these the ones that derive the size of a head from that of the hidden states, whatever `head_dim` says.
DERIVING = (
    "BloomForCausalLM", "FalconForCausalLM", "GPT2LMHeadModel", "GPTJForCausalLM", "OlmoeForCausalLM", "OPTForCausalLM",
    "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "StableLmForCausalLM",
)  # fmt: skip
OWN_LINEARS = "its transformers backend knows nn.Linear alone, and linears here are of a class of the original's own."
WIDTHS = range(2, 9)
SMALLEST_GROUP = 16
FUSED = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
SPLIT_INPUTS = {"self_attn.o_proj": "heads", "mlp.down_proj": "channels"}  # linears whose inputs are shared out


@dataclass(frozen=True)
class Verdict:
    """One rule. holds: whether vLLM takes it. sentence: what was found, and what to do if it does not."""

    rule: str
    holds: bool
    sentence: str

    def __str__(self) -> str:
        return f"vLLM {VERSION}, {self.rule}: {'yes' if self.holds else 'no'}, {self.sentence}"


@dataclass(frozen=True)
class Scheme:
    """How compressed-tensors stores a linear: integers with a 16-bit scale, and a zero point if not symmetric, for each
    group of inputs.

    bits: of a code. group_size: inputs that share a scale; None for whole rows.
    """

    bits: int
    symmetric: bool = True
    group_size: int | None = None

    @property
    def name(self) -> str:
        words = [f"int{self.bits}"] + [f"g{self.group_size}"] * (self.group_size is not None)
        return "_".join(words + ["zeros"] * (not self.symmetric))

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(bits=self.bits, grid="integer", group_size=self.group_size, symmetric=self.symmetric)

    def to_json(self) -> dict:
        """As compressed-tensors' `QuantizationArgs` read it."""
        return {
            "num_bits": self.bits, "type": "int", "symmetric": self.symmetric,
            "strategy": "channel" if self.group_size is None else "group", "group_size": self.group_size,
            "dynamic": False,
        }  # fmt: skip

    @classmethod
    def from_json(cls, how: Mapping[str, Any]) -> "Scheme":
        return cls(how["num_bits"], how["symmetric"], how.get("group_size"))

    def __str__(self) -> str:
        group = "whole rows" if self.group_size is None else f"groups of {self.group_size}"
        return f"{self.bits} bits in {group}{'' if self.symmetric else ' with zero points'}"


def vllm_verdict(model: Path | Mapping[str, Any], *, sizes: Sequence[int] = TENSOR_PARALLEL) -> list[Verdict]:
    """A verdict for each rule; vLLM is expected to take the folder if all hold.

    Args:
        model: a folder with config.json, or its content.
        sizes: of tensor parallelism, to say which divide the model.
    """
    config = model if isinstance(model, Mapping) else json.loads((Path(model) / "config.json").read_text())
    layers = layers_of(config)
    found = [_class(config, layers), _attention(layers)]
    if config.get("model_type") == OWN_TYPE and "quantization_config" not in config and config.get("coded", True):
        return [*found, Verdict("codes", False, "it does not read qpruner's codes; export --to compressed-tensors.")]
    if config.get("own_linears"):
        return [*found, Verdict("linears", False, OWN_LINEARS)]
    if (quantization := config.get("quantization_config")) is not None:
        if quantization.get("quant_method") != "compressed-tensors":
            return [*found, Verdict("codes", False, f"{quantization.get('quant_method')!r} is not judged here.")]
        stored = schemes_of(quantization)
        found += [_codes(stored), _fused(quantization, layers)]
    divides = tensor_parallel(config, sizes)
    good = [str(size) for size, reasons in divides.items() if not reasons]
    bad = "".join(f"; {size} does not: {reasons[0]}" for size, reasons in divides.items() if reasons)
    found.append(Verdict("tensor parallelism", bool(good), f"sizes that divide the model: {', '.join(good)}{bad}."))
    return found


def serve_options(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What `vllm serve` has to be told besides the folder."""
    code = ("--trust-remote-code",) if "auto_map" in config else ()
    return code + (("--model-impl", "transformers") if _misled(config) or is_mixture(config) else ())


def _misled(config: Mapping[str, Any]) -> bool:
    """Whether vLLM's own class would take heads for as wide as they were before some went."""
    name = next(iter(config.get("architectures") or ()), None)
    return name in DERIVING and head_dim_of(config) * _stated(config, HEADS) != _stated(config, HIDDEN)


def tensor_parallel(config: Mapping[str, Any], sizes: Sequence[int] = TENSOR_PARALLEL) -> dict[int, list[str]]:
    """Size -> why the model cannot be shared out over so many devices; empty where it can."""
    head_dim, layers = head_dim_of(config), layers_of(config)
    quantization = config.get("quantization_config") or {"config_groups": {}}
    return {size: list(dict.fromkeys(_undivided(layers, head_dim, quantization, size))) for size in sizes}


def uneven(layer: LayerWidths, size: int) -> Iterator[str]:
    """What of a layer cannot be shared out evenly. Fewer key/value heads than devices are given to several of them."""
    if layer.heads % size:
        yield f"{layer.heads} heads"
    if layer.kv_heads and layer.kv_heads % size and size % layer.kv_heads:
        yield f"{layer.kv_heads} key/value heads"
    if layer.channels % size:
        yield f"{layer.channels} channels"


def _undivided(layers: Sequence[LayerWidths], head_dim: int, quantization: Mapping, size: int):
    for i, layer in enumerate(layers):
        yield from (f"layer {i} has {what}" for what in uneven(layer, size))
        inputs = {"heads": layer.heads * head_dim, "channels": layer.channels}
        for name, width in SPLIT_INPUTS.items():
            stored = scheme_of(quantization, f"model.layers.{i}.{name}")
            if stored is None or inputs[width] % size:
                continue
            share = inputs[width] // size
            if stored.group_size is not None and share % stored.group_size:
                yield f"{share} inputs of layer {i}'s {name} are no whole groups of {stored.group_size}"
            elif share * stored.bits % WORD_BITS:
                yield f"{share} codes of {stored.bits} bits in layer {i}'s {name} do not fill whole words"
        outputs = {
            "self_attn.q_proj": layer.heads * head_dim,
            "self_attn.k_proj": max(layer.kv_heads // size, 1) * size * head_dim,
            "mlp.up_proj": layer.channels,
        }
        for name, width in outputs.items():
            stored = scheme_of(quantization, f"model.layers.{i}.{name}")
            if stored and not stored.symmetric and width % size == 0 and width // size * stored.bits % WORD_BITS:
                yield f"zero points of {width // size} outputs of layer {i}'s {name} do not fill whole words"


def _class(config: Mapping[str, Any], layers: Sequence[LayerWidths]) -> Verdict:
    name = next(iter(config.get("architectures") or ()), config.get("model_type"))
    if "block_configs" in config:
        return Verdict("class", True, f"it has {name} of its own, whose layers have MLPs of their own widths.")
    if len(set(layers)) > 1 or config.get("model_type") == OWN_TYPE:
        if is_mixture(config):
            return Verdict("class", False, "it builds no mixture of experts whose layers differ.")
        if "auto_map" in config:
            return Verdict(
                "class", True, "layers of their own widths go through its transformers backend, by the code in the "
                "folder (--trust-remote-code)."
            )  # fmt: skip
        return Verdict(
            "class", False, f"it has no class for {config.get('model_type')!r} with layers of their own widths; "
            "compress with one width for all layers, or export with code that builds them."
        )  # fmt: skip
    if is_mixture(config):
        return Verdict(
            "class", True, "a class of its own reads experts one by one, and they lie stacked here; its transformers "
            "backend takes them so (--model-impl transformers)."
        )  # fmt: skip
    if _misled(config):
        derived = _stated(config, HIDDEN) // _stated(config, HEADS)
        return Verdict(
            "class", True, f"{name} of its own takes heads for {derived} wide, and these are {head_dim_of(config)}; "
            "its transformers backend does not (--model-impl transformers)."
        )  # fmt: skip
    if name in NATIVE:
        return Verdict("class", True, f"it has {name} of its own.")
    return Verdict("class", True, f"{name} goes through its transformers backend.")


def _attention(layers: Sequence[LayerWidths]) -> Verdict:
    without = [i for i, layer in enumerate(layers) if not layer.heads]
    if without:
        return Verdict(
            "attention", False, f"layer(s) {listed(without)} have none, and its transformers backend wants attention "
            "in every layer; drop whole layers instead."
        )  # fmt: skip
    return Verdict("attention", True, "every layer has it.")


def _codes(stored: Sequence[Scheme]) -> Verdict:
    strange = [s for s in stored if s.bits not in WIDTHS]
    if strange:
        return Verdict("codes", False, f"{strange[0]}: it has 2 to 8 bits.")
    small = [s for s in stored if s.group_size is not None and s.group_size & (s.group_size - 1)]
    small += [s for s in stored if s.group_size is not None and s.group_size < SMALLEST_GROUP]
    if small:
        return Verdict(
            "codes", False, f"{small[0]}: no kernel is known to take it; groups of 32, 64, 128 or whole rows are."
        )
    other = [s for s in stored if (s.bits, s.symmetric) not in MARLIN or s.group_size not in MARLIN_GROUPS]
    if not other:
        return Verdict("codes", True, "Marlin takes all of them.")
    return Verdict("codes", True, f"Humming compiles kernels for {listed(other)} on the device; Marlin takes the rest.")


def _fused(quantization: Mapping, layers: Sequence[LayerWidths]) -> Verdict:
    for i in range(len(layers)):
        for module, parts in FUSED.items():
            how = {part: scheme_of(quantization, f"model.layers.{i}.{module}.{part}") for part in parts}
            if len(set(how.values())) > 1:
                said = ", ".join(f"{part} {'16 bits' if s is None else s}" for part, s in how.items())
                return Verdict("fused linears", False, f"layer {i} has {said}, and they are one matrix there.")
    return Verdict("fused linears", True, "q, k and v are stored alike in each layer, and gate and up.")


# --- what a configuration says ---------------------------------------------------------------------------------------


def layers_of(config: Mapping[str, Any]) -> list[LayerWidths]:
    """Widths of every layer, from the common ones and those of `per_layer_config` or of DeciLM's `block_configs`."""
    if blocks := config.get("block_configs"):
        heads = _stated(config, HEADS)
        in_group = lambda block: block["attention"]["n_heads_in_group"]
        return [LayerWidths(heads, heads // in_group(b), b["ffn"]["intermediate_size"]) for b in blocks]
    own = config.get("per_layer_config") or {}
    own = {int(layer): fields for layer, fields in own.items()}
    found = []
    for i in range(_stated(config, LAYERS)):
        fields = {**config, **own.get(i, {})}
        skipped = fields.get("skip") or ()
        heads = 0 if "attention" in skipped else _stated(fields, HEADS)
        kv_heads = min(heads, _stated(fields, KV_HEADS) or heads)
        found.append(LayerWidths(heads, kv_heads, 0 if "mlp" in skipped else _stated(fields, CHANNELS)))
    return found


def head_dim_of(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or _stated(config, HIDDEN) // max(_stated(config, HEADS), 1)


def _stated(config: Mapping[str, Any], words: Sequence[str]) -> int:
    """A number in whichever word the configuration has for it; 0 where it leaves it to be derived."""
    return next((config[word] for word in words if config.get(word)), 0)


def schemes_of(quantization: Mapping) -> list[Scheme]:
    return [Scheme.from_json(group["weights"]) for group in quantization["config_groups"].values()]


def scheme_of(quantization: Mapping, name: str) -> Scheme | None:
    """How the linear of this path is stored by a `quantization_config`; None for 16 bits."""
    if any(matches(name, target) for target in quantization.get("ignore", ())):
        return None
    groups = quantization["config_groups"].values()
    found = (group["weights"] for group in groups if any(matches(name, target) for target in group["targets"]))
    return next(map(Scheme.from_json, found), None)


def matches(name: str, target: str) -> bool:
    """As compressed-tensors and vLLM do it: a whole name, or a regular expression from its start on."""
    return bool(re.match(target.removeprefix("re:"), name)) if target.startswith("re:") else name == target
