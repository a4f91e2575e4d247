"""Several recipes on the same model, texts, budgets and seeds, and the table that papers print: with standard errors.

A study is a folder: one artifact and run per cell, and stage results that cells have in common in `common/`. The same
command continues it.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from qpruner import recipe as recipes
from qpruner.errors import RecipeError
from qpruner.files import write_text
from qpruner.judge.loss import mean_difference
from qpruner.progress import OnProgress, silent


def split_recipes(texts: Sequence[str]) -> list[str]:
    """Recipes from one or several arguments: apart at spaces, and at commas outside brackets."""
    one = r"[^\s,\[]+(?:\[(?:[^\[\]]|\[[^\]]*\])*\])?"  # a name, and changes in brackets that may hold lists
    return [name for text in texts for name in re.findall(one, text)]


def study(
    model: str,
    runs: Sequence[str],
    output: Path,
    *,
    compress: Callable,
    budgets: Sequence[str] = ("50%",),
    seeds: int = 3,
    baseline: str | None = None,
    calibration: Path | None = None,
    search_text: Path | None = None,
    evaluation: Path | None = None,
    trust_remote_code: bool = False,
    on_progress: OnProgress = silent,
) -> dict:
    """Compress by every recipe at every budget with seeds 0, 1, ...; compare the losses window by window.

    Args:
        runs: recipes, as `compress` takes them.
        compress: `qpruner.api.compress`.
        baseline: the one of `runs` that the others are compared with; the first by default.
    Returns:
        `rows`, one per budget and recipe; also written to study.json and table.md in the output folder.
    """
    runs = split_recipes(runs)
    baseline = baseline or runs[0]
    if baseline not in runs:
        raise RecipeError(f"the baseline {baseline!r} is none of the study's recipes: {', '.join(runs)}")
    for name in runs:
        recipes.load(name)
    cells: dict[tuple[str, str], list[dict]] = {}
    texts = {"calibration": calibration, "search_text": search_text, "evaluation": evaluation}
    jobs = [(budget, name, seed) for budget in budgets for seed in range(seeds) for name in runs]
    for done, (budget, name, seed) in enumerate(jobs):
        on_progress("study", done, len(jobs))
        slug = re.sub(r"[^A-Za-z0-9=.%-]+", "_", f"{name}-{budget}-seed{seed}")
        result = compress(
            model, budget, output / slug, recipe=name, seed=seed, shared=output / "common", measure_speed=False,
            trust_remote_code=trust_remote_code, **texts,
        )  # fmt: skip
        measured = [
            json.loads((output / f"{slug}.run" / "measurements" / f"{part}.json").read_text())
            for part in ("original", "artifact")
        ]
        cells.setdefault((budget, name), []).append(_cell(result.facts, *measured))
    on_progress("study", len(jobs), len(jobs))
    rows = [_row(budget, name, cells[budget, name], cells[budget, baseline]) for budget, name in cells]
    found = {"model": model, "baseline": baseline, "seeds": seeds, "rows": rows}
    write_text(output / "study.json", json.dumps(found, indent=1) + "\n")
    write_text(output / "table.md", markdown(found))
    return found


def _cell(facts, original: dict, artifact: dict) -> dict:
    return {
        "bytes": facts.sizes.on_disk,
        "parameters": facts.parameters_after,
        "search_loss": facts.recovery and facts.recovery.loss_before,
        "original": original["loss"]["window_losses"],
        "losses": artifact["loss"]["window_losses"],
    }


def _row(budget: str, name: str, cells: list[dict], baseline: list[dict]) -> dict:
    """Differences are of the same windows; over seeds each window's mean is taken first."""
    over_seeds = lambda key, of: [sum(column) / len(column) for column in zip(*(c[key] for c in of), strict=True)]
    losses, reference = over_seeds("losses", cells), over_seeds("losses", baseline)
    original = over_seeds("original", cells)
    by_seed = [sum(c["losses"]) / len(c["losses"]) for c in cells]
    mean = sum(by_seed) / len(by_seed)
    increase, increase_error = mean_difference(losses, original)
    difference, difference_error = mean_difference(losses, reference)
    return {
        "budget": budget,
        "recipe": name,
        "seeds": len(cells),
        "bytes": sum(c["bytes"] for c in cells) / len(cells),
        "parameters": sum(c["parameters"] for c in cells) / len(cells),
        "loss": mean,
        "loss_by_seed": by_seed,
        "original_loss": sum(original) / len(original),
        "loss_increase": increase,
        "loss_increase_error": increase_error,
        "search_loss_before_recovery": [c["search_loss"] for c in cells],
        "against_baseline": difference,
        "against_baseline_error": difference_error,
        "against_baseline_by_seed": [
            mean_difference(c["losses"], b["losses"])[0] for c, b in zip(cells, baseline, strict=True)
        ],
    }


COLUMNS = ("budget", "recipe", "bytes", "loss (nats/token)", "increase ± s.e.", "by seed", "against baseline ± s.e.")


def table_cells(found: dict) -> list[tuple[str, ...]]:
    return [
        (
            row["budget"],
            row["recipe"],
            f"{row['bytes']:,.0f}",
            f"{row['loss']:.4f}",
            f"{row['loss_increase']:+.4f} ± {row['loss_increase_error']:.4f}",
            " ".join(f"{loss:.4f}" for loss in row["loss_by_seed"]),
            "baseline"
            if row["recipe"] == found["baseline"]
            else f"{row['against_baseline']:+.4f} ± {row['against_baseline_error']:.4f}",
        )
        for row in found["rows"]
    ]


def markdown(found: dict) -> str:
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *table_cells(found)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
