"""Exports in vLLM itself, in its own process; only where an interpreter that has it is named by QPRUNER_VLLM."""

import os
from pathlib import Path

import pytest
import torch
from specs import of_groups
from tiny_gguf import artifact_of, folder_of

from qpruner import exporting
from qpruner.artifact.compressed import encoding, schemes
from qpruner.errors import ModelError, OutputError
from qpruner.exporting import served, vllm_program
from qpruner.model.packed.split import packed
from qpruner.plan import NF4, QuantSpec
from qpruner.vllm import serve_options, vllm_verdict

PYTHON = os.environ.get("QPRUNER_VLLM")
with_vllm = pytest.mark.skipif(not PYTHON, reason="QPRUNER_VLLM names no Python that has vLLM (make test-vllm)")
INT4, INT3 = (QuantSpec(bits=bits, grid="integer", group_size=64) for bits in (4, 3))
ZEROS = QuantSpec(bits=4, grid="integer", group_size=64, symmetric=False)
UNEVEN = dict(kv_groups=(4, 1, 3), channels=(512, 256, 320))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return lambda family: place / family if (place / family).is_dir() else folder_of(family, place / family)


def in_vllm(model: Path, folder: Path, to: str, model_class: str, **options) -> served.Served:
    found = exporting.export(model, to, folder, vllm=PYTHON, **options).served
    assert found.model_class == model_class and found.exact.relative < 1e-3
    assert found.as_served is None or found.as_served.kl < 0.02
    return found


@with_vllm
@pytest.mark.vllm
@pytest.mark.parametrize(
    "family, over, specs, model_class",
    [
        ("llama", {}, (INT4, INT3), "LlamaForCausalLM"),
        ("qwen2", dict(head_dim=32), (ZEROS,), "TransformersForCausalLM"),  # its own class would take heads for 64 wide
    ],
)
def test_codes_of_any_bits_are_read_into_fused_linears_with_adapters(family, over, specs, model_class, tmp_path):
    model = folder_of(family, tmp_path / "m", **over)
    artifact = artifact_of(model, tmp_path / "a", kv_groups=(2,) * 3, channels=(320,) * 3, specs=specs, rank=4)
    found = in_vllm(artifact, tmp_path / "o", "compressed-tensors", model_class)
    assert (found.as_served is None) is (INT3 in specs) or found.kernels != ("CPUWNA16LinearKernel",)


@with_vllm
@pytest.mark.vllm
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_layers_of_their_own_widths_are_built_by_the_code_in_the_folder(family, models, tmp_path):
    artifact = artifact_of(models(family), tmp_path / "a", specs=(INT4,), rank=4, **UNEVEN)
    in_vllm(artifact, tmp_path / "o", "compressed-tensors", "TransformersForCausalLM")


@with_vllm
@pytest.mark.vllm
def test_decilm_has_channels_of_each_layer(models, tmp_path):
    artifact = artifact_of(models("llama"), tmp_path / "a", channels=(512, 256, 320), specs=(INT4,), rank=4)
    in_vllm(artifact, tmp_path / "o", "deci", "DeciLMForCausalLM")


@with_vllm
@pytest.mark.vllm
def test_plain_weights_are_served_by_the_stock_class_or_by_the_code(models, tmp_path):
    even = artifact_of(models("llama"), tmp_path / "a", kv_groups=(2,) * 3, channels=(256,) * 3, specs=(NF4,))
    in_vllm(even, tmp_path / "even", "hf", "LlamaForCausalLM")
    uneven = artifact_of(models("llama"), tmp_path / "b", **UNEVEN)
    in_vllm(uneven, tmp_path / "uneven", "hf", "TransformersForCausalLM", with_code=True)


@with_vllm
@pytest.mark.vllm
def test_what_vllm_computes_otherwise_is_refused(models, tmp_path):
    """Weights of another folder are what it should have computed."""
    artifact = artifact_of(models("llama"), tmp_path / "a", specs=(INT4,))
    exporting.export(artifact, "compressed-tensors", tmp_path / "o")
    ids = torch.arange(5, 25)[None]
    with pytest.raises(ModelError, match="vLLM computes something else from the exported folder"):
        other = torch.randn(20, 259, generator=torch.Generator().manual_seed(0))
        served.served(Path(PYTHON), tmp_path / "o", ids, "bfloat16", weights=other, artifact=other)
    (tmp_path / "o/model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="vLLM does not take the exported folder: error: unpack"):
        served.served(Path(PYTHON), tmp_path / "o", ids, "bfloat16", weights=other, artifact=other)


# --- without it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", (2, 3, 4, 5, 6, 8))
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_product_that_stands_in_decodes_what_was_packed(bits, symmetric, rand):
    """Also rows that end inside a word, and outputs that do."""

    class Kernel:
        def __init__(self, config, parts):
            self.config, self.parts = config, parts

        def _get_weight_params(self, layer):
            return self.parts

    W = rand(37, 80).float()
    layer = packed(W, None, of_groups(QuantSpec(bits=bits, grid="integer", symmetric=symmetric), 16))
    scheme = schemes.exact_scheme(layer.spec, 80)
    stored = encoding.as_coded(layer, scheme)
    config = type("Config", (), {})()
    config.partition_weight_shape, config.act_type, config.zero_points = (80, 37), torch.float32, not symmetric
    config.weight_type = type("Type", (), {"size_bits": bits})()
    parts = [stored.get(f"weight_{name}") for name in ("packed", "scale", "zero_point")]
    parts = [None if part is None else torch.nn.Parameter(part, requires_grad=False) for part in parts]
    kernel = vllm_program.written_out(torch, Kernel)(config, parts)
    kernel.process_weights_after_loading(None)
    torch.testing.assert_close(kernel.weight, layer.dequantize(torch.float32), rtol=1e-3, atol=1e-6)
    x = rand(3, 80).float()
    torch.testing.assert_close(kernel.apply_weights(None, x), x @ kernel.weight.T)


def test_an_interpreter_without_vllm_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(OutputError, match="has no vLLM"):
        served.interpreter(tmp_path / "python")
    with pytest.raises(OutputError, match="does not run"):
        served.interpreter(tmp_path / "nothing")


def test_a_process_that_dies_is_a_refusal(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho one >&2; echo 'out of memory' >&2; exit 9\n")
    python.chmod(0o755)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(served.Refused, match="status 9 and said: out of memory"):
        served.ask(python, tmp_path, [1, 2, 3], "float32")


@pytest.mark.parametrize("exact, kernels", [(True, True), (True, False), (False, True)])
def test_one_of_two_runs_is_enough_where_memory_or_kernels_lack(exact, kernels, tmp_path, monkeypatch):
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))

    def ask(*_, written_out, **__):
        if written_out and not exact:
            raise served.Refused("RuntimeError: CUDA out of memory")
        if not written_out and not kernels:
            raise served.Refused("ValueError: Failed to find a kernel that can implement the WNA16 linear layer")
        return served.Answer("LlamaForCausalLM", logits.numpy(), ("Kernel",), "0.32.0")

    monkeypatch.setattr(served, "ask", ask)
    how = dict(weights=logits, artifact=logits)
    found = served.served(Path("python"), tmp_path, torch.arange(4)[None], "bfloat16", **how)
    assert ((found.exact is not None), (found.as_served is not None)) == (exact, kernels)
    assert ("no memory for float32" in found.lines()[0]) is not exact
    assert ("no kernel" in found.lines()[1]) is not kernels
    other = dict(weights=-logits, artifact=-logits)
    with pytest.raises(ModelError, match="something else"):
        served.served(Path("python"), tmp_path, torch.arange(4)[None], "bfloat16", **other)
    exact = kernels = False
    with pytest.raises(ModelError, match="does not take the exported folder: RuntimeError|ValueError"):
        served.served(Path("python"), tmp_path, torch.arange(4)[None], "bfloat16", **how)


def test_classes_that_derive_the_size_of_heads_are_passed_by():
    narrow = dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=256, num_hidden_layers=1, head_dim=32,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=256,
    )  # fmt: skip
    assert serve_options(narrow) == ("--model-impl", "transformers")
    assert "takes heads for 64 wide, and these are 32" in vllm_verdict(narrow)[0].sentence
    assert serve_options(narrow | {"num_attention_heads": 8}) == serve_options({}) == ()
    assert serve_options(narrow | {"architectures": ["LlamaForCausalLM"]}) == ()
    assert serve_options({"auto_map": {}}) == ("--trust-remote-code",)
    mixture = narrow | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
    assert serve_options(mixture) == ("--model-impl", "transformers")
    assert "they lie stacked here" in vllm_verdict(mixture)[0].sentence


def test_adapters_get_the_smallest_room_that_vllm_offers():
    assert [served.lora_rank(rank) for rank in (0, 1, 2, 8, 9, 256, 300)] == [1, 1, 8, 8, 16, 256, 320]
