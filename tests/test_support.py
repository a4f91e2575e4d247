import json

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from typer.testing import CliRunner

from qpruner import support
from qpruner.cli import app
from qpruner.errors import ModelError, PlanError
from qpruner.model.check import check_kept
from qpruner.model.discover import discover
from qpruner.model.skeleton import build_skeleton
from qpruner.model.surgery import cuts_of, narrow_
from qpruner.testing import Row, check_architecture, proof, random_kept, tiny_config, tiny_model

# What is said of single types here is said of those of 5.23; older releases lack some, and compute others differently.
OLDER = Version(transformers.__version__) < Version("5.23")
MAMBA2 = (
    "nothing can be cut: 'mixer': the columns of 'mixer.out_proj' are all tied together by the rows of 'mixer.in_proj'"
    if OLDER
    else "nothing can be cut: 'mixer': its units have values of their own in 'mixer.conv1d.bias'"
)

# What differs: stacked experts, as stored either way round, with biases and sinks, beside shared ones, under a router
# that is a linear; heads in parts; latent attention; one key head for all; state-space layers; keys of other layers.
SERVED = {
    "mixtral": dict(kv_group=("2",), channel=("4 x 40",)),
    "gpt_oss": dict(kv_group=("2",), channel=("4 x 40",)),
    "llama4_text": dict(kv_group=("2",), channel=("4 x 40", "40")),
    "qwen3_moe": dict(kv_group=("2",), channel=("4 x 20",)),
    "codegen": dict(kv_group=("4 x 2",), channel=("40",)),
    "deepseek_v3": dict(kv_group=("4",), channel=("40", "4 x 20", "20")),
    "gemma3_text": dict(kv_group=("2",), channel=("40",)),
    "falcon": dict(channel=("40",)),
    "qwen3_next": dict(kv_group=("2",), channel=("20", "4 x 20")),
    "jetmoe": dict(kv_group=("2",), channel=("4 x 40",)),
    "longcat_flash": dict(kv_group=("4",), channel=("40",)),
}


@pytest.fixture(scope="module")
def rows():
    return {row.model_type: row for row in support.support(list(SERVED), sweep=True)}


@pytest.mark.parametrize("model_type", SERVED)
def test_an_architecture_is_proven_from_discovery_to_a_loaded_artifact(rows, model_type):
    row = rows[model_type]
    assert row.passes, row.reason
    assert {kind: row.units.get(kind) for kind in SERVED[model_type]} == SERVED[model_type]


def test_what_stays_whole_is_named(rows):
    assert rows["falcon"].whole == ("self_attention",)
    assert "linear_attn" in rows["qwen3_next"].whole and not rows["mixtral"].whole


@pytest.mark.parametrize(
    "model_type, reason",
    [
        ("bart", "an encoder-decoder model"),
        ("gemma3", "its language model, of type gemma3_text, has a row of its own"),
        ("mamba2", MAMBA2),
        ("hrm_text", "has no list of 32 decoder layers"),
    ],
)
def test_what_does_not_pass_has_a_sentence(model_type, reason):
    row = check_architecture(model_type)
    assert not row.passes and reason in row.reason


@pytest.mark.parametrize("model_type", ["dots3_note_text", "zaya", "qwen4_exp_text", "xlstm", "dbrx", "olmo_hybrid"])
def test_every_configuration_has_a_tiny_form(model_type):
    """Of models that are one decoder: none is larger than tiny, and all that is said of others is why."""
    if OLDER and model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    proof.check_decoder(model_type)
    proof.check_small(tiny_config(model_type))


def test_a_wrong_cut_is_seen(monkeypatch, tmp_path):
    """The proof fails where a cut takes other units than were asked for."""
    shifted = lambda model, graph, kept: narrow_(
        model, graph, {n: [u - 1 if u else u for u in units[:1]] + list(units[1:]) for n, units in kept.items()}
    )
    monkeypatch.setattr(proof, "narrow_", shifted)
    row = check_architecture("llama", tmp_path / "llama")
    assert not row.passes and row.reason.startswith("removing units is not zeroing them")


def test_a_spoiled_artifact_is_seen(tmp_path):
    assert check_architecture("llama", tmp_path / "llama").passes
    stored = load_file(tmp_path / "llama" / proof.LOGITS)
    stored["logits"] = stored["logits"] + 1e-6 * stored["logits"].abs().max()
    save_file(stored, tmp_path / "llama" / proof.LOGITS)
    assert "other logits, by 1e-06" in proof.load_fault(tmp_path / "llama")


@pytest.fixture(scope="module")
def mixtral():
    model = tiny_model(tiny_config("mixtral"))
    return model, discover(model)


def test_experts_keep_equally_many_channels(mixtral):
    _, graph = mixtral
    name = "model.layers.0.mlp.experts"
    kept = {n: range(g.n_units) for n, g in graph.groups.items()}
    check_kept(graph, kept | {name: [0, 41, 80, 159]})
    with pytest.raises(PlanError, match="160 units come in 4 blocks of 40, .* equally many. Kept are between 1 and 2"):
        check_kept(graph, kept | {name: [0, 1, 41, 80, 159]})
    with pytest.raises(PlanError, match="Kept are between 0 and 1 of a block"):
        check_kept(graph, kept | {name: [0, 41, 80]})


def test_every_expert_keeps_channels_of_its_own(mixtral):
    model, graph = mixtral
    name = "model.layers.1.mlp.experts"
    kept = {n: range(g.n_units) for n, g in graph.groups.items()} | {name: [3, 40, 81, 159]}
    cuts = cuts_of(graph, kept)
    assert cuts.keys() == {f"{name}.gate_up_proj", f"{name}.down_proj"}
    (dim, rows), _ = cuts[f"{name}.gate_up_proj"]
    assert dim == 1 and rows.tolist() == [[3, 43], [0, 40], [1, 41], [39, 79]]
    before = model.get_parameter(f"{name}.down_proj")
    small = tiny_model(tiny_config("mixtral"))
    narrow_(small, graph, kept)
    after = small.get_parameter(f"{name}.down_proj")
    assert torch.equal(after[..., 0], torch.stack([before[e, :, c] for e, c in enumerate((3, 0, 1, 39))]))


def test_random_units_fit_the_graph_and_differ_from_layer_to_layer(mixtral):
    _, graph = mixtral
    kept = random_kept(graph, seed=0)
    check_kept(graph, kept)
    of = lambda kind: {tuple(kept[n]) for n, g in graph.groups.items() if g.kind == kind}
    assert len(of("channel")) == 4


def test_a_stack_larger_than_memory_is_never_allocated():
    sizes = dict(n_routed_experts=256, moe_intermediate_size=2**14, hidden_size=2**13)
    skeleton = build_skeleton(tiny_config("deepseek_v3", **sizes))
    assert skeleton.num_parameters() > 2**38


def test_the_page_keeps_its_text_and_replaces_its_table(tmp_path):
    rows = [Row("a", "AForCausalLM", True, {"channel": ("4 x 20",)}, remark="in | float32"), Row("b", "B", reason="no")]
    first = support.page(rows, "# Models\n\ntext\n")
    assert first.startswith(f"# Models\n\ntext\n\n{support.MARK}\n\n1 of 2 model types pass")
    assert first.endswith(
        "| a | AForCausalLM | - | - | 4 x 20 | - | - | one layer | passes in \\| float32 |\n"
        "| b | B | - | - | - | - | - | - | no |\n"
    )
    assert support.page(rows, first) == first


def test_the_command_prints_rows_and_writes_the_page(tmp_path):
    result = CliRunner().invoke(app, ["support", "--only", "llama,bart", "--json", "-o", str(tmp_path / "models.md")])
    assert result.exit_code == 0
    found = json.loads(result.stdout[result.stdout.index("[") :])
    assert [(row["model_type"], row["passes"]) for row in found] == [("llama", True), ("bart", False)]
    assert "1 of 2 model types pass" in (tmp_path / "models.md").read_text()


def test_a_type_that_is_unknown_is_refused():
    with pytest.raises(ModelError, match="no causal language model of type 'nonsense'. Accepted: 'afmoe'"):
        support.support(["nonsense"])
    assert "llama" in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
