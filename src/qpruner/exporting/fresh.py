"""Logits of a folder in a fresh process that has transformers alone: qpruner cannot be imported there."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qpruner.errors import ModelError

CODE = """
import sys
sys.modules["qpruner"] = None  # from here on its import is an error
folder, place, adapter, code, threads = sys.argv[1:]
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(int(threads))
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
how = dict(dtype=torch.float32, trust_remote_code=code == "code", local_files_only=True)
found = transformers.AutoModelForCausalLM.from_pretrained(folder, **how)
print(type(found).__name__)
if adapter:
    from peft import PeftModel
    found = PeftModel.from_pretrained(found, adapter)
ids = load_file(place + "/ids.safetensors")["ids"]
with torch.no_grad():
    logits = found.eval()(input_ids=ids, use_cache=False).logits[0].float()
save_file({"logits": logits.contiguous()}, place + "/logits.safetensors")
"""


def fresh_logits(
    folder: Path, ids: Tensor, *, with_code: bool = False, adapter: Path | None = None
) -> tuple[str, Tensor]:
    """The class that transformers makes of the folder, and its logits, (tokens, vocabulary), float32.

    Args:
        ids: (1, tokens). with_code: whether Python code in the folder may run; it is ours.
        adapter: in PEFT's format, to be put beside the model by PEFT.
    Raises:
        ModelError: it does not load there.
    """
    with tempfile.TemporaryDirectory() as place:
        save_file({"ids": ids.contiguous()}, Path(place) / "ids.safetensors")
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{place}/modules"}
        words = [str(folder), place, str(adapter or ""), "code" if with_code else "", str(torch.get_num_threads())]
        done = subprocess.run(
            [sys.executable, "-I", "-c", CODE, *words], capture_output=True, text=True, env=environment
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(f"transformers alone does not load the exported folder: {last}. Nothing was written.")
        return done.stdout.split()[-1], load_file(Path(place) / "logits.safetensors")["logits"]
