"""The verbs: what the command line offers, as functions of the same names and parameters."""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qpruner import __version__, matrix
from qpruner import recipe as recipes
from qpruner.errors import BudgetError, OutputError
from qpruner.files import write_text
from qpruner.judge.damage import TOLERANCE
from qpruner.judge.protocols import Cut
from qpruner.judge.tasks import Asked
from qpruner.model import load
from qpruner.plan import Budget
from qpruner.prepare import Prepared, bytes_of, check_output, limit_of, prepare, require_weights
from qpruner.progress import OnProgress, silent
from qpruner.recipe import Recipe
from qpruner.report.facts import Facts
from qpruner.run import Run, digest_of
from qpruner.study import study as run_study

if TYPE_CHECKING:
    from qpruner.joint.past import Front
    from qpruner.retraining import Recovery
    from qpruner.serving import Serving


@dataclass(frozen=True)
class Result:
    """What `compress` leaves: the artifact's folder, the report, and the report's facts."""

    artifact: Path
    report: Path
    facts: Facts

    def to_json(self) -> dict:
        return {"artifact": str(self.artifact), "report": str(self.report), "facts": self.facts.model_dump(mode="json")}


def compress(
    model: str,
    budget: str,
    output: str | Path,
    *,
    recipe: str | Recipe | None = None,
    from_run: str | Path | None = None,
    target: str | None = None,
    calibration: str | Path | None = None,
    training: str | Path | None = None,
    search_text: str | Path | None = None,
    evaluation: str | Path | None = None,
    trials: int | None = None,
    workers: int = 0,
    ray: str | None = None,
    seed: int | None = None,
    shared: Path | None = None,
    memory_limit: str | None = None,
    measure_speed: bool = True,
    measure_kl: bool = True,
    measure_stages: bool = True,
    tasks: Sequence[str] = (),
    tasks_dir: str | Path | None = None,
    tasks_limit: int | None = None,
    tolerance: float = TOLERANCE,
    trust_remote_code: bool = False,
    on_progress: OnProgress = silent,
) -> Result:
    """Make the best model of a given size, in a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        model: a folder, a hub name, or `pystdlib-5M`, the bundled model.
        budget: `50%` of the 16-bit bytes, `3.5GiB`, or `4.5bpw`; covers every stored tensor, adapters included.
        output: the artifact's folder, complete or absent. The run is kept in OUTPUT.run; the same call continues it.
        recipe: a recipe, or the name or file of one, with changes if wanted: `qpruner[steps=50]`. Default: `auto`.
        from_run: the folder of a finished `search`: its plan for this budget is carried out. Recipe, texts and seed are
            then those of the search.
        target: what has to load the result, in place of the recipe's.
        calibration, search_text, evaluation: files of text; see `qpruner.prepare.choose_texts` for what stands in.
        training: a text for the adapters, in place of the calibration's; of rows with instructions and answers, the
            answers are learned.
        trials: of the search, in place of the recipe's number.
        workers, ray: processes, or the address of a Ray cluster (`auto`), that evaluate trials of a joint search.
        seed: 0 unless given.
        shared: a folder for stage results that other runs may have in common with this one.
        memory_limit: `4GiB`, for the whole process; by default what is free on the machine. A model that does not fit
            goes through layer by layer; the artifact is the same.
        measure_speed: also time both models, each in a fresh process.
        measure_kl: also judge how far the artifact's predictions are from the original's; twice the work of its loss.
        measure_stages: also measure the loss after every stage, on eight windows of the search text.
        tasks, tasks_dir, tasks_limit: also score both models on zero-shot tasks; as for `evaluate`.
        tolerance: nats per token that the loss may rise before the result carries a warning.
        trust_remote_code: let Python code that came with the model run; the artifact carries that code on.
        on_progress: called with stage, done, total.
    Raises:
        QPrunerError: the request or its input cannot be served; nothing was written.
    """
    from qpruner.artifact.save import CARD, write_manifest
    from qpruner.compress import carry_out
    from qpruner.drafting import drafted
    from qpruner.facts import body_for, facts_of, manifest_of
    from qpruner.job import Job, Places, unfinished
    from qpruner.joint.facts import joint_facts
    from qpruner.joint.past import Past
    from qpruner.loading import loading
    from qpruner.model_card import card_of
    from qpruner.report.page import page

    output = Path(output)
    asked_tasks = Asked.of(tasks, tasks_dir, tasks_limit)
    texts = {
        "calibration": calibration, "training": training, "search_text": search_text, "evaluation": evaluation,
    }  # fmt: skip
    past = None
    if from_run is None:
        chosen, seed = _recipe(recipe or "auto", trials=trials, target=target), seed or 0
    else:
        past = Past.open(Path(from_run))
        past.check_same(
            dict(
                recipe=recipe, trials=trials, target=target, seed=seed, calibration=calibration, search_text=search_text
            )
        )
        chosen, seed = past.request.recipe, past.request.seed
        texts |= {"calibration": past.request.calibration, "search_text": past.request.search_text}
    prepared = prepare(
        model,
        budget,
        output,
        recipe=chosen,
        seed=seed,
        memory_limit=memory_limit,
        trust_remote_code=trust_remote_code,
        **{k: v and Path(v) for k, v in texts.items()},
    )
    check_output(prepared)
    if past is not None:
        past.check_model(prepared)
    request = request_of(prepared) | ({} if past is None else {"search": past.digest})
    run_folder = output.with_name(output.name + ".run")
    report = run_folder / "report.html"
    if load.is_artifact(output):
        return _finished(output, run_folder, request, tolerance)

    output.parent.mkdir(parents=True, exist_ok=True)
    with Run(run_folder, shared=shared) as run:
        forecast = prepared.forecast
        run.event("start", request=digest_of(request), memory=forecast.stages, resident=forecast.resident)
        on_progress(str(forecast), 1, 1)
        places = Places(workers, ray)
        job = Job(
            prepared, run, on_progress, measure_speed, measure_kl, measure_stages, places=places, tasks=asked_tasks
        )
        prepared, decided, measured = carry_out(job, drafted if past is None else past.drafted)
        command = _command(model, budget, output, chosen.name, seed, texts | {"trials": trials}, trust_remote_code)
        body = body_for(prepared, decided.plan)
        facts = facts_of(prepared, decided, measured, body, command=command, seconds=run.seconds(), tolerance=tolerance)
        joint = None
        if decided.searched is not None:
            asked = ([budget], command, None) if past is None else past.asked
            joint = joint_facts(job, decided.searched, asked[0], command=asked[1], folder=asked[2])
        manifest = manifest_of(prepared, decided, measured, request)
        write_manifest(unfinished(output), manifest)
        card = card_of(manifest, body, loading(body, "OUT"), prepared.shape.source.folder / CARD)
        write_text(unfinished(output) / CARD, card)
        write_text(run_folder / "facts.json", facts.to_json())
        write_text(report, page(facts, joint))
        os.replace(unfinished(output), output)
        run.event("done")
    return Result(output, report, facts)


def recover(
    model: str,
    output: str | Path,
    *,
    teacher: str | None = None,
    recipe: str | Recipe = "recover",
    training: str | Path | None = None,
    search_text: str | Path | None = None,
    evaluation: str | Path | None = None,
    seed: int = 0,
    memory_limit: str | None = None,
    trust_remote_code: bool = False,
    on_progress: OnProgress = silent,
) -> "Recovery | None":
    """Train adapters beside a finished artifact, of any recipe; the same call continues an interrupted training.

    Args:
        model: the folder of an artifact. One that has adapters goes on with them.
        output: the folder of the result; the run is kept in OUTPUT.run.
        teacher: the model that was compressed, whose predictions are learned; without it the next token is, unless the
            original is the bundled model.
        recipe: its keys of recovery are what counts.
        training: text, or rows of instructions with answers, of which the answers are learned; by default as for the
            calibration of `compress`. search_text, evaluation: likewise; both must be other texts.
        the others: as for `compress`.
    Returns:
        None in a process that torchrun or `accelerate launch` started beside the first.
    Raises:
        QPrunerError: the request or its input cannot be served; nothing was written.
    """
    from qpruner import retraining

    chosen, texts = _recipe(recipe), {"training": training, "search_text": search_text, "evaluation": evaluation}
    words = ["qpruner", "recover", model, "-o", str(output), "--recipe", chosen.name]
    for name, value in ({"teacher": teacher} | texts).items():
        words += [] if value is None else ["--" + name.replace("_", "-"), str(value)]
    words += ["--trust-remote-code"] * trust_remote_code + ["--seed", str(seed)]
    return retraining.recover(
        model, Path(output), teacher=teacher, recipe=chosen, seed=seed,
        memory_limit=None if memory_limit is None else bytes_of(memory_limit), command=shlex.join(words),
        trust_remote_code=trust_remote_code, on_progress=on_progress, **{k: v and Path(v) for k, v in texts.items()},
    )  # fmt: skip


def search(
    model: str,
    budgets: Sequence[str],
    output: str | Path,
    *,
    recipe: str | Recipe = "auto",
    target: str | None = None,
    calibration: str | Path | None = None,
    search_text: str | Path | None = None,
    trials: int | None = None,
    controls: Sequence[str] = (),
    workers: int = 0,
    ray: str | None = None,
    seed: int = 0,
    memory_limit: str | None = None,
    trust_remote_code: bool = False,
    on_progress: OnProgress = silent,
) -> "Front":
    """Search widths, layers and bits together, for several budgets at once; the same call continues it.

    `compress(..., from_run=output)` then makes any point of the front, or any other between.

    Args:
        budgets: as for `compress`, at least one.
        output: the search's folder.
        recipe: one with `allocation: joint`.
        controls: other ways to search for comparison, of as many trials: see `qpruner.joint.stages.CONTROLS`.
        the others: as for `compress`.
    Raises:
        QPrunerError: the request or its input cannot be served; nothing was written.
    """
    from qpruner.job import Job, Places
    from qpruner.joint.past import Request, finish, require_joint, texts_of
    from qpruner.joint.stages import searched

    chosen, output = _recipe(recipe, trials=trials, target=target), Path(output)
    require_joint(chosen, controls)
    texts = {name: text and Path(text) for name, text in (("calibration", calibration), ("search_text", search_text))}
    source = load.inspect_source(model, trust_remote_code=trust_remote_code)
    require_weights(source)
    limits = {text: limit_of(Budget.parse(text), source) for text in budgets}
    limits = dict(sorted(limits.items(), key=lambda pair: pair[1]))
    smallest = next(iter(limits), None)
    if smallest is None:
        raise BudgetError("a search needs one budget at least, for instance 25%,30%,40%.")
    prepared = prepare(
        model, smallest, output, evaluation=None, recipe=chosen, seed=seed, memory_limit=memory_limit,
        trust_remote_code=trust_remote_code, **texts,
    )  # fmt: skip
    request = Request(
        model=model, weights=prepared.weights_digest, texts=texts_of(prepared), recipe=chosen, budgets=tuple(limits),
        limits=tuple(limits.values()), controls=tuple(controls), seed=seed,
        trust_remote_code=trust_remote_code,
        **{name: text and str(text.absolute()) for name, text in texts.items()},
    )  # fmt: skip
    request.check(output)
    with Run(output) as run:
        request.write(output)
        job = Job(prepared, run, on_progress, measure_speed=False, places=Places(workers, ray))
        return finish(job, request, searched(job, request.limits, controls))


def _recipe(recipe: str | Recipe, **changes) -> Recipe:
    chosen = recipes.load(recipe) if isinstance(recipe, str) else recipe
    return chosen.model_copy(update={name: value for name, value in changes.items() if value is not None})


def _command(
    model: str, budget: str, output: Path, recipe: str, seed: int, options: dict, trust_remote_code: bool
) -> str:
    """What a person types to repeat the run."""
    words = ["qpruner", "compress", model, "--budget", budget, "-o", str(output), "--recipe", recipe]
    for name, value in options.items():
        words += [] if value is None else ["--" + name.replace("_", "-"), str(value)]
    words += ["--trust-remote-code"] if trust_remote_code else []
    return shlex.join([*words, "--seed", str(seed)])


def request_of(prepared: Prepared) -> dict:
    """All that the artifact's bytes depend on."""
    return {
        "qpruner": __version__,
        "model": prepared.weights_digest,
        "architecture": prepared.shape.source.digest,
        "recipe": prepared.recipe.model_dump(mode="json"),
        "limit_bytes": prepared.limit_bytes,
        "texts": prepared.texts.digests(),
        "seed": prepared.seed,
    }


def _finished(output: Path, run_folder: Path, request: dict, tolerance: float) -> Result:
    manifest = json.loads((output / "manifest.json").read_text())
    if manifest.get("request") != digest_of(request):
        raise OutputError(
            f"{output} holds an artifact of another request ({manifest.get('recipe', {}).get('name')}, "
            f"{manifest.get('budget')}). Name another output, or remove it and {run_folder}."
        )
    if not (run_folder / "facts.json").is_file():
        raise OutputError(
            f"{output} is finished, but its run folder {run_folder} is gone. Remove {output} to make it anew."
        )
    facts = Facts.read(run_folder / "facts.json")
    if facts.damage is not None:  # what is tolerated may change, and is no part of the request
        facts = facts.model_copy(update={"damage": facts.damage.model_copy(update={"tolerance": tolerance})})
    return Result(output, run_folder / "report.html", facts)


def inspect(
    model: str, *, recipe: str | Recipe | None = None, budget: str | None = None, trust_remote_code: bool = False
) -> dict:
    """Groups and sizes of a model, from its configuration alone; with a recipe and a budget, what would be left of it.

    Args:
        trust_remote_code: let Python code that came with the model run.
    Returns:
        `parameters`, `bytes_16bit`, `groups` (name, layer, kind, units, whether it can be pruned), `notes`, `loads_in`
        (what it loads in, and why not elsewhere, as `qpruner.loading` says it); with a recipe `predicted`: decoder
        layers, parameters, bytes, the kept units of each group, peak memory of each stage on this machine, and what the
        result will load in. Of an artifact: `layers`, `formats`, `bytes` and `loads_in`.
    """
    from qpruner import inspecting

    return inspecting.inspect(model, recipe=recipe, budget=budget, trust_remote_code=trust_remote_code)


def evaluate(
    model: str,
    *,
    text: str | Path | None = None,
    protocol: str = "windows",
    window: int | None = None,
    stride: int | None = None,
    windows: int | None = None,
    tokens: int | None = None,
    detokenised: bool = False,
    reference: str | None = None,
    tasks: Sequence[str] = (),
    tasks_dir: str | Path | None = None,
    tasks_limit: int | None = None,
    speed: bool = False,
    threads: int | None = None,
    memory_limit: str | None = None,
    trust_remote_code: bool = False,
    on_progress: OnProgress = silent,
) -> dict:
    """Loss of a model on a text, in float32, layer by layer if it does not fit in memory.

    Args:
        text: a file; by default the held-out modules of Python's standard library, in full.
        protocol: how the text is cut, by a name of `qpruner.judge.protocols`: `windows`, `wikitext2-2048`,
            `llm-pruner-128` or `rows`.
        window, stride: tokens, in place of the protocol's own; a window is cut to the model's context. With a stride
            below the window, windows overlap and predict only what is new in them.
        windows, tokens: at most so many windows (rows) or predicted tokens, from the start.
        detokenised: undo WikiText's tokeniser first.
        reference: another model, for the KL divergence to it, agreement with it, and tokens on which it was right.
        tasks, tasks_dir, tasks_limit: zero-shot tasks through lm-evaluation-harness, by name; from files in a folder,
            as `qpruner.judge.task_files` says, or else from the Hugging Face Hub; at most so many questions of each.
        speed: also tokens per second and memory, each model in fresh processes and in turn with the reference.
        threads: of torch, for the speed.
        memory_limit: as for `compress`.
        trust_remote_code: let Python code that came with either model run.
    """
    from qpruner import evaluating

    cut = Cut(protocol, window, stride, windows, tokens, detokenised)
    asked = Asked.of(tasks, tasks_dir, tasks_limit)
    return evaluating.evaluate(
        model, text=text, cut=cut, reference=reference, tasks=asked, speed=speed, threads=threads,
        memory_limit=memory_limit, trust_remote_code=trust_remote_code, on_progress=on_progress,
    )  # fmt: skip


def support(
    only: Sequence[str] = (),
    *,
    sweep: bool = False,
    output: str | Path | None = None,
    on_progress: OnProgress = silent,
) -> list:
    """What can be pruned of every causal language model of transformers; see `qpruner.support`.

    Args:
        only: model types; by default all that transformers has.
        sweep: also prove it on a tiny random model of each.
        output: a Markdown page to write the table into, below the text that is there.
    """
    from qpruner import support as architectures

    rows = architectures.support(only, sweep=sweep, on_progress=on_progress)
    if output is not None:
        path = Path(output)
        write_text(path, architectures.page(rows, path.read_text() if path.is_file() else ""))
    return rows


def study(
    models: str | Path | Sequence[str | Path],
    recipes: Sequence[str] | Mapping[str, str] = (),
    output: str | Path = "study",
    *,
    on_progress: OnProgress = silent,
    **options,
) -> dict:
    """Several recipes on the same models, texts, limits and seeds; the same call continues it. See `qpruner.study`.

    Args:
        models: as for `compress`, one or several; or a YAML file that describes the study.
        recipes: as for `compress`; or a mapping of labels to them.
        output: the study's folder.
        options: the other keys of a study; see `qpruner.matrix.Matrix`. They take the place of the file's.
    """
    given = options | ({"recipes": recipes} if recipes else {})
    return run_study(matrix.of(models, **given), Path(output), compress=compress, on_progress=on_progress)


def export(
    model: str | Path,
    to: str,
    output: str | Path | None = None,
    *,
    calibration: str | Path | None = None,
    trust_remote_code: bool = False,
    on_progress: OnProgress = silent,
    **options: bool,
):
    """Write a model or an artifact for another program, and open it there; see `qpruner.exporting.export`."""
    from qpruner import exporting

    options |= dict(calibration=calibration, trust_remote_code=trust_remote_code, on_progress=on_progress)
    return exporting.export(model, to, output, **options)


def serve_check(
    model: str | Path, *, context: int | None = None, batch: int = 1, trust_remote_code: bool = False
) -> "Serving":
    """What serving a model or an artifact takes; see `qpruner.serving.serve_check`."""
    from qpruner import serving

    source = load.inspect_source(model, trust_remote_code=trust_remote_code)
    return serving.serve_check(source, context=context, batch=batch)
