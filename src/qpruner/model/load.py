"""From what a person names to a model in memory, with everything that can be wrong found as early as possible.

    inspect_source   names, configuration, safetensors headers: milliseconds, no tensor is read
    checked_digest   every stored value, a piece of a file at a time
    load_model       the module, by transformers' own loading

Nothing here unpickles or runs code that came with a model. The Hub is asked only for `owner/name`, and only for
safetensors, JSON and tokenizer files.
"""

import hashlib
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from qpruner.errors import ModelError
from qpruner.model.checkpoint import OLD_BUFFERS, Header, check_against, not_matching, read_headers, refuse_mismatch
from qpruner.model.checkpoint import checked_digest as checked_digest
from qpruner.model.checkpoint import weight_files as weight_files
from qpruner.model.checkpoint import weights_digest as weights_digest
from qpruner.model.pystdlib import BUNDLED_NAME, bundled_folder
from qpruner.model.skeleton import build_skeleton

OWN_MODEL_TYPE = "qpruner"  # of an artifact: its weights are packed and its shapes are the plan's
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
SMALL_FILES = ("*.json", "*.txt", "*.jinja", "tokenizer*", "*.model")
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")

# Keys of a configuration that change neither a shape nor the mapping from tokens to logits.
NOT_ARCHITECTURE = frozenset(
    "transformers_version _name_or_path name_or_path dtype torch_dtype use_cache initializer_range bos_token_id "
    "eos_token_id pad_token_id output_attentions output_hidden_states return_dict attention_dropout hidden_dropout "
    "embd_pdrop resid_pdrop attn_pdrop dropout id2label label2id task_specific_params pretraining_tp "
    "_attn_implementation_autoset architectures".split()
)

ACCEPTED = (
    f"Accepted: a folder with config.json and *.safetensors, a config.json alone, the name {BUNDLED_NAME!r}, "
    "or a Hugging Face name such as 'owner/name'."
)


@dataclass(frozen=True)
class Source:
    """A model that was looked at but not loaded.

    folder: where its files are; None when a configuration alone was named.
    digest: of its architecture and tensor shapes; what a plan for it must carry.
    parameters: tied tensors once; None for an artifact, whose stored tensors are packed.
    tensors: headers of the stored tensors; empty without weights.
    """

    name: str
    folder: Path | None
    config: PreTrainedConfig
    digest: str
    parameters: int | None
    tensors: Mapping[str, Header]

    @property
    def bytes_16bit(self) -> int | None:
        return None if self.parameters is None else 2 * self.parameters

    @property
    def context_length(self) -> int | None:
        return context_length(original_config(self.config))


def inspect_source(model: str | Path) -> Source:
    """Look at what `model` names, and refuse what cannot be served.

    Args:
        model: a folder, a config.json, `pystdlib-5M` (or `bundled`), or the name of a model on the Hugging Face Hub.
    Raises:
        ModelError: it is absent, damaged, unsafe to read, or not a decoder language model.
    """
    name, path, on_hub = _locate(str(model))
    config_path = path if path.is_file() else path / "config.json"
    if not config_path.is_file():
        raise _not_a_model(name, path)
    config = _read_config(name, config_path)
    if path.is_file():
        return _described(name, None, config, {})
    if on_hub:
        _download(name, ("*.safetensors",))
    return _described(name, path, config, read_headers(path))


def _described(name: str, folder: Path | None, config: PreTrainedConfig, tensors: dict[str, Header]) -> Source:
    if config.model_type == OWN_MODEL_TYPE:
        shapes = {key: header.shape for key, header in tensors.items()}
        return Source(name, folder, config, config_digest(config, shapes), None, tensors)
    with _quiet():
        try:
            skeleton = build_skeleton(config)
            skeleton.tie_weights()  # building on the meta device leaves tied parameters apart
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            ArithmeticError,
            RuntimeError,
            AssertionError,
        ) as error:
            raise ModelError(
                f"the configuration of {name!r} describes no model that can be built: {_first_line(error)}. "
                "Compare its config.json with the original."
            ) from error
    shapes = {key: tuple(tensor.shape) for key, tensor in skeleton.state_dict().items()}
    if tensors:
        check_against(skeleton, shapes, tensors, name)
    parameters = sum(p.numel() for p in skeleton.parameters())
    return Source(name, folder, config, config_digest(config, shapes), parameters, tensors)


def _locate(model: str) -> tuple[str, Path, bool]:
    """The display name, the folder or config file, and whether it came from the Hub."""
    if model in (BUNDLED_NAME, "bundled"):
        return BUNDLED_NAME, bundled_folder(), False
    path = Path(model).expanduser()
    if model and path.is_dir():
        path = path.resolve()
        return path.name, path, False
    if path.is_file():
        if path.suffix != ".json":
            raise ModelError(f"{model} is a single file, not a model. {ACCEPTED}")
        path = path.resolve()
        return path.parent.name, path, False
    if re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", model):
        return model, _download(model, SMALL_FILES), True
    raise ModelError(f"there is no model at {model!r}. {ACCEPTED}")


def _download(name: str, patterns: tuple[str, ...]) -> Path:
    ignored = ["original/*", "consolidated*", "onnx/*"]
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=ignored)).resolve()
    except (HfHubHTTPError, HFValidationError, OSError) as error:  # offline and absent-from-cache are OSErrors
        raise ModelError(
            f"there is no folder {name!r} here, and no model of that name could be fetched from the Hugging Face "
            f"Hub: {_first_line(error)}. Check the name and the connection (and `hf auth login` for a gated model), "
            "or give the path of a local folder."
        ) from error


def _not_a_model(name: str, path: Path) -> ModelError:
    if (path / "adapter_config.json").is_file():
        return ModelError(
            f"{name!r} holds an adapter (adapter_config.json), not a whole model. Merge it into its base model first "
            "(peft: merge_and_unload, then save_pretrained), and give that folder."
        )
    return ModelError(f"{name!r} is no model: there is no config.json in it. {ACCEPTED}")


# --- configuration ---------------------------------------------------------------------------------------------------


def _read_config(name: str, path: Path) -> PreTrainedConfig:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(
            f"the configuration of {name!r} ({path.name}) is not readable JSON: {error}. Fetch or save it again."
        ) from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise ModelError(
            f"{path.name} of {name!r} names no model_type, so it is no model configuration. "
            "Accepted: the config.json of a decoder language model that transformers knows."
        )
    if raw["model_type"] != OWN_MODEL_TYPE and raw.get("quantization_config"):
        method = dict(raw["quantization_config"]).get("quant_method", "unknown")
        raise ModelError(
            f"{name!r} is already quantized ({method}). Rounding codes again would add their errors: give the "
            "16-bit or 32-bit model it was made from."
        )
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (ValueError, TypeError, KeyError, AttributeError, OSError, StrictDataclassError) as error:
            raise _unreadable_config(name, raw, error) from error
    if raw["model_type"] != OWN_MODEL_TYPE:
        _check_decoder(name, config, raw)
    return config


def _unreadable_config(name: str, raw: dict, error: Exception) -> ModelError:
    kind = raw["model_type"]
    if "auto_map" in raw:
        return ModelError(
            f"{name!r} (model_type {kind!r}) brings its own Python code, which would need --trust-remote-code; that is "
            "not supported yet. Accepted: architectures that transformers knows itself."
        )
    if kind not in transformers.CONFIG_MAPPING:
        return ModelError(
            f"{name!r} has model_type {kind!r}, which transformers {transformers.__version__} does not know. "
            "A newer transformers may; otherwise this model cannot be served."
        )
    return ModelError(f"the configuration of {name!r} is not valid for model_type {kind!r}: {_first_line(error)}.")


def _check_decoder(name: str, config: PreTrainedConfig, raw: dict) -> None:
    """Refuse what is not a text decoder with a language-model head."""
    kind, found = config.model_type, (raw.get("architectures") or [None])[0]
    what = f"{found} (model_type {kind!r})" if found else f"of model_type {kind!r}"
    accepted = "Accepted: decoder language models, whose class name ends in ForCausalLM or LMHeadModel."
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name!r} is {what}: an encoder-decoder (sequence-to-sequence) model. {accepted}")
    if any(getattr(config, part, None) is not None for part in ("vision_config", "audio_config")):
        raise ModelError(
            f"{name!r} is {what}: a model with vision or audio parts. {accepted} Its language model alone, saved as "
            "a model of its own, can be served."
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"{name!r} is {what}: not a decoder language model. {accepted}")
    if found and found not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and not found.endswith("ForCausalLM"):
        raise ModelError(f"{name!r} is {what}: it has no language-model head of a decoder. {accepted}")
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and hasattr(config, "is_decoder") and not config.is_decoder:
        raise ModelError(f"{name!r} is {what}: an encoder, whose tokens see those after them. {accepted}")


def original_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the model's own class; of an artifact, the one that it wraps."""
    return config.original() if config.model_type == OWN_MODEL_TYPE else config


def context_length(config: PreTrainedConfig) -> int | None:
    """The longest sequence that the model was made for, in tokens; None where its configuration sets no limit."""
    found = (getattr(config, key, None) for key in CONTEXT_KEYS)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


# --- identity --------------------------------------------------------------------------------------------------------


def config_digest(config: PreTrainedConfig, tensors: Mapping[str, tuple[int, ...]]) -> str:
    """sha256 over what a plan depends on: the architecture's own settings and the name and shape of every tensor."""
    settings = {key: value for key, value in config.to_diff_dict().items() if key not in NOT_ARCHITECTURE}
    content = {"config": settings, "tensors": {key: list(shape) for key, shape in tensors.items()}}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":"), default=str).encode()).hexdigest()


def stored_dtype(source: Source) -> torch.dtype:
    """The 16-bit dtype in which tensors of this model are stored: its own, or bfloat16 where its own is wider."""
    if source.tensors:
        weight: Counter[str] = Counter()
        for header in source.tensors.values():
            weight[header.dtype] += prod(header.shape)
        half = weight.most_common(1)[0][0] == "F16"
    else:
        half = str(getattr(source.config, "dtype", None)).removeprefix("torch.") == "float16"
    return torch.float16 if half else torch.bfloat16


# --- in memory -------------------------------------------------------------------------------------------------------


def load_model(source: Source, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model in evaluation mode on the CPU, its floating-point tensors in `dtype`.

    Raises:
        ModelError: no weights were named, or they do not fit the configuration.
    """
    if source.folder is None:
        raise ModelError(f"{source.name!r} is a configuration without weights; name the folder that holds both.")
    kwargs = dict(dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True)
    with _quiet():
        if source.config.model_type == OWN_MODEL_TYPE:
            return AutoModelForCausalLM.from_pretrained(source.folder, **kwargs).eval()
        # Mismatched sizes are let through so that they are reported here with the rest, in one sentence.
        model, info = AutoModelForCausalLM.from_pretrained(
            source.folder, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    wrong = [f"{key}: {list(found)} instead of {list(asked)}" for key, found, asked in info["mismatched_keys"]]
    unexpected = not_matching(sorted(info["unexpected_keys"]), OLD_BUFFERS)
    refuse_mismatch(source.name, list(info["missing_keys"]), unexpected, wrong)
    if info.get("error_msgs"):
        raise ModelError(f"the weights of {source.name!r} could not be loaded: {_first_line(info['error_msgs'][0])}")
    return model.eval()


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer in the model's folder.

    Raises:
        ModelError: there is none, or it produces ids that the model has no embedding for.
    """
    folder = source.folder
    if folder is None or not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ModelError(
            f"{source.name!r} has no tokenizer. Accepted: {', '.join(TOKENIZER_FILES[:4])} in the model's folder; "
            "copy them there from where the model came from."
        )
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
            raise ModelError(f"the tokenizer of {source.name!r} cannot be read: {_first_line(error)}.") from error
    vocabulary = getattr(original_config(source.config), "vocab_size", None)
    if vocabulary and tokenizer.vocab_size > vocabulary:
        raise ModelError(
            f"the tokenizer of {source.name!r} has {tokenizer.vocab_size:,} tokens and the model embeds "
            f"{vocabulary:,}: they do not belong together. Copy the tokenizer from where the model came from."
        )
    return tokenizer


@contextmanager
def _quiet():
    """Silence transformers' advice and progress bars; what matters of it becomes an error of ours."""
    library = transformers.utils.logging
    verbosity, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(logging.CRITICAL)
    library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bar()


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ") if lines else type(error).__name__
