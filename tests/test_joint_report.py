"""The pages of a joint search: facts, the figures drawn from them, and the page."""

import io
import json
import math
import random
import re
import shutil
import subprocess
from html import escape

import pytest
from joint_example import example_joint_facts
from test_report import Elements, example

from qpruner.errors import OutputError
from qpruner.report import joint_words as words
from qpruner.report import page
from qpruner.report.canvas import DARK, log_ticks
from qpruner.report.facts import bytes_text, label
from qpruner.report.joint import (
    NO_PLAN,
    Gates,
    JointFacts,
    Layer,
    Limit,
    Option,
    Point,
    Prediction,
    Sensitivity,
    Stored,
    Trial,
    agreement,
    limit_rows,
)
from qpruner.report.joint_layers import draw_layers
from qpruner.report.joint_page import PICTURES, joint_page, section


@pytest.fixture(scope="module")
def facts():
    return example_joint_facts()


@pytest.fixture(scope="module")
def figures(facts):
    return {name: picture.draw(facts) for name, picture in PICTURES.items()}


@pytest.fixture(scope="module")
def html(facts):
    return joint_page(facts)


def trial(number: int, size_bytes: int, loss: float | None, n_windows: int = 4, **more) -> Trial:
    counts = dict(n_layers=2, kv_groups_kept=1.0, channels_kept=0.5, bits_per_weight=3.0)
    return Trial(
        number=number, origin="random", size_bytes=size_bytes, loss=loss, n_windows=n_windows, **counts, **more
    )


def small(*trials: Trial, **more) -> JointFacts:
    """A search that has nothing but trials."""
    fields = dict(
        model_name="m", dense_bytes=200, bytes_16bit=100, n_layers=2, protocol="p", limits=(), command="c", machine="x",
        seed=0, versions={},
    )  # fmt: skip
    return JointFacts(**{**fields, "trials": trials, **more})


def named(figure, name):
    return [t for t in figure.data if t.name == name]


# ---------------------------------------------------------------- facts


def test_facts_survive_json_lost_and_infinite_losses_too(facts):
    assert any(t.loss is None for t in facts.trials)
    broken = small(trial(0, 10, None), trial(1, 10, math.inf), random_plans=(Prediction(predicted=1.0, measured=None),))
    for each in (facts, broken):
        json.loads(each.to_json(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
        assert JointFacts.from_json(each.to_json()) == each
    with pytest.raises(OutputError, match=r"'trials\.0\.loss'"):
        JointFacts.from_json(broken.to_json().replace('"loss": null', '"loss": "much"'))


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(front=(7,)), "not run"),
        (dict(limits=(Limit(text="20%", size_bytes=9, trial=7),)), "not run"),
        (dict(surrogate=(Prediction(predicted=1.0, measured=1.0, trial=7),)), "not run"),
        (dict(limits=(Limit(text="20%", size_bytes=9),) * 2), "stands twice"),
        (dict(gates=Gates(curve=(), at={"20%": ()})), "not asked for"),
        (dict(trials=(trial(0, 1, 1.0),) * 2), "same number"),
        (dict(extra=1), "not permitted"),
    ],
)
def test_facts_that_contradict_themselves_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        small(trial(0, 10, 1.0), **wrong)


def test_the_best_so_far_fits_was_measured_on_all_windows_and_never_rises(facts):
    for limit in facts.limits:
        line = facts.best_so_far(limit.size_bytes)
        assert all(a >= b for a, b in zip(line, line[1:], strict=False))
        if limit.trial is not None:
            assert line[-1] == facts.trial(limit.trial).loss
    trials = (trial(0, 9, None), trial(1, 9, 0.5), trial(2, 9, 0.1, n_windows=1), trial(3, 11, 0.2), trial(4, 8, 0.4))
    assert small(*trials).best_so_far(10) == (math.inf, 0.5, 0.5, 0.5, 0.4)
    assert small(*trials).best_so_far(11) == (math.inf, 0.5, 0.5, 0.2, 0.2)


def test_the_best_control_fits_within_the_size_and_is_a_number():
    points = lambda *pairs: tuple(Point(size_bytes=size, loss=loss) for size, loss in pairs)
    controls = {"a": points((9, 0.5), (20, 0.1)), "b": points((5, 0.6)), "c": points((3, math.inf), (4, math.nan))}
    facts = small(trial(0, 1, 1.0), controls=controls)
    assert facts.best_control(20) == ("a", 0.1) and facts.best_control(10) == ("a", 0.5)
    assert facts.best_control(5) == ("b", 0.6) and facts.best_control(4) is None


def test_agreement_is_of_order_and_of_logarithms():
    pairs = lambda *values: [Prediction(predicted=p, measured=m) for p, m in values]
    squares = agreement(pairs(*((x, x**2) for x in (0.1, 0.5, 2.0, 3.0))))
    assert squares.spearman == pytest.approx(1) and squares.pearson == pytest.approx(1)
    cubes = agreement(pairs(*((x, math.exp(x)) for x in (0.1, 0.5, 2.0, 9.0))))
    assert cubes.spearman == pytest.approx(1) and cubes.pearson < 0.99
    assert agreement(pairs(*((x, 1 / x) for x in (1, 2, 5)))).spearman == pytest.approx(-1)
    # Of two that are equal each has the mean of their ranks: 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    tied = agreement(pairs((1, 1), (2, 2), (2, 3), (3, 4)))
    assert tied.spearman == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert agreement(pairs((1, 1), (2, 2))) is None and agreement(pairs((1, 1), (1, 2), (1, 3))) is None
    lost = pairs((1, 1), (2, 2), (3, 3), (4, None), (0, 5), (6, math.inf))
    assert agreement(lost).pairs == 3


def test_every_limit_has_a_row_also_one_that_nothing_fits(facts):
    rows = limit_rows(facts)
    assert [row[0] for row in rows] == [limit.text for limit in facts.limits]
    for limit, row in zip(facts.limits, rows, strict=True):
        stored = [p for layer in limit.layers if layer.stays for p in layer.projections]
        bits = 8 * sum(p.size_bytes for p in stored) / sum(p.parameters for p in stored)
        kept = sum(la.kv_groups_kept for la in limit.layers if la.stays) / (4 * facts.n_layers)
        assert f"trial {limit.trial}, {facts.trial(limit.trial).origin}" in row[4]
        assert f"{bits:.2f} bits" in row[4] and f"{kept:.0%} of kv groups" in row[4]
        assert "prune, then allocate" in row[3] and bytes_text(limit.stored_bytes) in row[1]
    foretold = Limit(text="9%", size_bytes=9, stored_bytes=9, loss=0.0312)
    (row,) = limit_rows(small(trial(0, 10, 0.1), limits=(foretold,)))
    assert row[2] == "≈ 0.0312" and "predicted" in row[4] and not foretold.measured
    (row,) = limit_rows(small(trial(0, 10, 0.1), limits=(Limit(text="5%", size_bytes=5),)))
    assert row[4] == NO_PLAN


# ---------------------------------------------------------------- figures


def test_every_trial_is_on_the_front_picture(facts, figures):
    origins = {t.origin.partition(" at ")[0] for t in facts.trials}
    assert len(origins) == 5
    marks = [t for t in figures["joint-front"].data if t.mode == "markers" and t.name in {*origins, "no loss known"}]
    said = [c[0] for t in marks for c in t.customdata]
    assert sorted(said) == sorted(f"trial {t.number}, {t.origin}" for t in facts.trials)
    drawn = {(x, y) for t in marks if t.name in origins for x, y in zip(t.x, t.y, strict=True)}
    assert drawn == {(t.size_bytes, t.loss) for t in facts.trials if t.loss is not None}
    (lost,) = named(figures["joint-front"], "no loss known")
    assert list(lost.x) == [t.size_bytes for t in facts.trials if t.loss is None]
    hollow = {
        c[0].split(",")[0]
        for t in marks
        if t.name in origins
        for c, s in zip(t.customdata, t.marker.symbol, strict=True)
        if s.endswith("-open")
    }
    assert hollow == {f"trial {t.number}" for t in facts.trials if t.n_windows < facts.n_windows and t.measured}


def test_front_controls_and_chosen_plans_are_where_they_are(facts, figures):
    figure = figures["joint-front"]
    (line,) = named(figure, "front")
    assert set(zip(line.x, line.y, strict=True)) == {
        (facts.trial(n).size_bytes, facts.trial(n).loss) for n in facts.front
    }
    assert list(line.x) == sorted(line.x) and list(line.y) == sorted(line.y, reverse=True)
    for name, points in facts.controls.items():
        (control,) = named(figure, name)
        assert set(zip(control.x, control.y, strict=True)) == {(p.size_bytes, p.loss) for p in points}
    (rings,) = named(figure, "chosen")
    assert [(x, y, c[0]) for x, y, c in zip(rings.x, rings.y, rings.customdata, strict=True)] == [
        (limit.stored_bytes, limit.loss, limit.text) for limit in facts.limits
    ]
    low, high = figure.layout.yaxis.range
    assert all(low <= math.log10(y) <= high for t in figure.data for y in t.y)
    low, high = figure.layout.xaxis.range
    assert all(low <= math.log10(x) <= high for t in figure.data for x in t.x)


def test_a_control_is_drawn_as_its_own_front():
    tried = ((9, 0.1), (5, 0.5), (6, 0.7), (9, 0.3), (7, math.inf), (8, 0.2))
    tried = tuple(Point(size_bytes=size, loss=loss) for size, loss in tried)
    figure = PICTURES["joint-front"].draw(small(trial(0, 10, 0.1), controls={"chance": tried}))
    (line,) = named(figure, "chance")
    assert list(zip(line.x, line.y, strict=True)) == [(5, 0.5), (8, 0.2), (9, 0.1)]


def test_a_plan_that_was_not_tried_itself_is_a_square():
    limits = (
        Limit(text="9%", size_bytes=9, stored_bytes=8, loss=0.3),
        Limit(text="10%", size_bytes=10, stored_bytes=10, trial=0, loss=0.1),
        Limit(text="1%", size_bytes=1),
    )
    figure = PICTURES["joint-front"].draw(small(trial(0, 10, 0.1), limits=limits))
    for name, point in (("chosen", (10, 0.1)), ("chosen, loss predicted", (8, 0.3))):
        (ring,) = named(figure, name)
        assert (ring.x[0], ring.y[0]) == point and len(ring.x) == 1


def test_a_layer_picture_is_as_wide_as_what_stays_and_coloured_by_bits(facts):
    limit = next(limit for limit in facts.limits if any(not layer.stays for layer in limit.layers))
    figure = draw_layers(limit)
    for units, name in (("kv_group", "attention"), ("channel", "MLP")):
        length, bits, hovers = {}, {}, {}
        for t in named(figure, name):
            for y, x, text, said in zip(t.y, t.x, t.text, t.customdata, strict=True):
                length[y] = length.get(y, 0) + x
                bits.setdefault(y, []).append(int(text))
                hovers.setdefault(y, []).append(said)
        stay = [layer for layer in limit.layers if layer.stays]
        assert length == {layer.index: pytest.approx(layer.kept(units)) for layer in stay}
        inside = {layer.index: [p for p in layer.projections if p.units == units] for layer in stay}
        assert bits == {i: [p.bits for p in ps] for i, ps in inside.items()}
        for i, stored in inside.items():
            assert all(label(p.name) in h and p.spec in h for p, h in zip(stored, hovers[i], strict=True))
    gone = [layer.index for layer in limit.layers if not layer.stays]
    assert all(list(t.y) == gone and t.marker.pattern.shape for t in named(figure, "goes"))
    (embedding,) = named(figure, "embeddings")
    assert list(embedding.y) == ["embed_tokens"] and list(embedding.text) == ["4"]


def test_predictions_are_drawn_with_what_was_measured(facts, figures):
    for name, pairs in (("joint-random", facts.random_plans), ("joint-surrogate", facts.surrogate)):
        (marks,) = named(figures[name], "a plan")
        assert list(zip(marks.x, marks.y, strict=True)) == [
            (p.predicted, p.measured) for p in pairs if p.measured is not None
        ]
        (diagonal,) = named(figures[name], "exactly as predicted")
        assert diagonal.x == diagonal.y


def test_convergence_has_a_line_for_every_limit(facts, figures):
    for limit in facts.limits:
        (line,) = named(figures["joint-convergence"], limit.text)
        assert [math.inf if y is None else y for y in line.y] == list(facts.best_so_far(limit.size_bytes))


def test_every_choice_that_costs_something_has_its_cell(facts, figures):
    drawn = {}
    for panel in figures["joint-sensitivities"].data:
        for option, line, said in zip(panel.y, panel.z, panel.customdata, strict=True):
            for z, told in zip(line, said, strict=True):
                if z is not None:
                    drawn[told] = (option, z)
    cells = [(s, o) for s in facts.sensitivities for o in s.options if o.best]
    assert len(drawn) == len(cells)
    for s, o in cells:
        (told,) = [
            t for t in drawn if f"{label(s.name)}: {o.words}<br>" in t and (s.layer < 0 or f"layer {s.layer}," in t)
        ]
        assert drawn[told][0] == o.words
        assert drawn[told][1] == pytest.approx(math.log10(max(o.best, 1e-4 * max(o.best for _, o in cells))))
        assert ("measured" in told) == (o.measured is not None)


def test_gates_are_drawn_for_every_limit_and_layer(facts, figures):
    kept, bits = figures["joint-gates"].data
    for k, text in enumerate(facts.gates.at):
        assert list(kept.z[k]) == [g.kept for g in facts.gates.at[text]]
        assert list(bits.z[k]) == [g.bits for g in facts.gates.at[text]]
    loss, size = figures["joint-gate-training"].data
    assert list(loss.y) == [p.loss for p in facts.gates.curve]
    assert list(size.y) == [p.size_bytes for p in facts.gates.curve]


@pytest.mark.parametrize("low, high", [(1e6, 5e6), (0.003, 2.0), (1.4, 1.5), (2.041, 2.049), (1e-6, 10.0), (9.9, 10.1)])
def test_ticks_are_few_and_inside(low, high):
    ticks = log_ticks(low, high, 6)
    assert 2 <= len(ticks) <= 6 and ticks == sorted(ticks) and low <= ticks[0] and ticks[-1] <= high


def test_every_colour_has_a_dark_counterpart(facts, figures):
    drawn = [*figures.values(), *(draw_layers(limit) for limit in facts.limits)]
    used = {c for figure in drawn for c in re.findall(r'"(#[0-9a-fA-F]+)"', figure.to_json())}
    assert used and used <= set(DARK)


def test_odd_searches_draw():
    """Nothing measured; one trial without loss; losses of nothing; a layer without units; options that cost nothing."""
    lost = small(trial(0, 10, None), trial(1, 10, math.nan))
    free = small(
        trial(0, 10, 0.0),
        trial(1, 12, -1e-9),
        front=(0,),
        limits=(
            Limit(
                text="10%", size_bytes=10, stored_bytes=10, trial=0, loss=0.0,
                layers=(
                    Layer(
                        index=0, stays=True, kv_groups_kept=0, kv_groups_total=0, channels_kept=0, channels_total=4,
                        projections=(Stored(name="router", spec="16 bits", bits=16, parameters=0, size_bytes=0),),
                    ),
                    Layer(index=1, stays=False, kv_groups_kept=0, kv_groups_total=2, channels_kept=0, channels_total=4),
                ),
            ),
            Limit(text="1%", size_bytes=1),
        ),
        sensitivities=(Sensitivity(name="0.mlp", kind="width", layer=0, options=(Option(words="all", measured=0.0),)),),
        random_plans=(Prediction(predicted=0.0, measured=0.0),),
        gates=Gates(curve=(), at={"10%": ()}),
        controls={"none found": ()},
    )  # fmt: skip
    for facts in (lost, free):
        text = joint_page(facts)
        assert Elements(text).seen
        for picture in PICTURES.values():
            assert picture.present(facts) or escape(picture.missing) in text
    assert "lost" in words.front(lost).rows[0] and NO_PLAN in joint_page(free)


# ---------------------------------------------------------------- page


def test_the_page_loads_nothing_from_anywhere(html):
    elements = Elements(html)
    for tag, attributes in elements.seen:
        assert not {"src", "href", "srcset", "data", "action", "poster"} & set(attributes), (tag, attributes)
        assert tag not in ("link", "iframe", "object", "embed", "base")
    assert any("default-src 'none'" in a.get("content", "") for _, a in elements.seen)
    assert html.count("Plotly, Inc.") == 1


def test_the_page_opens_with_limits_and_commands_and_has_every_picture(facts, html):
    elements = Elements(html)
    body = html[html.index("<main>") :]
    first = body[: body.index("<figure")]
    assert body.count("<table class=limits>") == 1 and "<table class=limits>" in first
    for limit in facts.limits:
        assert all(f"<span>{word}</span>" in first for word in limit.command.split())
    ids = [a["id"] for tag, a in elements.seen if tag == "figure"]
    assert sorted(ids) == sorted([*PICTURES, *(f"joint-layers-{i}" for i in range(len(facts.limits)))])
    charted = [a for _, a in elements.seen if a.get("class", "").startswith("chart")]
    assert len(charted) == len(ids) and all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in charted)
    for text in (facts.command, facts.machine, *facts.warnings, *facts.notes, words.trust(facts.random_plans)):
        assert escape(text) in html


def test_numbers_in_words_hold_every_value(facts):
    assert len(words.front(facts).rows) == len(facts.trials) + sum(map(len, facts.controls.values()))
    assert "below the best control at 6 of 6 limits" in words.front(facts).sentence
    assert len(words.sensitivities(facts).rows) == sum(len(s.options) for s in facts.sensitivities)
    for limit in facts.limits:
        sizes = [p.size_bytes for la in limit.layers if la.stays for p in la.projections]
        assert sum(row[5] for row in words.layers(limit).rows if row[5] and row[0].startswith("layer")) == sum(sizes)


def test_predictions_are_trusted_as_far_as_they_order_plans():
    draw = random.Random(0)
    noisy = lambda noise: tuple(
        Prediction(predicted=x, measured=x * math.exp(draw.gauss(0, noise))) for x in (1.3**i for i in range(20))
    )
    assert "nearly as measuring does" in words.trust(noisy(0.05))
    assert "roughly" in words.trust(noisy(1.2))
    assert "do not rely" in words.trust(noisy(50))
    assert "too few" in words.trust(noisy(0.1)[:2])


def test_a_run_that_took_its_plan_from_a_search_shows_it(facts):
    run, limit = example(), facts.limits[0]
    assert run.sizes.asked == limit.size_bytes
    plain, both = page(run), page(run, facts)
    ids = lambda text: [a["id"] for tag, a in Elements(text).seen if tag == "figure"]
    assert "limits" not in {a.get("class") for _, a in Elements(plain).seen}
    assert len(set(ids(both))) == len(ids(both)) and set(ids(both)) == {*ids(plain), *PICTURES, "joint-layers-0"}
    assert f"Chosen for {limit.text}" in both and f"Chosen for {facts.limits[1].text}" not in both
    assert "Chosen for" not in section(facts, limit.size_bytes + 1)


def test_names_cannot_write_html(facts):
    evil = "</script><script>alert(1)</script><b>"
    touched = facts.model_copy(
        update=dict(
            model_name=evil,
            command=evil,
            warnings=(evil,),
            notes=(evil,),
            controls={evil: facts.controls["NSGA-II"]},
            trials=tuple(t.model_copy(update=dict(origin=evil)) for t in facts.trials),
            limits=tuple(x.model_copy(update=dict(text=f"{evil}{x.text}", command=evil)) for x in facts.limits),
            sensitivities=tuple(s.model_copy(update=dict(name=evil)) for s in facts.sensitivities),
            gates=None,
        )
    )
    text = joint_page(touched)
    plain = joint_page(facts.model_copy(update=dict(gates=None)))
    scripts = lambda t: sum(tag == "script" for tag, _ in Elements(t).seen)
    assert "alert(1)</script>" not in text and scripts(text) == scripts(plain)
    names = {t.name for t in PICTURES["joint-front"].draw(touched).data}
    assert escape(evil, quote=False) in names and evil not in names


def test_the_same_facts_give_the_same_page(facts, html):
    assert joint_page(JointFacts.from_json(facts.to_json())) == html


def test_the_terminal_table_holds_the_same_rows(facts):
    from rich.console import Console

    from qpruner.report.terminal import limits_table

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(limits_table(facts.model_copy(update=dict(model_name="[bold]m[/bold]"))))
    text = console.export_text()
    assert "[bold]m[/bold]" in text
    for row, limit in zip(limit_rows(facts), facts.limits, strict=True):
        assert row[1] in text and row[2] in text and limit.command in text


def test_a_browser_draws_every_chart(html, tmp_path):
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs chromium")
    source = tmp_path / "search.html"
    source.write_text(html, encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --hide-scrollbars --window-size=1280,3600 --dump-dom "
        f"--enable-logging=stderr --user-data-dir={tmp_path / 'profile'}"
    ).split()
    drawn = subprocess.run([chromium, *flags, source.as_uri()], capture_output=True, timeout=120, check=True)
    dom, said = drawn.stdout.decode(), drawn.stderr.decode()
    for name in re.findall(r"<figure id=([\w-]+)>", html):
        figure = dom[dom.index(f'id="{name}"') :]
        assert "main-svg" in figure[: figure.index("<details")], name
    assert "Content Security Policy" not in said and "Uncaught" not in said


def test_a_run_that_searched_jointly_does_not_say_that_it_searched_nothing(facts):
    bare = example().model_copy(update={"search": None, "information": (), "sensitivities": ()})
    assert "searched no plans" in page(bare) and "searched no plans" not in page(bare, facts)
