"""A compressed model as an instance of its original class, for transformers alone, put by qpruner beside weights.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

config.json has the original's configuration and what modules count since units went (`narrowed`); how wide they are
is seen from the stored tensors; plan.json says how each is stored. What lies in codes stays in codes: a few million
weights at a time are decoded where they are multiplied. This file needs torch, transformers and safetensors.

vLLM's transformers backend asks for the decoder without weights and reads them itself (--trust-remote-code).
"""

import json
from contextlib import contextmanager

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from .configuration_qpruner import QPrunerConfig

TILE_WEIGHTS = 2**22  # decoded at a time
# Values of the 2, 3 and 4-bit NormalFloat codes (QLoRA, arXiv:2305.14314, appendix E).
NORMAL_FLOAT = {
    2: (-1.0, 0.0, 0.4358181645831157, 1.0),
    3: (
        -1.0, -0.5350227084855379, -0.24693143181157526, 0.0, 0.18333748033548752, 0.3819939543209139,
        0.6229857417143423, 1.0,
    ),
    4: (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
}  # fmt: skip


class QPrunerForCausalLM(PreTrainedModel):
    """What transformers' auto class asks for the model; there are no instances of it."""

    config_class = QPrunerConfig

    def __init__(self, *args, **kwargs):
        raise TypeError("a compressed model comes from AutoModelForCausalLM.from_pretrained, with its weights")

    @classmethod
    def from_pretrained(cls, name, *args, config=None, dtype=None, torch_dtype=None, device_map=None, **kwargs):
        """The model in eval mode; dtype: of activations and of what is not in codes, by default as stored."""
        hub = ("revision", "token", "cache_dir", "local_files_only")
        hub = {key: kwargs[key] for key in hub if kwargs.get(key) is not None}
        config = config or QPrunerConfig.from_pretrained(name, **hub)
        dtype = dtype if dtype is not None else torch_dtype
        dtype = config.dtype if dtype in (None, "auto") else getattr(torch, dtype) if isinstance(dtype, str) else dtype
        with open(cached_file(name, "plan.json", **hub)) as file:
            plan = json.load(file)
        with parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config.original())
        fill_(model, config, plan, tensors_of(name, hub), dtype)
        if plan["adapter_ranks"] and plan["adapters"] == "beside":
            place = dict(subfolder="adapter", **hub)
            with open(cached_file(name, "adapter_config.json", **place)) as file:
                alpha = json.load(file)["lora_alpha"]
            put_adapters_(model, load_file(cached_file(name, "adapter_model.safetensors", **place)), alpha)
        if cached_file(name, "generation_config.json", _raise_exceptions_for_missing_entries=False, **hub):
            model.generation_config = GenerationConfig.from_pretrained(name, **hub)
        if implementation := kwargs.get("attn_implementation"):
            model.set_attn_implementation(implementation)
        model.name_or_path = str(name)
        return model.requires_grad_(False).eval().to(device_of(device_map))


class QPrunerModel(PreTrainedModel):
    """What vLLM asks for: the decoder with its widths, without head and weights; there are no instances of it."""

    config_class = QPrunerConfig
    _supports_attention_backend = True

    def __init__(self, *args, **kwargs):
        raise TypeError("a compressed model comes from AutoModelForCausalLM.from_pretrained, with its weights")

    @classmethod
    def _from_config(cls, config, dtype=None, **kwargs):
        if config.embeddings:
            raise ValueError("embeddings in codes come with their weights, by AutoModelForCausalLM.from_pretrained")
        original = config.original()
        original._attn_implementation = config._attn_implementation
        model = AutoModel.from_config(original, dtype=dtype, **kwargs)
        inside = f"{model.base_model_prefix}."
        narrow_(model, {path.removeprefix(inside): values for path, values in config.narrowed.items()})
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, shape in config.shapes.items():
            if (name := name.removeprefix(inside)) in state:  # not of the head
                put_(model, name, torch.empty(shape, dtype=state[name].dtype, device=state[name].device))
        return model


def tensors_of(name: str, hub: dict) -> dict[str, Tensor]:
    """All stored tensors, of one file or of those that an index lists."""
    index = cached_file(name, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **hub)
    if index is None:
        return load_file(cached_file(name, "model.safetensors", **hub))
    with open(index) as file:
        files = sorted(set(json.load(file)["weight_map"].values()))
    return {key: tensor for part in files for key, tensor in load_file(cached_file(name, part, **hub)).items()}


@contextmanager
def parameters_on_meta():
    """Parameters take no memory; buffers, such as rotary tables, are made."""
    register = nn.Module.register_parameter

    def on_meta(module, name, parameter):
        register(module, name, parameter if parameter is None else nn.Parameter(parameter.to("meta")))

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def device_of(device_map) -> torch.device:
    if isinstance(device_map, dict):
        (device_map,) = set(device_map.values())  # a compressed model is not split over devices
    if device_map == "auto":
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(f"cuda:{device_map}" if isinstance(device_map, int) else device_map or "cpu")


def fill_(model, config, plan: dict, tensors: dict[str, Tensor], dtype) -> None:
    """The modules that are narrower or packed, and all stored tensors, into a model on the meta device."""
    narrow_(model, config.narrowed)
    coded = {name: spec for name, spec in (plan["specs"] | plan["embeddings"]).items() if spec["bits"] < 16}
    for path, spec in coded.items():
        old = model.get_submodule(path)
        inside = [name for name in tensors if name.startswith(f"{path}.") and name != f"{path}.bias"]
        parts = {name.removeprefix(f"{path}."): tensors.pop(name) for name in inside}
        if path not in config.embeddings:
            width = vars(old).get("in_features") or old.nx
            if "weight_packed" in parts:
                width, parts = int(parts["weight_shape"][1]), of_compressed_tensors(parts, spec)
            matrix = Matrix(parts, spec, width)
            model.set_submodule(path, PackedLinear(matrix, getattr(old, "bias", None)))
            continue
        found = config.embeddings[path]
        matrix = Matrix(parts, spec, found["width"])
        model.set_submodule(path, PackedEmbedding(matrix, found["scales"], dtype))
        for head in found["heads"]:
            model.set_submodule(head, PackedLinear(matrix, getattr(model.get_submodule(head), "bias", None)))
    for name, tensor in tensors.items():
        put_(model, name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
    if not config.embeddings:
        model.tie_weights()  # a head in the codes of an embedding shares them already
    absent = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if absent:
        raise ValueError(f"the weights do not fit config.json and plan.json: {absent[:3]} are missing")


def narrow_(model, narrowed: dict[str, dict]) -> None:
    """What modules count, since units went."""
    for path, values in narrowed.items():
        module = model.get_submodule(path)
        if counts := values.get("config"):
            module.config = LayerConfig(module.config, counts)
        vars(module).update({name: value for name, value in values.items() if name != "config"})


def put_(model, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    setattr(module, attribute, tensor if attribute in module._buffers else nn.Parameter(tensor))
    if isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Linear) and not isinstance(module, PackedLinear):
        module.out_features, module.in_features = module.weight.shape


class LayerConfig:
    """The configuration as one narrowed module sees it: counts of its own, the rest the model's."""

    def __init__(self, config, counts: dict[str, int]):
        self.__dict__.update(counts, _config=config)

    def __getattr__(self, name: str):
        if name == "_config" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._config, name)


# --- what lies in codes ---------------------------------------------------------------------------------------------


class Matrix(nn.Module):
    """Codes and scales of a weight of (rows, width). float16 scales are held as bytes, which no `.to(dtype)` rounds.

    With salient columns it consists of two others: `rest`, and `high` for these columns.
    """

    def __init__(self, parts: dict[str, Tensor], spec: dict, width: int):
        super().__init__()
        self.spec, self.width = spec, width
        if spec["salient"]:
            of = lambda name: {k.removeprefix(f"{name}."): v for k, v in parts.items() if k.startswith(f"{name}.")}
            rounded = spec["activation_bits"]
            rounded = rounded if rounded == 16 else max(rounded, spec["salient_bits"])
            one_scale = dict(grid="integer", symmetric=True, group_size=None, scale_bits=16, salient=0)
            high = spec | one_scale | dict(bits=spec["salient_bits"], activation_bits=rounded)
            self.rest = Matrix(of("rest"), spec | dict(salient=0), width - spec["salient"])
            self.high = Matrix(of("high"), high, spec["salient"])
            others = torch.ones(width, dtype=torch.bool)
            others[parts["salient"].long()] = False
            self.register_buffer("columns", parts["salient"].long())
            self.register_buffer("others", others.nonzero().flatten())
            self.n_rows = self.rest.n_rows
        else:
            self.n_rows = len(parts["codes"])
            for name in ("codes", "scales", "steps", "zeros"):
                part = parts.get(name)
                halves = part is not None and part.dtype == torch.float16
                self.register_buffer(name, part.view(torch.int16) if halves else part)

    def decoded(self, rows) -> Tensor:
        """The weight in some rows, float32."""
        spec, codes = self.spec, self.codes[rows]
        n_groups = 1 if spec["group_size"] is None else -(-self.width // spec["group_size"])
        if codes.dtype != torch.int8:  # 8 symmetric bits are their values
            codes = unpacked(codes, 1.6 if spec["grid"] == "ternary" else spec["bits"], self.width)
        if spec["grid"] == "normal-float":
            W = torch.tensor(NORMAL_FLOAT[spec["bits"]], device=codes.device)[codes]
        elif spec["grid"] == "binary":
            W = 2.0 * codes - 1
        else:
            lowest = 1 if spec["grid"] == "ternary" else 2 ** (spec["bits"] - 1) if spec["symmetric"] else 0
            W = codes.float() - (0 if codes.dtype == torch.int8 else lowest)
        spread = lambda part: part.repeat_interleave(spec["group_size"] or self.width, 1)[:, : self.width]
        if self.zeros is not None:
            zeros = self.zeros[rows]
            W = W - spread(zeros if zeros.dtype == torch.int16 else unpacked(zeros, spec["bits"], n_groups))
        if self.steps is None:
            return W * spread(self.scales[rows].view(torch.float16).float())
        counts = unpacked(self.scales[rows], spec["scale_bits"], n_groups)
        return W * spread(counts * self.steps[rows].view(torch.float16).float())

    def product(self, x: Tensor) -> Tensor:
        """x @ W.T; inputs are rounded first where the format says so, a scale for each token."""
        if self.spec["salient"]:
            return self.rest.product(x[..., self.others]) + self.high.product(x[..., self.columns])
        bits, dtype, steps = self.spec["activation_bits"], x.dtype, None
        if bits < 16:
            x = x.to(torch.promote_types(dtype, torch.float32))
            steps = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
            x = (x / torch.where(steps == 0, 1, steps)).round()
        n = max(1, TILE_WEIGHTS // max(self.width, 1))
        tiles = [slice(first, first + n) for first in range(0, self.n_rows, n)]
        y = torch.cat([linear(x, self.decoded(rows).to(x.dtype)) for rows in tiles], dim=-1)
        return y if steps is None else (y * steps).to(dtype)


def unpacked(packed: Tensor, bits: int | float, n: int) -> Tensor:
    """n codes of every row: code j is bits [j b, (j + 1) b) of its bytes, from the lowest bit of the first. Ternary
    codes lie five to a byte, as digits of base 3."""
    if bits == 1.6:
        powers = 3 ** torch.arange(5, device=packed.device)
        return (packed[..., None].int() // powers % 3).flatten(1)[:, :n]
    first = torch.arange(n, device=packed.device) * bits
    pairs = pad(packed, (0, 1)).int()
    word = pairs[:, first // 8] | pairs[:, first // 8 + 1] << 8
    return word >> first % 8 & 2**bits - 1


def of_compressed_tensors(parts: dict[str, Tensor], spec: dict) -> dict[str, Tensor]:
    """The same codes, where words of 32 bits hold them: of each row, and of each column of zero points."""
    found = {"codes": parts["weight_packed"].view(torch.uint8), "scales": parts["weight_scale"].half()}
    if (zeros := parts.get("weight_zero_point")) is not None:
        words = zeros.T.contiguous().view(torch.uint8)
        found["zeros"] = unpacked(words, spec["bits"], len(parts["weight_packed"])).T.contiguous().to(torch.int16)
    return found


class PackedLinear(nn.Linear):
    """y = x @ W.T + bias, W in codes. `weight` says where the layer lives; it fits no product."""

    def __init__(self, matrix: Matrix, bias):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.matrix = matrix.width, matrix.n_rows, matrix
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        matrix = self.matrix.rest if self.matrix.spec["salient"] else self.matrix
        return matrix.codes.view(torch.uint8).flatten()

    def forward(self, x: Tensor) -> Tensor:
        y = self.matrix.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class PackedEmbedding(nn.Module):
    """Looks rows up in codes. scales: of rows, one that takes their dtype first, and one that does not."""

    def __init__(self, matrix: Matrix, scales: list[float], dtype: torch.dtype):
        super().__init__()
        self.matrix, self.num_embeddings, self.embedding_dim = matrix, matrix.n_rows, matrix.width
        self.register_buffer("factor", torch.tensor(scales[0], dtype=torch.float64).to(dtype), persistent=False)
        self.number = scales[1]

    @property
    def weight(self) -> Tensor:
        return self.matrix.codes.view(torch.uint8).flatten()

    def forward(self, ids: Tensor) -> Tensor:
        rows, places = ids.flatten().unique(return_inverse=True)
        found = self.matrix.decoded(rows).to(self.factor.dtype)[places]
        return (found * self.factor * self.number).view(*ids.shape, self.embedding_dim)


# --- adapters beside the weights ------------------------------------------------------------------------------------


def put_adapters_(model, factors: dict[str, Tensor], alpha: float) -> None:
    """LoRA factors in PEFT's file format, added to what their linears compute; in float32, as PEFT does."""
    for name, A in factors.items():
        if name.endswith(".lora_A.weight"):
            module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            B = factors[name.replace(".lora_A.", ".lora_B.")]
            module.register_buffer("lora_A", A.float(), persistent=False)
            module.register_buffer("lora_B", B.float() * (alpha / len(A)), persistent=False)
            module.register_forward_hook(with_adapter)


def with_adapter(module, args, y: Tensor) -> Tensor:
    x = args[0].to(module.lora_A.dtype)
    return (y + linear(linear(x, module.lora_A), module.lora_B)).to(y.dtype)
