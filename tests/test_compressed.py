"""Folders in compressed-tensors' format: they hold the artifact's codes, and transformers computes the same."""

import json
import sys

import pytest
import torch
from by_code import opened
from specs import BINARY, INTEGERS, TERNARY, of_groups
from tiny_folder import save
from tiny_gguf import artifact_of, folder_of
from tiny_remote import remote_model
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from qpruner import exporting
from qpruner.artifact.compressed import encoding, schemes, writing
from qpruner.artifact.compressed.reading import Unpacked
from qpruner.artifact.dense import Dense
from qpruner.cli import app
from qpruner.errors import MissingExtraError, ModelError, OutputError
from qpruner.exporting import fresh
from qpruner.model.load import inspect_source, load_model
from qpruner.model.packed.split import packed
from qpruner.plan import DENSE, INT8, NF4, QuantSpec
from qpruner.vllm import Scheme, matches

compressed_tensors = pytest.importorskip("compressed_tensors")

PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
NAMES = [
    *(f"model.layers.{i}.{part}" for i in range(12) for part in PARTS),
    *(f"model.layers.{i}.mlp.up_proj_again" for i in range(12)), "model.layers.1.mlp.experts.3.up_proj",
    "other.model.layers.1.mlp.up_proj", "lm_head", "lm_head_too",
]  # fmt: skip
UNIFORM = dict(kv_groups=(2, 2, 2), channels=(320, 320, 320))
UNEVEN = dict(kv_groups=(4, 1, 3), channels=(512, 256, 320))


def integer(bits, group_size=64, **more) -> QuantSpec:
    return QuantSpec(bits=bits, grid="integer", group_size=group_size, **more)


MIXED = (integer(4), integer(3, 32), INT8, DENSE, integer(6), integer(2, 128), integer(5))


@pytest.fixture
def in_process(monkeypatch):
    """transformers is asked here instead of in a process that first has to start."""
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    monkeypatch.setattr(compressor, "compress", compressor.compress)  # to be put back if it is corrected

    def ask(folder, tokens, *, dtypes, adapter=None, own=False, code=False):
        found, corrected = {}, False
        for name in dtypes:
            dtype = getattr(torch, name)
            by_code = lambda dtype=dtype: (opened(folder, with_code=True, dtype=dtype), False)
            model, now = by_code() if code else fresh.loaded(str(folder), dtype)
            corrected |= now
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([tokens])).logits
            assert type(model).__module__.startswith("transformers.models")
            found[name] = logits[0].float().numpy()
        return fresh.Answer(
            type(model).__name__, found, corrected, {"compressed_tensors": compressed_tensors.__version__}
        )

    monkeypatch.setattr(fresh, "ask", ask)


def export(model, path, **how):
    """The result; that transformers computes the same is part of it."""
    result = exporting.export(model, "compressed-tensors", path, **how)
    assert result.loaded.relative < 1e-3 and result.as_stored.relative < result.moved.relative + 0.05
    return result


# --- codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [*INTEGERS, TERNARY, BINARY, INT8, integer(4, 16, scale_bits=6)], ids=str)
@pytest.mark.parametrize("group_size", [None, 16, 48])
def test_the_library_unpacks_the_weight_that_was_packed(spec, group_size, rand):
    """Also rows that end inside a word, outputs that do, and groups that do not divide the inputs."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    W = rand(37, 80).float()
    layer = packed(W, None, of_groups(spec, group_size))
    scheme = schemes.exact_scheme(layer.spec, 80)
    stored = encoding.as_coded(layer, scheme)
    said = encoding.tensor_specs(37, 80, scheme)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        n: shape for n, (_, shape) in said.items()
    }
    how = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**scheme.to_json()))
    decompress = BaseCompressor.get_value_from_registry("pack-quantized").decompress
    exact = encoding.exact_scales(layer)
    for dtype in (torch.float32, torch.float16):
        found = decompress(stored | {"weight_scale": stored["weight_scale"].to(dtype)}, how)["weight"]
        torch.testing.assert_close(found, layer.dequantize(dtype), rtol=0 if exact else 1e-3, atol=0)
    assert exact or spec.scale_bits < 16
    again = encoding.decoded(stored, scheme)
    assert torch.equal(encoding.encoded(again, scheme)["weight_packed"], stored["weight_packed"])


def test_what_the_format_lacks_has_no_scheme():
    assert schemes.exact_scheme(NF4, 64) is None and "nf4 are none" in schemes.why_not(NF4, 64)
    salient = integer(3, 64, salient=8)
    assert schemes.exact_scheme(salient, 64) is None and "8 channels here have 8 bits" in schemes.why_not(salient, 64)
    odd = integer(4, 64)
    assert schemes.exact_scheme(odd, 132) is None and "132 and groups of 64" in schemes.why_not(odd, 132)
    assert schemes.nearest_scheme(odd, 132) == Scheme(4, True, 44)
    assert schemes.nearest_scheme(odd, 131) == Scheme(4, True, None)
    assert schemes.nearest_scheme(NF4, 64) == Scheme(4, True, None)


# --- names -----------------------------------------------------------------------------------------------------------


def test_expressions_match_the_names_they_stand_for_and_no_others():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        some = [NAMES[i] for i in torch.randperm(len(NAMES), generator=generator)[: len(NAMES) // 2].sort().values]
        found = schemes.targets(some, NAMES)
        assert [name for name in NAMES if any(matches(name, target) for target in found)] == some
    layers = [name for name in NAMES if name.endswith("mlp.up_proj") and not name.startswith("other")]
    assert schemes.targets(layers, NAMES) == [r"re:^model\.layers\.\d+\.mlp\.up_proj$"]


def test_expressions_still_match_where_the_decoder_is_called_model():
    """vLLM's transformers backend renames it in paths, and leaves expressions as they are."""
    (found,) = schemes.targets(["transformer.h.1.mlp.c_fc"], ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"])
    there = ("transformer.h.1.mlp.c_fc", "model.h.1.mlp.c_fc", "model.h.0.mlp.c_fc", "other.h.1.mlp.c_fc")
    assert [matches(name, found) for name in there] == [True, True, False, False]


def test_the_library_matches_them_as_we_do():
    from compressed_tensors.utils import match_name

    found = schemes.targets(NAMES[::3], NAMES)
    assert [n for n in NAMES if any(match_name(n, target) for target in found)] == NAMES[::3]


# --- through transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "specs", [MIXED, (integer(4, symmetric=False), integer(3, 32, symmetric=False))], ids=["mixed", "zero points"]
)
def test_a_uniform_artifact_of_any_bits_loads_in_stock_transformers(family, specs, tmp_path, in_process):
    over = dict(head_dim=64) if family == "qwen2" else {}  # what its configuration keeps only if it is told
    artifact = artifact_of(folder_of(family, tmp_path / "m", **over), tmp_path / "a", specs=specs, **UNIFORM)
    result = export(artifact, tmp_path / "o")
    assert result.written.stock and result.written.model_type == family and not result.written.again
    assert result.written.exact == sum(result.written.linears.values()) and result.moved.relative < 1e-5
    assert result.corrected is (specs is not MIXED)
    dense, unpacked = Dense(inspect_source(artifact)), Unpacked.of(tmp_path / "o")
    for name in dense.specs:
        assert torch.equal(unpacked.read(f"{name}.weight"), dense.read(f"{name}.weight"))


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_width_with_and_without_zero_points(symmetric, tmp_path, in_process):
    """All of them in one model: a linear that is read otherwise moves its logits."""
    specs = tuple(integer(bits, 64, symmetric=symmetric) for bits in (2, 3, 4, 5, 6, 8))
    artifact = artifact_of(folder_of("llama", tmp_path / "m"), tmp_path / "a", specs=specs, **UNIFORM)
    result = export(artifact, tmp_path / "o")
    assert set(result.written.linears) == {Scheme(spec.bits, symmetric, 64).name for spec in specs}
    assert result.moved.relative < 1e-5


@pytest.mark.parametrize("over", [dict(tie_word_embeddings=False), dict(attention_bias=True, mlp_bias=True)])
def test_heads_of_their_own_and_biases(over, tmp_path, in_process):
    artifact = artifact_of(folder_of("llama", tmp_path / "m", **over), tmp_path / "a", specs=MIXED)
    assert export(artifact, tmp_path / "o").moved.relative < 1e-5
    config = json.loads((tmp_path / "o/config.json").read_text())["quantization_config"]
    assert "lm_head" in config["ignore"]


def test_layers_of_their_own_widths_load_with_our_loader(tmp_path, in_process):
    ternary = QuantSpec(bits=2, grid="ternary", group_size=64)
    specs = (integer(4, 48), integer(3, symmetric=False), INT8, ternary)  # of which two are stored as something else
    artifact = artifact_of(folder_of("llama", tmp_path / "m"), tmp_path / "a", specs=specs, rank=4, **UNEVEN)
    result = export(artifact, tmp_path / "o")
    assert not result.written.stock and result.moved.relative < 1e-5
    said = "\n".join(result.lines())
    assert "trust_remote_code=True), or without that after import qpruner" in said
    assert f"vllm serve {tmp_path / 'o'} --trust-remote-code --enable-lora" in said
    loaded, again = load_model(inspect_source(artifact)), load_model(inspect_source(tmp_path / "o"))
    ids = torch.randint(259, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, loaded(ids).logits, rtol=1e-4, atol=1e-4)
    assert type(again.model.layers[1].mlp.down_proj.get_base_layer()).__name__ == "PackedLinear"  # and not decoded


def test_a_class_whose_linears_multiply_in_their_own_way_keeps_our_type(tmp_path, in_process):
    """Falcon's do; compressed-tensors takes the weight from where they look for it."""
    over = dict(vocab_size=259, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **over)).to(torch.bfloat16)
    artifact = artifact_of(
        save(model, tmp_path / "m"), tmp_path / "a", specs=(integer(4, 32),), kv_groups=(1, 1), channels=(256, 256)
    )
    assert not export(artifact, tmp_path / "o").written.stock


def test_ternary_and_binary_codes_are_integers_of_two_bits(tmp_path, in_process):
    specs = (QuantSpec(bits=2, grid="ternary", group_size=64), QuantSpec(bits=1, grid="binary", group_size=64))
    artifact = artifact_of(folder_of("llama", tmp_path / "m"), tmp_path / "a", specs=specs)
    result = export(artifact, tmp_path / "o")
    assert result.written.linears == {"int2_g64": 21} and result.moved.relative < 1e-5


def test_what_goes_into_16_bits_is_said(tmp_path, in_process):
    spec = integer(4, 48, scale_bits=6, activation_bits=8)
    artifact = artifact_of(folder_of("llama", tmp_path / "m"), tmp_path / "a", specs=(spec,), embeddings=INT8)
    result = export(artifact, tmp_path / "o")
    said = "\n".join(result.lines())
    assert "'model.embed_tokens' lie in codes in the artifact and in 16 bits here, 132,608 bytes" in said
    assert "scales of 21 linears are products of few bits" in said and "inputs of linears are not rounded" in said
    assert "their groups do not divide the inputs" in said
    assert result.written.exact == 21 and result.moved.relative < 2e-2


def test_a_model_of_16_bits_is_a_plain_folder(tmp_path, in_process):
    result = export(folder_of("llama", tmp_path / "m"), tmp_path / "o")
    assert result.moved.relative == 0 and "nothing lies in codes" in "\n".join(result.lines())
    assert "quantization_config" not in json.loads((tmp_path / "o/config.json").read_text())


def test_a_large_model_is_cut_into_files(tmp_path, in_process, monkeypatch):
    artifact = artifact_of(folder_of("llama", tmp_path / "m"), tmp_path / "a", specs=MIXED)
    monkeypatch.setattr(writing, "SHARD_BYTES", 300_000)
    export(artifact, tmp_path / "o")
    index = json.loads((tmp_path / "o/model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(tmp_path.glob("o/*.safetensors"))
    assert len(files) > 2 and {file.name for file in files} == set(index.values())
    assert all(file.stat().st_size < 310_000 for file in files)
    assert len({file for name, file in index.items() if name.startswith("model.layers.0.mlp.up_proj.")}) == 1


def test_the_same_bytes_every_time(tmp_path, in_process):
    artifact = artifact_of(folder_of("llama", tmp_path / "m"), tmp_path / "a", specs=(NF4, *MIXED))
    for name in ("a1", "a2"):
        export(artifact, tmp_path / name, round_again=True)
    for file in (tmp_path / "a1").iterdir():
        assert file.read_bytes() == (tmp_path / "a2" / file.name).read_bytes()


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [NF4, integer(3, 64, salient=8)], ids=str)
def test_codes_that_it_does_not_hold_are_rounded_again_only_if_asked(spec, tmp_path, in_process):
    artifact = artifact_of(folder_of("llama", tmp_path / "m"), tmp_path / "a", specs=(spec, INT8))
    with pytest.raises(ModelError, match="does not hold all codes as they are.*--round-again"):
        export(artifact, tmp_path / "o")
    assert not list(tmp_path.glob("*o")) and not list(tmp_path.glob(".o*"))
    result = export(artifact, tmp_path / "o", round_again=True)
    assert {one.scheme for one in result.written.again} == {f"int{spec.bits} g64"}
    assert 0 < result.moved.relative < 1 and "rounded once more" in "\n".join(result.lines())


def test_a_model_with_code_of_its_own_is_refused_before_anything_is_written(tmp_path):
    model = remote_model(tmp_path / "m", "rotary")
    with pytest.raises(ModelError, match="comes with Python code of its own"):
        export(model, tmp_path / "o", trust_remote_code=True)
    assert not list(tmp_path.glob("*o")) and not list(tmp_path.glob(".o*"))


def test_text_tells_which_columns_count_when_weights_are_rounded_again(tmp_path, in_process, short_text):
    artifact = artifact_of(folder_of("llama", tmp_path / "m", tokenizer=True), tmp_path / "a", specs=(NF4,))
    moved = [
        export(artifact, tmp_path / f"o{i}", round_again=True, calibration=text).moved.kl
        for i, text in enumerate((None, short_text))
    ]
    assert moved[0] != moved[1]


def test_a_folder_that_computes_something_else_is_not_left_there(tmp_path, in_process, monkeypatch):
    artifact = artifact_of(folder_of("llama", tmp_path / "m"), tmp_path / "a", specs=MIXED)
    right = encoding.encoded
    spoilt = lambda rounded, scheme: right(rounded, scheme) | {"weight_scale": rounded.scales * 1.5}
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encoded", spoilt)
        with pytest.raises(ModelError, match="exported weights compute something else"):
            export(artifact, tmp_path / "o")
    assert not list(tmp_path.glob("*o")) and not list(tmp_path.glob(".o*"))
    ask = fresh.ask
    wrong = lambda *args, **how: fresh.Answer("", {n: -x for n, x in ask(*args, **how).logits.items()}, False, {})
    with monkeypatch.context() as patch:
        patch.setattr(fresh, "ask", wrong)
        with pytest.raises(ModelError, match="transformers computes something else"):
            export(artifact, tmp_path / "o")
    assert not list(tmp_path.glob("*o")) and not list(tmp_path.glob(".o*"))


def test_places_that_are_taken_and_options_of_others_are_refused(tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o/file").touch()
    with pytest.raises(OutputError, match="is there already"):
        export("pystdlib-5M", tmp_path / "o")
    with pytest.raises(OutputError, match="to gguf has no option 'round_again'. Options: .*compressed-tensors"):
        exporting.export("pystdlib-5M", "gguf", tmp_path / "x.gguf", round_again=True)


def test_the_package_is_asked_for_by_its_extra_where_something_lies_in_codes(tmp_path, monkeypatch):
    artifact = artifact_of(folder_of("llama", tmp_path / "m"), tmp_path / "a", specs=(integer(4),))
    with monkeypatch.context() as patch:
        patch.setattr(compressed_tensors, "__version__", "0.17.1")
        with pytest.raises(MissingExtraError, match="0.17.1 puts codes into words in another way"):
            export(artifact, tmp_path / "no")
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'qpruner\[vllm-format\]'"):
        export(artifact, tmp_path / "no")


def test_without_memory_for_the_whole_the_folder_is_read_back_layer_by_layer(tmp_path, monkeypatch):
    monkeypatch.setattr("qpruner.exporting.compressed_tensors.memory_for", lambda dense: False)
    artifact = artifact_of(folder_of("llama", tmp_path / "m"), tmp_path / "a", specs=MIXED)
    result = exporting.export(artifact, "compressed-tensors", tmp_path / "o")
    assert result.loaded is None and result.moved.relative < 1e-5 and "was not asked" in "\n".join(result.lines())


# --- in a process of its own -----------------------------------------------------------------------------------------


def test_a_process_that_has_seen_nothing_of_this_loads_it_with_adapters_and_the_command_line_says_so(tmp_path):
    model = folder_of("llama", tmp_path / "m", tokenizer=True)
    artifact = artifact_of(model, tmp_path / "a", specs=(integer(4), integer(3), INT8), rank=4, **UNIFORM)
    command = ["export", str(artifact), "--to", "compressed-tensors", "-o", str(tmp_path / "o"), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert found["loaded"]["relative"] < 1e-3 and found["moved"]["relative"] < 1e-5
    assert found["written"]["stock"] and found["written"]["adapter_rank"] > 0
    assert all(verdict["holds"] for verdict in found["vllm"])
    with pytest.raises(fresh.Refused, match="num_attention_heads|config"):
        (tmp_path / "o/config.json").write_text("{}")
        fresh.ask(tmp_path / "o", [1, 2], dtypes=("float32",))


def test_a_process_without_qpruner_loads_layers_of_their_own_widths_by_the_code_in_the_folder(tmp_path):
    artifact = artifact_of(folder_of("qwen3", tmp_path / "m"), tmp_path / "a", specs=MIXED, **UNEVEN)
    assert not export(artifact, tmp_path / "o").written.stock
