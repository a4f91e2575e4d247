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
    model = tiny_model(tiny_config(family, **FAMILIES[family], **over))
    return model, discover(model)


def stacks_in(results) -> set[str]:
    return {name for name in flat(results) if not name.startswith(FACTS) and not name.endswith((".weight", ".bias"))}


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
    """Those that stay have other numbers then. What the others did is lost, so the model without them is the measure."""
    model, graph = mixture()
    with_doubles(model, graph)
    kept = kept_of(graph)
    experts = {name: (0, 2, 3) for name, group in graph.groups.items() if group.kind == "expert"}
    whole = {name: tuple(range(group.n_units)) for name, group in graph.groups.items()} | experts
    without = Pruned(model, plan_for(graph, whole), graph, ids=IDS).logits()
    pruned = Pruned(model, plan_for(graph, kept | experts, EXACT), graph, ids=IDS)
    results = pruned.results()
    first = flat(results)["model.layers.0.mlp.experts.down_proj"]
    assert first.shape == (3, 32, 20)
    half = model.model.layers[0].mlp.experts.down_proj.data[[0, 2, 3]].unflatten(2, (2, 20)).sum(2)
    torch.testing.assert_close(first, half)
    rows = [row for row in rows_of(results) if "experts" in row["linear"]]
    assert max(row["error"] for row in rows) < 1e-12 and {row["experts"] for row in rows} == {3}
    assert without.shape == pruned.logits(results).shape


@pytest.mark.parametrize("damping", [1e-4, 1e-1, 10.0])
def test_an_expert_is_fitted_to_what_the_original_makes_of_its_own_tokens(damping):
    """By the formulas of the model, after its refitted attention; and never worse than slicing on these tokens."""
    model, graph = mixture()
    ridge = Reconstruction(method="least-squares", dampings=(damping,), held_out=0.25)
    pruned = Pruned(model, plan_for(graph, kept_of(graph), ridge), graph, ids=IDS)
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
