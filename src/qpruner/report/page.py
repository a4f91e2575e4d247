"""The report of a run as one HTML page, and what each chart shows in words and numbers."""

from typing import TYPE_CHECKING

from qpruner.judge.damage import rises
from qpruner.report.canvas import KINDS
from qpruner.report.charts import CHARTS, absent, charts
from qpruner.report.damage import DID
from qpruner.report.document import Numbers, document, drawing, escaped, html_table, sentence
from qpruner.report.facts import Facts, all_warnings, before_after, bytes_text, title
from qpruner.report.joint import JointFacts
from qpruner.report.joint_page import section as joint_section

if TYPE_CHECKING:
    from rich.table import Table


def _sizes(facts: Facts) -> Numbers:
    sizes = facts.sizes
    whole = {"16-bit original": sizes.original_16bit, "asked": sizes.asked, "predicted": sizes.predicted}
    whole["on disk"] = sizes.on_disk
    rows = [(name, size) for name, size in whole.items()]
    rows += [(f"on disk: {name}", size) for name, size in sizes.parts().items()]
    return Numbers("; ".join(f"{n} {bytes_text(v)}" for n, v in whole.items()) + ".", ("size", "bytes"), rows)


def _damage(facts: Facts) -> Numbers:
    damage = facts.damage
    losses = [s.loss for s in damage.stages]
    rows = [
        (s.stage, s.loss, s.standard_error, rise, s.kl)
        for s, rise in zip(damage.stages, (None, *rises(losses)), strict=True)
    ]
    said = [f"from {losses[0]:.3f} to {losses[-1]:.3f} nats per token on {damage.windows} windows of the search text"]
    if worst := damage.worst():
        said.append(f"it rose most with {DID.get(worst[0], worst[0])}, by {worst[1]:.3f}")
    head = ("after", "loss, nats/token", "standard error", "since the stage before", "KL to the original, nats/token")
    return Numbers(sentence(said), head, rows)


def _plan(facts: Facts) -> Numbers:
    said = []
    for word, counts in (
        ("kv groups", [(la.kv_groups_kept, la.kv_groups_total) for la in facts.layers]),
        ("channels", [(la.channels_kept, la.channels_total) for la in facts.layers]),
    ):
        shares = [kept / total for kept, total in counts if total]
        if shares:
            said.append(f"layers keep {min(shares):.0%} to {max(shares):.0%} of their {word}")
    for bits in sorted({p.bits for p in facts.projections}):
        said.append(f"{sum(p.bits == bits for p in facts.projections)} projections at {bits} bits")
    rows = []
    for la in facts.layers:
        bits = facts.bits_per_weight(la.index)
        kept = (f"{la.kv_groups_kept} of {la.kv_groups_total}", f"{la.channels_kept} of {la.channels_total}")
        rows.append((f"layer {la.index}", *kept, "protected" if la.protected else "", "", bits, None, None))
        for p in facts.projections:
            if p.layer == la.index:
                rows.append((p.name, "", "", "", p.bits, p.bits_per_weight, p.parameters, p.size_bytes))
    for e in facts.embeddings:
        rows.append((e.name, "", "", "", e.bits, e.bits_per_weight, e.parameters, e.size_bytes))
    head = (
        "where",
        "kv groups kept",
        "channels kept",
        "",
        "bits",
        "bits per weight, scales included",
        "weights",
        "bytes",
    )
    return Numbers(sentence(said), head, rows)


def _importance(facts: Facts) -> Numbers:
    rows, overlap = [], 0
    for g in facts.importance:
        points = list(zip(g.curve.score, g.curve.kept, strict=True))
        removed = max((s for s, k in points if not k), default=None)
        stays = min((s for s, k in points if k), default=None)
        overlap += removed is not None and stays is not None and removed > stays
        scores = (min(g.curve.score), removed, stays, max(g.curve.score))
        rows.append((g.group, KINDS[g.kind], f"{g.curve.n_kept} of {g.curve.n_units}", *scores))
    cut = sum(g.curve.n_kept < g.curve.n_units for g in facts.importance)
    said = [f"{cut} of {len(rows)} groups were cut", f"in {overlap} of them a removed unit scores above a kept one"]
    return Numbers(
        sentence(said), ("group", "kind", "kept", "lowest score", "highest removed", "lowest kept", "highest"), rows
    )


def _fusion(facts: Facts) -> Numbers:
    fusion = facts.fusion
    said = [f"taken: {fusion.way}"]
    said += [f"{way} {loss:.4f}" for way, loss in sorted(fusion.losses.items(), key=lambda item: item[1])]
    said = [said[0], "losses on the search text: " + ", ".join(said[1:])] if fusion.losses else said
    rows = [(b.group, KINDS[b.kind], b.way, b.fine) for b in fusion.blend if b.way in ("learned", fusion.way)]
    return Numbers(sentence(said), ("group", "kind", "way", "weight of the fine score"), rows)


def _reconstruction(facts: Facts) -> Numbers:
    rows = [
        (r.linear, r.choice, r.damping, r.condition, r.error_sliced, r.error, r.tokens) for r in facts.reconstruction
    ]
    refitted = [r for r in facts.reconstruction if r.choice != "sliced" and r.error_sliced]
    stacks = [r for r in facts.reconstruction if r.experts is not None]
    said = [f"{len(refitted)} of {len(rows)} linears{' and stacks of experts' if stacks else ''} were refitted"]
    if refitted:
        gone = sum(1 - r.error / r.error_sliced for r in refitted) / len(refitted)
        said.append(f"on the mean {gone:.0%} of their squared error is gone")
    head = ("linear", "choice", "damping", "condition number", "error, sliced", "error, refitted", "tokens")
    if stacks:
        head += ("experts refitted",)
        rows = [(*row, r.experts) for row, r in zip(rows, facts.reconstruction, strict=True)]
    return Numbers(sentence(said), head, rows)


def _rounding(facts: Facts) -> Numbers:
    known = [r for r in facts.rounding if r.tokens and r.error_nearest]
    rows = [(r.linear, r.spec, r.damping, r.error_nearest, r.error, r.tokens) for r in facts.rounding]
    said = [f"{len(known)} of {len(rows)} quantized linears were rounded for the inputs that they get"]
    if known:
        gone = sum(1 - r.error / r.error_nearest for r in known) / len(known)
        said.append(f"on the mean {gone:.0%} of the squared error of rounding to nearest is gone")
    return Numbers(sentence(said), ("linear", "stored as", "damping", "error, nearest", "error", "tokens"), rows)


def _tuning(facts: Facts) -> Numbers:
    t = facts.tuning
    said = [f"divergence from the original on held-out calibration text from {t.before:.4f} to {t.after:.4f}"]
    if t.after >= t.before:
        said.append("that is no gain, so codes and scales stayed as rounding found them")
    return Numbers(sentence(said), ("step", "divergence, nats/token"), [(p.step, p.loss) for p in t.curve])


def _information(facts: Facts) -> Numbers:
    rows = [(r.unit, r.nats, r.null_mean, r.null_std, r.z) for r in facts.information]
    most = max(facts.information, key=lambda r: r.nats)
    above = sum(r.z > 2 for r in facts.information)
    said = [
        f"{above} of {len(rows)} units stand more than 2 std above shuffled pairs",
        f"the most is in {most.unit}, {most.nats:.3g} nats",
    ]
    return Numbers(sentence(said), ("unit", "nats", "shuffled mean", "shuffled std", "z"), rows)


def _sensitivities(facts: Facts) -> Numbers:
    most = max(facts.sensitivities, key=lambda r: r.nats)
    said = f"The costliest is {most.unit} at {most.bits} bits, {most.nats:.3g} nats per token."
    return Numbers(
        said, ("unit", "bits", "KL divergence, nats/token"), [(r.unit, r.bits, r.nats) for r in facts.sensitivities]
    )


def _search(facts: Facts) -> Numbers:
    search = facts.search
    rows = [
        (
            t.number,
            t.origin,
            t.size_bytes,
            t.loss,
            best,
            "yes" if t.number in search.front else "",
            "yes" if t.number == search.chosen else "",
        )
        for t, best in zip(search.trials, search.best_so_far(), strict=True)
    ]
    best = min(search.trials, key=lambda t: t.loss)
    said = [
        f"{len(rows)} trials, the lowest loss {best.loss:.4f} nats per token in trial {best.number} ({best.origin})",
        f"{len(search.front)} on the Pareto front",
    ]
    return Numbers(
        sentence(said), ("trial", "origin", "bytes", "loss, nats/token", "best so far", "on the front", "chosen"), rows
    )


SHIPS = {
    "merged": "merged adapters ship, which take no room",
    "beside": "the adapters ship beside their linears",
}


def _recovery(facts: Facts) -> Numbers:
    r, looked = facts.recovery, {p.step: p.loss for p in facts.recovery.validation}
    what = "divergence from the original" if r.loss == "distillation" else "training loss"
    said = [f"{what} from {r.curve[0].loss:.3f} to {r.curve[-1].loss:.3f} nats per token in {r.curve[-1].step} steps"]
    if r.best_step is not None:
        first, best = r.validation[0], looked[r.best_step]
        said.append(f"on the search text from {first.loss:.4f} to {best:.4f} at step {r.best_step}, which stayed")
    if r.loss_before is not None and r.loss_after is not None:
        said.append(f"loss on the search text from {r.loss_before:.4f} to {r.loss_after:.4f}")
    if r.loss_merged is not None:
        said.append(f"{r.loss_merged:.4f} with the adapters merged and their linears rounded again; {SHIPS[r.ships]}")
    learned = {p.step: p.loss for p in r.curve}
    rows = [(step, learned.get(step, ""), looked.get(step, "")) for step in sorted(learned | looked)]
    return Numbers(sentence(said), ("step", f"{what}, nats/token", "the same on the search text"), rows)


def _loftq(facts: Facts) -> Numbers:
    starts = facts.recovery.starts
    lower = sum(s.loftq < s.plain for s in starts)
    rows = [(s.linear, s.plain, s.loftq) for s in starts]
    return Numbers(
        f"LoftQ starts nearer in {lower} of {len(rows)} linears.", ("linear", "rounding alone", "LoftQ"), rows
    )


NUMBERS = {
    "sizes": _sizes,
    "damage": _damage,
    "plan": _plan,
    "importance": _importance,
    "fusion": _fusion,
    "reconstruction": _reconstruction,
    "rounding": _rounding,
    "tuning": _tuning,
    "information": _information,
    "sensitivities": _sensitivities,
    "search": _search,
    "pareto": _search,
    "recovery": _recovery,
    "loftq": _loftq,
}
SECTIONS = (
    ("What each stage did to the loss", ("damage",)),
    ("What was cut and rounded", ("plan", "importance", "fusion", "reconstruction", "rounding", "tuning")),
    ("What the layers carry", ("information", "sensitivities")),
    ("The search", ("search", "pareto")),
    ("Recovery", ("recovery", "loftq")),
)
SEARCHED_APART = ("information", "sensitivities", "search", "pareto")  # of a joint search its own section says more


def page(facts: Facts, joint: JointFacts | None = None) -> str:
    """The whole report as HTML, plotly.js inside.

    Args:
        joint: of the search that the plan was taken from, shown as a section.
    Raises:
        MissingExtraError: plotly is not installed.
    """
    drawn, missing = charts(facts), absent(facts)
    figures = {name: _chart(name, figure, facts) for name, figure in drawn.items()}
    if "sizes" in missing:
        figures["sizes"] = f"<p class=absent>{escaped(missing['sizes'])}</p>"
    body = "\n".join(
        [
            f"<header><h1>{escaped(title(facts))}</h1><p class=lead>{escaped(_lead(facts))}</p></header>",
            _warnings(facts),
            "<section class=first>",
            f"<div><h2>Before and after</h2>{_before_after(facts)}<p class=small>{escaped(facts.protocol)}</p></div>",
            f"<div><h2>Size</h2>{figures['sizes']}</div>",
            "</section>",
            f"<section><h2>Use it</h2><p>{escaped(facts.loads_in)}</p>"
            f"<pre><code>{escaped(facts.snippet)}</code></pre>{_places(facts)}</section>",
            *(
                f"<section><h2>{escaped(head)}</h2>{''.join(figures[n] for n in names if n in drawn)}</section>"
                for head, names in SECTIONS
                if drawn.keys() & set(names)
            ),
            "" if joint is None else joint_section(joint, facts.sizes.asked),
            _run(facts),
            _left_out([why for name, why in missing.items() if joint is None or name not in SEARCHED_APART]),
        ]
    )
    return document(title(facts), body)


def _left_out(reasons: list[str]) -> str:
    """What other runs show and this one cannot, all in one place."""
    if not reasons:
        return ""
    items = "".join(f"<li>{escaped(why)}</li>" for why in reasons)
    return f"<section><h2>Not part of this run</h2><ul class=absent>{items}</ul></section>"


def _lead(facts: Facts) -> str:
    share = facts.sizes.on_disk / facts.sizes.original_16bit if facts.sizes.original_16bit else 0
    return (
        f"Recipe {facts.recipe}, seed {facts.seed}. The files hold {share:.1%} of the bytes of the 16-bit original; "
        f"{facts.parameters_before:,} parameters before, {facts.parameters_after:,} after."
    )


def _warnings(facts: Facts) -> str:
    sentences = all_warnings(facts)
    if not sentences:
        return ""
    items = "".join(f"<li>{escaped(s)}</li>" for s in sentences)
    return f"<aside class=warnings aria-labelledby=warnings><h2 id=warnings>Warnings</h2><ul>{items}</ul></aside>"


def _before_after(facts: Facts) -> str:
    whole = lambda text: text.replace("± ", "±\N{NO-BREAK SPACE}").replace(" %", "\N{NO-BREAK SPACE}%")
    rows = [(name, *map(whole, values)) for name, *values in before_after(facts)]
    return html_table(("", "before", "after", "change"), rows, "before-after")


def _chart(name: str, figure, facts: Facts) -> str:
    return drawing(name, CHARTS[name].title, CHARTS[name].reading, figure, NUMBERS[name](facts))


def _places(facts: Facts) -> str:
    """A row for each place, with its command."""
    rows = ""
    for place in facts.places:
        command = f"<br><code>{escaped(place.command)}</code>" if place.command else ""
        rows += f"<tr><th scope=row>{escaped(place.target)}</th><td>{'yes' if place.loads else 'not as it is'}</td>"
        rows += f"<td>{escaped(place.sentence)}{command}</td></tr>"
    head = "<thead><tr><th scope=col>loads in</th><th scope=col></th><th scope=col>how, or why not</th></tr></thead>"
    return f"<table class=places>{head}<tbody>{rows}</tbody></table>" if rows else ""


def _run(facts: Facts) -> str:
    seconds = [(s.name, s.seconds) for s in facts.stages] + [("all", sum(s.seconds for s in facts.stages))]
    stages = (
        html_table(("stage", "seconds"), [(name, f"{s:,.1f}") for name, s in seconds], "narrow") if facts.stages else ""
    )
    notes = "".join(f"<li>{escaped(n)}</li>" for n in facts.notes)
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return (
        "<section><h2>The run</h2>"
        f"<p>To repeat it:</p><pre><code>{escaped(facts.command)}</code></pre>"
        f"<dl><dt>Machine</dt><dd>{escaped(facts.machine)}</dd><dt>Versions</dt><dd>{escaped(versions)}</dd>"
        f"<dt>Seed</dt><dd>{facts.seed}</dd></dl>{stages}"
        f"{f'<h3>Notes</h3><ul>{notes}</ul>' if notes else ''}</section>"
    )


def before_after_table(heading: str, rows: list[tuple[str, ...]]) -> "Table":
    """For a terminal: name, before, after and change of every metric."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(heading), title_justify="left", caption_justify="left")
    table.add_column("")
    for head in ("before", "after", "change"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def text_table(facts: Facts) -> "Table":
    """The before/after table for a terminal, with the warnings below it."""
    from rich.text import Text

    table = before_after_table(title(facts), before_after(facts))
    if warnings := all_warnings(facts):
        table.caption = Text("\n".join(f"Warning: {sentence}" for sentence in warnings), style="bold not italic")
    return table
