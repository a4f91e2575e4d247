"""Several recipes on the same models, texts, limits and seeds, compared window by window: a matrix of cells.

A study is a folder, and the same command continues it:

    OUT/
      cells/        one JSON file per finished cell, named after its place in the matrix and a digest of all that it
                    depends on: what is there is not computed again
      runs/         artifact and run of each cell; the weights and what is large stay only if that is asked for
      common/       stage results that cells have in common
      study.json, table.md, study.html
"""

import json
import re
import shutil
import statistics
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpruner import __version__
from qpruner.errors import QPrunerError
from qpruner.files import write_text
from qpruner.judge.loss import mean_difference
from qpruner.matrix import Matrix, Subject
from qpruner.model import checkpoint, load
from qpruner.prepare import choose_texts, require_weights
from qpruner.progress import OnProgress, silent
from qpruner.recipe import Recipe
from qpruner.report.study import markdown, page
from qpruner.run import digest_of
from qpruner.shape import Room, shape_of
from qpruner.workers.processes import in_processes

SCORED_BY = ("score", "fisher", "precision", "calibration_windows", "window")


@dataclass(frozen=True)
class Cell:
    """One place of the matrix. value: of the key that is varied. prunable: parameters that kept fractions speak of.

    key: a digest of all that its numbers depend on.
    """

    subject: Subject
    limit: str
    budget: str
    label: str
    recipe: Recipe
    value: int | float | None
    seed: int
    prunable: int
    key: str

    @property
    def slug(self) -> str:
        varied = [] if self.value is None else [str(self.value)]
        words = "-".join([self.subject.name, self.limit, self.label, *varied])
        return f"{re.sub(r'[^A-Za-z0-9=.%-]+', '_', words)[:120]}-seed{self.seed}-{self.key[:8]}"

    @property
    def scored(self) -> str:
        """Cells with the same take the scores of their units from each other."""
        return json.dumps([self.subject.name, self.seed, *(str(getattr(self.recipe, key)) for key in SCORED_BY)])


@dataclass(frozen=True)
class Place:
    """Where a study's cells are computed, and by what. compress: `qpruner.api.compress`."""

    folder: Path
    compress: Callable
    memory_limit: str | None
    trust_remote_code: bool
    keep_artifacts: bool

    def record(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.slug}.json"


def study(matrix: Matrix, folder: Path, *, compress: Callable, on_progress: OnProgress = silent) -> dict:
    """Compute what is missing of the matrix; compare the losses window by window.

    Returns:
        `rows`, one per model, limit, recipe and value, `cells`, and what they are of; also written into the folder,
        with a table and a plot.
    """
    place = Place(folder, compress, matrix.memory_limit, matrix.trust_remote_code, matrix.keep_artifacts)
    cells = list(cells_of(matrix))  # refuses what cannot be served, before anything is written
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    finished = {cell.slug: _finished(cell, place) for cell in cells if place.record(cell).is_file()}
    missing = [cell for cell in cells if cell.slug not in finished]
    on_progress("study", len(finished), len(cells))
    for cell, result in _computed(missing, place, matrix.processes):
        finished[cell.slug] = result
        on_progress("study", len(finished), len(cells))
    found = summary(matrix, [(cell, finished[cell.slug]) for cell in cells])
    write_text(folder / "study.json", json.dumps(found, indent=1) + "\n")
    write_text(folder / "table.md", markdown(found))
    write_text(folder / "study.html", page(found))
    return found


def cells_of(matrix: Matrix) -> Iterator[Cell]:
    """All places of the matrix, seed by seed, so that a study cut short has all recipes."""
    looked_at = [(subject, *_look_at(subject, matrix.trust_remote_code)) for subject in matrix.subjects]
    for seed in range(matrix.seeds):
        for subject, room, depends_on in looked_at:
            for value in matrix.varied[1]:
                for label in matrix.recipes:
                    recipe = matrix.recipe(label, value)
                    for i, limit in enumerate(matrix.limits):
                        budget = f"{room.limit_bytes(matrix.kept[i])}B" if matrix.kept else limit
                        of = depends_on | {"recipe": recipe.model_dump(mode="json"), "budget": budget, "seed": seed}
                        key = digest_of(of)
                        yield Cell(subject, limit, budget, label, recipe, value, seed, room.parameters, key)


def _look_at(subject: Subject, trust_remote_code: bool) -> tuple[Room, dict]:
    """What can go of a model, and all of it and its texts that numbers depend on; each file is read once a study."""
    source = load.inspect_source(subject.model, trust_remote_code=trust_remote_code)
    require_weights(source)
    texts = choose_texts(source.name, subject.calibration, subject.search_text, subject.evaluation)
    digests = {"model": checkpoint.weights_digest(source.folder), "architecture": source.digest}
    return Room.of(shape_of(source)), {"qpruner": __version__, **digests, "texts": texts.digests()}


def _finished(cell: Cell, place: Place) -> dict:
    _tidy(cell, place)  # where a study was killed before it could
    return json.loads(place.record(cell).read_text())


def _computed(cells: Sequence[Cell], place: Place, processes: int) -> Iterator[tuple[Cell, dict]]:
    if processes == 1 or len(cells) < 2:
        yield from ((cell, compute(cell, place)) for cell in cells)
    else:
        lost = lambda cell: {"failed": "the process that computed it died, perhaps for want of memory."}
        yield from in_processes(compute, cells, place, n=processes, apart=lambda cell: cell.scored, lost=lost)


def compute(cell: Cell, place: Place) -> dict:
    """One cell's numbers, on disk before they are returned; or `failed`, a sentence, which is not kept."""
    artifact = place.folder / "runs" / cell.slug
    texts = {key: getattr(cell.subject, key) for key in ("calibration", "search_text", "evaluation")}
    try:
        result = place.compress(
            cell.subject.model, cell.budget, artifact, recipe=cell.recipe, seed=cell.seed, **texts,
            shared=place.folder / "common", memory_limit=place.memory_limit, measure_speed=False, measure_kl=False,
            trust_remote_code=place.trust_remote_code,
        )  # fmt: skip
    except QPrunerError as error:
        return {"failed": str(error).replace(cell.recipe.name, cell.label)}
    except Exception as error:  # a fault of ours costs its cell, not a night's work; where it arose is kept
        artifact.parent.mkdir(parents=True, exist_ok=True)
        artifact.with_name(f"{cell.slug}.fault").write_text(traceback.format_exc())
        return {"failed": f"{type(error).__name__}: {error}"}
    parts = ("original", "artifact")
    files = {part: artifact.with_name(f"{cell.slug}.run") / "measurements" / f"{part}.json" for part in parts}
    losses = {part: json.loads(file.read_text())["loss"]["window_losses"] for part, file in files.items()}
    numbers = _numbers(cell, result.facts, losses)
    write_text(place.record(cell), json.dumps(numbers, indent=1) + "\n")
    _tidy(cell, place)
    return numbers


def _numbers(cell: Cell, facts: Any, losses: dict[str, list[float]]) -> dict:
    gone = facts.parameters_before - facts.parameters_after
    return {
        "bytes": facts.sizes.on_disk,
        "parameters_before": facts.parameters_before,
        "parameters": facts.parameters_after,
        "kept": 1 - gone / cell.prunable,
        "search_loss_before_recovery": facts.recovery and facts.recovery.loss_before,
        "original": losses["original"],
        "losses": losses["artifact"],
        "seconds": {stage.name: stage.seconds for stage in facts.stages},
    }


def _tidy(cell: Cell, place: Place) -> None:
    """Of a finished cell only what tells how it was made stays, unless its artifact is to be kept."""
    if place.keep_artifacts:
        return
    artifact = place.folder / "runs" / cell.slug
    run = artifact.with_name(f"{cell.slug}.run")
    for large in (artifact, run / "measurements", run / "passes"):
        shutil.rmtree(large, ignore_errors=True)
    (run / "report.html").unlink(missing_ok=True)


# --- the table --------------------------------------------------------------------------------------------------------


def summary(matrix: Matrix, cells: Sequence[tuple[Cell, dict]]) -> dict:
    """What the table and the plots show, from the numbers of the cells."""
    places: dict[tuple, dict[int, dict]] = {}
    for cell, numbers in cells:
        places.setdefault((cell.subject.name, cell.limit, cell.value, cell.label), {})[cell.seed] = numbers
    order = [
        (subject.name, limit, value, label)
        for subject in matrix.subjects
        for limit in matrix.limits
        for value in matrix.varied[1]
        for label in matrix.recipes
    ]
    rows = [_row(place, places[place], places[*place[:3], matrix.reference]) for place in order]
    named = lambda cell: {
        "model": cell.subject.name, "limit": cell.limit, "recipe": cell.label, "value": cell.value, "seed": cell.seed,
        "run": cell.slug,
    }  # fmt: skip
    return {
        "models": [subject.name for subject in matrix.subjects],
        "recipes": {
            label: matrix.recipe(label, matrix.varied[1][0]).model_dump(mode="json") for label in matrix.recipes
        },
        "baseline": matrix.reference,
        "varied": matrix.varied[0],
        "seeds": matrix.seeds,
        "rows": rows,
        "cells": [named(cell) | numbers for cell, numbers in cells],
    }


def _row(place: tuple, by_seed: dict[int, dict], baseline: dict[int, dict]) -> dict:
    """Of one line. Differences are of the same windows; over seeds each window's mean is taken first.

    seed_spread: standard deviation, over the seeds, of the increase.
    """
    model, limit, value, label = place
    done = {seed: cell for seed, cell in by_seed.items() if "failed" not in cell}
    both = [seed for seed in done if "failed" not in baseline[seed]]
    row = {
        "model": model, "limit": limit, "recipe": label, "value": value, "seeds": len(done),
        "failed": {str(seed): cell["failed"] for seed, cell in by_seed.items() if "failed" in cell},
    }  # fmt: skip
    if not done:
        return row
    cells = list(done.values())
    losses, original = _over_seeds("losses", cells), _over_seeds("original", cells)
    increase, increase_error = mean_difference(losses, original)
    increases = [mean_difference(c["losses"], c["original"])[0] for c in cells]
    row |= {key: _mean([c[key] for c in cells]) for key in ("bytes", "parameters_before", "parameters", "kept")}
    row |= {
        "windows": len(losses),
        "loss": _mean(losses),
        "loss_by_seed": [_mean(c["losses"]) for c in cells],
        "original_loss": _mean(original),
        "loss_increase": increase,
        "loss_increase_error": increase_error,
        "loss_increase_by_seed": increases,
        "seed_spread": statistics.stdev(increases) if len(increases) > 1 else None,
        "search_loss_before_recovery": [c["search_loss_before_recovery"] for c in cells],
        "seconds": sum(sum(c["seconds"].values()) for c in cells),
    }
    if both:
        ours, theirs = ([of[seed] for seed in both] for of in (done, baseline))
        difference, error = mean_difference(_over_seeds("losses", ours), _over_seeds("losses", theirs))
        row |= {
            "against_baseline": difference,
            "against_baseline_error": error,
            "against_baseline_by_seed": [
                mean_difference(a["losses"], b["losses"])[0] for a, b in zip(ours, theirs, strict=True)
            ],
        }
    return row


def _over_seeds(key: str, cells: Sequence[dict]) -> list[float]:
    return [_mean(column) for column in zip(*(c[key] for c in cells), strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
