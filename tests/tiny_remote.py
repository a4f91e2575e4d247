"""Folders of a small random model that brings its own code (tests/remote), in the layout of Baichuan."""

import json
import shutil
from pathlib import Path

import torch
from tiny_folder import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

CODE = Path(__file__).parent / "remote"
CLASSES = {"AutoConfig": "configuration_wpack.WPackConfig", "AutoModelForCausalLM": "modeling_wpack.WPackForCausalLM"}
POSITIONS = ("rotary", "alibi")


def remote_model(folder: Path, position: str, *, dtype=torch.bfloat16, tokenizer: bool = False, **over) -> Path:
    """A folder with config.json, weights and code; its code runs here once, to make the weights."""
    folder.mkdir()
    for path in CODE.glob("*.py"):
        shutil.copyfile(path, folder / path.name)
    (folder / "notes.py").write_text("raise RuntimeError('no class of the model is in here')\n")
    config = dict(model_type="wpack", position=position, auto_map=CLASSES, bos_token_id=0, eos_token_id=1) | over
    (folder / "config.json").write_text(json.dumps(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True).to(dtype)
    model.save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder
