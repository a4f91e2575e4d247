"""The command line as a user meets it: exit statuses, one-line errors, JSON."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_folder import save, tiny_model

SIZES = dict(hidden_size=64, intermediate_size=128, num_attention_heads=8, num_key_value_heads=4)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


HERE = Path(__file__).parent


@dataclass
class Command:
    """One that runs, or has run: its process, and files that it writes what it says to."""

    server: "Server"
    pid: int
    out: Path
    err: Path

    def ended(self) -> subprocess.CompletedProcess:
        status = int(self.server.process.stdout.readline())
        return subprocess.CompletedProcess([], status, self.out.read_text(), self.err.read_text())


class Server:
    """Starts commands in processes of their own that begin with everything imported."""

    def __init__(self, folder: Path):
        self.folder, self.n = folder, 0
        command = [sys.executable, str(HERE / "forked_cli.py")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=ENVIRONMENT
        )

    def start(self, *words, cwd=None) -> Command:
        self.n += 1
        out, err = self.folder / f"{self.n}.out", self.folder / f"{self.n}.err"
        err.touch()
        asked = [*map(str, words)], str(cwd or self.folder), str(out), str(err)
        self.process.stdin.write(json.dumps(asked) + "\n")
        return Command(self, int(self.process.stdout.readline()), out, err)

    def __call__(self, *words, cwd=None) -> subprocess.CompletedProcess:
        return self.start(*words, cwd=cwd).ended()


@pytest.fixture(scope="module")
def qpruner(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("said"))
    yield server
    server.process.stdin.close()
    assert server.process.wait(60) == 0
    server.process.stdout.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    return save(tiny_model("llama", **SIZES).to(torch.bfloat16), folder, tokenizer=True)


def test_help_names_every_verb_in_a_process_of_its_own():
    command = [sys.executable, "-m", "qpruner.cli", "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert found.returncode == 0
    for verb in ("compress", "inspect", "evaluate", "study", "demo"):
        assert verb in found.stdout


def test_inspect_prints_json_from_a_configuration_alone(qpruner, model):
    found = qpruner("inspect", model / "config.json", "--json")
    assert found.returncode == 0, found.stderr
    shown = json.loads(found.stdout)
    assert shown["bytes_16bit"] == 2 * shown["parameters"]
    assert {g["kind"] for g in shown["groups"]} == {"kv_group", "query_head", "channel", "residual"}


def test_evaluate_prints_what_checks_rely_on(qpruner, model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some words, and then some more of them\n" * 60)
    found = qpruner("evaluate", model, "--text", text, "--json")
    assert found.returncode == 0, found.stderr
    shown = json.loads(found.stdout)
    keys = {"loss", "standard_error", "perplexity", "bits_per_byte", "n_tokens", "protocol"}
    assert keys <= set(shown)
    assert 0 < shown["loss"] < 10 and shown["n_tokens"] > 1000


def test_evaluate_says_how_far_another_model_is(qpruner, model, tmp_path, monkeypatch):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"a story of {i} words, told in a row"}) + "\n" for i in range(12)))
    words = ("evaluate", model, "--text", text, "--protocol", "rows", "--reference", model)
    found = qpruner(*words, "--json")
    assert found.returncode == 0, found.stderr
    shown = json.loads(found.stdout)
    assert shown["kl"]["flips"] == 0 and shown["kl"]["top1_agreement"] == 1
    assert "12 rows, each alone" in shown["protocol"] and shown["standard_error_by"] == "bootstrap of 12 rows"
    from qpruner import api
    from qpruner.judge import speed, turns
    from qpruner.report.terminal import evaluation_tables

    here = lambda folder, **_: speed.measure(Path(folder), torch.float32)  # a run of `compress` below starts processes
    monkeypatch.setattr(turns, "measure_in_fresh_process", here)
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    shown = api.evaluate(str(model), text=text, protocol="rows", reference=str(model), speed=True, threads=1)
    assert shown["speed"]["ratios"]["decode_tokens_per_second"]["low"] > 0

    tables = evaluation_tables(shown)
    assert [len(table.rows) for table in tables] == [8, 6] and "12 rows" in tables[0].caption


@pytest.mark.parametrize(
    "words, message",
    [
        (["compress", "nowhere", "--budget", "50%", "-o", "out"], "nowhere"),
        (["compress", "MODEL", "--budget", "half", "-o", "out"], "budget 'half' cannot be read"),
        (["compress", "MODEL", "--budget", "1%", "-o", "out"], "smallest reachable"),
        (["compress", "MODEL", "--budget", "50%", "-o", "out", "--recipe", "none"], "no recipe 'none'"),
        (["compress", "MODEL", "--budget", "50%", "-o", "out", "--calibration", "empty.txt"], "empty"),
        (["evaluate", "MODEL", "--text", "absent.txt"], "absent.txt"),
        (["evaluate", "MODEL", "--protocol", "c4"], "no protocol 'c4'. Accepted: 'windows', 'wikitext2-2048'"),
        (["compress", "MODEL", "-o", "out"], "budget"),
    ],
)
def test_what_cannot_be_served_exits_with_2_and_writes_nothing(qpruner, model, tmp_path, words, message):
    (tmp_path / "empty.txt").write_text("")
    found = qpruner(*[model if w == "MODEL" else w for w in words], cwd=tmp_path)
    assert found.returncode == 2, found.stderr
    assert message in found.stderr and "Traceback" not in found.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["empty.txt"]


def test_an_interrupted_run_exits_with_130_and_can_be_continued(qpruner, model, tmp_path):
    quick = "steps=2,window=64,calibration_windows=2,search_windows=2,evaluation_windows=2"
    words = ["compress", model, "--budget", "70%", "-o", "out", "--recipe", f"qpruner[allocation=uniform,{quick}]"]
    command = qpruner.start(*words, cwd=tmp_path)
    until = time.monotonic() + 60
    while "importance" not in command.err.read_text() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(command.pid, signal.SIGINT)
    found = command.ended()
    assert found.returncode == 130 and "the same command continues" in found.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / "out.run/stages.json").is_file()
    done = qpruner(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/model.safetensors").is_file()
    measured = json.loads((tmp_path / "out.run/measurements/speed.json").read_text())
    assert measured["artifact"]["speed"]["rounds"] == 1 and measured["artifact"]["speed"]["resident_bytes"] > 0
