"""What touches lm-evaluation-harness: its tasks, its model class, the answers in what it logs. Imported when needed.

The harness tokenises, truncates, scores and compares; here is decided how many rows go through the model at once, and
everything it says aside from results is kept quiet.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import lm_eval
import lm_eval.api.task
import numpy as np
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qpruner.errors import CorpusError, listed
from qpruner.judge.task_files import TaskRows
from qpruner.model.load import context_length, quiet
from qpruner.progress import OnProgress

VERSION = f"lm-eval {lm_eval.__version__}"
LOGITS_AT_ONCE = 2**25  # elements, of which the harness holds about three copies in float32
ROWS_AT_ONCE = 32
FOLDERS = {  # of the harness, where it defines the tasks that papers use: reading all of its 14,000 files takes long
    "boolq": "super_glue/boolq",
    "piqa": "piqa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "openbookqa": "openbookqa",
    "lambada_openai": "lambada",
}


# --- tasks -----------------------------------------------------------------------------------------------------------


def task_of(task: TaskRows) -> ConfigurableTask:
    """The harness's task for rows from a file: fields of a row are taken as they are, no template is filled in."""
    strip = lambda choice: choice.removeprefix(task.delimiter)
    rows = [{"context": r.context, "choices": [strip(c) for c in r.choices], "label": r.label} for r in task.rows]
    mean = lambda name: {"metric": name, "aggregation": "mean", "higher_is_better": True}
    if task.asks_for_ending:
        rows = [{"context": r.context, "ending": r.choices[0]} for r in task.rows]
        perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
        how = dict(output_type="loglikelihood", doc_to_text="context", doc_to_target="ending")
        how |= dict(metric_list=[mean("acc"), perplexity])
    elif task.context_per_choice:  # the harness's form for it: the text is the label, the target what follows
        rows = [row | {"ending": row["choices"][0]} for row in rows]
        how = dict(output_type="multiple_choice", doc_to_text="label", doc_to_choice="context", doc_to_target="ending")
        how |= dict(metric_list=[mean("acc")])
    else:
        how = dict(output_type="multiple_choice", doc_to_text="context", doc_to_choice="choices", doc_to_target="label")
        how |= dict(metric_list=[mean("acc"), mean("acc_norm")])
    return custom_task(rows, task=task.name, target_delimiter=task.delimiter, **how)


def custom_task(rows: list[dict], **config: Any) -> ConfigurableTask:
    """A task of the harness on rows at hand, all of which are scored."""
    split = datasets.Dataset.from_list(rows)
    config |= dict(custom_dataset=lambda **_: {"rows": split}, test_split="rows", num_fewshot=0)
    return ConfigurableTask(config=config)


def named_tasks(names: Sequence[str]) -> list[ConfigurableTask]:
    """The harness's own definitions, with data from the Hub or its cache.

    Raises:
        CorpusError: a name is unknown, a task cannot be scored as choices or endings, or its data cannot be fetched.
    """
    folders = [Path(lm_eval.__file__).parent / "tasks" / FOLDERS[name] for name in names if name in FOLDERS]
    known = len(folders) == len(names)
    manager = TaskManager(include_path=folders, include_defaults=False) if known else TaskManager()
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise CorpusError(
            f"lm-evaluation-harness {lm_eval.__version__} has no task {listed(unknown)}. Accepted: its names of tasks, "
            f"such as {', '.join(FOLDERS)}."
        )
    try:
        found = manager.load(list(names))["tasks"]
    except Exception as error:  # whatever the network, the Hub's client or a damaged cache raises
        first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise CorpusError(
            f"the data of {listed(names)} cannot be fetched ({type(error).__name__}: {first}). Give local files with "
            "--tasks-dir, or try again where the Hugging Face Hub can be reached."
        ) from error
    for name, task in found.items():
        if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
            raise CorpusError(f"task {name!r} is of kind {task.OUTPUT_TYPE}. Accepted: choices, or the end of a text.")
        if task.config.process_results is not None or getattr(task, "multiple_target", 0):
            raise CorpusError(f"task {name!r} has a score of its own. Accepted: tasks with one right answer each.")
        task.set_config("num_fewshot", 0)
    return list(found.values())


# --- scoring ---------------------------------------------------------------------------------------------------------


class Scorer(HFLM):
    """The harness's model around one that is loaded: batches by their logits; what cannot be scored is named.

    A context manager: modules are in evaluation mode inside, and in their own mode afterwards.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, on_progress: OnProgress):
        self._modes = [(module, module.training) for module in model.modules()]
        with patch.object(model, "tie_weights", lambda: None):  # tied or packed, it is as it was loaded
            super().__init__(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),  # which is given a padding token
                backend="causal",
                batch_size="auto",
                max_length=context_length(model.config.get_text_config(decoder=True)),
                softmax_dtype=torch.promote_types(model.dtype, torch.float32),
            )
        self._vocabulary = model.get_input_embeddings().num_embeddings
        self._on_progress = on_progress
        self._stage, self._questions = "", []

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *exception) -> None:
        for module, training in self._modes:
            module.training = training

    def score(self, task: ConfigurableTask, *, limit: int | None = None) -> dict[str, Any]:
        """The fields of a `TaskScore`."""
        self._stage, self.cut = f"task {task.task_name}", set()
        with patch.object(lm_eval.api.task, "tqdm", lambda rows, **_: rows):
            found = evaluate(self, {"tasks": {task.task_name: task}}, limit=limit, bootstrap_iters=0)
        samples = sorted(found["samples"][task.task_name], key=lambda sample: sample["doc_id"])
        return answers_of(task, samples) | {"cut": len(self.cut)}

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        self._questions = [request.doc_id for request in requests]
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, **_):
        for question, (_, context, choice) in zip(self._questions, requests, strict=True):
            if not choice or len(choice) > self.max_length:
                raise CorpusError(
                    f"{self._stage}, question {question + 1}: an answer is {len(choice)} tokens after its context. "
                    f"Accepted: 1 to {self.max_length}, which is the model's context. Leave the question out."
                )
            if len(context) + len(choice) > self.max_length + 1:
                self.cut.add(question)
        self._until, self._rows = 0, 0
        found = super()._loglikelihood_tokens(requests, disable_tqdm=True)
        self._on_progress(self._stage, len(requests), len(requests))
        return found

    def _batch_scheduler(self, position: int, requests) -> int:
        """Rows of the batch that `position` falls into. The first of a batch is its longest."""
        if position >= self._until:
            length = len(requests[position][1]) + len(requests[position][2])
            self._rows = max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // (length * self._vocabulary)))
            self._until = position + self._rows
            self._on_progress(self._stage, position, len(requests))
        return self._rows

    def _model_call(self, inps: Tensor, attn_mask=None, labels=None) -> Tensor:
        with torch.inference_mode():
            return self.model(input_ids=inps, use_cache=False).logits


def answers_of(task: ConfigurableTask, samples: list[dict]) -> dict[str, Any]:
    """What was answered to every question, from what the harness logged of it."""
    digest = hashlib.sha256()
    labels, plain, by_length, logprobs = [], [], [], []
    endings = task.OUTPUT_TYPE == "loglikelihood"
    for sample in samples:
        scored = sample["filtered_resps"]
        if endings:
            (logprob, greedy) = scored[0]
            label, answers = 0, (0 if greedy else -1,) * 2
            logprobs.append(logprob)
        else:
            choices = task.doc_to_choice(sample["doc"])
            sums = np.array([logprob for logprob, _ in scored[: len(choices)]])
            # With a context for each choice all answers are one string, so dividing by its length decides nothing.
            lengths = np.array([1.0 if task.multiple_input else float(len(choice)) for choice in choices])
            label = _label(task, sample["doc"], choices)
            answers = int(np.argmax(sums)), int(np.argmax(sums / lengths))
        for name, answer in zip(("acc", "acc_norm"), answers, strict=True):
            assert name not in sample or bool(sample[name]) == (answer == label), f"{name} is not what the harness has"
        labels.append(label)
        plain.append(answers[0])
        by_length.append(answers[1])
        digest.update(json.dumps([sample["arguments"], label], ensure_ascii=False).encode() + b"\n")
    return {
        "name": task.task_name,
        "rows_digest": digest.hexdigest(),
        "labels": tuple(labels),
        "answers": tuple(plain),
        "answers_norm": None if endings else tuple(by_length),
        "logprobs": tuple(logprobs) if endings else None,
    }


def _label(task: ConfigurableTask, doc: dict, choices: Sequence[str]) -> int:
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    return choices.index(gold) if isinstance(gold, str) and gold in choices else int(gold)


@contextmanager
def unheard() -> Iterator[None]:
    """No warnings, log lines or progress bars of the harness and the libraries below it."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    with ExitStack() as after:
        after.enter_context(quiet())
        for logger in loggers:
            after.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        if not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            after.callback(datasets.enable_progress_bars)
        yield
