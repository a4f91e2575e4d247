"""The command line: one subcommand per verb of `qpruner.api`, same names, same parameters.

Exit status: 0 done; 2 the request or its input cannot be served; 1 a fault of ours; 130 interrupted.
"""

import errno
import functools
import json
import os
from pathlib import Path
from typing import Annotated

import typer

from qpruner.errors import QPrunerError
from qpruner.judge.damage import TOLERANCE

DEMO = "auto[search_windows=12,sensitivity_windows=4,gate_steps=0,trials=24]"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Give it a decoder LLM and a size in bytes; it returns the best model that fits, in a folder that "
    "AutoModelForCausalLM.from_pretrained loads, with a report.",
)


def with_status(verb):
    """The verb, ending with one line and the right status instead of a traceback; faults of ours keep theirs."""

    @functools.wraps(verb)
    def run(*args, **kwargs):
        try:
            verb(*args, **kwargs)
        except QPrunerError as error:
            message, status = str(error), 2
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            message = f"the disk is full: {error.filename or error}. Make room; the same command continues."
            status = 2
        except KeyboardInterrupt:
            message, status = "interrupted; the same command continues where this run stopped.", 130
        else:
            return
        typer.echo(f"qpruner: {message}", err=True)
        raise typer.Exit(status)

    return run


MODEL_HELP = "A folder with config.json and safetensors, a hub name (owner/name), or pystdlib-5M, the bundled model."
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
BudgetText = Annotated[
    str, typer.Option("--budget", help="50% of the 16-bit bytes, a size (3.5GiB), or bits per parameter (4.5bpw).")
]
RECIPE_HELP = "A recipe's name or YAML file; change keys with NAME[key=value,key=value]."
RecipeText = Annotated[str, typer.Option("--recipe", help=RECIPE_HELP)]
Calibration = Annotated[
    Path | None,
    typer.Option("--calibration", help="Your text to measure and train on: .txt, .jsonl, .jsonl.gz or .parquet."),
]
Target = Annotated[
    str | None,
    typer.Option("--target", help="Stay inside what it can load: transformers (default), vllm, deci, gguf or any."),
]
Trials = Annotated[int | None, typer.Option(min=1, help="Trials of the search, in place of the recipe's.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that evaluate trials. Default: this one.")]
Ray = Annotated[str | None, typer.Option("--ray", help="Evaluate trials on a Ray cluster: its address, or auto.")]
SearchText = Annotated[
    Path | None,
    typer.Option("--search-text", help="Text that trials are judged on. Default: a part of the calibration file."),
]
Evaluation = Annotated[
    Path | None,
    typer.Option("--evaluation", help="Held-out text for the report. Default: a part of the calibration file."),
]
Training = Annotated[
    Path | None,
    typer.Option("--training", help="Text for adapters; of rows with instruction and output the output is learned."),
]
Tasks = Annotated[str, typer.Option("--tasks", help="Zero-shot tasks by name: boolq,piqa,... Needs qpruner[eval].")]
TasksDir = Annotated[
    Path | None,
    typer.Option("--tasks-dir", help="Folder of task files (JSON lines), instead of the Hub. All, or --tasks."),
]
TasksLimit = Annotated[int | None, typer.Option("--tasks-limit", min=1, help="At most so many questions of each task.")]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        "--memory-limit", help="4GiB, for the whole process. A model that does not fit goes through layer by layer."
    ),
]
SEED_HELP = "The same seed gives the same artifact, byte for byte."
Seed = Annotated[int, typer.Option("--seed", help=SEED_HELP)]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let Python code that came with the model run. Read it first.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


@app.command()
@with_status
def compress(
    model: Model,
    budget: BudgetText,
    output: Annotated[Path, typer.Option("--output", "-o", help="The artifact; its run is in OUTPUT.run.")],
    recipe: Annotated[str | None, typer.Option("--recipe", help=RECIPE_HELP + " Default: auto.")] = None,
    from_run: Annotated[
        Path | None, typer.Option("--from", help="A finished `qpruner search`: take its plan for this budget.")
    ] = None,
    target: Target = None,
    calibration: Calibration = None,
    training: Training = None,
    search_text: SearchText = None,
    evaluation: Evaluation = None,
    trials: Trials = None,
    workers: Workers = 0,
    ray: Ray = None,
    tasks: Tasks = "",
    tasks_dir: TasksDir = None,
    tasks_limit: TasksLimit = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Nats per token that the loss may rise before the result carries a warning.")
    ] = TOLERANCE,
    memory_limit: MemoryLimit = None,
    seed: Annotated[int | None, typer.Option("--seed", help=SEED_HELP)] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Make the best model of a given size: prune, choose bits, quantize, recover, judge.

    The same command continues an interrupted run. With --from, recipe, texts and seed are those of the search.
    """
    from qpruner import api
    from qpruner.progress import bars

    with bars() as on_progress:
        result = api.compress(
            model, budget, output, recipe=recipe, from_run=from_run, target=target, calibration=calibration,
            training=training, search_text=search_text, evaluation=evaluation, trials=trials, workers=workers, ray=ray,
            tasks=names_of(tasks), tasks_dir=tasks_dir, tasks_limit=tasks_limit, tolerance=tolerance,
            memory_limit=memory_limit, seed=seed, trust_remote_code=trust_remote_code, on_progress=on_progress,
        )  # fmt: skip
    _show_result(result, as_json)


@app.command()
@with_status
def recover(
    model: Annotated[str, typer.Argument(help="The folder of an artifact, of any recipe.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The result; its run is in OUTPUT.run.")],
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="The model that was compressed, to learn from its predictions.")
    ] = None,
    recipe: RecipeText = "recover",
    training: Training = None,
    search_text: SearchText = None,
    evaluation: Evaluation = None,
    memory_limit: MemoryLimit = None,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Train adapters on a finished artifact, taught by the original; the same command continues.

    Several processes train together: torchrun --nproc_per_node 2 -m qpruner.cli recover ..., and share the model as
    well: accelerate launch --use_fsdp -m qpruner.cli recover ...
    """
    from qpruner import api
    from qpruner.do import sharding
    from qpruner.progress import bars

    if os.environ.get("RANK", "0") == "0" and (words := sharding.in_words()):
        typer.echo(words, err=True)

    with bars() as on_progress:
        found = api.recover(
            model, output, teacher=teacher, recipe=recipe, training=training, search_text=search_text,
            evaluation=evaluation, seed=seed, memory_limit=memory_limit, trust_remote_code=trust_remote_code,
            on_progress=on_progress,
        )  # fmt: skip
    if found is None:
        return
    if as_json:
        _print_json(found.to_json())
        return
    from qpruner.report.retrained import retrained_table

    _print(retrained_table(found.facts))
    typer.echo(f"artifact  {found.artifact}\nreport    {found.report}\n\n{found.facts.snippet}")


@app.command()
@with_status
def search(
    model: Model,
    budgets: Annotated[str, typer.Option("--budgets", help="Budgets with commas between them: 20%,25%,30%.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the search; resumable.")] = Path("search"),
    recipe: RecipeText = "auto",
    target: Target = None,
    calibration: Calibration = None,
    search_text: SearchText = None,
    trials: Trials = None,
    controls: Annotated[
        str, typer.Option(help="Other searches for comparison, of as many trials: random,greedy,nsga-ii,prune-first.")
    ] = "",
    workers: Workers = 0,
    ray: Ray = None,
    memory_limit: MemoryLimit = None,
    seed: Seed = 0,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Search widths, layers and bits together, for several budgets at once; `compress --from` then makes any of them.

    The same command continues an interrupted search.
    """
    from qpruner import api
    from qpruner.progress import bars

    with bars() as on_progress:
        found = api.search(
            model, budgets.split(","), output, recipe=recipe, target=target, calibration=calibration,
            search_text=search_text, trials=trials, controls=names_of(controls),
            workers=workers, ray=ray, memory_limit=memory_limit, seed=seed, trust_remote_code=trust_remote_code,
            on_progress=on_progress,
        )  # fmt: skip
    if as_json:
        _print_json(found.to_json())
        return
    from qpruner.report.terminal import limits_table

    _print(limits_table(found.facts))
    typer.echo(f"report    {found.report}")


@app.command()
@with_status
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the artifact.")] = Path("build/demo"),
    budget: BudgetText = "25%",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Compress the bundled model with the default recipe, searching shortly; no download, some minutes on two cores."""
    compress("pystdlib-5M", budget, output, recipe=DEMO, seed=seed, as_json=as_json)


@app.command()
@with_status
def inspect(
    model: Annotated[str, typer.Argument(help=MODEL_HELP + " A config.json alone will do; artifacts too.")],
    recipe: Annotated[str | None, typer.Option(help="Predict what this recipe makes of the model.")] = None,
    budget: Annotated[str | None, typer.Option(help="The size to predict for; see `qpruner compress --help`.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show a model's groups and sizes, what can be pruned and what it loads in, without loading its weights."""
    from qpruner import api

    found = api.inspect(model, recipe=recipe, budget=budget, trust_remote_code=trust_remote_code)
    if as_json:
        _print_json(found)
    else:
        from qpruner.report.terminal import artifact_table, inspection_table, loading_lines

        _print(inspection_table(found) if "groups" in found else artifact_table(found))
        typer.echo("\n".join(loading_lines(found)))


@app.command()
@with_status
def support(
    sweep: Annotated[bool, typer.Option("--sweep", help="Prove every row on a tiny random model; minutes.")] = False,
    only: Annotated[str | None, typer.Option(help="Model types, with commas between them. Default: all.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the table into this Markdown page, below its text.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show for every causal language model of transformers what can be pruned, and why not where nothing can."""
    from qpruner import api
    from qpruner.progress import bars

    with bars() as on_progress:
        rows = api.support(only.split(",") if only else (), sweep=sweep, output=output, on_progress=on_progress)
    if as_json:
        _print_json([row.to_json() for row in rows])
    else:
        from qpruner.report.terminal import study_table
        from qpruner.support import COLUMNS, cells, summary

        _print(study_table(COLUMNS, [cells(row) for row in rows]))
        typer.echo(summary(rows))


@app.command()
@with_status
def evaluate(
    model: Annotated[str, typer.Argument(help=MODEL_HELP + " Artifacts of qpruner too.")],
    text: Annotated[Path | None, typer.Option(help="Text to judge on; default: the bundled held-out modules.")] = None,
    protocol: Annotated[
        str, typer.Option(help="How the text is cut: windows, wikitext2-2048, llm-pruner-128 or rows (each alone).")
    ] = "windows",
    window: Annotated[int | None, typer.Option(min=8, help="Tokens per window, in place of the protocol's.")] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between two windows; fewer than a window make them overlap.")
    ] = None,
    windows: Annotated[int | None, typer.Option(min=2, help="At most this many windows, from the start.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="At most this many predicted tokens.")] = None,
    detokenised: Annotated[
        bool, typer.Option("--detokenised", help="Undo WikiText's tokeniser first; bits per byte stay of the text.")
    ] = False,
    reference: Annotated[
        str | None, typer.Option(help="Also how far the predictions are from this model's: KL, agreement, flips.")
    ] = None,
    tasks: Tasks = "",
    tasks_dir: TasksDir = None,
    tasks_limit: TasksLimit = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Also tokens per second and memory, in turn with the reference.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads for --speed. Default: torch's choice.")] = None,
    memory_limit: MemoryLimit = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model's loss on a text, with its standard error and the protocol it was measured by."""
    from qpruner import api
    from qpruner.progress import bars

    with bars() as on_progress:
        found = api.evaluate(
            model, text=text, protocol=protocol, window=window, stride=stride, windows=windows, tokens=tokens,
            detokenised=detokenised, reference=reference, tasks=names_of(tasks), tasks_dir=tasks_dir,
            tasks_limit=tasks_limit, speed=speed, threads=threads, memory_limit=memory_limit,
            trust_remote_code=trust_remote_code, on_progress=on_progress,
        )  # fmt: skip
    if as_json:
        _print_json(found)
    else:
        from qpruner.report.terminal import evaluation_tables

        for table in evaluation_tables(found):
            _print(table)


@app.command()
@with_status
def export(
    model: Annotated[str, typer.Argument(help=MODEL_HELP + " Artifacts of qpruner too.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="What is written: hf, for transformers alone; gguf, for llama.cpp; compressed-tensors, for vLLM; "
            "deci, for vLLM's DeciLM.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File or folder. Default: the model's name, in this folder.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="gguf: text that tells which columns of weights count most.")
    ] = None,
    round_again: Annotated[
        bool,
        typer.Option(
            "--round-again", help="compressed-tensors: round weights once more where the format lacks their codes."
        ),
    ] = False,
    padded: Annotated[
        bool, typer.Option("--padded", help="hf: fill layers of other widths up with zeros; the cost is printed.")
    ] = False,
    with_code: Annotated[
        bool, typer.Option("--with-code", help="hf: codes stay; Python files for trust_remote_code beside them.")
    ] = False,
    adapters_beside: Annotated[
        bool, typer.Option("--adapters-beside", help="hf: adapters stay a PEFT folder, and are not merged.")
    ] = False,
    vllm: Annotated[
        Path | None,
        typer.Option("--vllm", help="Python of an environment that has vLLM: the result is opened there as well."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a model for another program, open it there, and say how far its predictions moved."""
    from qpruner import api
    from qpruner.progress import bars

    with bars() as on_progress:
        found = api.export(
            model, to, output, calibration=calibration, trust_remote_code=trust_remote_code, on_progress=on_progress,
            round_again=round_again, padded=padded, with_code=with_code, adapters_beside=adapters_beside,
            vllm=vllm,
        )  # fmt: skip
    if as_json:
        _print_json(found.to_json())
    else:
        typer.echo("\n".join(found.lines()))


@app.command("serve-check")
@with_status
def serve_check(
    model: Annotated[str, typer.Argument(help=MODEL_HELP + " Artifacts of qpruner too.")],
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sequence. Default: the most that the model takes.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Say what serving takes: memory for weights and cache, over how many devices it divides, what loads it."""
    from qpruner import api

    found = api.serve_check(model, context=context, batch=batch, trust_remote_code=trust_remote_code)
    if as_json:
        _print_json(found.to_json())
    else:
        typer.echo("\n".join(found.lines()))


@app.command()
@with_status
def chat(
    model: Annotated[str, typer.Argument(help=MODEL_HELP + " Artifacts of qpruner too.")],
    prompt: Annotated[str | None, typer.Option(help="Go on with this and end; without it, line after line.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="At most so many each time.")] = 256,
    seed: Annotated[int | None, typer.Option(help="Draw tokens, by this seed. Default: always the likeliest.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Generate text in the terminal: a conversation where the tokenizer has a chat template, else continuations."""
    from qpruner.chat import Speaker

    speaker = Speaker(model, seed=seed, trust_remote_code=trust_remote_code)
    write = lambda text: typer.echo(text, nl=False)
    if prompt is not None:
        speaker.say(prompt, write, max_new_tokens=max_new_tokens)
        typer.echo()
        return
    typer.echo("A line to the model; end with Ctrl-D.", err=True)
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if line:
            speaker.say(line, write, max_new_tokens=max_new_tokens)
            typer.echo()


@app.command()
@with_status
def study(
    models: Annotated[
        list[str], typer.Argument(help=MODEL_HELP + " Several, or one YAML file that describes the study.")
    ],
    recipes: Annotated[list[str] | None, typer.Option("--recipes", help="Recipes, as for compress; several.")] = None,
    budgets: Annotated[list[str] | None, typer.Option("--budget", help="A budget; give several. Default: 50%.")] = None,
    kept: Annotated[
        list[str] | None,
        typer.Option("--kept", help="Instead of a budget: a fraction of the prunable parameters (80%); give several."),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds, from 0. Default: 3.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the study; resumable.")] = Path("study"),
    baseline: Annotated[str | None, typer.Option(help="Recipe to compare the others with. Default: the first.")] = None,
    changes: Annotated[str | None, typer.Option(help="Changes of every recipe: key=value,key=value.")] = None,
    vary: Annotated[
        str | None, typer.Option(help="A numeric key of the recipes and what to try: calibration_windows=4,16,64.")
    ] = None,
    calibration: Calibration = None,
    search_text: SearchText = None,
    evaluation: Evaluation = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Cells computed side by side. Default: 1.")] = None,
    memory_limit: Annotated[str | None, typer.Option("--memory-limit", help="4GiB, for each process.")] = None,
    keep_artifacts: Annotated[
        bool | None, typer.Option("--keep-artifacts", help="Keep the weights of every cell, not only its numbers.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Run recipes on the same models and data; print their tables with standard errors and paired differences.

    A YAML file has keys of the same names: models, recipes, budgets, kept, seeds, ...; options go before what it says.
    """
    from qpruner import api
    from qpruner.matrix import varied_of
    from qpruner.progress import bars
    from qpruner.recipe import changes_of

    options = dict(
        recipes=recipes, budgets=budgets, kept=kept, seeds=seeds, baseline=baseline, calibration=calibration,
        search_text=search_text, evaluation=evaluation, processes=processes, memory_limit=memory_limit,
        keep_artifacts=keep_artifacts, trust_remote_code=trust_remote_code or None,
        changes=changes and changes_of(changes), vary=vary and varied_of(vary),
    )  # fmt: skip
    given = {key: value for key, value in options.items() if value}
    with bars() as on_progress:
        found = api.study(models, output=output, on_progress=on_progress, **given)
    if as_json:
        _print_json(found)
        return
    from qpruner.report.study import sections
    from qpruner.report.terminal import study_table

    for section in sections(found):
        _print(study_table(section.head, section.rows, title=section.title, caption=section.lead))
        for sentence in section.failures:
            typer.echo(f"failed: {sentence}", err=True)
    typer.echo(f"plots  {output / 'study.html'}\ntable  {output / 'table.md'}")


def names_of(text: str) -> list[str]:
    """Names with commas between them."""
    return [name for name in text.split(",") if name]


def _show_result(result, as_json: bool) -> None:
    if as_json:
        _print_json(result.to_json())
        return
    from qpruner.report.page import text_table

    _print(text_table(result.facts))
    typer.echo(f"artifact  {result.artifact}\nreport    {result.report}\n\n{result.facts.snippet}")


def _print(table) -> None:
    from rich.console import Console

    Console().print(table)


def _print_json(value) -> None:
    typer.echo(json.dumps(value, indent=1))


def main() -> None:
    app()


if __name__ == "__main__":
    main()
