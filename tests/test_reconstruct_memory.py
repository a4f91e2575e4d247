"""What least squares takes of memory is what was promised for it, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_folder import save, tiny_model

from qpruner.model.memory import ARENA

MIDDLING = dict(
    hidden_size=384, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=256
)
FAMILIES = {"llama": MIDDLING, "mixtral": MIDDLING | dict(num_local_experts=4, num_experts_per_tok=2)}


@pytest.mark.parametrize("family, how", [("llama", "streamed"), ("mixtral", "resident")])
def test_the_forecast_covers_what_least_squares_takes(family, how, tmp_path, short_text):
    model = save(tiny_model(family, **FAMILIES[family]).to(torch.bfloat16), tmp_path / "model", tokenizer=True)
    script = Path(__file__).with_name("reconstruction_peak.py")
    run = subprocess.run(
        [sys.executable, str(script), str(model), str(short_text), how, str(tmp_path)],
        stdout=subprocess.PIPE, check=True, text=True,
    )  # fmt: skip
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["peak"] <= found["promised"]
    grown, promised = found["peak"] - found["before"], found["promised"] - found["before"] - ARENA
    assert promised <= 2 * grown, "and not much more"
