"""Zero-shot tasks: what the harness answers from files is what plain torch and its own task definitions answer."""

import copy
import json
import math
import socket
import sys
from pathlib import Path

import pytest
import torch
from tiny_folder import byte_tokenizer, tiny_model
from tiny_tasks import CONTEXTS, ENDINGS, OWN, QUESTIONS, row, write_rows

from qpruner.errors import CorpusError, MemoryLimitError, MissingExtraError
from qpruner.judge import tasks
from qpruner.judge.paired import compare, mcnemar
from qpruner.judge.task_files import chosen_files, read_task
from qpruner.judge.tasks import TaskReport, TaskScore, zero_shot
from qpruner.model import memory
from qpruner.model.load import context_length, inspect_source, load_model, load_tokenizer, quiet
from qpruner.report.tasks import CHANGES_HEAD, SCORES_HEAD, change_rows, score_rows, scores_note

SHARED = Path(__file__).parents[2] / "shared"
CONTEXT = 96  # tokens, of the tiny model: one of the questions is longer

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
with quiet():
    from qpruner.judge import harness


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=3, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def other():
    return tiny_model(seed=4, max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("tasks")
    write_rows(place / "questions.jsonl", QUESTIONS)
    write_rows(place / "contexts.jsonl.gz", CONTEXTS)
    write_rows(place / "endings.jsonl", ENDINGS)
    (place / "README.md").write_text("not a task")
    return place


def score_of(report: TaskReport, name: str) -> TaskScore:
    return next(score for score in report.scores if score.name == name)


def by_hand(model, tokenizer, context: str, choice: str) -> tuple[float, bool]:
    """Sum of log-probabilities of a choice's tokens, and whether each is the likeliest; one text at a time."""
    blanks = len(context) - len(context.rstrip())
    context, choice = context[: len(context) - blanks], context[len(context) - blanks :] + choice
    if context:
        n = len(tokenizer(context).input_ids)
        ids = tokenizer(context + choice).input_ids
    else:
        n, ids = 1, [tokenizer.bos_token_id, *tokenizer(choice, add_special_tokens=False).input_ids]
    length = context_length(model.config)
    n_choice, seen = len(ids) - n, ids[-(length + 1) :]
    with torch.no_grad():
        logits = model(torch.tensor([seen[:-1]])).logits[0, -n_choice:].double()
    wanted = torch.tensor(seen[-n_choice:])
    logprobs = logits.log_softmax(-1).gather(-1, wanted[:, None])
    return logprobs.sum().item(), bool((logits.argmax(-1) == wanted).all())


def answers_by_hand(model, tokenizer, rows: list[dict]) -> dict[str, list]:
    found = {"acc": [], "acc_norm": [], "logprobs": []}
    for each in rows:
        contexts = each["context"] if isinstance(each["context"], list) else [each["context"]] * len(each["choices"])
        scored = [by_hand(model, tokenizer, c, choice) for c, choice in zip(contexts, each["choices"], strict=True)]
        if len(scored) == 1:
            found["acc"].append(0 if scored[0][1] else -1)
            found["logprobs"].append(scored[0][0])
            continue
        lengths = [len(choice.removeprefix(" ")) for choice in each["choices"]]
        best = lambda values: max(range(len(values)), key=values.__getitem__)
        found["acc"].append(best([total for total, _ in scored]))
        found["acc_norm"].append(best([total / length for (total, _), length in zip(scored, lengths, strict=True)]))
    return found


# --- the same answers, found another way ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_answers_are_those_of_plain_torch(tokenizer, folder, seed):
    model = tiny_model(seed=seed, max_position_embeddings=CONTEXT)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)  # so that choices differ by more than their number of tokens
    report = zero_shot(model, tokenizer, folder=folder)
    for name, rows in (("questions", QUESTIONS), ("contexts", CONTEXTS), ("endings", ENDINGS)):
        score, expected = score_of(report, name), answers_by_hand(model, tokenizer, rows)
        assert list(score.answers) == expected["acc"]
        assert score.labels == tuple(each["label"] for each in rows)
        if name == "endings":
            assert score.logprobs == pytest.approx(expected["logprobs"], abs=1e-4)
        else:
            assert list(score.answers_norm) == expected["acc_norm"]
    assert [score.cut for score in report.scores] == [0, 0, 1]


@pytest.mark.parametrize("name", OWN)
def test_the_harness_own_definition_scores_the_same(model, tokenizer, tmp_path, name):
    """Its prompts, choices, labels and metrics on its own form of the rows: the same texts, answers and numbers."""
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks._yaml_loader import load_yaml

    file, split, pairs = OWN[name]
    write_rows(tmp_path / f"{name}.jsonl", [ours for _, ours in pairs])
    ours = zero_shot(model, tokenizer, [name], folder=tmp_path).scores[0]

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / file)
    rows = datasets.Dataset.from_list([doc for doc, _ in pairs])
    others = {"tag", "training_split", "validation_split", "test_split"} - {f"{split}_split"}
    config = {key: value for key, value in config.items() if key not in others}
    config["custom_dataset"] = lambda **_: {split: rows}
    silent = lambda *_: None
    with harness.unheard(), harness.Scorer(model, tokenizer, silent) as scorer:
        theirs = TaskScore(**scorer.score(ConfigurableTask(config=copy.copy(config))))
        task = ConfigurableTask(config=config)
        numbers = evaluate(scorer, {"tasks": {name: task}}, bootstrap_iters=10)["results"][name]
    assert theirs == ours
    value, error = ours.accuracy("acc")
    assert (numbers["acc,none"], numbers["acc_stderr,none"]) == pytest.approx((value, error))
    if "acc_norm,none" in numbers:
        assert numbers["acc_norm,none"] == pytest.approx(ours.accuracy("acc_norm")[0])
    if "perplexity,none" in numbers:
        assert numbers["perplexity,none"] == pytest.approx(ours.perplexity[0])
    # What papers print is acc_norm wherever the harness's definition of the task has it.
    assert ours.metric == ("acc_norm" if "acc_norm,none" in numbers else "acc")


def test_acc_norm_divides_by_characters_not_by_bytes(model, tokenizer, tmp_path):
    """All tokens alike: the sum is minus the number of bytes, space included; per byte the first choice would win."""
    uniform = copy.deepcopy(model)
    with torch.no_grad():
        uniform.model.embed_tokens.weight.zero_()
    write_rows(tmp_path / "t.jsonl", [row("a", [" üüü", " abcd"], 1), row("a", [" ab", " abcdef"], 1)])
    score = zero_shot(uniform, tokenizer, folder=tmp_path).scores[0]
    assert -7 / 6 > -5 / 4  # what the choices of the first row would have per byte
    assert score.answers_norm == (1, 1)  # -7/3 against -5/4, -3/2 against -7/6
    assert score.answers == (1, 0)  # -7 against -5, -3 against -7


def test_how_many_rows_go_through_at_once_changes_nothing(model, tokenizer, folder, monkeypatch):
    shapes = []
    forward = type(model).forward
    watched = lambda self, input_ids, **how: shapes.append(input_ids.shape) or forward(self, input_ids, **how)
    monkeypatch.setattr(type(model), "forward", watched)
    whole = zero_shot(model, tokenizer, ["questions"], folder=folder).scores
    assert len(shapes) == 1  # they all fit
    shapes.clear()
    monkeypatch.setattr(harness, "LOGITS_AT_ONCE", 120 * 259)
    assert zero_shot(model, tokenizer, ["questions"], folder=folder).scores == whole
    assert max(n * length for n, length in shapes) <= 120 and max(n for n, _ in shapes) > 1


def test_nothing_is_said_fetched_or_changed(model, tokenizer, folder, monkeypatch, capfd):
    refuse = lambda *_: pytest.fail("the network was asked")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(type(model), "tie_weights", lambda *_: pytest.fail("weights were tied anew"))
    model.model.layers[1].train()
    tokenizer, steps = copy.deepcopy(tokenizer), []
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = zero_shot(model, tokenizer, folder=folder, on_progress=lambda *step: steps.append(step))
    modes = [module.training for module in model.modules()]
    assert model.model.layers[1].training and not model.training and any(modes)
    model.eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert tokenizer.pad_token is None
    assert capfd.readouterr() == ("", "")
    assert steps[0] == ("task contexts", 0, 4) and steps[-1] == ("task questions", 15, 15)
    assert zero_shot(model, tokenizer, folder=folder) == first


def test_a_limit_takes_the_first_questions(model, tokenizer, folder):
    whole, first = (zero_shot(model, tokenizer, ["questions"], folder=folder, limit=n).scores[0] for n in (None, 2))
    assert first.n == 2 and first.answers == whole.answers[:2] and first.rows_digest != whole.rows_digest


# --- numbers ----------------------------------------------------------------------------------------------------------


def made(name, labels, answers, *, norm=None, digest="d") -> TaskScore:
    return TaskScore(name, digest, tuple(labels), tuple(answers), tuple(norm or answers), None, 0)


def report_of(*scores) -> TaskReport:
    return TaskReport(scores, "here", "lm-eval 0")


def test_accuracy_and_its_error():
    score = made("t", [0, 1, 2, 0], [0, 1, 1, 1], norm=[0, 1, 2, 1])
    assert score.accuracy("acc") == pytest.approx((0.5, math.sqrt(0.25 * 4 / 3 / 4)))
    assert score.accuracy()[0] == 0.75 and score.metric == "acc_norm"
    assert made("boolq", [0], [0], norm=[1]).accuracy()[0] == 1.0  # whose own metric is acc
    one = made("t", [0], [0])
    assert one.to_dict()["acc"] == 1.0 and one.to_dict()["acc_error"] is None
    with pytest.raises(ValueError, match="'acc', 'acc_norm'"):
        score.accuracy("f1")


def test_the_mean_weighs_tasks_equally():
    many = made("a", [0] * 100, [0] * 50 + [1] * 50)
    few = made("b", [0] * 4, [0, 0, 0, 1])
    mean, error = report_of(many, few).mean
    a, b = (score.accuracy()[1] for score in (many, few))
    assert mean == pytest.approx(0.625) and error == pytest.approx((a**2 + b**2) ** 0.5 / 2)


def test_perplexity_of_endings():
    score = TaskScore("l", "d", (0, 0), (0, -1), None, (-1.0, -3.0), 0)
    value, error = score.perplexity
    assert value == pytest.approx(math.exp(2)) and error == pytest.approx(math.exp(2) * 1.0)
    assert score.accuracy() == (0.5, 0.5) and score.metric == "acc"
    assert TaskScore("l", "d", (0,), (-1,), None, (-1e5,), 0).to_dict()["perplexity"] is None


def test_a_report_survives_json(model, tokenizer, folder):
    report = zero_shot(model, tokenizer, folder=folder)
    content = json.loads(json.dumps(report.to_dict(rows=True), allow_nan=False))
    assert TaskReport.from_dict(content) == report
    assert "answers" not in report.to_dict()["tasks"]["questions"]
    assert content["harness"].startswith("lm-eval 0.") and content["origin"] == str(folder)


def test_rows_of_tables(model, other, tokenizer, folder):
    before, after = (zero_shot(m, tokenizer, folder=folder) for m in (model, other))
    rows = score_rows(before.to_dict())
    assert [r[0] for r in rows] == ["contexts", "endings", "questions", "mean"]
    assert all(len(r) == len(SCORES_HEAD) for r in rows) and rows[1][3] == "" and " ± " in rows[2][2]
    note = scores_note(before.to_dict())
    assert "zero-shot, lm-eval" in note and "1 question(s) longer" in note and "acc for endings" in note
    rows = change_rows(compare(before, after).to_dict())
    assert all(len(r) == len(CHANGES_HEAD) for r in rows) and rows[-1][0] == "mean"


# --- two models on the same questions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lost, gained", [(0, 0), (1, 0), (0, 5), (3, 3), (4, 12), (700, 640)])
def test_mcnemar_is_the_exact_binomial_test(lost, gained):
    scipy = pytest.importorskip("scipy.stats")
    expected = scipy.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected)


def test_changes_are_counted_question_by_question():
    labels = [0] * 10
    before, after = made("t", labels, [0, 0, 0, 1, 1, 1, 2, 2, 0, 0]), made("t", labels, [0, 1, 2, 0, 1, 2, 2, 1, 0, 0])
    found = compare(report_of(before), report_of(after)).tasks[0]
    assert (found.lost, found.gained, found.changed) == (2, 1, 5)
    assert found.flips == pytest.approx(0.3) and found.difference == pytest.approx(-0.1)
    steps = torch.tensor([0, -1, -1, 1, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    assert found.standard_error == pytest.approx(steps.std().item() / math.sqrt(10))
    assert found.p_value == pytest.approx(1.0)
    assert found.difference == pytest.approx(found.after - found.before)


def test_the_other_way_round_is_the_opposite(model, other, tokenizer, folder):
    a, b = (zero_shot(m, tokenizer, folder=folder) for m in (model, other))
    there, back = compare(a, b), compare(b, a)
    assert there.difference[0] == pytest.approx(-back.difference[0])
    assert there.difference[1] == pytest.approx(back.difference[1]) and there.p_value == back.p_value
    assert [t.lost for t in there.tasks] == [t.gained for t in back.tasks] and there.flips == back.flips > 0
    same = compare(a, a)
    assert same.difference == (0, 0) and same.flips == 0 and same.p_value == 1.0
    assert there.difference[0] == pytest.approx(b.mean[0] - a.mean[0])


def test_other_questions_are_not_paired():
    a, b = made("t", [0, 1], [0, 0]), made("t", [0, 1], [0, 0], digest="e")
    with pytest.raises(CorpusError, match="'t': 2 and 2 questions that are not the same"):
        compare(report_of(a), report_of(b))
    with pytest.raises(CorpusError, match="'u' was scored for one of two"):
        compare(report_of(a, made("u", [0], [0])), report_of(a))


def test_a_digest_is_of_the_texts_and_the_labels(model, tokenizer, tmp_path):
    rows = [row("a", [" b", " c"]), row("a", [" b", " d"]), row("e", [" b", " c"]), row("a", [" b", " c"], 1)]
    for number, each in enumerate([*rows, rows[0]]):
        write_rows(tmp_path / f"{number}.jsonl", [each])
    digests = [score.rows_digest for score in zero_shot(model, tokenizer, folder=tmp_path).scores]
    assert len(set(digests)) == 4 and digests[0] == digests[4]


# --- refusals ---------------------------------------------------------------------------------------------------------

GOOD = row("a", [" b", " c"], 0)


@pytest.mark.parametrize(
    "bad, message",
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a list"),
        ({"context": "a", "choices": [" b"]}, "line 2: an object with 'context', 'choices'"),
        (row("a", []), "line 2: `choices` must be"),
        (row("a", [" b", " "]), "line 2: `choices` must be"),
        (row("a", [" b", 3]), "line 2: `choices` must be"),
        (row(["a"], [" b", " c"]), "line 2: `context` must be"),
        (row(["a", "b"], [" b", " c"]), "line 2: contexts and choices both differ"),
        (row("a", [" b", " c"], 2), "line 2: `label` is 2. Accepted: 0 to 1"),
        (row("a", [" b", " c"], True), "line 2: `label` is True"),
        (row("a", [" b", "c"]), "line 2: some choices of this file start with a space"),
        (row("a", ["b", "c"]), "line 2: some choices of this file start with a space"),
        (row("a", [" b"]), "line 2: one choice, one context, and rows before it have several choices"),
    ],
)
def test_a_row_that_is_wrong_is_named(tmp_path, bad, message):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + (bad if isinstance(bad, str) else json.dumps(bad)))
    with pytest.raises(CorpusError, match=message):
        read_task("t", path)


def test_blank_lines_and_answers_without_a_space_are_taken(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text("\n" + json.dumps(row("a:", ["b", "c"])) + "\n\n")
    read = read_task("t", path)
    assert read.delimiter == "" and len(read.rows) == 1


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    whole = write_rows(tmp_path / "t.jsonl.gz", [GOOD] * 50).read_bytes()
    (tmp_path / "t.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(CorpusError, match="not a whole gzip file"):
        read_task("t", tmp_path / "t.jsonl.gz")
    (tmp_path / "u.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(CorpusError, match="not UTF-8"):
        read_task("u", tmp_path / "u.jsonl")
    (tmp_path / "v.jsonl").write_text("\n")
    with pytest.raises(CorpusError, match="no rows"):
        read_task("v", tmp_path / "v.jsonl")


def test_folders_and_names_that_are_not_there(folder, tmp_path):
    with pytest.raises(CorpusError, match="no folder of tasks at"):
        chosen_files(tmp_path / "none")
    with pytest.raises(CorpusError, match="no task files. Accepted: TASK.jsonl or TASK.jsonl.gz"):
        chosen_files(tmp_path)
    with pytest.raises(CorpusError, match="no file for 'piqa'.*There is: 'contexts', 'endings', 'questions'"):
        chosen_files(folder, ["questions", "piqa"])
    assert list(chosen_files(folder, ["questions", "contexts"])) == ["questions", "contexts"]
    for end in (".jsonl", ".jsonl.gz"):
        write_rows(tmp_path / f"t{end}", [GOOD])
    with pytest.raises(CorpusError, match="two files"):
        chosen_files(tmp_path)


def test_nothing_named_is_refused(model, tokenizer):
    with pytest.raises(CorpusError, match="no task is named. Accepted: boolq, piqa.*--tasks-dir"):
        zero_shot(model, tokenizer)
    with pytest.raises(CorpusError, match="0 questions"):
        tasks.require(["piqa"], limit=0)


def test_an_answer_without_a_token_of_its_own_is_named(model, tokenizer, tmp_path):
    write_rows(tmp_path / "t.jsonl", [GOOD, row("a", [" " + "b" * (CONTEXT + 1), " c"])])
    with pytest.raises(CorpusError, match=f"task t, question 2: an answer is {CONTEXT + 2} tokens"):
        zero_shot(model, tokenizer, folder=tmp_path)


def test_without_the_network_a_folder_is_asked_for(model, tokenizer, monkeypatch):
    import datasets

    def away(*_, **__):
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", away)
    with pytest.raises(CorpusError, match="'piqa' cannot be fetched .*Couldn't reach.*--tasks-dir") as caught:
        zero_shot(model, tokenizer, ["piqa"])
    assert "\n" not in str(caught.value)


def test_named_tasks_are_the_harness_own(model, tokenizer, monkeypatch):
    """As online, with what the Hub would send; the same numbers as from a file."""
    import datasets

    pairs = OWN["arc_easy"][2]
    there = datasets.Dataset.from_list([doc for doc, _ in pairs])
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: {"train": there, "validation": there, "test": there})
    report = zero_shot(model, tokenizer, ["arc_easy"], limit=2)
    assert report.origin == "online" and report.scores[0].n == 2
    assert report.scores[0].labels == tuple(ours["label"] for _, ours in pairs[:2])


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(output_type="generate_until", doc_to_text="context", doc_to_target="context"), "kind generate_until"),
        (dict(output_type="multiple_choice", doc_to_text="context", doc_to_choice="choices", doc_to_target="labels"),
         "score of its own"),
    ],
)  # fmt: skip
def test_tasks_that_are_scored_otherwise_are_refused(monkeypatch, config, message):
    with quiet(), harness.unheard():
        task = harness.custom_task([{"context": "a", "choices": ["b", "c"], "labels": [0, 1]}], task="t", **config)
    monkeypatch.setattr(harness.TaskManager, "load", lambda *_: {"tasks": {"t": task}})
    with pytest.raises(CorpusError, match=message), harness.unheard():
        harness.named_tasks(["piqa"])


def test_without_the_harness_the_extra_is_named(model, tokenizer, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"qpruner\[eval\]"):
        zero_shot(model, tokenizer, folder=folder)


def test_a_model_too_large_for_memory_is_refused_with_numbers():
    tensors = inspect_source("pystdlib-5M").tensors
    tasks.require_room(tensors)
    limit = memory.whole_bytes(tensors) - 2**29
    with pytest.raises(MemoryLimitError, match=r"whole model in memory.*about \d+\.\d\d GiB, and \d+\.\d\d GiB are"):
        tasks.require_room(tensors, limit)
    assert memory.fits(tensors, None) and not memory.fits(tensors, limit)


# --- real models ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared models are not beside this checkout")
def test_stories260k_scores_what_its_readme_says():
    source = inspect_source(SHARED / "models/stories260K")
    model, tokenizer = load_model(source), load_tokenizer(source)
    names = ["arc_easy", "lambada_openai", "winogrande"]  # the short ones
    report = zero_shot(model, tokenizer, names, folder=SHARED / "data/tasks", limit=200)
    found = [(round(s.accuracy("acc")[0], 3), round(s.accuracy("acc_norm")[0], 3)) for s in report.scores]
    assert found == [(0.225, 0.225), (0.025, 0.025), (0.490, 0.490)]

    boolq = zero_shot(model, tokenizer, ["boolq"], folder=SHARED / "data/tasks", limit=8).scores[0]
    rows = read_task("boolq", SHARED / "data/tasks/boolq.jsonl.gz", limit=8).rows
    expected = answers_by_hand(model, tokenizer, [row(r.context, list(r.choices), r.label) for r in rows])
    assert list(boolq.answers) == expected["acc"] and list(boolq.answers_norm) == expected["acc_norm"]
    assert boolq.cut > 0  # longer than the model's 512 tokens
