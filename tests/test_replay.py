"""A layer that remembers gives the same to the last bit, and does less."""

import pytest
import torch
from tiny import tiny
from tiny_pruned import IDS
from tiny_stream import streamed

from qpruner.do import replay as module
from qpruner.do.replay import End, Replay, ends_of
from qpruner.model.discover import discover
from qpruner.model.scratch import Scratch

ENDS = {
    "llama": {"self_attn.o_proj": "self_attn", "mlp.down_proj": "mlp"},
    "gpt2": {"attn.c_proj": "attn", "mlp.c_proj": "mlp"},
    "gpt_neox": {"attention.dense": "attention", "mlp.dense_4h_to_h": "mlp"},
    "opt": {"self_attn.out_proj": "self_attn"},  # its MLP is no module
}


def first_step(family: str):
    model = tiny(family)
    graph = discover(model)
    step = next(streamed(model, resident=True).steps(IDS, Scratch(), batch_size=4))
    return step, [name.removeprefix(f"{graph.layers[0]}.") for name, s in graph.linears.items() if s.layer == 0]


@pytest.mark.parametrize("family", ENDS)
def test_modules_end_in_linears(family):
    step, inners = first_step(family)
    assert {inner: end.module for inner, end in ends_of(step, inners).items()} == ENDS[family]


@pytest.mark.parametrize("family", ENDS)
def test_it_gives_the_same_bits_and_leaves_no_trace(family):
    step, inners = first_step(family)
    plain, _ = first_step(family)
    with Replay(step, ends := ends_of(step, inners)) as replay:
        for inner in ends:
            replay.settle(inner, min(step.layer.get_submodule(inner).weight.shape))
            for b in (0, 1, 0):
                assert torch.equal(replay.run(b), plain.run(b))
            for one in (step, plain):
                one.layer.get_submodule(inner).weight.data *= 1.5  # the end itself may still change
            assert torch.equal(replay.run(1), plain.run(1))
    assert torch.equal(step.run(0), plain.run(0))
    assert not any("forward" in vars(part) for part in step.layer.modules())


def test_what_is_settled_is_not_done_again():
    step, inners = first_step("llama")
    calls = []
    step.layer.self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    with Replay(step, ends_of(step, inners)) as replay:
        calls.clear()
        replay.settle("self_attn.o_proj", 24)
        first = [replay.run(b) for b in (0, 1)]
        assert len(calls) == 2
        assert all(torch.equal(replay.run(b), first[b]) for b in (0, 1)) and len(calls) == 2
        replay.forget()
        assert torch.equal(replay.run(0), first[0]) and len(calls) == 3


def test_what_does_not_fit_is_not_remembered(monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED", 100)
    step, inners = first_step("llama")
    with Replay(step, ends_of(step, inners)) as replay:
        replay.settle("self_attn.o_proj", 24)
        assert "forward" not in vars(step.layer.self_attn)


def test_a_module_that_returns_more_than_its_linear_gives_is_done_again():
    step, inners = first_step("llama")
    step.layer.mlp.register_forward_hook(lambda module, args, output: output + 1)
    assert set(ends_of(step, inners)) == {"self_attn.o_proj"}
    assert ends_of(step, inners)["self_attn.o_proj"] == End("self_attn", (None,))
