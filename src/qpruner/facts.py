"""From the values of a finished run to the facts of its report and the artifact's manifest."""

import platform
from collections.abc import Sequence
from importlib.metadata import version

import psutil

from qpruner import __version__
from qpruner.artifact.stock import how_to_load
from qpruner.body import Body, body_of_plan
from qpruner.compress import Measured
from qpruner.damage import WINDOWS
from qpruner.decide import search as bayesian
from qpruner.decide.widths import kept_fractions
from qpruner.deciding import Decided
from qpruner.do.recover import Trained
from qpruner.job import unfinished
from qpruner.judge.damage import TOLERANCE, unigram_loss
from qpruner.loading import loading
from qpruner.model import cost, memory
from qpruner.model.depth import shortened_config
from qpruner.model.discover import spans
from qpruner.model.embeddings import embedding_shapes
from qpruner.plan import DENSE, Plan
from qpruner.prepare import Prepared
from qpruner.report import facts as report
from qpruner.report.damage import Damage, StageLoss
from qpruner.run import digest_of

HIGHER, LOWER = True, False


def facts_of(
    prepared: Prepared,
    decided: Decided,
    measured: Measured,
    body: Body,
    *,
    command: str,
    seconds: dict[str, float],
    tolerance: float = TOLERANCE,
) -> report.Facts:
    """tolerance: nats per token that the loss may rise without a warning."""
    plan, size = decided.plan, measured.size
    used = report.Memory(
        limit=prepared.forecast.limit,
        predicted=prepared.forecast.stages,
        measured=memory.peak_bytes(),
        layer_by_layer=not prepared.forecast.resident,
    )
    stored = prepared.shape.stored(prepared.shape.plan(prepared.recipe, plan.kept, 16, embeddings={}))
    loads_in, snippet = how_to_load(unfinished(prepared.output), str(prepared.output))
    return report.Facts(
        model_name=prepared.shape.source.name,
        recipe=prepared.recipe.name,
        budget=str(prepared.budget),
        seed=prepared.seed,
        versions={"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers", "peft")}}
        | {"qpruner": __version__},
        machine=machine(),
        command=command,
        sizes=report.Sizes(
            asked=prepared.limit_bytes,
            predicted=size.total,
            on_disk=measured.on_disk,
            original_16bit=prepared.shape.source.bytes_16bit,
            **size.parts(),
        ),  # fmt: skip
        parameters_before=prepared.shape.source.parameters,
        parameters_after=cost.parameter_count(stored),
        metrics=metrics(prepared, measured),
        protocol=measured.artifact["loss"]["protocol"],
        damage=damage(prepared, measured, tolerance),
        layers=layers(prepared, decided),
        projections=projections(prepared, decided),
        embeddings=embeddings(prepared, decided.plan),
        importance=tuple(
            report.Importance(
                group=name,
                layer=g.layer,
                kind=g.kind,
                curve=report.summarise_scores(decided.scores[name].tolist(), plan.kept[name]),
            )
            for name, g in prepared.shape.graph.groups.items()
            if g.kind in prepared.recipe.units
        ),  # fmt: skip
        fusion=fusion(prepared, decided),
        reconstruction=tuple(report.Refitted(**row) for row in measured.reconstruction),
        rounding=tuple(report.RoundedLinear(**row) for row in measured.done.rounding),
        tuning=tuning(measured),
        information=tuple(report.Information(**row) for row in decided.information),
        sensitivities=tuple(
            report.Sensitivity(unit=unit.name, layer=unit.layer, bits=bits, nats=nats)
            for unit, row in zip(decided.units, decided.sensitivity or [], strict=False)
            for bits, nats in zip(prepared.recipe.bits, row, strict=True)
        ),
        search=search(decided, measured),
        recovery=recovery(prepared, decided.plan, measured),
        memory=used,
        stages=tuple(report.Stage(name=name, seconds=s) for name, s in seconds.items()),
        warnings=warnings(prepared, decided, measured),
        notes=tuple(n for n in (*said_before(prepared), task_note(measured.tasks), pace(measured), str(used)) if n),
        loads_in=loads_in,
        snippet=snippet,
        places=tuple(report.Place(**row.to_json()) for row in loading(body, str(prepared.output))),
    )


def body_for(prepared: Prepared, plan: Plan) -> Body:
    """Of the artifact, before and after it is written."""
    shape = prepared.shape
    return body_of_plan(shape.source, shortened_config(shape.source.config, shape.layers), shape.graph, plan)


PREDICTIONS = (  # name, unit, part, key, key of its standard error, whether higher is better
    ("loss", "nats/token", "loss", "loss", "standard_error", LOWER),
    ("perplexity", "", "loss", "perplexity", "perplexity_standard_error", LOWER),
    ("bits per byte", "bits", "loss", "bits_per_byte", "bits_per_byte_standard_error", LOWER),
    ("KL to the original", "nats/token", "kl", "kl", "standard_error", LOWER),
    ("top-1 agreement", "fraction", "kl", "top1_agreement", "top1_agreement_standard_error", HIGHER),
    ("right tokens now wrong", "fraction", "kl", "right_to_wrong", "right_to_wrong_standard_error", LOWER),
    ("wrong tokens now right", "fraction", "kl", "wrong_to_right", "wrong_to_right_standard_error", HIGHER),
)
SPEED = (
    ("tensor bytes in memory", "bytes", "speed", "tensor_bytes", None, LOWER),
    ("peak memory", "bytes", "speed", "peak_bytes", None, LOWER),
    *(
        (name, unit, "speed", key, f"{key}_standard_error", better)
        for name, unit, key, better in (
            ("prefill", "tokens/s", "prefill_tokens_per_second", HIGHER),
            ("decode", "tokens/s", "decode_tokens_per_second", HIGHER),
            ("time to first token", "s", "seconds_to_first_token", LOWER),
        )
    ),
)


def compared(rows: Sequence[tuple], before: dict, after: dict) -> list[report.Metric]:
    """What was measured before and after, for rows like those of `PREDICTIONS`."""
    return [
        report.Metric(
            name=name, unit=unit, before=before.get(part, {}).get(key), after=after.get(part, {}).get(key),
            standard_error_before=before.get(part, {}).get(error) if error else None,
            standard_error_after=after.get(part, {}).get(error) if error else None,
            higher_is_better=better,
        )
        for name, unit, part, key, error, better in rows
    ]  # fmt: skip


def on_disk(before: int, after: int) -> report.Metric:
    return report.Metric(name="bytes on disk", unit="bytes", before=before, after=after, higher_is_better=LOWER)


def metrics(prepared: Prepared, measured: Measured) -> tuple[report.Metric, ...]:
    before, after = measured.original, measured.artifact
    disk = on_disk(prepared.shape.source.bytes_16bit, measured.on_disk)
    predictions = compared(PREDICTIONS, before, after)
    return (*predictions, *task_metrics(measured.tasks), disk, *compared(SPEED, before, after))


def task_metrics(tasks: dict | None) -> list[report.Metric]:
    """Accuracy on every task, each by its own metric, and their mean."""
    if tasks is None:
        return []
    rows = []
    for name, change in tasks["changes"]["tasks"].items():
        key = change["metric"]
        scores = [tasks[which]["tasks"][name] for which in ("original", "artifact")]
        rows.append((f"{name}, {key.replace('_', ' ')}", key, scores))
    if len(rows) > 1:
        rows.append(("mean over tasks", "mean", [tasks["original"], tasks["artifact"]]))
    return [
        report.Metric(
            name=name, unit="fraction", before=before[key], after=after[key], higher_is_better=HIGHER,
            standard_error_before=before[f"{key}_error"], standard_error_after=after[f"{key}_error"],
        )
        for name, key, (before, after) in rows
    ]  # fmt: skip


def task_note(tasks: dict | None) -> str | None:
    """What changed on the same questions, and how much of that may be chance."""
    if tasks is None:
        return None
    change = tasks["changes"]
    error = change["standard_error"]
    by = f"{100 * change['difference']:+.2f}" + ("" if error is None else f" ± {100 * error:.2f}")
    return (
        f"Zero-shot tasks by {tasks['artifact']['harness']}, the same questions before and after: {by} points on the "
        f"mean, {change['flips']:.1%} of the answers went from right to wrong or back (McNemar's p = "
        f"{change['p_value']:.3f})."
    )


def said_before(prepared: Prepared) -> tuple[str | None, ...]:
    return prepared.texts.note, layers_gone(prepared), *prepared.shape.graph.notes


def pace(measured: Measured) -> str | None:
    """How much faster or slower the artifact is, as a sentence."""
    ratios = measured.artifact.get("speed", {}).get("ratios")
    if not ratios:
        return None
    shown = {"prefill": "prefill_tokens_per_second", "decoding": "decode_tokens_per_second"}
    said = [
        f"{name} {ratios[key]['ratio']:.2f} times as fast ({ratios[key]['low']:.2f} to {ratios[key]['high']:.2f})"
        for name, key in shown.items()
        if key in ratios
    ]
    rounds = measured.artifact["speed"]["rounds"]
    return f"Speed against the original, in turn, {rounds} rounds of fresh processes: {', '.join(said)}."


def damage(prepared: Prepared, measured: Measured, tolerance: float) -> Damage:
    predicted = prepared.evaluation.ids[:, 1:].flatten()
    return Damage(
        stages=tuple(StageLoss(**row) for row in measured.stages),
        windows=min(WINDOWS, len(prepared.search.ids)),
        tolerance=tolerance,
        unigram=unigram_loss(predicted.bincount().tolist()),
    )


def layers(prepared: Prepared, decided: Decided) -> tuple[report.Layer, ...]:
    graph, rows = prepared.shape.graph, []
    whole = kept_fractions(len(graph.layers), prepared.recipe, 0.0)
    for index in range(len(graph.layers)):
        counted = {"kv_group": [0, 0], "channel": [0, 0]}
        for name, group in graph.groups.items():
            if group.layer == index and group.kind in counted:
                counted[group.kind][0] += len(decided.plan.kept[name])
                counted[group.kind][1] += group.n_units
        (heads, all_heads), (channels, all_channels) = counted["kv_group"], counted["channel"]
        rows.append(
            report.Layer(
                index=index, kv_groups_kept=heads, kv_groups_total=all_heads, channels_kept=channels,
                channels_total=all_channels, protected=whole[index] == 1.0,
            )
        )  # fmt: skip
    return tuple(rows)


def layers_gone(prepared: Prepared) -> str | None:
    stay = prepared.shape.layers
    return (
        stay and f"Whole decoder layers went; the layers here are those of the original numbered {spans(list(stay))}."
    )


def projections(prepared: Prepared, decided: Decided) -> tuple[report.ProjectionBits, ...]:
    graph, plan, rows = prepared.shape.graph, decided.plan, []
    dims = cost.kept_shapes(graph, plan.kept)
    for projection in graph.projections:
        spec = plan.specs[projection.linears[0]]
        rows.append(
            report.ProjectionBits(
                name=projection.name, layer=projection.layer, bits=spec.bits,
                parameters=sum(dims[n][0] * dims[n][1] for n in projection.linears),
                size_bytes=sum(cost.linear_bytes(*dims[n], plan.specs[n]) for n in projection.linears),
            )
        )  # fmt: skip
    return tuple(rows)


def embeddings(prepared: Prepared, plan: Plan) -> tuple[report.ProjectionBits, ...]:
    """How the embedding and the head are stored."""
    shapes, rows = embedding_shapes(prepared.shape.graph, plan.kept), []
    for name, (n_rows, width) in shapes.items():
        spec = plan.embeddings.get(name, DENSE)
        size = cost.linear_bytes(n_rows, width, spec)
        rows.append(
            report.ProjectionBits(name=name, layer=-1, bits=spec.bits, parameters=n_rows * width, size_bytes=size)
        )
    return tuple(rows)


def fusion(prepared: Prepared, decided: Decided) -> report.Fusion | None:
    fused, groups = decided.fused, prepared.shape.graph.groups
    if fused is None:
        return None
    blend = tuple(
        report.Blend(group=name, layer=groups[name].layer, kind=groups[name].kind, way=way, fine=value)
        for way, each in fused.fine.items()
        for name, value in each.items()
        if groups[name].kind in prepared.recipe.units
    )
    return report.Fusion(way=fused.way, losses=fused.losses, blend=blend, curve=fused.curve)


def tuning(measured: Measured) -> report.Tuning | None:
    found = measured.done.tuning
    if found is None:
        return None
    curve = tuple(report.LossPoint(step=step, loss=loss) for step, loss in found["curve"])
    return report.Tuning(before=found["before"], after=found["after"], curve=curve)


def search(decided: Decided, measured: Measured) -> report.Search | None:
    """Trials count the bytes of what they choose between; here all that is stored besides is added."""
    if not decided.trials:
        return None
    besides = measured.size.total - decided.chosen.size_bytes
    return report.Search(
        trials=tuple(
            report.Trial(number=t.number, origin=t.origin, size_bytes=besides + t.size_bytes, loss=t.loss)
            for t in decided.trials
        ),
        front=tuple(t.number for t in bayesian.pareto(decided.trials)),
        chosen=decided.chosen.number,
    )


def recovery(prepared: Prepared, plan: Plan, measured: Measured) -> report.Recovered | None:
    trained = measured.done.trained
    if not plan.adapter_ranks or not (trained.curve or measured.done.loftq_errors):
        return None
    points = lambda curve: tuple(report.LossPoint(step=step, loss=loss) for step, loss in curve)
    linears = prepared.shape.graph.linears
    return report.Recovered(
        loss=plan.recovery.loss,
        curve=points(trained.curve),
        validation=points(trained.validation),
        best_step=trained.best_step,
        loss_before=measured.done.search_loss.get("before"),
        loss_after=measured.done.search_loss.get("after"),
        loss_merged=measured.done.merging.merged if measured.done.merging else None,
        ships=plan.adapters,
        starts=tuple(
            report.AdapterStart(linear=name, layer=linears[name].layer, plain=plain, loftq=loftq)
            for name, (plain, loftq) in measured.done.loftq_errors.items()
        ),
    )


def training_warnings(trained: Trained) -> list[str]:
    start, best = trained.before_and_best or (0.0, 0.0)
    if best <= start:
        return []
    return [
        f"No step of the training did as well on the validation text as none: {start:.4f} nats per token of its own "
        f"loss before, {best:.4f} after step {trained.best_step}, which ships. Give it a lower learning_rate or more "
        "steps, or leave the adapters out (adapter_rank 0)."
    ]


def warnings(prepared: Prepared, decided: Decided, measured: Measured) -> tuple[str, ...]:
    found = []
    before, after = measured.done.search_loss.get("before"), measured.done.search_loss.get("after")
    if before is not None and after > before:
        found.append(f"Training the adapters made the search text worse: {before:.4f} to {after:.4f} nats per token.")
    found += training_warnings(measured.done.trained)
    silent = [row["unit"] for row in decided.information if row["z"] < 2]
    if silent:
        found.append(
            f"Mutual information shows no evidence of importance (z < 2) for {len(silent)} of "
            f"{len(decided.information)} units."
        )
    return tuple(found)


def manifest_of(prepared: Prepared, decided: Decided, measured: Measured, request: dict) -> dict:
    """What the artifact says of itself. Nothing in it depends on when or how fast it was made."""
    loss = lambda part: {k: v for k, v in part["loss"].items() if k != "window_losses"}
    return {
        "made_by": f"qpruner {__version__}",
        "base_model": prepared.shape.source.name,
        "budget": str(prepared.budget),
        "recipe": prepared.recipe.model_dump(mode="json"),
        "seed": prepared.seed,
        "request": digest_of(request),
        "bytes": {
            "asked": prepared.limit_bytes,
            "predicted": measured.size.total,
            "on_disk": measured.on_disk,
            "original_16bit": prepared.shape.source.bytes_16bit,
            "parts": measured.size.parts(),
        },
        "digests": {
            "model_weights": prepared.weights_digest,
            "model_architecture": prepared.shape.source.digest,
            "texts": prepared.texts.digests(),
        },
        "fingerprints": prepared.texts.fingerprints(),
        "evaluation": {
            "original": loss(measured.original),
            "artifact": loss(measured.artifact),
            **{part: measured.artifact[part] for part in ("kl",) if part in measured.artifact},
        },
    }


def machine() -> str:
    import torch

    total = psutil.virtual_memory().total / 2**30
    accelerator = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no accelerator"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {total:.0f} GiB memory, {accelerator}"
