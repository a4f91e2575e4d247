"""From what a person names to a model in memory, with everything that can be wrong found as early as possible.

    inspect_source   names, configuration, safetensors headers: milliseconds, no tensor is read
    checked_digest   every stored value, a piece of a file at a time
    load_model       the module, by transformers' own loading

Nothing here unpickles, or runs code that came with a model unless the user said so. The Hub is asked only for
`owner/name`, and only for safetensors, JSON and tokenizer files, and then for Python files.
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

from qpruner.errors import ModelError, listed
from qpruner.model import remote
from qpruner.model.checkpoint import OLD_BUFFERS, Header, check_against, not_matching, read_headers, refuse_mismatch
from qpruner.model.checkpoint import checked_digest as checked_digest
from qpruner.model.checkpoint import weight_files as weight_files
from qpruner.model.checkpoint import weights_digest as weights_digest
from qpruner.model.pystdlib import BUNDLED_NAME, bundled_folder
from qpruner.model.skeleton import build_skeleton

OWN_MODEL_TYPE = "qpruner"  # of an artifact: its weights are packed and its shapes are the plan's
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
SMALL_FILES = ("*.json", "*.txt", "*.jinja", "tokenizer*", "*.model")
CODE_FILES = ("*.py",)
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")

# Keys of a configuration that change neither a shape nor the mapping from tokens to logits.
NOT_ARCHITECTURE = frozenset(
    "transformers_version _name_or_path name_or_path dtype torch_dtype use_cache initializer_range bos_token_id "
    "eos_token_id pad_token_id output_attentions output_hidden_states return_dict attention_dropout hidden_dropout "
    "embd_pdrop resid_pdrop attn_pdrop dropout id2label label2id task_specific_params pretraining_tp "
    "_attn_implementation_autoset architectures".split()
)

# What building a model from a configuration that makes no sense may raise.
UNBUILDABLE = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError, AssertionError)

ACCEPTED = (
    f"Accepted: a folder with config.json and *.safetensors, a config.json alone, the name {BUNDLED_NAME!r}, "
    "or a Hugging Face name such as 'owner/name'."
)


@dataclass(frozen=True)
class Source:
    """A model that was looked at but not loaded.

    folder: where its files are; None when a configuration alone was named.
    digest: of its architecture and tensor shapes; what a plan for it must carry.
    parameters: tied tensors once; None for an artifact, which is not to be compressed again.
    tensors: headers of the stored tensors; empty without weights.
    code: Python files that came with the model and may run, because the user said so; empty for any other model.
    """

    name: str
    folder: Path | None
    config: PreTrainedConfig
    digest: str
    parameters: int | None
    tensors: Mapping[str, Header]
    code: tuple[Path, ...] = ()

    @property
    def trust_remote_code(self) -> bool:
        """What transformers is to be told."""
        return bool(self.code)

    @property
    def original(self) -> PreTrainedConfig:
        return original_config(self.config, self.folder, trust_remote_code=self.trust_remote_code)

    @property
    def bytes_16bit(self) -> int | None:
        return None if self.parameters is None else 2 * self.parameters

    @property
    def context_length(self) -> int | None:
        return context_length(self.original)


def inspect_source(model: str | Path, *, trust_remote_code: bool = False) -> Source:
    """Look at what `model` names, and refuse what cannot be served.

    Args:
        model: a folder, a config.json, `pystdlib-5M` (or `bundled`), or the name of a model on the Hugging Face Hub.
        trust_remote_code: whether Python code that came with the model may run. Nothing else turns this on.
    Raises:
        ModelError: it is absent, damaged, unsafe to read, or not a decoder language model.
    """
    name, path, on_hub = _locate(str(model), SMALL_FILES + CODE_FILES if trust_remote_code else SMALL_FILES)
    config_path = path if path.is_file() else path / "config.json"
    if not config_path.is_file():
        raise _not_a_model(name, path)
    raw = _read_json(name, config_path)
    base = raw.get("base_config", raw)  # of the original, where this is an artifact
    code = remote.code_files(name, config_path.parent, base) if trust_remote_code else ()
    config = _read_config(name, config_path, raw, code)
    if path.is_file():
        return _described(name, None, config, {}, code)
    if on_hub:
        _download(name, ("*.safetensors",))
    return _described(name, path, config, read_headers(path), code)


def _described(
    name: str, folder: Path | None, config: PreTrainedConfig, tensors: dict[str, Header], code: tuple[Path, ...]
) -> Source:
    if config.model_type == OWN_MODEL_TYPE:
        shapes = {key: header.shape for key, header in tensors.items()}
        return Source(name, folder, config, config_digest(config, shapes, code), None, tensors, code)
    impossible = Exception if code else UNBUILDABLE  # a model's own code raises what it likes
    with quiet():
        try:
            skeleton = build_skeleton(config, trust_remote_code=bool(code))
            skeleton.tie_weights()  # building on the meta device leaves tied parameters apart
        except impossible as error:
            raise ModelError(
                f"the configuration of {name!r} describes no model that can be built: {_first_line(error)}. "
                "Compare its config.json with the original."
            ) from error
    shapes = {key: tuple(tensor.shape) for key, tensor in skeleton.state_dict().items()}
    if tensors:
        check_against(skeleton, shapes, tensors, name)
    stock_artifact = folder is not None and is_artifact(folder)
    parameters = None if stock_artifact else sum(p.numel() for p in skeleton.parameters())
    return Source(name, folder, config, config_digest(config, shapes, code), parameters, tensors, code)


def is_artifact(folder: Path) -> bool:
    """Whether qpruner wrote this folder; its model may be of a stock type."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return False
    return isinstance(manifest, dict) and "qpruner" in str(manifest.get("made_by"))


def _locate(model: str, small_files: tuple[str, ...]) -> tuple[str, Path, bool]:
    """The display name, the folder or config file, and whether it came from the Hub, of which the small files come."""
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
        return model, _download(model, small_files), True
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


def _read_json(name: str, path: Path) -> dict:
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
    return raw


def _read_config(name: str, path: Path, raw: dict, code: tuple[Path, ...]) -> PreTrainedConfig:
    """The configuration; of a model that brings code its own class of one, if it may run."""
    own = raw["model_type"] == OWN_MODEL_TYPE
    if own and remote.brings_model(raw.get("base_config") or {}) and not code:
        raise remote.refusal(name, raw["base_config"]["model_type"])
    if not own and raw.get("quantization_config"):
        method = dict(raw["quantization_config"]).get("quant_method", "unknown")
        raise ModelError(
            f"{name!r} is already quantized ({method}). Rounding codes again would add their errors: give the "
            "16-bit or 32-bit model it was made from."
        )
    if code and remote.brings_model(raw):
        with quiet():
            try:
                return remote.read_config(raw, path.parent)
            except Exception as error:  # a model's own code raises what it likes
                raise ModelError(
                    f"the code of {name!r} cannot be used: {type(error).__name__}: {_first_line(error)}. It may be for "
                    f"another version of transformers than {transformers.__version__}, or need a package that is "
                    "not installed."
                ) from error
    with quiet():
        try:
            config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (ValueError, TypeError, KeyError, AttributeError, OSError, StrictDataclassError) as error:
            raise _unreadable_config(name, raw, code, error) from error
    if not own:
        _check_decoder(name, config, raw)
    return config


def _unreadable_config(name: str, raw: dict, code: tuple[Path, ...], error: Exception) -> ModelError:
    kind = raw["model_type"]
    if "auto_map" in raw and not code:
        return remote.refusal(name, kind)
    if "auto_map" in raw:
        return ModelError(
            f"{name!r} brings its own Python code, but its auto_map names no {remote.MODEL_CLASS}: no decoder language "
            f"model. It names {listed(raw['auto_map'])}."
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


def original_config(
    config: PreTrainedConfig, folder: Path | None, *, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The configuration of the model's own class; of an artifact, whose folder this is, the one that it wraps."""
    if config.model_type != OWN_MODEL_TYPE:
        return config
    return config.original(folder, trust_remote_code=trust_remote_code)


def context_length(config: PreTrainedConfig) -> int | None:
    """The longest sequence that the model was made for, in tokens; None where its configuration sets no limit."""
    found = (getattr(config, key, None) for key in CONTEXT_KEYS)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


# --- identity --------------------------------------------------------------------------------------------------------


def config_digest(config: PreTrainedConfig, tensors: Mapping[str, tuple[int, ...]], code: tuple[Path, ...] = ()) -> str:
    """sha256 over what a plan depends on: the architecture's own settings, its code if the model brought it, and the
    name and shape of every tensor."""
    settings = {key: value for key, value in config.to_diff_dict().items() if key not in NOT_ARCHITECTURE}
    content = {"config": settings, "tensors": {key: list(shape) for key, shape in tensors.items()}}
    content |= {"code": remote.code_digest(code)} if code else {}
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
    kwargs = dict(dtype=dtype, local_files_only=True, trust_remote_code=source.trust_remote_code, use_safetensors=True)
    with quiet():
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
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=source.trust_remote_code
            )
        except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
            raise ModelError(f"the tokenizer of {source.name!r} cannot be read: {_first_line(error)}.") from error
    vocabulary = getattr(source.original, "vocab_size", None)
    if vocabulary and tokenizer.vocab_size > vocabulary:
        raise ModelError(
            f"the tokenizer of {source.name!r} has {tokenizer.vocab_size:,} tokens and the model embeds "
            f"{vocabulary:,}: they do not belong together. Copy the tokenizer from where the model came from."
        )
    return tokenizer


@contextmanager
def quiet():
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
