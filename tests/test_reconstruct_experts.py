"""Stacked experts refitted behind a pruned prefix, each to what the original makes of the tokens that it gets."""

import pytest
import torch
from tiny_pruned import Pruned, flat, kept_of, logits_of, plan_for, rows_of, with_doubles
from torch.nn.functional import silu

from qpruner.do.reconstruct import FACTS
from qpruner.model import memory
from qpruner.model.discover import discover
from qpruner.model.scratch import Scratch
from qpruner.model.surgery import bereft_stacks, remaining
from qpruner.plan import Reconstruction
from qpruner.testing.tiny import tiny_config, tiny_model

IDS = torch.randint(2, 61, (16, 24), generator=torch.Generator().manual_seed(0))
EXACT = Reconstruction(method="least-squares", dampings=(0.0,), held_out=0.5)
FAMILIES = {
    "mixtral": {},
    "qwen2_moe": {},  # with a shared expert
    "gpt_oss": {},  # transposed, with biases
    "deepseek_v3": {},  # shared experts that join the sum plainly
    "jetmoe": dict(num_local_experts=3),  # each stack in a module of its own, and heads in experts too
    "llama4_text": {},  # all experts in one product
}


def mixture(family: str = "mixtral", **over):
    model = tiny_model(tiny_config(family, **FAMILIES.get(family, {}), **over))
    return model, discover(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_doubles_go_at_no_loss(family):
    model, graph = mixture(family)
    with_doubles(model, graph)
    pruned = Pruned(model, plan_for(graph, kept_of(graph), EXACT), graph, ids=IDS)
    results = pruned.results()
    rows = {row["linear"]: row for row in rows_of(results)}
    assert bereft_stacks(graph, pruned.plan.kept).keys() <= rows.keys()
    assert not torch.allclose(pruned.logits(), logits_of(model, IDS), atol=1e-2)
    torch.testing.assert_close(pruned.logits(results), logits_of(model, IDS), rtol=1e-6, atol=1e-6)


def test_doubles_go_at_no_loss_where_whole_experts_go_too():
    """Those that stay have other numbers then."""
    model, graph = mixture()
    with_doubles(model, graph)
    experts = {name: (0, 2, 3) for name, group in graph.groups.items() if group.kind == "expert"}
    results = Pruned(model, plan_for(graph, kept_of(graph) | experts, EXACT), graph, ids=IDS).results()
    for i, layer in enumerate(model.model.layers):
        both = layer.mlp.experts.down_proj.data[[0, 2, 3]].unflatten(2, (2, 20)).sum(2)
        torch.testing.assert_close(flat(results)[f"model.layers.{i}.mlp.experts.down_proj"], both)
    rows = [row for row in rows_of(results) if "experts" in row["linear"]]
    assert max(row["error"] for row in rows) < 1e-12 and [row["experts"] for row in rows] == [3] * 4


@pytest.mark.parametrize("damping", [1e-4, 1e-1, 10.0])
def test_an_expert_is_fitted_to_what_the_original_makes_of_its_own_tokens(damping):
    """By the formulas of the model, after its refitted attention; and never worse than slicing on these tokens."""
    model, graph = mixture()
    ridge = Reconstruction(method="least-squares", dampings=(damping,), held_out=0.25)
    of_each = tuple(u for u in range(160) if (u + 5 * (u // 40)) % 40 < 20)
    kept = {
        name: of_each if group.kind == "channel" else units
        for (name, group), units in zip(graph.groups.items(), kept_of(graph).values(), strict=True)
    }
    pruned = Pruned(model, plan_for(graph, kept, ridge), graph, ids=IDS)
    name = "model.layers.0.mlp.experts.down_proj"
    found = flat(pruned.results())
    left = remaining(graph, pruned.plan.kept)[name][1].view(4, 20) % 40
    seen = []
    ours = pruned.stream([found]).loaded()
    with ours.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2))):
        with torch.no_grad():
            ours(IDS)
    mlp = model.model.layers[0].mlp
    chosen = mlp.gate(seen[0])[2]
    n_refitted = 0
    for e in range(4):
        x = seen[0][(chosen == e).any(1)]
        gate, up = (x @ mlp.experts.gate_up_proj[e].T).chunk(2, dim=-1)
        X, W = silu(gate) * up, mlp.experts.down_proj[e].detach()
        Y, W, X = X @ W.T, W[:, left[e]], X[:, left[e]]
        strength = (damping * X.square().sum(0).mean()).sqrt()
        below = torch.cat([X, strength * torch.eye(20, dtype=X.dtype)]), torch.cat([Y, strength * W.T])
        if not torch.equal(found[name][e], W):  # slicing did better on what is held out
            torch.testing.assert_close(found[name][e], torch.linalg.lstsq(*below).solution.T)
            assert (X @ found[name][e].T - Y).square().sum() < (X @ W.T - Y).square().sum()
            n_refitted += 1
    assert n_refitted >= 3


def test_an_expert_that_no_token_is_sent_to_stays_as_the_cut_left_it():
    model, graph = mixture("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.router.bias.data[1] = -1e9
    pruned = Pruned(model, plan_for(graph, kept_of(graph)), graph, ids=IDS)
    found = flat(pruned.results())
    sliced = pruned.stream().loaded().state_dict()
    for name in bereft_stacks(graph, pruned.plan.kept):
        same = [torch.equal(*pair) for pair in zip(found[name], sliced[name], strict=True)]
        assert same == [False, True, False, False]
        bias = graph.stacks[name].bias
        assert torch.equal(found[bias][1], sliced[bias][1]) and not torch.equal(found[bias][0], sliced[bias][0])
        assert found[FACTS + name].tolist()[-1] == 3


def test_a_bias_alone_is_flap_for_every_expert():
    """b + W times the mean of the inputs that go, over the tokens of the expert: of the first layer, whose attention
    is whole, so that the original's own inputs are those of the pruned model."""
    model, graph = mixture("gpt_oss")
    whole = {name: tuple(range(g.n_units)) for name, g in graph.groups.items() if g.kind != "channel"}
    plan = plan_for(graph, kept_of(graph) | whole, Reconstruction(method="bias", dampings=(), held_out=0.25))
    found = flat(Pruned(model, plan, graph, ids=IDS).results())
    name, experts = "model.layers.0.mlp.experts.down_proj", model.model.layers[0].mlp.experts
    calls = []
    with experts.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True):
        logits_of(model, IDS)
    (hidden, chosen, *_), _ = calls[0]
    for e in range(4):
        x = hidden.flatten(0, -2)[(chosen == e).any(1)]
        X = experts._apply_gate(x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e])
        gone = X[:, 20:].mean(0) @ experts.down_proj[e, 20:]
        torch.testing.assert_close(found[f"{name}_bias"][e], (experts.down_proj_bias[e] + gone).detach())
    assert name not in found


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe"])  # which call the shared one after and before
def test_a_shared_expert_makes_up_for_what_the_others_leave(family):
    """Least squares leaves nothing in the sum that the inputs of the linear that was fitted last could still give."""
    model, graph = mixture(family)
    ids = IDS[:8].repeat(2, 1)  # the same is held out as is fitted to, so that least squares is always chosen
    pruned = Pruned(model, plan_for(graph, kept_of(graph), EXACT), graph, ids=ids)
    refitted = pruned.stream(pruned.results()).loaded()
    inputs, outputs = [], []
    for each in (model, refitted):
        layer = each.model.layers[1]
        shared = next(m for n, m in layer.named_modules() if "shared_expert" in n and n.endswith("down_proj"))
        shared.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
        layer.register_forward_hook(lambda _, args, output: outputs.append(output.flatten(0, -2)))
        logits_of(each, ids)
    left = outputs[0] - outputs[1]
    assert left.norm() > 0.1 * outputs[0].norm()
    torch.testing.assert_close(inputs[1].T @ left, torch.zeros(inputs[1].shape[1], 32).double(), rtol=0, atol=1e-8)


def test_experts_stay_sliced_where_hidden_channels_go():
    model, graph = mixture()
    kept = kept_of(graph) | {"residual": tuple(range(0, 32, 2))}
    results = Pruned(model, plan_for(graph, kept), graph, ids=IDS).results()
    rows = {row["linear"]: row for row in rows_of(results)}
    assert len(bereft_stacks(graph, kept)) == 8
    for name in bereft_stacks(graph, kept):
        assert (rows[name]["choice"], rows[name]["tokens"], rows[name]["experts"]) == ("sliced", 0, 0)
        assert name not in flat(results)


# --- one answer, whatever the way ---


@pytest.mark.parametrize("moments", [1, 3 * 16 * 20 * (20 + 32), 2**30])
def test_it_does_not_matter_how_many_experts_are_summed_up_at_once(moments, monkeypatch):
    model, graph = mixture()
    plan = plan_for(graph, kept_of(graph))
    together = flat(Pruned(model, plan, graph, ids=IDS).results())
    monkeypatch.setattr(memory, "EXPERT_MOMENTS", moments)
    for name, tensor in flat(Pruned(model, plan, graph, ids=IDS).results()).items():
        torch.testing.assert_close(tensor, together[name], rtol=0, atol=0, equal_nan=True)


class Killed(Exception):
    pass


def test_killed_and_taken_up_again_from_disk_gives_the_same_bits(tmp_path):
    model, graph = mixture()
    plan = plan_for(graph, kept_of(graph))
    at_once = flat(Pruned(model, plan, graph, ids=IDS, resident=True).results())
    assert bereft_stacks(graph, plan.kept).keys() <= at_once.keys()

    def kill(done, total, pace):
        if done == 2:
            raise Killed

    scratches = lambda: (Scratch(tmp_path / "theirs"), Scratch(tmp_path / "ours"))
    pruned = Pruned(model, plan, graph, ids=IDS)
    with pytest.raises(Killed):
        pruned.results(scratches(), on_layer=kill)
    for name, tensor in flat(pruned.results(scratches())).items():
        torch.testing.assert_close(tensor, at_once[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_it_does_not_matter_how_the_model_computes_its_experts(implementation):
    model, graph = mixture()
    model.to(torch.float32)
    pruned = Pruned(model, plan_for(graph, kept_of(graph)), graph, ids=IDS)
    pruned.experts = implementation
    results = flat(pruned.results())
    assert bereft_stacks(graph, pruned.plan.kept).keys() <= results.keys()
    assert {stream.model.config._experts_implementation for stream in pruned.streams} == {implementation}
    pruned.experts = "eager"
    for name, tensor in flat(pruned.results()).items():
        torch.testing.assert_close(results[name], tensor, rtol=0, atol=0, equal_nan=True)
