"""Linears rounded behind a rounded prefix: what may not change the result, and what has to be gained."""

import pytest
import torch
from tiny import tiny
from tiny_pruned import IDS, flat, kept_of, logits_of
from tiny_stream import streamed

from qpruner.do.junction import Junction
from qpruner.do.rounding import FACTS, facts_of, round_
from qpruner.model.adapters import tensor_names
from qpruner.model.discover import discover
from qpruner.model.packed.split import stored
from qpruner.model.scratch import Scratch
from qpruner.model.skeleton import build_skeleton
from qpruner.model.stream import Stream
from qpruner.model.surgery import narrow_
from qpruner.model.tensors import Cut
from qpruner.plan import DENSE, Plan, QuantSpec, Recovery, Rounding
from qpruner.testing.tiny import Held

INT3 = QuantSpec(bits=3, grid="integer", group_size=8, symmetric=False)
GPTQ = Rounding(method="gptq", ranges="mse")
GPTAQ = Rounding(method="gptq", ranges="mse", propagation=True, dampings=(1e-2, 1e-1, 1.0), held_out=0.25)
WITHOUT, LOFTQ = Recovery(loftq_iterations=0), Recovery(loftq_iterations=3)
WEIGHTED = Recovery(loftq_iterations=3, loftq_weighting="gram")
NEAREST = Rounding(ranges="mse")
FAMILIES = {
    "llama": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
}


class Case:
    """A tiny model, a plan for it, and its rounding."""

    def __init__(
        self, family="llama", rounding=GPTAQ, spec=INT3, *, kept=1.0, ids=IDS, seed=0, rank=None, recovery=WITHOUT,
        **how,
    ):  # fmt: skip
        self.model = tiny(family, seed=seed, **FAMILIES.get(family, {}))
        self.dtype = torch.float64
        self.graph = discover(self.model)
        specs = spec if isinstance(spec, dict) else dict.fromkeys(self.graph.linears, spec)
        self.plan = Plan(
            model_name="m", model_digest="", kept=kept_of(self.graph, kept), specs=specs, rounding=rounding,
            adapter_ranks={name: rank(site) for name, site in self.graph.linears.items()} if rank else {},
            recovery=recovery,
        )  # fmt: skip
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


# --- adapters that start from what rounding lost ---

ALL = lambda site: min(site.d_out, site.d_in)  # a rank that makes up for everything


def stands_for(case: Case, name: str, result) -> torch.Tensor:
    """Codes and adapter of a linear, as one weight."""
    tensors = {n.removeprefix(f"{name}."): t for n, t in result.items() if n.startswith(f"{name}.")}
    tensors.pop("bias", None)
    site = case.graph.linears[name]
    Q = stored(tensors, None, case.plan.specs[name], site.d_in).dequantize(torch.float64)
    A, B = (result[n].double() for n in tensor_names(name))
    return Q + case.plan.recovery.adapter_alpha / len(A) * B @ A


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("how", [(GPTQ, LOFTQ), (NEAREST, WEIGHTED)], ids=["gptq", "nearest"])
def test_an_adapter_of_full_rank_makes_up_for_everything(family, how):
    case = Case(family, how[0], QuantSpec(bits=2, grid="integer", group_size=8), rank=ALL, recovery=how[1])
    found = flat(case.results())
    for name, site in case.graph.linears.items():
        W = case.model.get_submodule(name).weight.detach()
        torch.testing.assert_close(stands_for(case, name, found), W.T if site.transposed else W)
        plain, error = found[f"errors:{name}"].tolist()
        assert error < 1e-9 < 0.01 < plain


@pytest.mark.parametrize("how", [(GPTQ, LOFTQ), (GPTAQ, LOFTQ), (NEAREST, WEIGHTED), (NEAREST, LOFTQ)])
def test_a_start_is_nearer_than_rounding_alone(how):
    case = Case("llama", how[0], rank=lambda site: 2, recovery=how[1])
    found = flat(case.results())
    errors = {name: found[f"errors:{name}"].tolist() for name in case.graph.linears}
    assert all(error < plain for plain, error in errors.values())


def test_later_layers_are_rounded_behind_the_adapters():
    """Where those of the first layer make up for everything, the others get the codes that they would get behind it."""
    first = lambda graph: {n for n, site in graph.linears.items() if site.layer == 0}
    spec = QuantSpec(bits=2, grid="integer", group_size=8)
    graph = Case("llama", GPTQ).graph
    dense = {name: DENSE if name in first(graph) else spec for name in graph.linears}
    alone = flat(Case("llama", GPTQ, dense).results())
    case = Case("llama", GPTQ, spec, rank=ALL, recovery=LOFTQ)
    only = {name: rank for name, rank in case.plan.adapter_ranks.items() if name in first(graph)}
    case.plan = case.plan.model_copy(update={"adapter_ranks": only})
    behind = flat(case.results())
    codes = [name for name in alone if name.endswith("codes")]
    assert codes and all(torch.equal(alone[name], behind[name]) for name in codes)
    bare = flat(Case("llama", GPTQ, spec).results())
    assert any(not torch.equal(alone[name], bare[name]) for name in codes)


def test_biases_make_up_for_the_mean_of_codes_and_adapter():
    """With full rank nothing is left to make up for, so the bias is that of an exact layer."""
    case = Case("opt", GPTAQ, QuantSpec(bits=2, grid="integer", group_size=8), rank=ALL, recovery=LOFTQ)
    found = flat(case.results())
    for name in case.graph.linears:
        torch.testing.assert_close(found[f"{name}.bias"], case.model.get_submodule(name).bias.detach())


def test_salient_channels_can_be_said():
    spec = QuantSpec(bits=2, grid="integer", group_size=8, salient=2)
    case = Case("llama", GPTQ, spec)
    said = {name: torch.tensor([5, 1]) for name in case.graph.linears}
    found = flat(case.results(salient=said))
    assert all(found[f"{name}.salient"].tolist() == [1, 5] for name in case.graph.linears)
