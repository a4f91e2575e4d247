"""Models that bring their own code: like any other when the user says so, and not a line of it runs otherwise."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from test_surgery import continued, narrowed
from tiny_folder import edit_config
from tiny_remote import CODE, POSITIONS, remote_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qpruner import api
from qpruner import shape as shaping
from qpruner.artifact.stock import how_to_load
from qpruner.cli import app
from qpruner.errors import ModelError
from qpruner.judge import speed
from qpruner.model import load, memory
from qpruner.model.discover import discover
from qpruner.testing import random_kept, zeroed

IDS = torch.arange(3, 23)[None]
SIZES = dict(
    vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, head_dim=8
)
QUICK = "steps=2,batch_size=2,window=32,calibration_windows=4,search_windows=2,evaluation_windows=2,width_grid=16"

EVERYWHERE = (
    f"llm-pruner[{QUICK},layers=null,protect_first=0,protect_last=0,kept=0.5,shrink_to_fit=false,selection=grid,"
    "adapters=merged]"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("remote")
    return {p: remote_model(root / p, p, tokenizer=True, **SIZES) for p in POSITIONS}


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that the code of a model writes as soon as it is imported."""
    monkeypatch.setenv("WPACK_WAS_IMPORTED", str(tmp_path / "imported"))
    return tmp_path / "imported"


# --- with the flag: as any other model -------------------------------------------------------------------------------


@pytest.mark.parametrize("position", POSITIONS)
def test_stacked_qkv_is_heads_and_channels(folders, position):
    found = api.inspect(str(folders[position]), trust_remote_code=True)
    assert found["architecture"] == "WPackForCausalLM" and not found["notes"]
    groups = [(g["kind"], g["units"]) for g in found["groups"]]
    assert groups == [*[("kv_group", 8), ("channel", 128)] * 2, ("residual", 64)]
    shape = shaping.shape_of(load.inspect_source(folders[position], trust_remote_code=True))
    heads = shape.graph.groups["model.layers.0.self_attn"]
    rows = torch.arange(192).view(3, 8, 8).transpose(0, 1).flatten(1)  # of q, then k, then v
    assert torch.equal(heads.producers["model.layers.0.self_attn.W_pack"], rows)


@pytest.mark.parametrize("position", POSITIONS)
def test_removing_a_unit_is_zeroing_it(folders, position):
    """With ALiBi the mask carries a slope per head, of which the kept heads keep their own."""
    source = load.inspect_source(folders[position], trust_remote_code=True)
    model = load.load_model(source, torch.float64)
    ids = torch.randint(2, 259, (2, 9), generator=torch.Generator().manual_seed(1))
    padding = torch.ones_like(ids)
    padding[0, :3] = 0
    for seed in (0, 1):
        kept = random_kept(discover(model), seed)
        small, reference = narrowed(model, discover(model), kept), zeroed(model, discover(model), kept)
        with torch.no_grad():
            for mask in (None, padding):
                expected = reference(ids, attention_mask=mask).logits
                torch.testing.assert_close(small(ids, attention_mask=mask).logits, expected, rtol=1e-9, atol=1e-9)
            assert (model(ids).logits - expected).abs().max() > 1e-3
        torch.testing.assert_close(continued(small, ids), continued(reference, ids), rtol=1e-9, atol=1e-9)


FRESH = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.arange(3, 23)[None]
found = []
sys.modules["qpruner"] = None  # its import is an error
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    tokens = model.generate(ids[:, :5], max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        found.append([type(model).__name__, model(ids).logits.tolist(), tokens.shape[1]])
    if sys.modules["qpruner"] is None:
        del sys.modules["qpruner"]
        import qpruner
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def artifact(folders, short_text, tmp_path_factory):
    """Heads of an ALiBi model and bits mixed: of our own type."""
    return api.compress(
        str(folders["alibi"]), "65%", tmp_path_factory.mktemp("own") / "out", trust_remote_code=True,
        recipe=f"qpruner[{QUICK},allocation=mutual-information]", measure_speed=False, calibration=short_text,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stock(folders, short_text, tmp_path_factory):
    """Every layer of a rotary model as wide as the others, at 16 bits: of the model's own type."""
    return api.compress(
        str(folders["rotary"]), "90%", tmp_path_factory.mktemp("stock") / "out", trust_remote_code=True,
        recipe=EVERYWHERE,
        measure_speed=False, calibration=short_text,
    )  # fmt: skip


@pytest.fixture(scope="module")
def fresh(stock, artifact) -> list:
    """What one process makes of the stock artifact without qpruner, and then of the other with it."""
    command = [sys.executable, "-c", FRESH, str(stock.artifact), str(artifact.artifact)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_artifact_carries_the_code_and_loads_in_a_fresh_process(artifact, fresh):
    folder = artifact.artifact
    assert {p.name for p in folder.glob("*.py")} == {p.name for p in CODE.glob("*.py")}  # and not notes.py
    assert all((folder / p.name).read_bytes() == p.read_bytes() for p in CODE.glob("*.py"))
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "qpruner" and "auto_map" not in config
    assert config["base_config"]["auto_map"]["AutoModelForCausalLM"] == "modeling_wpack.WPackForCausalLM"
    assert artifact.facts.sizes.on_disk == artifact.facts.sizes.predicted <= artifact.facts.sizes.asked
    _, (name, logits, length) = fresh
    here = load.load_model(load.inspect_source(folder, trust_remote_code=True))
    assert name == type(here).__name__ == "WPackForCausalLM" and length == 9
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(logits), here(IDS).logits, rtol=0, atol=1e-5)
    assert "import qpruner" in artifact.facts.snippet and "trust_remote_code=True" in artifact.facts.snippet
    assert "--trust-remote-code" in artifact.facts.command


def test_a_stock_artifact_loads_without_qpruner(stock, fresh):
    folder = stock.artifact
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "wpack" and config["num_attention_heads"] == 4 and config["head_dim"] == 8
    (name, logits, length), _ = fresh
    assert name == "WPackForCausalLM" and length == 9
    here = load.load_model(load.inspect_source(folder, trust_remote_code=True))
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(logits), here(IDS).logits, rtol=0, atol=1e-5)
    assert "qpruner" not in stock.facts.snippet and "trust_remote_code=True" in stock.facts.snippet
    assert how_to_load(folder, "OUT")[0].endswith("by the code that came with the original.")


def test_fewer_heads_with_the_slopes_of_all_are_not_the_model_of_fewer_heads(folders, tmp_path):
    """Of the same shapes: only running both shows that the slopes differ."""
    from test_stock import config_of, every_other, plan_of

    shape = shaping.shape_of(load.inspect_source(folders["alibi"], trust_remote_code=True))
    assert config_of(shape, plan_of(shape, every_other(shape, ("channel",)))).model_type == "wpack"
    first = every_other(shape, ()) | {n: range(4) for n, g in shape.graph.groups.items() if g.kind == "kv_group"}
    assert config_of(shape, plan_of(shape, first)).model_type == "qpruner"
    # 2^-2, 2^-4, ... are the slopes of half as many heads, those of every other of these
    assert config_of(shape, plan_of(shape, every_other(shape, ("kv_group",)))).model_type == "wpack"


def test_evaluate_and_speed_take_the_flag(artifact, folders, tmp_path, monkeypatch):
    (tmp_path / "other.txt").write_text(
        "".join(f"on day {i} the wind came from the {i * 37 % 360}\n" for i in range(99))
    )
    options = dict(text=tmp_path / "other.txt", window=32, windows=2, trust_remote_code=True)
    judged = api.evaluate(str(artifact.artifact), reference=str(folders["alibi"]), **options)
    monkeypatch.setattr(memory, "fits", lambda *_: False)  # layer by layer
    streamed = api.evaluate(str(artifact.artifact), reference=str(folders["alibi"]), **options)
    assert streamed["loss"] == pytest.approx(judged["loss"], abs=1e-6)
    assert streamed["kl"]["kl"] == pytest.approx(judged["kl"]["kl"], abs=1e-6) and judged["kl"]["kl"] > 0
    monkeypatch.setattr(speed, "SECONDS", 0)
    for folder in (artifact.artifact, folders["alibi"]):
        assert speed.measure(folder, torch.float32, trust_remote_code=True).tensor_bytes > 0
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: asked.append(command) or 1 / 0)
    for trusted in (True, False):
        with pytest.raises(ZeroDivisionError):
            speed.measure_in_fresh_process(artifact.artifact, trust_remote_code=trusted)
    assert ["--trust-remote-code" in command for command in asked] == [True, False]


def test_another_code_is_another_model(folders, tmp_path):
    changed = shutil.copytree(folders["rotary"], tmp_path / "changed")
    same, other = (load.inspect_source(f, trust_remote_code=True) for f in (folders["rotary"], changed))
    assert same.digest == other.digest
    path = changed / "positions_wpack.py"
    path.write_text(path.read_text() + "\n# another version\n")
    assert load.inspect_source(changed, trust_remote_code=True).digest != same.digest


def test_a_run_does_not_continue_with_another_code(folders, short_text, tmp_path):
    model, out, seen = shutil.copytree(folders["rotary"], tmp_path / "model"), tmp_path / "out", []
    options = dict(recipe=EVERYWHERE, measure_speed=False, calibration=short_text)

    def run() -> set[str]:
        stages = []
        api.compress(
            str(model),
            "95%",
            out,
            trust_remote_code=True,
            on_progress=lambda stage, *_: stages.append(stage),
            **options,
        )
        shutil.rmtree(out)
        return set(stages)

    seen = [run(), run()]
    path = model / "positions_wpack.py"
    path.write_text(path.read_text().replace("10000.0", "20000.0"))
    seen.append(run())
    assert ["importance" in stages for stages in seen] == [True, False, True]


def test_the_flag_changes_nothing_for_a_model_without_code():
    bundled = load.inspect_source("bundled", trust_remote_code=True)
    assert not bundled.code and bundled == load.inspect_source("bundled")


# --- without it, nothing runs ----------------------------------------------------------------------------------------


def verbs(folder, out):
    return {
        "inspect": lambda: api.inspect(str(folder)),
        "compress": lambda: api.compress(str(folder), "50%", out),
        "evaluate": lambda: api.evaluate(str(folder)),
        "study": lambda: api.study(str(folder), ["qpruner"], out),
        "config": lambda: load.inspect_source(folder / "config.json"),
        "reference": lambda: api.evaluate("bundled", window=16, windows=1, reference=str(folder)),
    }


@pytest.mark.parametrize("verb", verbs(None, None))
def test_without_the_flag_it_is_named_and_no_code_runs(folders, tmp_path, marker, verb):
    folder = shutil.copytree(folders["rotary"], tmp_path / "never_imported")
    with pytest.raises(ModelError, match="brings its own Python code.*--trust-remote-code.*trust_remote_code=True"):
        verbs(folder, tmp_path / "out")[verb]()
    assert not marker.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("made", ["artifact", "stock"])
def test_an_artifact_does_not_turn_the_flag_on_by_itself(made, request, tmp_path, marker):
    folder = shutil.copytree(request.getfixturevalue(made).artifact, tmp_path / f"never_imported_{made}")
    with pytest.raises(ModelError, match="--trust-remote-code"):
        api.evaluate(str(folder))
    with pytest.raises((ModelError, ValueError), match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    if made == "artifact":
        with pytest.raises(ModelError, match="trust_remote_code=True"):
            AutoModelForCausalLM.from_pretrained(folder)
    assert not marker.exists()
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert marker.exists(), "the marker shows it when code runs"


def test_the_command_line(folders, marker):
    done = CliRunner().invoke(app, ["inspect", str(folders["rotary"])])
    assert done.exit_code == 2 and "--trust-remote-code" in done.output and not marker.exists()
    done = CliRunner().invoke(app, ["inspect", str(folders["rotary"]), "--trust-remote-code", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["layers"] == 2
    for verb in ("compress", "evaluate", "study"):
        assert "--trust-remote-code" in CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"}).output


# --- code that cannot be used ----------------------------------------------------------------------------------------


@pytest.fixture
def broken(folders, tmp_path):
    return shutil.copytree(folders["rotary"], tmp_path / "broken")


def refused(folder, match):
    with pytest.raises(ModelError, match=match):
        load.inspect_source(folder, trust_remote_code=True)


def test_files_that_are_missing_or_elsewhere(broken):
    (broken / "positions_wpack.py").unlink()
    refused(broken, "imports positions_wpack.py, which is not in its folder")
    (broken / "modeling_wpack.py").unlink()
    refused(broken, "class 'modeling_wpack.WPackForCausalLM' .* modeling_wpack.py is not in its folder")
    for elsewhere in ("owner/name--modeling.Model", "../modeling.Model", "Model"):
        edit_config(broken, auto_map={"AutoModelForCausalLM": elsewhere})
        refused(broken, "is not in its folder.*code from elsewhere is not looked for")


def test_code_that_does_not_run(broken):
    path = broken / "configuration_wpack.py"
    path.write_text(path.read_text() + "\nraise OSError('not today')\n")
    refused(broken, "the code of 'broken' cannot be used: OSError: not today")


def test_a_model_that_does_not_build(broken):
    edit_config(broken, num_attention_heads="many")
    refused(broken, "describes no model that can be built")


def test_code_without_a_language_model(broken):
    edit_config(broken, auto_map={"AutoConfig": "configuration_wpack.WPackConfig"})
    refused(broken, "names no AutoModelForCausalLM: no decoder language model. It names 'AutoConfig'")
