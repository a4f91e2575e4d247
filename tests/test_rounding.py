"""Linears rounded behind a rounded prefix: what may not change the result, and what has to be gained."""

import pytest
import torch
from tiny import tiny
from tiny_pruned import IDS, flat, kept_of, logits_of
from tiny_stream import streamed

from qpruner.do.junction import Junction
from qpruner.do.rounding import FACTS, facts_of, round_
from qpruner.model.discover import discover
from qpruner.model.packed.split import stored
from qpruner.model.scratch import Scratch
from qpruner.model.skeleton import build_skeleton
from qpruner.model.stream import Stream
from qpruner.model.surgery import narrow_
from qpruner.model.tensors import Cut
from qpruner.plan import DENSE, Plan, QuantSpec, Rounding
from qpruner.testing.tiny import Held

INT3 = QuantSpec(bits=3, grid="integer", group_size=8, symmetric=False)
GPTQ = Rounding(method="gptq", ranges="mse")
GPTAQ = Rounding(method="gptq", ranges="mse", propagation=True, dampings=(1e-2, 1e-1, 1.0), held_out=0.25)
FAMILIES = {
    "llama": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
}


class Case:
    """A tiny model, a plan for it, and its rounding."""

    def __init__(self, family="llama", rounding=GPTAQ, spec=INT3, *, kept=1.0, ids=IDS, seed=0, **how):
        self.model = tiny(family, seed=seed, **FAMILIES.get(family, {}))
        self.dtype = torch.float64
        self.graph = discover(self.model)
        specs = spec if isinstance(spec, dict) else dict.fromkeys(self.graph.linears, spec)
        self.plan = Plan(
            model_name="m", model_digest="", kept=kept_of(self.graph, kept), specs=specs, rounding=rounding
        )
        self.ids, self.how = ids, how

    def stream(self) -> Stream:
        skeleton = build_skeleton(self.model.config)
        skeleton.config._experts_implementation = "eager"
        narrow_(skeleton, self.graph, self.plan.kept)
        tensors = Cut(Held(self.model), self.graph, self.plan.kept)
        return Stream(skeleton, tensors, dtype=self.dtype, **self.how)

    def results(self, scratches=None, **options):
        original = streamed(self.model, **self.how) if self.plan.rounding.propagation else None
        if original is not None:
            original.model.config._experts_implementation = "eager"
        scratches = scratches or (Scratch(), Scratch())
        return round_(
            original, self.stream(), self.graph, self.plan, self.ids, dtype=self.dtype, scratches=scratches, **options
        )

    def rows(self, results) -> list[dict]:
        return [row for i, result in enumerate(results) for row in facts_of(self.plan, i, result)]

    def logits(self, results, ids) -> torch.Tensor:
        model, found = self.stream().loaded(), flat(results)
        for name, site in self.graph.linears.items():
            if self.plan.specs[name].bits < 16:
                linear = model.get_submodule(name)
                own = {k.removeprefix(f"{name}."): t for k, t in found.items() if k.startswith(f"{name}.")}
                bias = own.pop("bias", None)
                d_in = linear.weight.shape[0 if site.transposed else 1]
                model.set_submodule(name, stored(own, bias, self.plan.specs[name], d_in))
        with torch.no_grad():
            return model(ids).logits


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(t.nan_to_num(), other[n].nan_to_num()) for n, t in one.items()
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rounding", [GPTQ, GPTAQ], ids=["gptq", "gptaq"])
def test_it_loses_less_than_plain_rounding(family, rounding):
    distance = {}
    for how in (Rounding(ranges="mse"), rounding):
        case = Case(family, how)
        distance[how.method] = (case.logits(case.results(), IDS) - logits_of(case.model)).square().mean()
    assert distance["gptq"] < 0.8 * distance["nearest"]


def test_propagation_lowers_the_error_on_text_that_was_not_seen(monkeypatch):
    """And more so where the target is the sum that a linear joins, not its own output."""
    ids = torch.randint(2, 61, (72, 24), generator=torch.Generator().manual_seed(1))

    def distance(rounding: Rounding) -> torch.Tensor:
        case = Case("llama", rounding, ids=ids[:64])
        return (case.logits(case.results(), ids[64:]) - logits_of(case.model, ids[64:])).square().mean()

    plain, sums = distance(GPTQ), distance(GPTAQ)
    monkeypatch.setattr(Junction, "find", lambda step, inner: Junction(inner, None))
    outputs = distance(GPTAQ)
    assert sums < 0.85 * outputs < 0.85 * plain


def test_without_propagated_error_it_is_gptq():
    """Of the first linears, whose inputs are still those of the original."""
    found = [flat(Case("llama", rounding).results()) for rounding in (GPTQ, GPTAQ)]
    for part in "qkv":
        name = f"model.layers.0.self_attn.{part}_proj"
        for key in ("codes", "scales", "zeros"):
            assert torch.equal(found[0][f"{name}.{key}"], found[1][f"{name}.{key}"])
    assert not same(*({n: t for n, t in f.items() if not n.startswith(FACTS)} for f in found))


@pytest.mark.parametrize("rounding", [GPTQ, GPTAQ], ids=["gptq", "gptaq"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_from_disk_gives_the_same_bits(family, rounding, tmp_path):
    resident = flat(Case(family, rounding, kept=0.5, resident=True).results())
    scratches = Scratch(tmp_path / "theirs"), Scratch(tmp_path / "ours")
    assert same(flat(Case(family, rounding, kept=0.5).results(scratches)), resident)
    assert any(name.endswith(".codes") for name in resident)


class Killed(Exception):
    pass


@pytest.mark.parametrize("rounding", [GPTQ, GPTAQ], ids=["gptq", "gptaq"])
def test_it_goes_on_after_the_last_finished_layer(rounding, tmp_path):
    case = Case("llama", rounding)

    def kill(done, total, pace):
        raise Killed

    scratches = lambda: (Scratch(tmp_path / "theirs"), Scratch(tmp_path / "ours"))
    with pytest.raises(Killed):
        case.results(scratches(), on_layer=kill)
    seen = []
    again = flat(case.results(scratches(), on_layer=lambda done, total, pace: seen.append(done)))
    assert seen == [2, 3] and same(again, flat(case.results()))


@pytest.mark.parametrize("rounding", [Rounding(ranges="mse"), GPTQ, GPTAQ], ids=["nearest", "gptq", "gptaq"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_goes_on_is_what_will_be_stored(family, rounding):
    case, scratch = Case(family, rounding), Scratch()
    results = case.results((Scratch(), scratch))
    border = 6 if rounding.propagation else 8
    hidden = [scratch.get("hidden-3", first, n) for first, n in ((0, border), (border, 8 - border)) if n]
    norm = {"llama": lambda m: m.model.norm, "gpt2": lambda m: m.transformer.ln_f}[family](case.model)
    logits = case.model.lm_head(norm(torch.cat(hidden)))
    torch.testing.assert_close(case.logits(results, IDS), logits.detach(), rtol=1e-4, atol=1e-5)


def test_linears_of_16_bits_stay(tmp_path):
    names = discover(tiny("llama")).linears
    specs = {name: DENSE if ".mlp." in name else INT3 for name in names}
    case = Case("llama", GPTAQ, specs)
    results = flat(case.results())
    assert {n.removeprefix(FACTS) for n in results if n.startswith(FACTS)} == {n for n in names if ".mlp." not in n}
    assert not any(".mlp." in name for name in results)
    dense = Case("llama", GPTAQ, DENSE)
    assert not flat(dense.results())


def test_salient_channels_help():
    few = INT3.model_copy(update={"bits": 2, "salient": 3})
    errors = []
    for spec in (few, few.model_copy(update={"salient": 0})):
        case = Case("llama", GPTQ, spec)
        results = case.results()
        errors.append(sum(row["error"] for row in case.rows(results)))
        assert all(row["error"] < row["error_nearest"] for row in case.rows(results))
        assert case.logits(results, IDS).isfinite().all()
    assert errors[0] < errors[1]


def test_facts_say_what_was_chosen():
    case = Case("llama", GPTAQ, kept=0.5)
    rows = case.rows(case.results())
    assert {row["linear"] for row in rows} == set(case.graph.linears)
    assert {row["damping"] for row in rows} <= {*GPTAQ.dampings, None} and {row["tokens"] for row in rows} == {96}
    assert {row["spec"] for row in rows} == {"int3 g8 asymmetric"}
    by_set = {row["linear"].rpartition(".")[2]: row["error"] for row in rows if row["layer"] == 1}
    assert by_set["q_proj"] == by_set["k_proj"] and by_set["gate_proj"] == by_set["up_proj"]


def test_what_tunes_a_layer_has_the_last_word():
    case = Case("llama", GPTQ)
    seen = []

    def tune(theirs, ours, layers, weights):
        assert weights.keys() == layers.keys()
        seen.append((theirs, ours.index, sorted(layers)))
        return {**layers, "mlp.up_proj": layers["mlp.gate_proj"]}

    results = case.results(tune=tune)
    assert [index for _, index, _ in seen] == [0, 1, 2] and all(len(layers) == 7 for *_, layers in seen)
    assert all(theirs is None for theirs, *_ in seen)
    for i, result in enumerate(results):
        codes = [result[f"model.layers.{i}.mlp.{part}_proj.codes"] for part in ("gate", "up")]
        assert torch.equal(*codes)
