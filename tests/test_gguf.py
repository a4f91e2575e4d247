"""Files for llama.cpp: they hold what the artifact computes with, and llama.cpp computes it."""

import dataclasses
import json
import sys

import pytest
import torch
from tiny_gguf import SIZES, artifact_of, folder_of
from typer.testing import CliRunner

from qpruner import exporting
from qpruner.artifact.dense import Dense
from qpruner.artifact.gguf import families, layout, llamacpp
from qpruner.artifact.gguf.reading import Decoded
from qpruner.cli import app
from qpruner.errors import MissingExtraError, ModelError, OutputError
from qpruner.exporting import comparing
from qpruner.exporting import gguf as gguf_export
from qpruner.model.load import inspect_source, load_model
from qpruner.plan import DENSE, INT8, NF4, QuantSpec

gguf = pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(not llamacpp.installed(), reason="llama.cpp: pip install 'qpruner[llamacpp]'")

K_SPECS = tuple(
    QuantSpec(bits=b, grid="integer", group_size=64, scale_bits=8) for b in (2, 3, 4, 5, 6)
)  # rounded again
EXACT = (
    QuantSpec(bits=4, grid="integer", group_size=64), QuantSpec(bits=5, grid="integer", group_size=32), INT8,
    QuantSpec(bits=2, grid="ternary", group_size=256), QuantSpec(bits=1, grid="binary", group_size=256), DENSE,
)  # fmt: skip
ROPE3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
UNEVEN = dict(kv_groups=(4, 1, 3), channels=(512, 256, 320))


def export(model, path, **how):
    """The result; that llama.cpp agreed is part of it where it is installed."""
    return exporting.export(model, "gguf", path, **how)


def agreed(result, *, moved: float, loaded: float) -> None:
    assert result.moved.relative < moved
    assert result.loaded is None or result.loaded.relative < loaded


@pytest.mark.parametrize(
    "family, over, name",
    [
        ("llama", {}, "llama"),
        ("llama", dict(tie_word_embeddings=False, head_dim=32), "llama"),
        ("llama", dict(attention_bias=True, mlp_bias=True), "llama"),
        ("llama", dict(rope_parameters=ROPE3), "llama"),
        ("llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)), "llama"),
        ("mistral", dict(sliding_window=None), "llama"),
        ("qwen2", dict(head_dim=32), "qwen2"),
        ("qwen2", {}, "llama"),  # whose heads are not as wide as the hidden states, as where some went
        ("qwen3", {}, "qwen3"),
        ("qwen3", dict(tie_word_embeddings=False), "qwen3"),
        ("qwen3", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)), "qwen3"),
    ],
)
def test_a_model_of_16_bits_is_the_same_model(family, over, name, tmp_path):
    result = export(folder_of(family, tmp_path / "m", **over), tmp_path / "m.gguf")
    assert result.written.architecture == name
    assert not result.written.instead and set(result.written.types) == {"F16", "F32"}
    agreed(result, moved=1e-3, loaded=5e-3)


@pytest.mark.parametrize(
    "family, over, name",
    [
        ("llama", {}, "deci"),
        ("llama", dict(tie_word_embeddings=False, attention_bias=True, rope_parameters=ROPE3), "deci"),
        ("mistral", dict(sliding_window=None), "deci"),
        ("qwen2", {}, "deci"),
        ("qwen3", {}, "openelm"),
    ],
)
@pytest.mark.parametrize("specs", [(DENSE,), (*K_SPECS, INT8, DENSE)], ids=["16 bits", "mixed"])
def test_layers_of_other_widths_go_where_widths_are_told_layer_by_layer(family, over, name, specs, tmp_path):
    model = folder_of(family, tmp_path / "m", **over)
    result = export(artifact_of(model, tmp_path / "a", specs=specs, **UNEVEN), tmp_path / "a.gguf")
    assert result.written.architecture == name
    agreed(result, moved=1e-3 if specs == (DENSE,) else 0.6, loaded=5e-3 if specs == (DENSE,) else 0.1)


def test_every_bit_width_has_its_type_and_each_is_read_as_it_was_meant(tmp_path):
    model = folder_of("llama", tmp_path / "m")
    for spec, kind, most in zip(
        K_SPECS, ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), (1, 0.5, 0.3, 0.2, 0.1), strict=True
    ):
        result = export(artifact_of(model, tmp_path / kind, specs=(spec,)), tmp_path / f"{kind}.gguf")
        assert set(result.written.types) == {kind, "F16", "F32"}
        agreed(result, moved=most, loaded=0.1)


def test_codes_that_have_a_type_are_taken_over(tmp_path):
    artifact = artifact_of(folder_of("llama", tmp_path / "m"), tmp_path / "a", specs=EXACT, embeddings=INT8)
    result = export(artifact, tmp_path / "a.gguf")
    assert set(result.written.types) == {"Q4_0", "Q5_0", "Q8_0", "TQ1_0", "F16", "F32"}
    dense = Dense(inspect_source(artifact))
    read = Decoded(tmp_path / "a.gguf", dense.model)
    for name, spec in dense.specs.items():
        assert torch.equal(read.read(f"{name}.weight"), dense.read(f"{name}.weight")), spec
    assert result.written.exact == len(dense.specs)
    agreed(result, moved=1e-3, loaded=0.1)


def test_minima_of_zero_points_are_rounded_to_16_bits_and_nothing_else(tmp_path):
    specs = tuple(QuantSpec(bits=b, grid="integer", group_size=32, symmetric=False) for b in (4, 5))
    artifact = artifact_of(folder_of("llama", tmp_path / "m"), tmp_path / "a", specs=specs)
    result = export(artifact, tmp_path / "a.gguf")
    assert set(result.written.types) == {"Q4_1", "Q5_1", "F16", "F32"}
    agreed(result, moved=5e-3, loaded=0.1)


@pytest.mark.parametrize(
    "channels, expected",
    [
        (320, {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}),
        (300, dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"), "F16")),
    ],
)
def test_rows_that_have_no_place_in_a_type_get_another_and_it_is_said(channels, expected, tmp_path):
    model = folder_of("llama", tmp_path / "m", num_hidden_layers=6)
    eights = QuantSpec(bits=8, grid="integer", group_size=300)
    specs = [spec for spec in (*K_SPECS, eights) for _ in range(4)]  # a layer has four projections
    many = dict(kv_groups=(4,) * 6, channels=(channels,) * 6)
    result = export(artifact_of(model, tmp_path / "a", specs=tuple(specs), **many), tmp_path / "a.gguf")
    found = {one.wanted: one.used for one in result.written.instead}
    assert found == expected
    assert all("ffn_down" in one.tensor and one.columns == channels for one in result.written.instead)
    assert f"rows of {channels} are no multiple of {32 if channels == 300 else 256}" in "\n".join(result.lines())
    agreed(result, moved=1, loaded=0.1)


def test_adapters_are_added_to_the_weights(tmp_path):
    artifact = artifact_of(folder_of("llama", tmp_path / "m"), tmp_path / "a", specs=(INT8, NF4), rank=4)
    dense, loaded = Dense(inspect_source(artifact)), load_model(inspect_source(artifact))
    ids = torch.randint(259, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert comparing.off(comparing.logits_of(dense.stream(), ids), loaded(input_ids=ids).logits[0]).relative < 1e-4
    result = export(artifact, tmp_path / "a.gguf")
    assert result.written.exact == 0
    agreed(result, moved=0.3, loaded=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_in_codes_have_their_types(tied, tmp_path):
    model = folder_of("llama", tmp_path / "m", tie_word_embeddings=tied)
    spec = QuantSpec(bits=4, grid="integer", group_size=64)
    result = export(artifact_of(model, tmp_path / "a", embeddings=spec), tmp_path / "a.gguf")
    assert result.written.types["Q4_0"][0] == (1 if tied else 2)
    agreed(result, moved=1e-3, loaded=0.1)


@pytest.mark.parametrize(
    "family, over, uneven, match",
    [
        (
            "qwen3",
            dict(tie_word_embeddings=False),
            True,
            "all layers have the same widths, and here they have 2 to 8 heads",
        ),
        ("qwen3", dict(rope_parameters=ROPE3), False, "rotary frequencies are not scaled one by one"),
        ("qwen3", dict(attention_bias=True), False, "it has no bias for 'k_proj', 'o_proj', 'q_proj' and 1 more"),
        ("llama", dict(hidden_act="gelu"), False, "the activation is SiLU, and here it is 'gelu'"),
        ("llama", dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)), False, "'dynamic'"),
        ("gpt_neox", {}, False, "'gpt_neox' are not exported to GGUF yet. Accepted: llama, mistral"),
    ],
)
def test_what_no_architecture_holds_is_refused_with_the_reason(family, over, uneven, match, tmp_path):
    model = folder_of(family, tmp_path / "m", **over)
    model = artifact_of(model, tmp_path / "a", **UNEVEN) if uneven else model
    with pytest.raises(ModelError, match=match):
        export(model, tmp_path / "no.gguf")
    assert not list(tmp_path.glob("*no.gguf*"))


def test_other_formats_and_other_places_are_refused(tmp_path):
    with pytest.raises(OutputError, match="no export to 'onnx'. Accepted: .*gguf"):
        exporting.export("pystdlib-5M", "onnx")
    with pytest.raises(OutputError, match="is a folder"):
        export("pystdlib-5M", tmp_path)


@needs_llama_cpp
@pytest.mark.parametrize("uneven", [False, True])
def test_a_file_that_computes_something_else_is_not_left_there(uneven, tmp_path, monkeypatch):
    model = folder_of("llama", tmp_path / "m")
    model = artifact_of(model, tmp_path / "a", **UNEVEN) if uneven else model
    monkeypatch.setattr("qpruner.artifact.gguf.writing.order", lambda rows, heads: torch.arange(rows))
    monkeypatch.setattr("qpruner.artifact.gguf.reading.restored", lambda rows, heads: torch.arange(rows))
    with pytest.raises(ModelError, match="computes something else"):
        export(model, tmp_path / "no.gguf")
    assert not list(tmp_path.glob("*no.gguf*"))


@needs_llama_cpp
def test_widths_that_llama_cpp_does_not_load_are_an_error(tmp_path, monkeypatch):
    artifact = artifact_of(folder_of("llama", tmp_path / "m"), tmp_path / "a", **UNEVEN)
    blind = dataclasses.replace(families.LLAMA, each_layer=True)
    monkeypatch.setitem(families.FAMILIES, "llama", (blind,))
    with pytest.raises(ModelError, match="llama.cpp does not take the exported file: .*(shape|dim|expected)"):
        export(artifact, tmp_path / "no.gguf")


def test_what_a_file_cannot_say_is_said(tmp_path):
    model = folder_of("mistral", tmp_path / "m", sliding_window=128)
    rounded = QuantSpec(bits=8, grid="integer", activation_bits=8)
    result = export(artifact_of(model, tmp_path / "a", specs=(rounded,)), tmp_path / "a.gguf")
    said = "\n".join(result.lines())
    assert (
        "no tokenizer" in said and "the context is 128 tokens" in said and "inputs of linears are not rounded" in said
    )
    assert gguf.GGUFReader(tmp_path / "a.gguf").fields["llama.context_length"].contents() == 128


def test_the_package_that_writes_is_asked_for_by_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'qpruner\[gguf\]'"):
        export("pystdlib-5M", tmp_path / "no.gguf")


def test_without_llama_cpp_the_decoder_of_gguf_compares_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(llamacpp, "installed", lambda: False)
    result = export(folder_of("llama", tmp_path / "m"), tmp_path / "m.gguf")
    assert result.loaded is None and result.moved.relative < 1e-3
    assert "llama.cpp is not installed" in "\n".join(result.lines())


def test_text_tells_which_columns_count(tmp_path, short_text):
    model = folder_of("llama", tmp_path / "m", tokenizer=True)
    spec = K_SPECS[0]
    artifact = artifact_of(model, tmp_path / "a", specs=(spec,))
    flat, weighted = (export(artifact, tmp_path / f"{i}.gguf", calibration=c) for i, c in enumerate((None, short_text)))
    assert flat.written.types == weighted.written.types
    dense = Dense(inspect_source(artifact))
    counts = gguf_export.importance_of(dense, inspect_source(artifact), short_text, lambda *_: None)
    losses = []
    for i in range(2):
        read, loss = Decoded(tmp_path / f"{i}.gguf", dense.model), 0.0
        for name in dense.specs:
            W = dense.read(f"{name}.weight")
            loss += float((counts(name) * (read.read(f"{name}.weight") - W).double() ** 2).sum())
        losses.append(loss)
    assert losses[1] < losses[0]


def test_rows_are_put_back_where_they_were():
    for heads in (1, 3):
        there, back = layout.order(24 * heads, heads), layout.restored(24 * heads, heads)
        assert torch.equal(there[back], torch.arange(24 * heads))
        # neighbours in the file are a half apart in the model
        assert torch.equal(there[1::2] - there[::2], torch.full((12 * heads,), 12))


def test_the_file_is_the_same_every_time_and_says_the_widths_of_each_layer(tmp_path):
    artifact = artifact_of(folder_of("llama", tmp_path / "m"), tmp_path / "a", **UNEVEN)
    for name in ("a", "b"):
        export(artifact, tmp_path / f"{name}.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    value = lambda key: fields[key].contents()
    assert value("general.architecture") == "deci"
    assert value("deci.attention.head_count_kv") == [4, 1, 3]
    assert value("deci.attention.head_count") == [8, 2, 6]
    assert value("deci.feed_forward_length") == [512, 256, 320]
    assert value("deci.attention.key_length") == value("deci.rope.dimension_count") == SIZES["head_dim"]


def test_a_layer_less_and_the_command_line(tmp_path):
    model = folder_of("llama", tmp_path / "m", tokenizer=True, num_hidden_layers=4)
    widths = dict(kv_groups=(4, 1, 3), channels=(512, 256, 320), layers=(0, 2, 3))
    artifact = artifact_of(model, tmp_path / "a", specs=(NF4,), **widths)
    path = tmp_path / "a.gguf"
    done = CliRunner().invoke(app, ["export", str(artifact), "--to", "gguf", "-o", str(path), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert gguf.GGUFReader(path).fields["deci.block_count"].contents() == 3
    assert found["written"]["size_bytes"] == path.stat().st_size
    assert found["loaded"] is None or (found["loaded"]["relative"] < 0.1 and found["same_tokens"] == 1)
