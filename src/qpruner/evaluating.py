"""Judging a model by itself: its loss on a text by a named protocol, its distance from another, its speed."""

import tempfile
from dataclasses import asdict
from pathlib import Path

from qpruner.artifact.opened import manifest_of, open_stream
from qpruner.errors import MemoryLimitError
from qpruner.judge.divergence import kl_to
from qpruner.judge.loss import Streamed, evaluate_loss
from qpruner.judge.paired import compare
from qpruner.judge.protocols import Cut, sequences
from qpruner.judge.sequences import Sequences
from qpruner.judge.tasks import Asked, TaskReport, require_room, zero_shot
from qpruner.judge.turns import ROUNDS, in_turn
from qpruner.model import load, memory
from qpruner.model.corpus import Corpus, bundled_corpus, read_corpus
from qpruner.model.overlap import check_unseen
from qpruner.model.scratch import Scratch
from qpruner.prepare import bytes_of, require_weights
from qpruner.progress import OnProgress, silent
from qpruner.shape import evaluation_batch

BY_WINDOWS = Cut()


def evaluate(
    model: str,
    *,
    text: str | Path | None = None,
    cut: Cut = BY_WINDOWS,
    reference: str | None = None,
    tasks: Asked | None = None,
    speed: bool = False,
    threads: int | None = None,
    memory_limit: str | None = None,
    trust_remote_code: bool = False,
    on_progress: OnProgress = silent,
) -> dict:
    """As `qpruner.api.evaluate`, with what belongs to the protocol in one value.

    Returns:
        `model`, `text`, the numbers of a `LossReport`, `protocol` as a sentence; with a reference `kl`; with speed
        `speed`; with tasks `tasks`, and with a reference too `changes`, from the reference to the model.
    """
    source = _opened(model, trust_remote_code)
    beside = None if reference is None else _opened(reference, trust_remote_code)
    corpus = evaluation_corpus(text, cut)
    check_unseen(manifest_of(source), corpus)
    limit = None if memory_limit is None else bytes_of(memory_limit)
    both = [source] if beside is None else [beside, source]
    if tasks is not None:
        for each in both:
            require_room(each.tensors, limit)
    with tempfile.TemporaryDirectory() as place:
        judging = Judging(corpus, cut, limit, Path(place), on_progress)
        found = judging.of(source, beside)
    if tasks is not None:
        reports = [scored(each, tasks, on_progress) for each in both]
        found["tasks"] = reports[-1].to_dict()
        found |= {"changes": compare(*reports).to_dict()} if len(reports) > 1 else {}
    if speed:
        found["speed"] = speeds(
            source, beside, limit=limit, threads=threads, trust_remote_code=trust_remote_code, on_progress=on_progress
        )
    return found


def scored(source: load.Source, tasks: Asked, on_progress: OnProgress) -> TaskReport:
    """On zero-shot tasks, the whole model in memory."""
    show = lambda stage, done, total, detail="": on_progress(f"{stage}, {source.name}", done, total, detail)
    model, tokenizer = load.load_model(source), load.load_tokenizer(source)
    return zero_shot(model, tokenizer, tasks.names, folder=tasks.folder, limit=tasks.limit, on_progress=show)


def evaluation_corpus(text: str | Path | None, cut: Cut) -> Corpus:
    """The text to judge on; by default the held-out modules of Python's standard library."""
    if text is None:
        return bundled_corpus("evaluation")
    return read_corpus(Path(text), "evaluation", blank=cut.keeps_blank_rows)


class Judging:
    """One text for one or two models, which read it layer by layer if they do not fit. Final."""

    def __init__(self, corpus: Corpus, cut: Cut, limit: int | None, place: Path, on_progress: OnProgress):
        self.corpus, self.cut, self.limit, self.place, self.on_progress = corpus, cut, limit, place, on_progress

    def of(self, source: load.Source, reference: load.Source | None) -> dict:
        text = sequences(self.corpus, load.load_tokenizer(source), self.cut, context=source.context_length)
        batch = evaluation_batch(text.ids.shape[1], source.original.get_text_config(decoder=True).vocab_size)
        ours = self._judged(source, "evaluating")
        report = evaluate_loss(ours, text, batch_size=batch)
        found = {"model": source.name, "text": self.corpus.name, **report.to_dict(), "protocol": str(report.protocol)}
        if reference is not None:
            theirs = self._judged(reference, "reference")
            found["kl"] = {"reference": reference.name} | self._distance(ours, theirs, text, batch)
        return found

    def _distance(self, ours: Streamed, theirs: Streamed, text: Sequences, batch: int) -> dict:
        report = kl_to(ours, theirs, text, batch_size=batch)
        return report.to_dict() | {"protocol": str(report.protocol)}

    def _judged(self, source: load.Source, name: str) -> Streamed:
        resident = memory.fits(source.tensors, self.limit)
        show = lambda done, total, pace: self.on_progress(name, done, total, str(pace))
        scratch = Scratch(None if resident else self.place / name)
        return Streamed(open_stream(source, resident=resident), scratch, show)


def speeds(
    source: load.Source,
    reference: load.Source | None,
    *,
    limit: int | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    on_progress: OnProgress = silent,
) -> dict:
    """Memory and tokens per second in fresh processes; with a reference in turn with it, and the ratios to it.

    Raises:
        MemoryLimitError: a model is larger than the memory it may take; it cannot be timed layer by layer.
    """
    both = {"model": source} | ({} if reference is None else {"reference": reference})
    for each in both.values():
        if not memory.fits(each.tensors, limit):
            raise MemoryLimitError(
                f"{each.name} does not fit in memory, and speed is measured of a model that is there as a whole. "
                "Leave --speed out, or allow more memory."
            )
    turns = in_turn(
        {name: each.folder for name, each in both.items()},
        rounds=ROUNDS,
        threads=threads,
        trust_remote_code=trust_remote_code,
        on_round=lambda done, total: on_progress("speed", done, total),
    )
    found = {"rounds": ROUNDS, **{name: turns.typical(name) for name in both}}
    if reference is not None:
        found["ratios"] = {key: asdict(ratio) for key, ratio in turns.ratios("model", "reference").items()}
    return found


def _opened(model: str, trust_remote_code: bool) -> load.Source:
    source = load.inspect_source(model, trust_remote_code=trust_remote_code)
    require_weights(source)
    return source
