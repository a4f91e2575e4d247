"""Whole experts: removing one is never routing to it."""

import copy

import pytest
import torch
from test_surgery import continued, everything
from tiny import tiny, tiny_config
from torch.overrides import TorchFunctionMode

from qpruner.errors import PlanError
from qpruner.model import cost
from qpruner.model.check import check_kept
from qpruner.model.discover import discover
from qpruner.model.skeleton import build_skeleton
from qpruner.model.surgery import narrow_
from qpruner.testing import random_kept
from qpruner.testing.proof import whole_plan

N = 5
CHOICE = dict(num_experts_per_tok=2, moe_intermediate_size=8)
CASES = [
    ("mixtral", dict(num_local_experts=N, num_experts_per_tok=2)),
    ("qwen3_moe", CHOICE | dict(num_experts=N, norm_topk_prob=True)),
    ("qwen2_moe", CHOICE | dict(num_experts=N, shared_expert_intermediate_size=16)),
    ("gpt_oss", dict(num_local_experts=N, num_experts_per_tok=2, head_dim=8)),
    ("glm4_moe", CHOICE | dict(n_routed_experts=N, n_group=1, topk_group=1, first_k_dense_replace=1, head_dim=8)),
    ("deepseek_v3", CHOICE | dict(n_routed_experts=N, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4)),
]  # fmt: skip


class NeverRoutedTo(TorchFunctionMode):
    """Logits of minus infinity for some experts, in every product with the weight of a router."""

    def __init__(self, routers, gone):
        super().__init__()
        self.routers, self.gone = routers, gone

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and any(
            args[1].shape == r.shape and torch.equal(args[1].float(), r.float()) for r in self.routers
        ):
            out[..., self.gone] = float("-inf")
        return out


def routed(model, gone):
    """The model that never sends a token to these experts: biases of the choice follow the logits."""
    model = copy.deepcopy(model)
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.shape == (N,) and "experts" not in name.split("."):
            value.data[gone] = float("-inf")
    forward = model.forward
    routers = [p.detach() for name, p in model.named_parameters() if name.endswith((".gate.weight", ".router.weight"))]

    def never(*args, **kwargs):
        with NeverRoutedTo(routers, gone):
            return forward(*args, **kwargs)

    model.forward = never
    return model


def experts(graph, units):
    return {name: units for name, group in graph.groups.items() if group.kind == "expert"}


@pytest.fixture
def ids():
    return torch.randint(2, 61, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family, over", CASES)
def test_removing_an_expert_is_never_routing_to_it(family, over, ids):
    model = tiny(family, **over)
    model.config._experts_implementation = "eager"
    graph = discover(model)
    assert experts(graph, ())
    for others in (everything(graph), random_kept(graph, 1)):
        kept = others | experts(graph, [0, 2, 3])
        small, whole = copy.deepcopy(model), copy.deepcopy(model)
        narrow_(small, graph, kept)
        narrow_(whole, graph, others)
        reference = routed(whole, [1, 4])
        with torch.no_grad():
            expected = reference(ids).logits
            torch.testing.assert_close(small(ids).logits, expected, rtol=1e-5, atol=1e-5)
            assert (model(ids).logits - expected).abs().max() > 1e-3
    torch.testing.assert_close(continued(small, ids), continued(small, ids, use_cache=False), rtol=1e-5, atol=1e-5)
    again = [group for group in discover(small).groups.values() if group.kind == "expert"]
    assert again and all(group.n_units == 3 for group in again)


@pytest.mark.parametrize("family, over", CASES)
def test_what_is_stored_of_fewer_experts_is_as_predicted_and_loads_into_a_skeleton(family, over, ids):
    model = tiny(family, **over)
    graph = discover(model)
    kept = random_kept(graph, 2) | experts(graph, [1, 2, 4])
    skeleton = build_skeleton(tiny_config(family, **over))
    predicted = cost.stored_tensors(cost.named_tensors(skeleton), discover(skeleton), whole_plan(graph, kept), "F64")
    narrow_(model, graph, kept)
    assert {n: s for n, (_, s) in predicted.items()} == {n: s for n, (_, s) in cost.named_tensors(model).items()}
    narrow_(skeleton, discover(skeleton), kept)
    skeleton.load_state_dict({n: model.state_dict()[n] for n in predicted}, strict=False, assign=True)
    skeleton.to(torch.float64).tie_weights()
    model.config._experts_implementation = skeleton.config._experts_implementation = "eager"
    torch.testing.assert_close(skeleton(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_the_slices_of_an_expert_are_those_of_its_stacks_and_its_router():
    group = discover(tiny("mixtral", num_local_experts=N, num_experts_per_tok=2)).groups[
        "model.layers.1.mlp.whole_experts"
    ]
    names = {n.removeprefix("model.layers.1.mlp."): dim for n, (dim, _) in group.tensors.items()}
    assert names == {"experts.gate_up_proj": 0, "experts.down_proj": 0, "gate.weight": 0}
    assert (group.n_units, group.at_least, group.layer, group.n_blocks) == (N, 2, 1, 1)
    (rows,) = (t for n, t in group.producers.items() if n.endswith("gate_up_proj"))
    assert rows[3].tolist() == list(range(3 * 80, 4 * 80))


def test_fewer_experts_than_a_token_is_sent_to_are_refused():
    graph = discover(tiny("mixtral", num_local_experts=N, num_experts_per_tok=2))
    with pytest.raises(PlanError, match="keeps 1 of 5 units, and every token is sent to 2 of them. Keep as many"):
        check_kept(graph, everything(graph) | experts(graph, [3]))


def test_experts_that_are_chosen_group_by_group_all_stay_and_that_is_said():
    graph = discover(
        tiny("glm4_moe", **CHOICE, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1, head_dim=8)
    )
    assert not experts(graph, ())
    said = "'mlp.experts': they are chosen group by group, so no expert of it is ever left out whole"
    assert f"{said} (in decoder layers 1-2)" in graph.notes
