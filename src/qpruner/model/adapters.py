"""Low-rank adapters beside the linears of a model, in PEFT's classes and PEFT's file format.

PEFT wraps the linears in place: the model stays an instance of its own class, `model.peft_config` appears, and linear X
becomes a LoRA layer with the original under `X.base_layer`. The functions here take and give the names without that.
Adapters are float32 in memory, where they are trained, and of a 16-bit dtype on disk.

PEFT is imported where it is called: it imports transformers, and importing transformers may import this module.
"""

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qpruner.errors import ModelError, PlanError, listed
from qpruner.model.packed.split import Quantized, repacked

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
ADAPTER = "default"
PREFIX = "base_model.model."

# Fields of PEFT's configuration with which it computes something else than W x + alpha / r B A x.
OTHER_KINDS = (
    "alpha_pattern", "use_rslora", "use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save",
    "trainable_token_indices", "layer_replication", "target_parameters", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
# Starts that leave the weights as they are; pissa, olora and others take out of W what A and B begin with.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def inject_adapters_(
    model: nn.Module, ranks: Mapping[str, int], *, alpha: float, dropout: float, seed: int = 0
) -> None:
    """Put an adapter beside every named linear, with scaling alpha / rank; A random, B zero, everything else frozen.

    The global random state is neither read nor changed.

    Raises:
        PlanError: a name is not a linear of the model, a rank is below 1 or above what the linear can hold, or there
            are adapters already.
    """
    from peft import inject_adapter_in_model

    check_ranks(model, ranks)
    config = lora_config(ranks, alpha=alpha, dropout=dropout)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT sets this flag by itself for each layer, and says so for each layer.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    config.target_modules = set(ranks)  # PEFT shortens a long list to suffixes
    layers = adapter_layers(model)
    assert {name: layer.r[ADAPTER] for name, layer in layers.items()} == dict(ranks), "PEFT matched other layers"
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        A, B = factors(layer)
        start = torch.rand(A.shape, generator=generator).mul_(2).sub_(1).div_(math.sqrt(A.shape[1]))
        set_factors(layer, start.to(A.device), torch.zeros(B.shape, device=B.device))


def check_ranks(model: nn.Module, ranks: Mapping[str, int]) -> None:
    if not ranks:
        raise PlanError("no linear gets an adapter; name at least one in adapter_ranks")
    if adapter_layers(model):
        raise PlanError("the model has adapters already; merge them before adding others")
    modules = dict(model.named_modules())
    strangers = [n for n in ranks if not isinstance(modules.get(n), nn.Linear | Conv1D)]
    if strangers:
        raise PlanError(f"the plan gives adapters to what is no linear of the model: {listed(strangers)}")
    for name, rank in ranks.items():
        largest = min(features(modules[name]))
        if not 1 <= rank <= largest:
            raise PlanError(f"the adapter of {name!r} has rank {rank}; 1 to {largest} fit this linear")


def lora_config(ranks: Mapping[str, int], *, alpha: float, dropout: float):
    """The adapters' configuration. PEFT scales by lora_alpha / r of each layer, so one alpha serves all ranks."""
    from peft import LoraConfig

    common = Counter(ranks.values()).most_common(1)[0][0]
    return LoraConfig(
        r=common,
        # PEFT reads these as regular expressions that any prefix may precede: escaped and anchored, they are names.
        rank_pattern={f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common},
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=dropout,
        target_modules=set(ranks),
        bias="none",
        task_type="CAUSAL_LM",
    )


def features(linear: nn.Module) -> tuple[int, int]:
    """(d_out, d_in), whatever way the weight is stored."""
    if isinstance(linear, Conv1D):
        d_in, d_out = linear.weight.shape
        return d_out, d_in
    return linear.out_features, linear.in_features


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name of each adapted linear -> PEFT's layer around it."""
    return {name: m for name, m in model.named_modules() if ADAPTER in getattr(m, "lora_A", ())}


def factors(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def set_factors(layer: nn.Module, A: Tensor, B: Tensor) -> None:
    for parameter, value in zip(factors(layer), (A, B), strict=True):
        parameter.data = value.detach().to(parameter.device, torch.float32, copy=True)


def set_adapter_weights_(model: nn.Module, weights: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Give the named adapters their factors A (r, d_in) and B (d_out, r); ModelError where one does not fit."""
    layers = adapter_layers(model)
    strangers = [name for name in weights if name not in layers]
    if strangers:
        raise ModelError(f"no adapter stands beside {listed(strangers)}; inject adapters first")
    for name, given in weights.items():
        shapes = [tuple(p.shape) for p in factors(layers[name])]
        if [tuple(t.shape) for t in given] != shapes:
            raise ModelError(
                f"the adapter of {name!r} has factors of {shapes[0]} and {shapes[1]}, "
                f"not {tuple(given[0].shape)} and {tuple(given[1].shape)}; was it trained on a model of other widths?"
            )
    for name, (A, B) in weights.items():
        set_factors(layers[name], A, B)


def tensor_names(linear: str) -> tuple[str, str]:
    """Names of A and B in PEFT's file."""
    return f"{PREFIX}{linear}.lora_A.weight", f"{PREFIX}{linear}.lora_B.weight"


def adapter_state(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The adapters' tensors under PEFT's names, in the dtype of the file."""
    state = {}
    for name, layer in adapter_layers(model).items():
        for key, parameter in zip(tensor_names(name), factors(layer), strict=True):
            state[key] = parameter.detach().to("cpu", dtype, copy=True).contiguous()
    return state


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` as it would be without adapters."""
    state, stored = model.state_dict(keep_vars=True), stored_names(model)
    return {stored[key]: value for key, value in state.items() if not stored[key].startswith(PREFIX)}


def stored_names(model: nn.Module) -> dict[str, str]:
    """For every tensor of a model with adapters the name in the files: of the base as without, of adapters PEFT's."""
    names = {key: key for key in model.state_dict()}
    for linear in adapter_layers(model):
        A, B = tensor_names(linear)
        names |= {f"{linear}.lora_A.{ADAPTER}.weight": A, f"{linear}.lora_B.{ADAPTER}.weight": B}
        inside = f"{linear}.base_layer."
        names |= {key: f"{linear}.{key.removeprefix(inside)}" for key in names if key.startswith(inside)}
    return names


def save_adapters(model: nn.Module, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the adapters of a model; `PeftModel.from_pretrained(model, folder)` reads them."""
    if not adapter_layers(model):
        raise ModelError("the model has no adapters to save")
    write_adapters(folder, adapter_state(model, dtype), model.peft_config[ADAPTER])


def write_adapters(folder: Path, state: Mapping[str, Tensor], config) -> None:
    """Write adapter_config.json and adapter_model.safetensors. The same adapters give the same bytes.

    Args:
        state: factors under PEFT's names, in the dtype of the file. config: PEFT's LoraConfig.
    Raises:
        ModelError: the adapters change nothing, or are not finite.
    """
    check_effect(state, "the adapters")
    fields = config.to_dict() | {"inference_mode": True, "base_model_name_or_path": None}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), folder / TENSORS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")


def check_effect(state: Mapping[str, Tensor], what: str) -> None:
    """Adapters that were saved for other names or never trained load without a word in PEFT (issue 1746)."""
    if not all(torch.isfinite(t).all() for t in state.values()):
        raise ModelError(f"{what} have values that are not finite")
    if not any(t.any() for name, t in state.items() if ".lora_B." in name):
        raise ModelError(
            f"{what} change nothing: every B is zero. Train them, start them from LoftQ, or leave them out."
        )


def load_adapters_(model: nn.Module, folder: Path) -> None:
    """Put the saved adapters beside the linears of a model that has none.

    Raises:
        ModelError: the folder holds no adapters in PEFT's format; they are for other linears or other widths; they
            change nothing.
    """
    ranks, alpha, dropout, weights = read_adapters(Path(folder))
    try:
        inject_adapters_(model, ranks, alpha=alpha, dropout=dropout)
    except PlanError as error:
        raise ModelError(f"the adapters in {folder} do not fit the model: {error}") from None
    set_adapter_weights_(model, weights)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()


def read_adapters(folder: Path) -> tuple[dict[str, int], float, float, dict[str, tuple[Tensor, Tensor]]]:
    """Ranks, alpha, dropout and factors by linear."""
    for file in (CONFIG_FILE, TENSORS_FILE):
        if not (folder / file).is_file():
            raise ModelError(f"there is no {file} in {folder}")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        state = load_file(folder / TENSORS_FILE)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ModelError(f"the adapters in {folder} are damaged: {error}") from None
    check_kind(config, folder)
    linears = sorted({key.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for key in state})
    weights = {}
    for linear in linears:
        names = tensor_names(linear)
        if not all(name in state for name in names):
            raise ModelError(f"the adapters in {folder} have no {listed(n for n in names if n not in state)}")
        weights[linear] = (state.pop(names[0]), state.pop(names[1]))
    if state:
        raise ModelError(f"the adapters in {folder} hold tensors that are no LoRA factors: {listed(state)}")
    check_effect({tensor_names(n)[1]: B for n, (_, B) in weights.items()}, f"the adapters in {folder}")
    return {n: len(A) for n, (A, _) in weights.items()}, config["lora_alpha"], config["lora_dropout"], weights


def check_kind(config: Mapping, folder: Path) -> None:
    """Refuses what would be read as plain LoRA and is none. config: of PEFT, as its file has it."""
    if config.get("peft_type") != "LORA":
        found = [f"peft_type {config.get('peft_type')}"]
    else:
        found = [name for name in OTHER_KINDS if config.get(name)]
        if config.get("bias", "none") != "none":
            found.append(f"bias {config['bias']}")
        if config.get("init_lora_weights") not in STARTS:
            found.append(f"init_lora_weights {config['init_lora_weights']}")
    if found:
        raise ModelError(
            f"the adapters in {folder} are of a kind that is not supported: their {CONFIG_FILE} has {', '.join(found)}."
            " Accepted: plain LoRA beside linears, of any ranks, with one alpha."
        )


@torch.no_grad()
def merge_adapters_(model: nn.Module) -> None:
    """Add every adapter into its weight and take the adapters away.

    A dense weight is rounded to its dtype once. A packed one is rounded again on its own grid, which undoes part of
    what the adapter learned.
    """
    for name, layer in adapter_layers(model).items():
        model.set_submodule(name, merged(layer.get_base_layer(), correction(layer)))
    if hasattr(model, "peft_config"):
        del model.peft_config


def correction(layer: nn.Module) -> Tensor:
    """What the adapter in PEFT's layer adds to the weight, (d_out, d_in), float64."""
    A, B = (factor.detach().double() for factor in factors(layer))
    return layer.scaling[ADAPTER] * (B @ A)


def merged(base: nn.Module, correction: Tensor, *, ranges: str = "absmax") -> nn.Module:
    """The linear with `correction`, (d_out, d_in), added; a packed one anew, rounded to nearest by these ranges."""
    if isinstance(base, Quantized):
        return repacked(base, base.dequantize(torch.float64) + correction, ranges)
    added = correction.T if isinstance(base, Conv1D) else correction
    base.weight.copy_(base.weight.double() + added)
    return base
