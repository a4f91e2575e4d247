"""Exports that bring Python files along, opened in this process as transformers' dynamic modules would be."""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def module_of(folder: Path):
    """The Python files of an export as a package of their own."""
    for name in ("", ".configuration_qpruner", ".modeling_qpruner"):
        path = folder / f"{name.removeprefix('.') or 'none'}.py"
        package = dict(submodule_search_locations=[str(folder)]) if not name else {}
        spec = importlib.util.spec_from_file_location(f"exported{name}", path, **package)
        sys.modules[f"exported{name}"] = module = importlib.util.module_from_spec(spec)
        if name:
            spec.loader.exec_module(module)
    return module


def opened(folder: Path, *, with_code: bool = False, dtype=torch.float32):
    if not with_code:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    content = json.loads((folder / "config.json").read_text())
    module = module_of(folder)
    config = module.QPrunerConfig.from_dict({k: v for k, v in content.items() if k != "auto_map"})
    return module.QPrunerForCausalLM.from_pretrained(folder, config=config, dtype=dtype)
