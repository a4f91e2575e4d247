"""Every picture of a joint search for those who do not see it: what it shows in one sentence, and its values."""

from qpruner.report.document import Numbers, sentence
from qpruner.report.facts import bytes_text
from qpruner.report.joint import JointFacts, Limit, Prediction, agreement
from qpruner.report.joint_layers import UNITS


def front(facts: JointFacts) -> Numbers:
    chosen: dict[int, list[str]] = {}
    for limit in facts.limits:
        if limit.trial is not None:
            chosen.setdefault(limit.trial, []).append(limit.text)
    rows = [
        (
            f"trial {t.number}", t.origin, t.size_bytes, "lost" if t.loss is None else t.loss, t.standard_error,
            t.n_windows, t.left_text(facts.n_layers), "yes" if t.number in facts.front else "",
            ", ".join(chosen.get(t.number, ())),
        )
        for t in facts.trials
    ]  # fmt: skip
    rows += [
        ("control", name, p.size_bytes, p.loss, None, None, "", "", "")
        for name, points in facts.controls.items()
        for p in points
    ]
    lost = sum(t.loss is None for t in facts.trials)
    early = sum(t.loss is not None and t.n_windows < facts.n_windows for t in facts.trials)
    said = [f"{len(facts.trials)} trials", f"{len(facts.front)} of them on the front"]
    said += [f"{early} given up early"] * bool(early) + [f"{lost} lost with their worker"] * bool(lost)
    compared = [
        limit.loss < control[1]
        for limit in facts.limits
        if limit.measured and (control := facts.best_control(limit.size_bytes))
    ]
    said += [f"below the best control at {sum(compared)} of {len(compared)} limits"] * bool(compared)
    head = ("", "who", "bytes", "loss, nats/token", "standard error", "windows", "what is left", "front", "chosen for")
    return Numbers(sentence(said), head, rows)


def convergence(facts: JointFacts) -> Numbers:
    lines = [facts.best_so_far(limit.size_bytes) for limit in facts.limits]
    said = []
    for limit, line in zip(facts.limits, lines, strict=True):
        if line[-1] < float("inf"):
            said.append(f"{limit.text}: {line[-1]:.4g} after trial {facts.trials[line.index(line[-1])].number}")
        else:
            said.append(f"{limit.text}: nothing that fits")
    rows = [
        (f"{i}", *(None if v == float("inf") else v for v in each))
        for i, each in enumerate(zip(*lines, strict=True), start=1)
    ]
    return Numbers(sentence(said), ("trials that ended", *(limit.text for limit in facts.limits)), rows)


def predictions(predictions: tuple[Prediction, ...]) -> Numbers:
    rows = [(p.name, p.predicted, "lost" if p.measured is None else p.measured) for p in predictions]
    return Numbers(trust(predictions), ("plan", "predicted", "measured"), rows)


def trust(predictions: tuple[Prediction, ...]) -> str:
    """How far to believe predictions, as a sentence."""
    found = agreement(predictions)
    if found is None:
        return f"{len(predictions)} plans are too few, or too much alike, to tell how good predictions are."
    verdict = "do not rely on them"
    if found.spearman >= 0.7:
        verdict = "they order plans nearly as measuring does" if found.spearman >= 0.9 else "they order plans roughly"
    return (
        f"On {found.pairs} plans, predictions and measurements have a rank correlation (Spearman) of "
        f"{found.spearman:.2f}, and their logarithms a correlation (Pearson) of {found.pearson:.2f}: {verdict}."
    ).replace("-", "\N{MINUS SIGN}")


def sensitivities(facts: JointFacts) -> Numbers:
    rows = [(s.name, o.words, o.estimated, o.measured) for s in facts.sensitivities for o in s.options]
    pairs = [
        Prediction(predicted=o.estimated, measured=o.measured)
        for s in facts.sensitivities
        for o in s.options
        if o.estimated is not None and o.measured is not None
    ]
    measured = sum(row[3] is not None for row in rows)
    said = [f"{len(rows)} options of {len(facts.sensitivities)} choices, {measured} of them measured"]
    if found := agreement(pairs):
        said.append(f"estimates and measurements have a rank correlation of {found.spearman:.2f}")
    return Numbers(sentence(said), ("choice", "option", "estimated, nats/token", "measured, nats/token"), rows)


def gate_training(facts: JointFacts) -> Numbers:
    curve = facts.gates.curve
    said = [
        f"in {curve[-1].step} steps the loss goes from {curve[0].loss:.4g} to {curve[-1].loss:.4g} nats per token",
        f"the expected size from {bytes_text(curve[0].size_bytes)} to {bytes_text(curve[-1].size_bytes)}",
    ]
    return Numbers(
        sentence(said), ("step", "loss, nats/token", "bytes"), [(f"{p.step}", p.loss, p.size_bytes) for p in curve]
    )


def gates(facts: JointFacts) -> Numbers:
    at = {text: layers for text, layers in facts.gates.at.items() if layers}
    rows = [(text, f"{g.layer}", f"{g.kept:.1%}", g.bits) for text, layers in at.items() for g in layers]
    least = {text: min(layers, key=lambda g: g.kept) for text, layers in at.items()}
    said = [f"at {text} layer {g.layer} keeps least, {g.kept:.0%} of its weights" for text, g in least.items()]
    return Numbers(sentence(said), ("limit", "layer", "weights kept", "bits per weight"), rows)


def layers(limit: Limit) -> Numbers:
    rows = [("embedding", p.name, "", p.spec, p.parameters, p.size_bytes) for p in limit.embeddings]
    for layer in limit.layers:
        if not layer.stays:
            rows.append((f"layer {layer.index}", "goes as a whole", "", "", None, None))
        for p in layer.projections if layer.stays else ():
            kept = f"{layer.kept(p.units):.0%} of {UNITS[p.units]}" if p.units else ""
            rows.append((f"layer {layer.index}", p.name, kept, p.spec, p.parameters, p.size_bytes))
    rows += [("part", name, "", "", None, size) for name, size in limit.parts.items()]
    stay = [layer for layer in limit.layers if layer.stays]
    said = [f"{len(stay)} of {len(limit.layers)} layers stay"]
    for units, word in UNITS.items():
        shares = [layer.kept(units) for layer in stay]
        if shares:
            said.append(f"they keep {min(shares):.0%} to {max(shares):.0%} of their {word}")
    bits = [p.bits for layer in stay for p in layer.projections]
    said += [f"{bits.count(b)} projections at {b} bits" for b in sorted(set(bits))]
    if limit.parts:
        said.append("bytes: " + ", ".join(f"{name} {size:,}" for name, size in limit.parts.items()))
    return Numbers(sentence(said), ("", "what", "kept", "stored as", "weights", "bytes"), rows)
