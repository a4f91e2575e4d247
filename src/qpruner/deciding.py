"""The stages of a run that decide: what is measured of the model, and the plan that is made of it."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from qpruner.decide import search as bayesian
from qpruner.decide import widths
from qpruner.decide.allocate import ALLOCATORS, Choices
from qpruner.decide.fusion import Blend, Fused, Parameters, fuse, train_
from qpruner.decide.influence import INFLUENCE, block_influence
from qpruner.decide.information import BitUnit, bit_units, measure_information
from qpruner.decide.scores import scorer_of
from qpruner.decide.sensitivity import measure_sensitivity
from qpruner.do.quantize import Candidates
from qpruner.files import write_text
from qpruner.job import Job
from qpruner.judge import loss as judge
from qpruner.judge.divergence import kl_from_logprobs, reference_logprobs
from qpruner.model import cost
from qpruner.plan import Plan, QuantSpec
from qpruner.refitting import reconstructed_on_trial
from qpruner.run import Journal, digest_of
from qpruner.shape import EVALUATION_BATCH, measures_influence, stored_sizes

if TYPE_CHECKING:
    from qpruner.joint.stages import Searched

INFORMATION_WINDOWS = 32
HEADER_SLACK = 4  # bytes per linear
SENSITIVITY_PART = 2  # one in so many windows of the search text: there are as many passes as candidates


@dataclass(frozen=True)
class Decided:
    """The plan, and the numbers that it was decided on, for the report."""

    plan: Plan
    scores: dict[str, Tensor]
    units: tuple[BitUnit, ...]
    information: list[dict]
    sensitivity: list[list[float]] | None
    trials: list[bayesian.Trial]
    chosen: bayesian.Trial | None
    fused: Fused | None = None
    searched: "Searched | None" = None


def measure_scores(job: Job) -> tuple[dict[str, Tensor], Fused | None]:
    """One score for every unit; of a hybrid score also how its two became one."""
    windows = job.prepared.calibration.ids
    inputs = job.inputs(
        score=job.recipe.score, fisher=job.recipe.fisher,
        windows=digest_of(windows.tolist()),
    )  # fmt: skip
    scorer = scorer_of(job.recipe, windows.shape[1])
    generator = torch.Generator().manual_seed(job.prepared.seed)
    with job.scratch("importance", inputs) as scratch:
        measured = job.run.tensors(
            "importance",
            inputs,
            lambda: scorer(job.original(), job.graph, windows, generator, scratch, job.progress("importance")),
        )
    if job.recipe.score != "hybrid":
        return measured, None
    found = _fused(job, measured, inputs)
    return found.scores, found


def _fused(job: Job, measured: dict[str, Tensor], inputs: dict) -> Fused:
    recipe, prepared = job.recipe, job.prepared
    sizes = stored_sizes(job.shape, recipe)
    inputs = inputs | dict(
        fusion=recipe.fusion, steps=recipe.fusion_steps, counts=prepared.counts, scope=recipe.scope,
        limit=prepared.limit_bytes, search=digest_of(prepared.search.ids.tolist()),
        refits=[recipe.reconstruction, recipe.added_biases, recipe.dampings, recipe.held_out], **job.basis,
    )  # fmt: skip

    with job.scratch("fusion", inputs) as scratch:

        def train(blend: Blend) -> tuple[list[Parameters], tuple[float, ...]]:
            return train_(
                blend, job.original(), prepared.calibration.ids, steps=recipe.fusion_steps, scratch=scratch,
                generator=torch.Generator().manual_seed(prepared.seed), on_step=job.progress("fusion"),
            )  # fmt: skip

        def trial(scores: dict[str, Tensor]) -> float:
            kept = widths.choose(job.graph, recipe, scores, prepared.counts, sizes, prepared.limit_bytes)
            name = f"trial-{digest_of(kept)[:16]}"
            if not scratch.finished(name):
                place, folder = scratch.part(name), job.passes / name
                pruned = reconstructed_on_trial(job, kept, folder, place).pruned(kept, job.precision)
                loss = judge.evaluate_loss(judge.Streamed(pruned, place), prepared.search, batch_size=job.batch).loss
                place.clear()
                shutil.rmtree(folder, ignore_errors=True)
                scratch.finish(name, {"loss": torch.tensor(loss, dtype=torch.float64)})
            return float(scratch.result(name)["loss"])

        def compute() -> dict[str, Tensor]:
            pools = widths.pools(job.graph, recipe, prepared.counts, sizes[0])
            show = job.progress("trials of fusion")
            return fuse(measured, pools, job.graph, recipe.fusion, train, trial, show).to_tensors()

        return Fused.from_tensors(job.run.tensors("fusion", inputs, compute))


def worth_of_layers(job: Job, scores: Mapping[str, Tensor]) -> list[float]:
    """One number for each decoder layer, higher = keep: from the scores of its units, or measured of it as a whole."""
    if not measures_influence(job.recipe):
        return widths.layer_worth(job.graph, scores)
    windows = job.prepared.calibration.ids
    inputs = job.inputs(windows=digest_of(windows.tolist()))
    with job.scratch("layer-scores", inputs) as scratch:
        found = job.run.tensors(
            "layer_scores",
            inputs,
            lambda: {INFLUENCE: block_influence(job.original(), windows, scratch, job.progress("block influence"))},
        )
    return found[INFLUENCE].tolist()


def measure_layers(job: Job, kept: dict) -> list[dict]:
    """What the output of each unit of bits tells about the prediction; nothing where there is one choice of bits."""
    if not units_of(job):
        return []
    windows, estimator = job.prepared.calibration.ids[:INFORMATION_WINDOWS], job.recipe.information
    inputs = job.inputs(
        kept=kept,
        layers=job.shape.layers,
        windows=digest_of(windows.tolist()),
        estimator=estimator,
        unit=job.recipe.bit_unit,
        **job.basis,
    )
    with job.scratch("information", inputs) as scratch:
        return job.run.values(
            "information",
            inputs,
            lambda: measure_information(
                job.pruned(kept, job.precision), units_of(job), windows, estimator=estimator,
                seed=job.prepared.seed, scratch=scratch, on_layer=job.progress("mutual information"),
            ),
        )  # fmt: skip


def choose_bits(
    job: Job, scores, kept: dict, information: list[dict], loaded: tuple[nn.Module, Candidates] | None
) -> Decided:
    """The plan. loaded: the pruned model, measured with candidates in place and left with the last of them."""
    if not units_of(job):
        plan, sensitivity, trials, chosen = job.plan(kept, job.recipe.bits[0]), None, [], None
    else:
        sensitivity, trials, chosen = None, [], None
        if job.recipe.tries_adapters:
            sensitivity = _sensitivity(job, *loaded, kept)
        choices = _choices(job, kept, information, sensitivity)
        if job.recipe.allocation == "bayesian":
            trials = _search(job, *loaded, choices, kept)
            chosen = bayesian.best(trials)
        levels = chosen.levels if chosen else ALLOCATORS[job.recipe.allocation](choices)
        plan = job.plan(kept, _bits_of(job, levels))
    return _written(job, Decided(plan, scores, units_of(job), information, sensitivity, trials, chosen))


def settled(job: Job, scores: dict[str, Tensor], kept: dict, specs: dict[str, QuantSpec]) -> Decided:
    """The plan where units and specs were chosen together."""
    return _written(job, Decided(job.plan(kept, specs), scores, (), [], None, [], None))


def _written(job: Job, decided: Decided) -> Decided:
    size = job.shape.size(decided.plan).total
    assert size <= job.prepared.limit_bytes, f"{size} bytes planned, {job.prepared.limit_bytes} allowed"
    write_text(job.run.folder / "plan.json", decided.plan.to_json())
    return decided


def shipping(job: Job, decided: Decided, plan: Plan) -> Decided:
    """The same with the plan that ships, where carrying it out settled what was open."""
    return decided if plan == decided.plan else _written(job, replace(decided, plan=plan))


def units_of(job: Job) -> tuple[BitUnit, ...]:
    """What shares a choice of bits; nothing where there is none to make."""
    return bit_units(job.graph, job.recipe.bit_unit) if len(job.recipe.bits) > 1 else ()


def search_loss(job: Job, model: nn.Module) -> float:
    return judge.evaluate_loss(model, job.prepared.search, batch_size=EVALUATION_BATCH).loss


def _quantized_inputs(job: Job, kept: dict, **facts) -> dict:
    plan = job.plan(kept, 16)
    return job.inputs(
        kept=kept, layers=job.shape.layers, unit=job.recipe.bit_unit,
        specs=[job.recipe.spec(bits).model_dump() for bits in job.recipe.bits], ranges=plan.rounding.ranges,
        ranks=plan.adapter_ranks, loftq=[plan.recovery.loftq_iterations, plan.recovery.adapter_alpha],
        windows=digest_of(job.prepared.search.ids.tolist()), **job.basis, **facts,
    )  # fmt: skip


def _sensitivity(job: Job, model, candidates, kept) -> list[list[float]]:
    windows = job.prepared.search.first(max(1, len(job.prepared.search.ids) // SENSITIVITY_PART))

    def compute() -> list[list[float]]:
        reference = reference_logprobs(model, windows)

        def divergence(bits: dict[str, int]) -> float:
            candidates.put_({name: job.recipe.spec(bits.get(name, 16)) for name in job.graph.linears})
            return kl_from_logprobs(model, windows, reference).kl

        return measure_sensitivity(units_of(job), job.recipe.bits, divergence, job.progress("sensitivity"))

    return job.run.values("sensitivity", _quantized_inputs(job, kept), compute)


def _bits_of(job: Job, levels: tuple[int, ...]) -> dict[str, int]:
    return {n: job.recipe.bits[level] for u, level in zip(units_of(job), levels, strict=True) for n in u.linears}


def _choices(job: Job, kept, information, sensitivity) -> Choices:
    """What each unit weighs at each level, and what is left of the budget for all of them."""

    dims = cost.kept_shapes(job.graph, kept)
    sizes = np.array(
        [
            [sum(cost.linear_bytes(*dims[n], job.recipe.spec(b)) for n in u.linears) for b in job.recipe.bits]
            for u in units_of(job)
        ]
    )
    sized = job.recipe.model_copy(update={"rank_by": "uniform"})  # adapters never take more than by this rule
    plans = [job.shape.plan(sized, kept, b, embeddings=job.embeddings) for b in job.recipe.bits]
    stored = [job.shape.size(plan) for plan in plans]
    # The header names shapes and offsets, whose digits depend on the mixture: a few bytes a linear at the most.
    headers = max(size.headers for size in stored) + HEADER_SLACK * len(job.graph.linears)
    elsewhere = stored[0].total - stored[0].linears - stored[0].headers + headers
    return Choices(
        units=tuple(u.name for u in units_of(job)),
        bits=job.recipe.bits,
        sizes_bytes=sizes,
        limit_bytes=job.prepared.limit_bytes - elsewhere,
        information=np.array([row["nats"] for row in information]),
        sensitivity=None if sensitivity is None else np.array(sensitivity),
        seed=job.prepared.seed,
    )


def _search(job: Job, model, candidates, choices: Choices, kept) -> list[bayesian.Trial]:
    journal = Journal(
        job.run.folder / "trials.jsonl",
        _quantized_inputs(job, kept, limit=choices.limit_bytes, information=choices.information.tolist()),
    )
    starts = {name: allocate(choices) for name, allocate in ALLOCATORS.items() if name != "random"}

    def evaluate(levels: tuple[int, ...]) -> float:
        candidates.put_({n: job.recipe.spec(b) for n, b in _bits_of(job, levels).items()})
        return search_loss(job, model)

    def on_trial(trial: bayesian.Trial) -> None:
        journal.append(json.loads(trial.to_json()))
        job.on_progress("search", trial.number + 1, job.recipe.trials)

    past = [bayesian.Trial.from_json(json.dumps(line)) for line in journal.lines][: job.recipe.trials]
    return bayesian.search(
        choices, evaluate, starts=starts, n_trials=job.recipe.trials, seed=job.prepared.seed,
        journal=past, on_trial=on_trial,
    )  # fmt: skip
