"""Exports for transformers alone: the stock class, filled up or not, and code beside the weights.

Most are opened in this process, to be fast; some in a fresh one that cannot import qpruner, as every export is.
"""

import pytest
import torch
from by_code import opened
from test_artifact import MIXED, compressed
from tiny import TINY
from tiny_gguf import artifact_of, folder_of
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from qpruner import exporting
from qpruner.artifact.save import weight_bytes
from qpruner.artifact.widths import widest
from qpruner.cli import app
from qpruner.errors import ModelError, OutputError
from qpruner.exporting import fresh, served
from qpruner.exporting.padding import padded
from qpruner.model import load
from qpruner.model.surgery import cut_tensor, cuts_of
from qpruner.plan import INT8, NF4, QuantSpec

UNEVEN = dict(kv_groups=(4, 1, 3), channels=(512, 256, 320))
EVEN = dict(kv_groups=(2, 2, 2), channels=(256, 256, 256))


@pytest.fixture
def here(monkeypatch):
    """Exports are opened in this process."""

    def ask(folder, tokens, *, adapter=None, code=False):
        with torch.no_grad():
            model = opened(folder, with_code=code)
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
            return fresh.Answer(type(model).__name__, {"float32": logits.numpy()}, False, {})

    monkeypatch.setattr(fresh, "ask", ask)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return folder_of("llama", tmp_path_factory.mktemp("llama") / "model", tokenizer=True)


@pytest.fixture(scope="module")
def uneven(llama, tmp_path_factory):
    specs = (NF4, INT8, QuantSpec(bits=3, grid="integer", group_size=64, symmetric=False))
    return artifact_of(llama, tmp_path_factory.mktemp("uneven") / "out", specs=specs, embeddings=INT8, rank=2, **UNEVEN)


@pytest.fixture(scope="module")
def even(llama, tmp_path_factory):
    return artifact_of(llama, tmp_path_factory.mktemp("even") / "out", specs=(NF4, INT8), rank=2, **EVEN)


# --- with code -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted({*TINY} - {"bloom"}))
def test_the_code_computes_what_the_artifact_does_in_every_format(family, tmp_path, here):
    folder, model, plan, _ = compressed(family, tmp_path, bits=tuple(MIXED), rank=0)
    made = exporting.export(folder, "hf", tmp_path / "coded", with_code=True)
    assert made.loaded.relative < 1e-4 and made.bytes_after == made.bytes_before
    assert made.architecture == type(model).__name__


def test_the_code_has_embeddings_in_codes_with_their_scale_and_adapters(tmp_path, here):
    model = folder_of("gemma3_text", tmp_path / "gemma", tokenizer=True)
    folder = artifact_of(model, tmp_path / "out", specs=(NF4,), embeddings=INT8, rank=2, **UNEVEN)
    made = exporting.export(folder, "hf", tmp_path / "coded", with_code=True)
    assert made.loaded.relative < 1e-4
    loaded = opened(tmp_path / "coded", with_code=True)
    assert loaded.lm_head.matrix is loaded.model.embed_tokens.matrix


def test_the_code_has_experts(tmp_path, here):
    model = folder_of("mixtral", tmp_path / "model", num_local_experts=2, tie_word_embeddings=False)
    folder = artifact_of(model, tmp_path / "out", specs=(NF4,), kv_groups=(4, 1, 3), channels=(1024, 1024, 1024))
    assert exporting.export(folder, "hf", tmp_path / "coded", with_code=True).loaded.relative < 1e-4


def test_scales_keep_their_precision_where_the_model_moves(uneven, tmp_path, here):
    exporting.export(uneven, "hf", tmp_path / "coded", with_code=True)
    model = opened(tmp_path / "coded", with_code=True)
    weight = model.model.layers[1].mlp.down_proj.matrix.decoded(slice(None))
    moved = model.to(torch.bfloat16).model.layers[1].mlp.down_proj.matrix.decoded(slice(None))
    assert torch.equal(weight, moved)


def test_vllm_is_not_asked_where_its_rules_speak_against_it(uneven, tmp_path, here, monkeypatch):
    monkeypatch.setattr(served, "interpreter", lambda named: named)
    made = exporting.export(uneven, "hf", tmp_path / "coded", with_code=True, vllm="python")
    assert made.served is None and "vLLM was not asked: it does not read qpruner's codes" in "\n".join(made.lines())


def test_slopes_of_heads_are_refused_for_the_code_knows_none(tmp_path, here):
    folder, *_ = compressed("bloom", tmp_path, bits=(4,), rank=0)
    with pytest.raises(ModelError, match="values for the heads that stayed \\(alibi\\)"):
        exporting.export(folder, "hf", tmp_path / "coded", with_code=True)
    assert not (tmp_path / "coded").exists()


def test_the_folder_with_code_still_loads_with_us_and_is_known_as_an_artifact(uneven, tmp_path, here):
    exporting.export(uneven, "hf", tmp_path / "coded", with_code=True)
    source = load.inspect_source(tmp_path / "coded")
    assert source.config.model_type == "qpruner" and source.parameters is None and not source.code
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "coded", dtype=torch.float32)(ids).logits
        was = AutoModelForCausalLM.from_pretrained(uneven, dtype=torch.float32)(ids).logits
    assert torch.equal(ours, was)


def test_a_process_without_qpruner_loads_the_code(uneven, tmp_path):
    made = exporting.export(uneven, "hf", tmp_path / "coded", with_code=True)
    assert made.architecture == "LlamaForCausalLM" and made.loaded.relative < 1e-4
    assert "trust_remote_code=True" in made.commands[0]


# --- the stock class -------------------------------------------------------------------------------------------------


def test_codes_and_adapters_become_stock_weights_of_16_bits(even, tmp_path, here):
    made = exporting.export(even, "hf", tmp_path / "stock")
    assert made.loaded.relative < 1e-4 and made.moved.relative < 0.03
    assert made.bytes_after == weight_bytes(tmp_path / "stock") > 2 * made.bytes_before
    config = AutoConfig.from_pretrained(tmp_path / "stock")
    assert (config.model_type, config.num_key_value_heads, config.intermediate_size) == ("llama", 2, 256)
    assert "adapters were added into the weights" in made.notes


def test_adapters_stay_beside_for_peft_in_a_process_without_qpruner(even, tmp_path):
    made = exporting.export(even, "hf", tmp_path / "beside", adapters_beside=True)
    assert made.architecture == "LlamaForCausalLM" and made.loaded.relative < 0.03
    assert (tmp_path / "beside" / "adapter" / "adapter_config.json").is_file()
    without = torch.from_numpy(fresh.ask(tmp_path / "beside", range(3, 20)).logits["float32"].copy())
    ours = AutoModelForCausalLM.from_pretrained(even, dtype=torch.float32)
    with torch.no_grad():
        far = exporting.comparing.off(without, ours(torch.arange(3, 20)[None]).logits[0])
    assert far.relative > 2 * made.loaded.relative, "the adapters have to count for the test to say anything"


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox"])
def test_zeros_make_layers_equally_wide_and_change_nothing(family, tmp_path, here):
    folder, model, plan, shape = compressed(family, tmp_path, bits=(16,), rank=0)
    with pytest.raises(ModelError, match="layer 0 keeps .* and layer 1 .*--padded"):
        exporting.export(folder, "hf", tmp_path / "no")
    made = exporting.export(folder, "hf", tmp_path / "filled", padded=True)
    assert made.loaded.relative < 1e-5 and made.moved.relative == 0
    assert 0 < made.bytes_of_zeros <= made.bytes_after - made.bytes_before + 4096
    assert AutoConfig.from_pretrained(tmp_path / "filled").intermediate_size == 30  # of 40; the widest layer


def test_transposed_linears_are_written_as_their_class_has_them(tmp_path, here):
    """In codes and not, with adapters beside both."""
    folder, *_ = compressed("gpt2", tmp_path, bits=(4, 16), rank=2)
    made = exporting.export(folder, "hf", tmp_path / "filled", padded=True)
    assert made.loaded.relative < 1e-4 and made.moved.relative < 0.03


def test_where_the_class_does_not_take_the_widest_all_heads_come_back(llama, tmp_path, here):
    folder = artifact_of(llama, tmp_path / "out", kv_groups=(3, 1, 3), channels=(256, 512, 256))
    made = exporting.export(folder, "hf", tmp_path / "filled", padded=True)  # 6 heads do not divide 256
    assert made.loaded.relative < 1e-5
    assert AutoConfig.from_pretrained(tmp_path / "filled").num_attention_heads == 8


def test_cutting_what_was_filled_up_gives_back_what_was_there(tmp_path):
    """On a mixture of experts too, where every expert lost other channels."""
    for family in ("mixtral", "phi3", "gpt2"):
        folder, model, plan, shape = compressed(family, tmp_path / family, bits=(16,), rank=0)
        kept = {n: (range(g.n_units) if g.kind == "expert" else plan.kept[n]) for n, g in shape.graph.groups.items()}
        wide = widest(shape.graph, kept)
        assert all(set(kept[name]) <= set(units) for name, units in wide.items())
        cuts, wider = cuts_of(shape.graph, kept), cuts_of(shape.graph, wide)
        for name, (_, whole) in shape.tensors.items():
            if name in cuts:
                tensor = torch.randn(whole, generator=torch.Generator().manual_seed(0))
                small, shape_wide = cut_tensor(tensor, cuts[name]), cut_tensor(tensor, wider.get(name, ())).shape
                filled = padded(small, cuts[name], wider.get(name, ()), shape_wide)
                assert filled.count_nonzero() == small.count_nonzero()
                back = torch.zeros(whole)
                restored = padded(filled, wider[name], (), whole) if name in wider else filled
                back += restored
                assert torch.equal(cut_tensor(back, cuts[name]), small)


def test_an_expert_of_zeros_would_be_sent_tokens(tmp_path):
    folder, _, plan, shape = compressed("mixtral", tmp_path, bits=(16,), rank=0)
    kept = {
        n: (g.at_least and range(g.at_least)) if g.kind == "expert" else plan.kept[n]
        for n, g in shape.graph.groups.items()
    }
    with pytest.raises(ModelError, match="one of zeros would still be sent tokens"):
        widest(shape.graph, kept)


@pytest.mark.parametrize(
    "which, options, message",
    [
        ("llama", dict(with_code=True), "it needs no code"),
        ("llama", dict(adapters_beside=True), "no adapters beside"),
        ("uneven", dict(with_code=True, padded=True), "Ask for one of them"),
        ("uneven", dict(padded=True, adapters_beside=True), "adapters do not fit"),
    ],
)
def test_requests_that_contradict_themselves_are_refused_before_anything_is_read(
    which, options, message, request, tmp_path
):
    with pytest.raises(OutputError, match=message):
        exporting.export(request.getfixturevalue(which), "hf", tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_what_computes_something_else_is_not_left_behind(even, tmp_path, monkeypatch):
    wrong = lambda folder, tokens, **_: fresh.Answer("", {"float32": torch.randn(len(tokens), 259).numpy()}, False, {})
    monkeypatch.setattr(fresh, "ask", wrong)
    with pytest.raises(ModelError, match="computes something else"):
        exporting.export(even, "hf", tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="is there already"):
        exporting.export(even, "hf", tmp_path / "there")
    with pytest.raises(OutputError, match="no option 'padded'"):
        exporting.export(even, "gguf", tmp_path / "x", padded=True)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_command_line_says_what_zeros_cost(uneven, tmp_path, here):
    done = CliRunner().invoke(app, ["export", str(uneven), "--to", "hf", "--padded", "-o", str(tmp_path / "filled")])
    assert done.exit_code == 0, done.output
    assert "are zeros for units that went" in done.stdout and "from_pretrained" in done.stdout
