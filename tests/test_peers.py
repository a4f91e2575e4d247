"""The model that all peers get: whole groups in every linear, the same function, and only linears of decoder layers.

Bytes that a target is compared with are those of the model as it was before.
"""

import json
from pathlib import Path

import pytest
import torch

from qpruner.testing.tiny import tiny_config, tiny_model

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "peers"


@pytest.fixture
def inputs(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.syspath_prepend(str(FOLDER))
    import inputs

    return inputs


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_padding_gives_whole_groups_and_changes_no_logit(inputs, family, tmp_path):
    model, ids = tiny_model(tiny_config(family)), torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        before = model(ids).logits
        assert inputs.pad(model, 32) == 24  # its MLP has 40 channels
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
        torch.testing.assert_close(again(ids).logits, before, rtol=0, atol=1e-12)
    layers = inputs.linears(again)
    assert all(m.in_features % 32 == 0 for m in layers.values())
    assert again.get_output_embeddings() not in layers.values()
    assert inputs.pad(model, 32) == 0


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_channels_of_zeros_cost_nothing(inputs, family, tmp_path):
    import peer

    model = tiny_model(tiny_config(family))
    dense_bytes = 2 * sum(p.numel() for p in model.parameters())
    before = peer.linears(model)
    codes_and_scales = {
        name: sum(-(-m.in_features // 32) * 16 + m.in_features * 3 for _ in range(m.out_features)) // 8
        for name, m in before.items()
    }
    (tmp_path / "inputs.json").write_text(json.dumps({"padded_channels": inputs.pad(model, 32)}))
    sizes = peer.Sizes.of(model, tmp_path)
    assert sizes.dense_bytes == sizes.whole_bytes(lambda name, rows, columns: 2 * rows * columns) == dense_bytes
    in_three_bits = sizes.whole_bytes(lambda name, rows, columns: peer.linear_bytes(rows, columns, 3, 32, 16))
    assert in_three_bits == sizes.rest_bytes + sum(codes_and_scales.values())
