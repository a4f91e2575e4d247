"""The report: facts, the figures drawn from them, and the page."""

import io
import json
import math
import random
import re
import shutil
import subprocess
import sys
from html import escape
from html.parser import HTMLParser

import pytest

from qpruner.errors import MissingExtraError, OutputError
from qpruner.report import (
    AdapterStart,
    Blend,
    Damage,
    Facts,
    Fusion,
    Importance,
    Information,
    Layer,
    LossPoint,
    Metric,
    ProjectionBits,
    Recovered,
    Refitted,
    RoundedLinear,
    Search,
    Sensitivity,
    Sizes,
    Stage,
    StageLoss,
    Trial,
    Tuning,
    absent,
    all_warnings,
    before_after,
    charts,
    page,
    summarise_scores,
    text_table,
    title,
)
from qpruner.report.canvas import DARK
from qpruner.report.charts import CHARTS
from qpruner.report.document import json_text
from qpruner.report.facts import bytes_text, label
from qpruner.report.page import NUMBERS, SECTIONS

PROJECTIONS = {
    "self_attn.q_proj, k_proj, v_proj": 4,
    "self_attn.o_proj": 2,
    "mlp.gate_proj, up_proj": 6,
    "mlp.down_proj": 3,
}


def example() -> Facts:
    """A 50 % run on the bundled model: 6 layers, 24 projections, 25 trials. Realistic, not measured."""
    draw = random.Random(0)
    layers, importance = [], []
    for i in range(6):
        protected = i in (0, 5)
        kv, channels = (4, 768) if protected else (draw.choice([2, 3, 3]), draw.choice([384, 448, 512, 576]))
        layers.append(
            Layer(
                index=i,
                kv_groups_kept=kv,
                kv_groups_total=4,
                channels_kept=channels,
                channels_total=768,
                protected=protected,
            )
        )
        for kind, n, k, name in (("kv_group", 4, kv, "self_attn"), ("channel", 768, channels, "mlp")):
            scores = [math.exp(draw.gauss(-4 + i / 3, 1)) for _ in range(n)]
            kept = sorted(range(n), key=scores.__getitem__)[n - k :]
            curve = summarise_scores(scores, kept)
            importance.append(Importance(group=f"model.layers.{i}.{name}", layer=i, kind=kind, curve=curve))

    projections, information, sensitivities, starts = [], [], [], []
    for i in range(6):
        for short, weights in PROJECTIONS.items():
            bits, parameters, name = draw.choice([4, 4, 8]), weights * 32768, f"model.layers.{i}.{short}"
            size = parameters * bits // 8 + parameters // (32 if bits == 4 else 128)
            projections.append(ProjectionBits(name=name, layer=i, bits=bits, parameters=parameters, size_bytes=size))
            mean, std = draw.uniform(0.01, 0.02), draw.uniform(0.002, 0.006)
            nats = mean + draw.choice([0.2, 1, 6, 12]) * std + 0.05 * math.exp(-i / 2)
            z = (nats - mean) / std
            information.append(Information(unit=name, layer=i, nats=nats, null_mean=mean, null_std=std, z=z))
            cost = 0.02 * math.exp(draw.gauss(-0.3 * i, 0.7))
            sensitivities.append(Sensitivity(unit=name, layer=i, bits=4, nats=cost))
            sensitivities.append(Sensitivity(unit=name, layer=i, bits=8, nats=cost / 80))
            plain = 0.09 if bits == 4 else 0.006
            starts.append(AdapterStart(linear=name, layer=i, plain=plain, loftq=plain * draw.uniform(0.75, 0.95)))

    blend, reconstruction, rounding = [], [], []
    for i in range(6):
        for kind, short, linear in (("kv_group", "self_attn", "o_proj"), ("channel", "mlp", "down_proj")):
            group = f"model.layers.{i}.{short}"
            for way, fine in (("learned", 0.15 + 0.14 * i), ("mean", 0.5)):
                blend.append(Blend(group=group, layer=i, kind=kind, way=way, fine=fine))
            error, choice = draw.uniform(0.05, 0.4), "sliced" if i == 4 and kind == "channel" else "least-squares"
            reconstruction.append(
                Refitted(
                    linear=f"{group}.{linear}",
                    layer=i,
                    choice=choice,
                    damping=None if choice == "sliced" else 0.01,
                    condition=None if choice == "sliced" else 120.0,
                    error_sliced=error,
                    error=error if choice == "sliced" else 0.6 * error,
                    tokens=16384,
                )
            )
            nearest = draw.uniform(0.01, 0.1)
            rounding.append(
                RoundedLinear(
                    linear=f"{group}.{linear}",
                    layer=i,
                    spec="int3 g32 asymmetric",
                    damping=0.01,
                    condition=80.0,
                    error_nearest=nearest,
                    error=0.7 * nearest,
                    tokens=16384,
                )  # fmt: skip
            )
    losses = {"fine": 2.61, "coarse": 2.58, "mean": 2.55, "attention": 2.56, "learned": 2.57}
    fusion = Fusion(way="mean", losses=losses, blend=tuple(blend), curve=(2.9, 2.7, 2.6))

    trials, asked = [], 5_246_208
    for number in range(25):
        origin = (
            ["uniform", "mutual-information", "sensitivity", "random", "random"][number] if number < 5 else "bayesian"
        )
        size = asked - draw.randrange(0, 400_000)
        loss = 2.52 + (asked - size) / 8e6 + abs(draw.gauss(0, 0.03)) - 0.002 * number
        trials.append(Trial(number=number, origin=origin, size_bytes=size, loss=loss))
    front = [
        t for t in trials if not any(u.size_bytes <= t.size_bytes and u.loss < t.loss for u in trials if u is not t)
    ]
    chosen = min(trials, key=lambda t: t.loss).number
    curve = [LossPoint(step=s, loss=2.33 + 0.25 * math.exp(-s / 25) + draw.gauss(0, 0.04)) for s in range(1, 101)]
    rows = [
        ("loss", "nats/token", 2.314, 2.381, 0.0121, 0.0123, False),
        ("perplexity", "", 10.11, 10.82, 0.122, 0.133, False),
        ("bits per byte", "bits", 1.053, 1.084, 0.0055, 0.0056, False),
        ("KL to the original", "nats/token", None, 0.1132, None, 0.0021, False),
        ("top-1 agreement", "fraction", None, 0.8312, None, 0.0031, True),
        ("bytes on disk", "bytes", 10_499_312, 5_245_980, None, None, False),
        ("tensor bytes in memory", "bytes", 10_492_416, 5_243_120, None, None, False),
        ("peak memory", "bytes", 412_000_000, 398_000_000, None, None, False),
        ("prefill", "tokens/s", 10412.0, 13120.0, 120.0, 140.0, True),
        ("decode", "tokens/s", 212.4, 251.9, 3.1, 2.8, True),
    ]
    keys = "name unit before after standard_error_before standard_error_after higher_is_better".split()
    stored, other, adapters, headers = sum(p.size_bytes for p in projections), 6_656, 393_216, 9_840
    on_disk = 5_245_980
    return Facts(
        model_name="pystdlib-5M",
        recipe="qpruner",
        budget="50%",
        seed=0,
        versions={"qpruner": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
        machine="2 cores of an x86-64 server, 8 GiB of memory, no accelerator",
        command="qpruner compress pystdlib-5M --budget 50% -o build/demo --recipe qpruner --trials 25 --seed 0",
        sizes=Sizes(
            asked=5_246_208,
            predicted=on_disk,
            on_disk=on_disk,
            original_16bit=10_492_416,
            linears=stored,
            embeddings=on_disk - stored - other - adapters - headers,
            other=other,
            adapters=adapters,
            headers=headers,
        ),
        parameters_before=5_246_208,
        parameters_after=4_102_912,
        metrics=tuple(Metric(**dict(zip(keys, row, strict=True))) for row in rows),
        protocol="float32; windows of 511 tokens with <s> in front, no overlap, the first 200 windows; standard errors "
        "over windows.",
        layers=tuple(layers),
        projections=tuple(projections),
        importance=tuple(importance),
        information=tuple(information),
        sensitivities=tuple(sensitivities),
        fusion=fusion,
        reconstruction=tuple(reconstruction),
        rounding=tuple(rounding),
        tuning=Tuning(
            before=0.12,
            after=0.07,
            curve=[LossPoint(step=s, loss=0.05 + 0.07 * math.exp(-s / 40)) for s in range(4, 201, 4)],
        ),
        damage=Damage(
            stages=[
                StageLoss(stage=stage, loss=loss, standard_error=0.05, kl=kl)
                for stage, loss, kl in [
                    ("original", 2.31, 0.0),
                    ("cut", 2.61, 0.31),
                    ("refitted", 2.45, 0.16),
                    ("rounded", 2.49, 0.2),
                    ("recovered", 2.4, 0.1),
                ]
            ],
            windows=8,
            tolerance=0.5,
            unigram=5.4,
        ),
        search=Search(trials=tuple(trials), front=tuple(t.number for t in front), chosen=chosen),
        recovery=Recovered(curve=tuple(curve), loss_before=2.521, loss_after=2.402, starts=tuple(starts)),
        stages=tuple(Stage(name=n, seconds=s) for n, s in [("measure", 41.2), ("search", 88.5), ("recover", 71.0)]),
        warnings=("The calibration text is short (9,812 tokens): scores of rarely used channels are noisy.",),
        notes=("Layers 0 and 5 were protected by the recipe.",),
        loads_in="Loads in transformers 5.x after `import qpruner`.",
        snippet="import qpruner\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("build/demo")',
    )


@pytest.fixture(scope="module")
def facts():
    return example()


@pytest.fixture(scope="module")
def figures(facts):
    return charts(facts)


@pytest.fixture(scope="module")
def html(facts):
    return page(facts)


def bare(facts: Facts, **changes) -> Facts:
    """The same run with nothing that is optional."""
    empty = dict.fromkeys(
        ("importance", "reconstruction", "rounding", "information", "sensitivities", "stages", "notes"), ()
    )
    empty |= dict.fromkeys(("fusion", "tuning", "search", "recovery", "damage"))
    return facts.model_copy(update={**empty, **changes})


# ---------------------------------------------------------------- facts


def test_facts_survive_json(facts):
    assert Facts.from_json(facts.to_json()) == facts
    assert Facts.from_json(bare(facts).to_json()) == bare(facts)


def test_an_infinite_perplexity_survives_json_and_reaches_the_page(facts):
    broken = bare(facts, metrics=(Metric(name="perplexity", before=10.0, after=math.inf, higher_is_better=False),))
    json.loads(broken.to_json(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert Facts.from_json(broken.to_json()) == broken
    assert "not finite" in page(broken)


def test_a_damaged_facts_file_is_refused_with_its_place(facts, tmp_path):
    data = json.loads(facts.to_json())
    data["sizes"]["asked"] = "much"
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(data))
    with pytest.raises(OutputError, match=r"facts\.json.*'sizes\.asked'"):
        Facts.read(path)
    with pytest.raises(OutputError, match="no facts of a run"):
        Facts.read(tmp_path / "absent.json")


def test_front_and_chosen_must_name_trials():
    trial = Trial(number=3, origin="random", size_bytes=10, loss=1.0)
    for wrong in (dict(front=(3, 4)), dict(chosen=0), dict(trials=(trial, trial))):
        with pytest.raises(ValueError, match="trials"):
            Search(**{"trials": (trial,), **wrong})


def test_best_so_far_is_monotone_and_skips_what_is_not_a_number(facts):
    best = facts.search.best_so_far()
    assert all(a >= b for a, b in zip(best, best[1:], strict=False))
    assert best[-1] == min(t.loss for t in facts.search.trials)
    losses = [math.nan, 2.0, math.nan, 3.0, 1.0]
    search = Search(trials=tuple(Trial(number=i, origin="a", size_bytes=1, loss=x) for i, x in enumerate(losses)))
    assert search.best_so_far() == (math.inf, 2.0, 2.0, 2.0, 1.0)


@pytest.mark.parametrize("n", [1, 4, 100, 101, 5000])
def test_summary_keeps_the_extremes_and_the_cut(n):
    draw = random.Random(n)
    scores = [draw.lognormvariate(0, 1) for _ in range(n)]
    for kept in ([], range(n), draw.sample(range(n), n // 2), sorted(range(n), key=scores.__getitem__)[n // 3 :]):
        curve = summarise_scores(scores, kept)
        assert (curve.n_units, curve.n_kept) == (n, len(kept))
        assert curve.score[0] == min(scores) and curve.score[-1] == max(scores)
        assert list(curve.score) == sorted(curve.score)
        assert len(curve.score) == len(curve.kept) == len(curve.position) <= 102
        removed = set(range(n)) - set(kept)
        if kept:
            assert min(s for s, k in zip(curve.score, curve.kept, strict=True) if k) == min(scores[u] for u in kept)
        if removed:
            assert max(s for s, k in zip(curve.score, curve.kept, strict=True) if not k) == max(
                scores[u] for u in removed
            )


def test_a_short_summary_is_every_unit():
    curve = summarise_scores([3.0, 1.0, 2.0], [0, 2])
    assert curve.score == (1.0, 2.0, 3.0) and curve.kept == (False, True, True) and curve.position == (0, 1, 2)
    with pytest.raises(ValueError, match="kept names unit 3 of a group of 3"):
        summarise_scores([3.0, 1.0, 2.0], [3])


@pytest.mark.parametrize(
    "name, short",
    [
        ("model.layers.12.mlp.up_proj", "mlp.up_proj"),
        ("transformer.h.0", "layer"),
        ("0.attn", "attn"),
        ("lm_head", "lm_head"),
        ("model.layers.3.mlp.experts.7.up", "mlp.experts.7.up"),
        ("layer2norm.x", "layer2norm.x"),
    ],
)
def test_label_is_the_name_within_the_layer(name, short):
    assert label(name) == short


@pytest.mark.parametrize(
    "size, text",
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (5_246_208, "5.25 MB"),
        (10_492_416, "10.5 MB"),
        (999_950, "1.00 MB"),
        (3.5e9, "3.50 GB"),
    ],
)
def test_bytes_have_three_digits(size, text):
    assert bytes_text(size) == text


def test_title_names_sizes_and_losses(facts):
    assert title(facts) == "pystdlib-5M, 50 % budget: 10.5 MB → 5.25 MB, loss 2.31 → 2.38 nats/token"
    assert title(bare(facts, metrics=())) == "pystdlib-5M, 50 % budget: 10.5 MB → 5.25 MB"


def test_before_after_rounds_to_the_standard_error(facts):
    rows = {row[0]: row[1:] for row in before_after(facts)}
    assert rows["loss (nats/token)"] == ("2.314 ± 0.012", "2.381 ± 0.012", "+0.067, worse")
    assert rows["KL to the original (nats/token)"] == ("–", "0.1132 ± 0.0021", "–")
    assert rows["top-1 agreement (%)"] == ("–", "83.12 ± 0.31", "–")
    assert rows["bytes on disk"] == ("10.5 MB", "5.25 MB", "−50.0 %, better")
    assert rows["decode (tokens/s)"] == ("212.4 ± 3.1", "251.9 ± 2.8", "+18.6 %, better")


def test_sizes_that_disagree_are_warned_of(facts):
    assert all_warnings(facts) == facts.warnings
    larger = facts.sizes.model_copy(update=dict(on_disk=facts.sizes.asked + 8))
    said = " ".join(all_warnings(facts.model_copy(update=dict(sizes=larger))))
    assert "8 bytes more than was asked" in said and "predicted" in said and "add up" in said


# ---------------------------------------------------------------- charts


def named(figure, name):
    return [t for t in figure.data if t.name == name]


def test_every_chart_is_drawn_or_said_to_be_missing(facts, figures):
    assert list(figures) == list(CHARTS) and not absent(facts)
    few = bare(facts)
    assert set(charts(few)) == {"sizes", "plan"}
    assert set(absent(few)) == set(CHARTS) - {"sizes", "plan"}
    assert set(NUMBERS) == set(CHARTS) == {"sizes"} | {name for _, names in SECTIONS for name in names}


def test_size_bars_are_the_sizes(facts, figures):
    whole, *parts = figures["sizes"].data
    assert dict(zip(whole.y, whole.x, strict=True)) == {
        "16-bit original": 10_492_416,
        "asked": 5_246_208,
        "predicted": 5_245_980,
    }
    assert {p.name: p.x[0] for p in parts} == facts.sizes.parts()
    assert sum(p.x[0] for p in parts) == facts.sizes.on_disk


def test_the_plan_shows_every_width_and_every_bit(facts, figures):
    heads, channels = named(figures["plan"], "kv groups")[0], named(figures["plan"], "channels")[0]
    assert list(heads.y) == [la.kv_groups_kept / 4 for la in facts.layers]
    assert list(channels.y) == [la.channels_kept / 768 for la in facts.layers]
    assert [bool(s) for s in channels.marker.pattern.shape] == [la.protected for la in facts.layers]
    (cells,) = named(figures["plan"], "bits")
    drawn = {
        (name, x): int(t)
        for name, line in zip(cells.y, cells.text, strict=True)
        for x, t in zip(cells.x, line, strict=True)
    }
    assert drawn == {(label(p.name), p.layer): p.bits for p in facts.projections} and len(drawn) == 24


def test_importance_draws_kept_and_removed_apart(facts, figures):
    traces = figures["importance"].data
    assert len(traces) == 2 * len(facts.importance)
    drawn = {
        name: sorted(y for t in traces[k::2] for y in t.y if y is not None) for k, name in enumerate((False, True))
    }
    for stays in (False, True):
        points = [x for g in facts.importance for x, k in zip(g.curve.score, g.curve.kept, strict=True) if k == stays]
        assert drawn[stays] == sorted(points)


def test_information_shows_its_null(facts, figures):
    null, *units = figures["information"].data
    assert list(null.error_y.array) == [2 * r.null_std for r in facts.information]
    assert sorted(y for t in units for y in t.y) == sorted(r.nats for r in facts.information)
    assert sorted(c[1] for t in units for c in t.customdata) == sorted(r.z for r in facts.information)


def test_sensitivities_fill_one_map_per_width(facts, figures):
    for trace, bits in zip(figures["sensitivities"].data, (4, 8), strict=True):
        drawn = sorted(z for line in trace.z for z in line)
        assert drawn == sorted(r.nats for r in facts.sensitivities if r.bits == bits)


def test_search_and_front_draw_every_trial(facts, figures):
    trials = facts.search.trials
    best = named(figures["search"], "best so far")[0]
    assert tuple(best.y) == facts.search.best_so_far()
    for name, x in (("search", lambda t: t.number), ("pareto", lambda t: t.size_bytes)):
        marks = [t for t in figures[name].data if t.mode == "markers" and t.name != "chosen"]
        drawn = {(px, py) for t in marks for px, py in zip(t.x, t.y, strict=True)}
        assert drawn == {(x(t), t.loss) for t in trials}
        (ring,) = named(figures[name], "chosen")
        assert (ring.x[0], ring.y[0]) == next((x(t), t.loss) for t in trials if t.number == facts.search.chosen)
    (front,) = named(figures["pareto"], "Pareto front")
    assert len(front.x) == len(facts.search.front) and list(front.y) == sorted(front.y, reverse=True)


def test_recovery_draws_every_step(facts, figures):
    curve = named(figures["recovery"], "training loss, each step")[0]
    assert list(zip(curve.x, curve.y, strict=True)) == [(p.step, p.loss) for p in facts.recovery.curve]
    (text,) = named(figures["recovery"], "search text, before and after")
    assert list(text.y) == [2.521, 2.402]


def test_the_loss_of_every_stage_is_a_bar_with_its_step(facts, figures):
    loss, more, gone = figures["damage"].data
    stages = facts.damage.stages
    assert list(loss.y) == [s.stage for s in stages] == ["original", "cut", "refitted", "rounded", "recovered"]
    assert [round(a + b, 6) for a, b in zip(loss.x, more.x, strict=True)] == [s.loss for s in stages]
    assert list(gone.x) == pytest.approx([0, 0, 0.16, 0, 0.09])
    assert "it rose most with the cuts, before anything was refitted, by 0.300" in NUMBERS["damage"](facts).sentence


def test_every_colour_has_a_dark_counterpart(figures):
    used = {c for figure in figures.values() for c in re.findall(r'"(#[0-9a-fA-F]+)"', figure.to_json())}
    assert used and used <= set(DARK)
    assert len(set(DARK.values())) == len(DARK)


def test_odd_models_draw(facts):
    """One layer, no kv groups, scores of zero, one trial whose loss is no number, one training step."""
    odd = facts.model_copy(
        update=dict(
            layers=(Layer(index=7, kv_groups_kept=0, kv_groups_total=0, channels_kept=1, channels_total=3),),
            projections=(),
            importance=(Importance(group="g", layer=7, kind="channel", curve=summarise_scores([0.0, 0.0, 0.0], [1])),),
            information=facts.information[:1],
            sensitivities=(Sensitivity(unit="x", layer=7, bits=4, nats=-0.001),),
            search=Search(trials=(Trial(number=0, origin="a", size_bytes=5, loss=math.nan),)),
            recovery=Recovered(curve=(LossPoint(step=1, loss=2.0),)),
            damage=Damage(
                stages=[
                    StageLoss(stage="original", loss=2.0, kl=0.0),
                    StageLoss(stage="cut", loss=math.nan, kl=math.inf),
                ],
                windows=1,
                tolerance=0.5,
                unigram=5.0,
            ),
        )
    )
    assert list(charts(odd)) == [name for name in CHARTS if name != "loftq"]
    assert "<html" in page(odd)


# ---------------------------------------------------------------- page


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen, self.open, self.text = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


def test_the_page_loads_nothing_from_anywhere(html):
    elements = Elements(html)
    for tag, attributes in elements.seen:
        assert not {"src", "href", "srcset", "data", "action", "poster"} & set(attributes), (tag, attributes)
        assert tag not in ("link", "iframe", "object", "embed", "base")
    assert "@import" not in "".join(elements.text["style"]) and "url(" not in "".join(elements.text["style"])
    assert any("default-src 'none'" in a.get("content", "") for _, a in elements.seen)
    assert html.count("Plotly, Inc.") == 1


def test_the_page_has_every_part(facts, html):
    elements = Elements(html)
    heads = [t for t in elements.text["h2"] if t.strip()]
    assert heads == ["Warnings", "Before and after", "Size", "Use it", *(h for h, _ in SECTIONS), "The run"]
    assert [a["id"] for tag, a in elements.seen if tag == "figure"] == list(CHARTS)
    charted = [a for _, a in elements.seen if a.get("class", "").startswith("chart")]
    assert len(charted) == len(CHARTS) and all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in charted)
    assert [tag for tag, _ in elements.seen].count("details") == len(CHARTS)
    for text in (*facts.warnings, *facts.notes, facts.machine, "2.381 ±\xa00.012", "4,102,912"):
        assert text in html
    few = page(bare(facts))
    for missing in absent(bare(facts)).values():
        assert escape(missing) in few


def test_names_cannot_write_html(facts):
    evil = "</script><script>alert(1)</script><b>"
    trial = Trial(number=0, origin=evil, size_bytes=1, loss=1.0)
    touched = facts.model_copy(
        update=dict(
            model_name=evil,
            command=evil,
            machine=evil,
            warnings=(evil,),
            search=Search(trials=(trial,)),
            information=(facts.information[0].model_copy(update=dict(unit=evil)),),
            versions={evil: evil},
        )
    )
    text = page(touched)
    assert "alert(1)</script>" not in text and "&lt;/script&gt;&lt;script&gt;alert(1)" in text
    scripts = lambda t: sum(tag == "script" for tag, _ in Elements(t).seen)
    assert scripts(text) == scripts(page(facts))
    origins = [t.name for t in charts(touched)["search"].data if t.mode == "markers"]
    assert origins == ["&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;&lt;b&gt;"]


def test_json_cannot_end_its_script_element():
    text = json_text({"a": "</script><!-- & \u2028"})
    assert not set("<>&") & set(text) and json.loads(text) == {"a": "</script><!-- & \u2028"}


def test_the_same_facts_give_the_same_page(facts, html):
    assert page(Facts.from_json(facts.to_json())) == html


def test_without_plotly_the_error_says_what_to_install(facts, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "plotly"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    for verb in (charts, page):
        with pytest.raises(MissingExtraError, match=r"pip install 'qpruner\[report\]'"):
            verb(facts)


def test_importing_the_report_imports_neither_torch_nor_plotly():
    code = "import sys, qpruner.report; print([m for m in ('torch', 'plotly', 'rich', 'numpy') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_the_terminal_table_holds_the_same_rows(facts):
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(text_table(facts.model_copy(update=dict(model_name="[bold]m[/bold]"))))
    text = console.export_text()
    assert "[bold]m[/bold]" in text
    for row in before_after(facts):
        assert all(cell in text for cell in row)


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_a_browser_draws_every_chart(html, tmp_path, colours):
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs chromium")
    source, picture = tmp_path / "report.html", tmp_path / "report.png"
    source.write_text(html, encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars --window-size=1280,3600"
    ).split()
    flags += [
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={int(colours == 'light')}",
    ]
    run = lambda *more: subprocess.run(
        [chromium, *flags, *more, source.as_uri()], capture_output=True, timeout=120, check=True
    )
    drawn = run("--dump-dom", "--enable-logging=stderr")
    dom, said = drawn.stdout.decode(), drawn.stderr.decode()
    for name in CHARTS:
        figure = dom[dom.index(f'id="{name}"') :]
        assert "main-svg" in figure[: figure.index("<details")], name
    assert "Content Security Policy" not in said and "Uncaught" not in said
    ink = {"light": "rgb(31, 41, 51)", "dark": "rgb(228, 231, 235)"}
    other = ink["dark" if colours == "light" else "light"]
    assert f"fill: {ink[colours]}" in dom and f"fill: {other}" not in dom
    run(f"--screenshot={picture}")
    assert picture.stat().st_size > 50_000
