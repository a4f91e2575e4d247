"""The model that all peers get: whole groups in every linear, the same function, and only linears of decoder layers."""

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
