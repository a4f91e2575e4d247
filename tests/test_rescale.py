"""Channels made larger where they are rounded and smaller where they come from: nothing changes but the rounding."""

import pytest
import torch
from test_rounding import FAMILIES as SOME
from test_rounding import Case, same
from tiny import tiny
from tiny_pruned import IDS, flat, kept_of, logits_of
from tiny_stream import streamed

from qpruner.do.rescale import rescale_
from qpruner.math import grids, rescaling
from qpruner.model.discover import discover
from qpruner.model.scratch import Scratch
from qpruner.model.surgery import remaining
from qpruner.plan import DENSE, Plan, QuantSpec, Rounding

INT3 = QuantSpec(bits=3, grid="integer", group_size=8, symmetric=False)
INT8 = QuantSpec(bits=8, grid="integer", group_size=8)
NEAREST = Rounding(transforms=("rescale",))
GPTAQ = Rounding(method="gptq", propagation=True, dampings=(1e-2, 1e-1, 1.0), held_out=0.25, transforms=("rescale",))
EXPERTS = dict(num_local_experts=3, num_experts_per_tok=2)
# Where rescaled channels come from, in a layer of each family.
SOURCES = {
    "llama": {"input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"},
    "gemma2": {"input_layernorm", "pre_feedforward_layernorm", "self_attn.v_proj", "mlp.up_proj"},
    "gpt_neox": {"input_layernorm", "post_attention_layernorm", "attention.query_key_value"},  # nothing behind a GELU
    "opt": {"self_attn_layer_norm", "final_layer_norm", "self_attn.v_proj", "fc1"},  # all is well behind a ReLU
    "gpt2": {"ln_1", "ln_2", "attn.c_attn"},
    "phi3": {"input_layernorm", "post_attention_layernorm", "self_attn.qkv_proj", "mlp.gate_up_proj"},
    "olmo2": {"mlp.up_proj"},  # norms come after
    "cohere": {"input_layernorm", "self_attn.v_proj", "mlp.up_proj"},  # one norm for both
    "falcon": {"input_layernorm", "self_attention.query_key_value"},
    "nemotron": {"input_layernorm", "post_attention_layernorm", "self_attn.v_proj"},  # a square is no multiple
    "mixtral": {"input_layernorm", "self_attn.v_proj"},  # the router and its stacks read the other norm
}
OVER = {"gemma2": dict(head_dim=8), "mixtral": EXPERTS, "falcon": dict(multi_query=True)}
CLOSE = dict(rtol=1e-5, atol=2e-6)  # many norms compute in float32, whatever they are given


def plan_of(graph, spec=INT3, rounding=NEAREST, kept=1.0) -> Plan:
    specs = spec if isinstance(spec, dict) else dict.fromkeys(graph.linears, spec)
    return Plan(model_name="m", model_digest="", kept=kept_of(graph, kept), specs=specs, rounding=rounding)


def plain(W, counts):
    return grids.dequantize(grids.quantize(W, INT3, "mse"), INT3, W.dtype)


def outliers(rand, d=24, tokens=60):
    X = rand(tokens, d)
    X[:, [3, 11]] *= 20
    return X


def test_the_error_is_that_of_the_output(rand):
    X, W, s = outliers(rand), rand(10, 24), rand(24).exp()
    expected = (X @ (plain(W * s, None) / s - W).T).square().sum()
    assert rescaling.output_error(W, plain, X.T @ X, s) == pytest.approx(float(expected), rel=1e-9)


def test_factors_are_never_worse_and_better_for_outliers(rand):
    every = torch.arange(24)
    for _ in range(2):
        maps = [(rand(8, 24), plain)]
        for X, much in ((rand(60, 24), 1.0), (outliers(rand), 0.8)):
            found = rescaling.choose(maps, X.T @ X, every, 24)
            sizes = [
                sum(rescaling.output_error(W, r, X.T @ X, s) for W, r in maps)
                for s in (torch.ones_like(found.s), found.s)
            ]
            assert [found.error_before, found.error] == pytest.approx(sizes)
            assert found.error <= much * found.error_before


def test_channels_that_share_a_factor_get_one_and_others_none(rand):
    classes = torch.tensor([0, 1, 0, 1, 2, -1, -1, 2])
    X, W = rand(40, 8) * torch.arange(1.0, 9), rand(5, 8)
    found = rescaling.choose([(W, plain)], X.T @ X, classes, 3)
    s = rescaling.spread(found.s, classes)
    assert found.s.shape == (3,) and (s[[5, 6]] == 1).all()
    assert s[0] == s[2] and s[1] == s[3] and s[4] == s[7]


def test_channels_that_never_come_and_columns_of_zeros_have_finite_factors(rand):
    X, W = rand(40, 8), rand(5, 8)
    X[:, 2] = 0
    W[:, 5] = 0
    found = rescaling.choose([(W, plain)], X.T @ X, torch.arange(8), 8)
    sizes = rescaling.class_sizes((X.T @ X).diagonal(), torch.arange(8), 8)
    for s in (found.s, rescaling.bounded(sizes.log())):
        assert s.isfinite().all() and s.min() >= 1 / rescaling.LARGEST and s.max() <= rescaling.LARGEST


@pytest.mark.parametrize("family", SOURCES)
@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_a_rescaled_layer_gives_what_it_gave(family, kept):
    model = tiny(family, **OVER.get(family, {}))
    graph = discover(model)
    plan = plan_of(graph, kept=kept)
    case = Case.__new__(Case)
    case.model, case.graph, case.plan, case.dtype, case.how = model, graph, plan, torch.float64, {}
    for step in case.stream().steps(IDS, Scratch(), batch_size=4):
        before, state = step.run(0), {n: t.clone() for n, t in step.layer.state_dict().items()}
        done = rescale_(step, graph, plan, remaining(graph, plan.kept), torch.float64)
        torch.testing.assert_close(step.run(0), before, **CLOSE)
        changed = {n for n, t in step.layer.state_dict().items() if not torch.equal(t, state[n])}
        sources = {n.rpartition(".")[0] for n in changed} & SOURCES[family]
        assert set(done.sources) == SOURCES[family] >= sources
        assert all(after <= first for first, after in done.errors.values())
        assert kept < 1 or any(after < 0.95 * first for first, after in done.errors.values())
        weights = {
            n for n in changed if n.removesuffix(".weight") in done.errors or n in {f"{o}.weight" for o in done.outputs}
        }
        assert changed - weights == done.changed.keys() - weights
        step.pass_all_on()
        step.finish({})


def test_outputs_that_changed_are_named_with_their_factors():
    model = tiny("llama")
    graph = discover(model)
    for step in streamed(model).steps(IDS, Scratch(), batch_size=4):
        before = step.layer.mlp.up_proj.weight.clone()
        done = rescale_(step, graph, plan_of(graph), {}, torch.float64)
        assert done.outputs.keys() == {"self_attn.v_proj", "mlp.up_proj"}
        gate_and_norm = step.layer.mlp.up_proj.weight / before
        by_row = gate_and_norm / gate_and_norm[:1]
        factors = done.outputs["mlp.up_proj"]
        torch.testing.assert_close(by_row, (factors / factors[0])[:, None].expand_as(by_row))
        break


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "opt"])
def test_norms_lose_nothing_in_the_dtype_that_is_stored(family):
    """Factors are those that the rounded norm stands for. Biases are rounded as ever."""
    model = tiny(family, **OVER.get(family, {})).bfloat16().double()
    graph = discover(model)
    for step in streamed(model).steps(IDS, Scratch(), batch_size=4):
        before, state = step.run(0), {n: t.clone() for n, t in step.layer.state_dict().items()}
        done = rescale_(step, graph, plan_of(graph), {}, torch.bfloat16)
        assert set(done.sources) == SOURCES[family]
        for _name, tensor in done.changed.items():
            assert torch.equal(tensor.bfloat16().double(), tensor)
        assert any(not torch.equal(tensor, state[name]) for name, tensor in done.changed.items())
        exact = not any(name.endswith(".bias") for name in done.changed)
        torch.testing.assert_close(step.run(0), before, **(CLOSE if exact else dict(rtol=0.01, atol=0.01)))
        break


def test_what_is_not_quantized_is_rescaled_along_or_left_alone():
    model = tiny("llama")
    graph = discover(model)
    mlp = lambda name: any(part in name for part in ("up_proj", "gate_proj"))
    plan = plan_of(graph, {n: DENSE if mlp(n) else INT3 for n in graph.linears})
    for step in streamed(model).steps(IDS, Scratch(), batch_size=4):
        state = {n: t.clone() for n, t in step.layer.state_dict().items()}
        done = rescale_(step, graph, plan, {}, torch.float64)
        assert {"mlp.up_proj.weight", "input_layernorm.weight"} <= done.changed.keys()
        assert torch.equal(step.layer.mlp.gate_proj.weight, state["mlp.gate_proj.weight"])
        assert torch.equal(done.changed["mlp.up_proj.weight"], step.layer.mlp.up_proj.weight)
        break


def rounded_logits(case: Case, ids=IDS) -> torch.Tensor:
    results = case.results()
    found = flat(results)
    stream = case.stream()
    own = {n: t for n, t in found.items() if n in stream.model.state_dict()}
    whole = stream.loaded()
    for name, tensor in own.items():
        whole.get_parameter(name).data.copy_(tensor)
    case.stream = lambda: Filled(whole)
    return case.logits(results, ids)


class Filled:
    def __init__(self, model):
        self.model = model

    def loaded(self):
        return self.model


@pytest.mark.parametrize("family", SOME)
def test_rounding_loses_less(family):
    distance = {}
    for transforms in ((), ("rescale",)):
        case = Case(family, Rounding(transforms=transforms))
        generator = torch.Generator().manual_seed(3)
        for name, parameter in case.model.named_parameters():
            if (
                "layers" in name
                and "norm" in name
                and name.endswith("weight")
                or name.endswith(("ln_1.weight", "ln_2.weight"))
            ):
                parameter.data[torch.randperm(len(parameter), generator=generator)[:2]] *= 15
        distance[transforms] = (rounded_logits(case) - logits_of(case.model)).square().mean()
    assert distance["rescale",] < 0.8 * distance[()]


@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_targets_follow_the_factors(kept):
    """First linears see what the original's see: nothing is to be repaired, unless they aim at what they were."""
    graph = discover(tiny("llama"))
    specs = {name: INT3 if name.endswith("o_proj") else INT8 for name in graph.linears}
    case = Case("llama", GPTAQ, specs, kept=kept)
    rows = {row["linear"]: row for row in case.rows(case.results())}
    values = rows["model.layers.0.self_attn.v_proj"]
    assert values["damping"] is None and values["error"] < 1e-4


@pytest.mark.parametrize("rounding", [NEAREST, GPTAQ], ids=["nearest", "gptaq"])
def test_layer_by_layer_from_disk_gives_the_same_bits(rounding, tmp_path):
    resident = flat(Case("llama", rounding, kept=0.5, resident=True).results())
    scratches = Scratch(tmp_path / "theirs"), Scratch(tmp_path / "ours")
    assert same(flat(Case("llama", rounding, kept=0.5).results(scratches)), resident)
    assert "model.layers.1.input_layernorm.weight" in resident
