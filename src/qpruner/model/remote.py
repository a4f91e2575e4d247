"""Code that a model brings, and the one condition under which it runs: the user says so, every time.

A model brings code when the `auto_map` of its config.json or tokenizer_config.json names classes in Python files that
lie beside it. Reading those files runs nothing; `read_config` is the only place here that does.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files

from qpruner.errors import ModelError

MODEL_CLASS = "AutoModelForCausalLM"


def brings_model(config: Mapping) -> bool:
    """Whether a config.json names a causal language model of its own."""
    return MODEL_CLASS in (config.get("auto_map") or {})


def refusal(name: str, kind: str) -> ModelError:
    return ModelError(
        f"{name!r} (model_type {kind!r}) brings its own Python code, which would run with all your rights and does so "
        "only if you say it may. Read it; then repeat with --trust-remote-code (in Python trust_remote_code=True). "
        "Accepted without it: architectures that transformers knows itself."
    )


def code_files(name: str, folder: Path, config: Mapping) -> tuple[Path, ...]:
    """The Python files that a model's own classes are in, and those that these import from beside them.

    Raises:
        ModelError: one of them is not in the folder.
    """
    files: dict[Path, None] = {}
    for reference in _references(config) + _references(_tokenizer_config(folder)):
        module = reference.rpartition(".")[0]
        path = folder / f"{module}.py"
        if not module.isidentifier() or not path.is_file():
            raise ModelError(
                f"{name!r} says that its class {reference!r} is in Python code, but {path.name} is not in its folder. "
                "Fetch that file from where the model came from; code from elsewhere is not looked for."
            )
        try:
            files |= dict.fromkeys([path, *map(Path, get_relative_import_files(path))])
        except FileNotFoundError as error:
            raise ModelError(
                f"the code of {name!r} imports {Path(error.filename).name}, which is not in its folder. Fetch that "
                "file from where the model came from."
            ) from error
    return tuple(sorted(files))


def _references(config: Mapping) -> list[str]:
    """`module.Class` of every class in an auto_map; tokenizers have a list of two there, one of them often null."""
    values = (config.get("auto_map") or {}).values()
    return [ref for value in values for ref in (value if isinstance(value, list | tuple) else [value]) if ref]


def _tokenizer_config(folder: Path) -> dict:
    try:
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):  # reading the tokenizer says so
        return {}
    return found if isinstance(found, dict) else {}


def code_digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def read_config(content: Mapping, folder: Path) -> PreTrainedConfig:
    """The configuration of a model that brings code: its own class of one if it has one. Runs code of the folder.

    It remembers the folder, where transformers will look for the model's class.
    """
    own = content["auto_map"].get("AutoConfig")
    kind = get_class_from_dynamic_module(own, folder) if own else CONFIG_MAPPING[content["model_type"]]
    return kind.from_dict(dict(content), name_or_path=str(folder))
