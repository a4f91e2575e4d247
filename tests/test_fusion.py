"""HyWIA's two scores made one: laws of the formulas, of the gates, and of the attention that they train."""

import pytest
import torch
from tiny import tiny
from tiny_stream import streamed

from qpruner.decide.fusion import WAYS, Blend, Fused, fuse, train_
from qpruner.decide.widths import Pool
from qpruner.math import fusion
from qpruner.model.discover import discover
from qpruner.model.gates import gated
from qpruner.model.scratch import Scratch
from qpruner.model.surgery import narrow_

WINDOWS = torch.arange(48).reshape(4, 12) % 29 + 1


@pytest.fixture
def R(rand):
    return fusion.comparable(rand(2, 30).abs(), rand(30).abs() + 0.1)


def attentions(R, rand):
    X = torch.cat([R.log().T, rand(R.shape[1], 3)], dim=1)
    return fusion.attention_of_scores(R), fusion.attention(X, rand(5, 8), rand(2, 5, 8))


# --- the formulas ----------------------------------------------------------------------------------------------------


def test_comparable_scores_have_a_mean_of_one_over_all_weight(rand):
    S, w = rand(2, 30).abs(), rand(30).abs() + 0.1
    R = fusion.comparable(S, w)
    torch.testing.assert_close((R * w).sum(1) / w.sum(), torch.ones(2, dtype=R.dtype))
    torch.testing.assert_close(fusion.comparable(3 * S, w), R)  # and no scale of their own


def test_fusion_lies_between_its_inputs(R, rand):
    for a in attentions(R, rand):
        torch.testing.assert_close(a.sum(0), torch.ones(30, dtype=a.dtype))
        s = fusion.fused(R, a)
        assert (s >= R.min(0).values - 1e-12).all() and (s <= R.max(0).values + 1e-12).all()


def test_where_both_scores_agree_so_does_the_fusion(R, rand):
    same = R[:1].expand(2, -1)
    for a in attentions(same, rand):
        torch.testing.assert_close(fusion.fused(same, a), R[0])


def test_permuting_units_permutes_the_fusion(R, rand):
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    Q, K = rand(3, 8), rand(2, 3, 8)
    X = torch.cat([R.log().T, torch.ones(30, 1)], dim=1)
    for a, moved in (
        (fusion.attention_of_scores(R), fusion.attention_of_scores(R[:, order])),
        (fusion.attention(X, Q, K), fusion.attention(X[order], Q, K)),
    ):
        torch.testing.assert_close(fusion.fused(R, a)[order], fusion.fused(R[:, order], moved))


def test_attention_of_scores_trusts_whoever_is_surer():
    R = torch.tensor([[4.0, 0.1], [2.0, 0.5]], dtype=torch.float64)
    a = fusion.attention_of_scores(R)
    assert a[0, 0] > 0.5  # important to both: the higher score
    assert a[0, 1] > 0.5  # unimportant to both: the lower


# --- gates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_soft_gates_hold_the_target(R, rand, temperature):
    w = rand(30).abs() + 0.1
    gates = fusion.soft_gates(R[0], w, 0.4 * float(w.sum()), temperature=temperature)
    torch.testing.assert_close((w * gates).sum(), 0.4 * w.sum(), rtol=1e-6, atol=0)


def test_the_gradient_of_soft_gates_knows_that_the_target_holds(R, rand):
    w, s = rand(30).abs() + 0.1, R[0].clone().requires_grad_()
    target = 0.5 * float(w.sum())
    gates = fusion.soft_gates(s, w, target, temperature=0.3)
    (through,) = torch.autograd.grad((w * gates).sum(), s, retain_graph=True)
    torch.testing.assert_close(through, torch.zeros(30, dtype=s.dtype), rtol=0, atol=1e-9)
    along, step = rand(30), 1e-6
    moved = lambda sign: fusion.soft_gates(s.detach() + sign * step * along, w, target, temperature=0.3)
    pick = rand(30)
    (gradient,) = torch.autograd.grad((pick * gates).sum(), s)
    torch.testing.assert_close(
        gradient @ along, (pick * (moved(1) - moved(-1))).sum() / (2 * step), rtol=1e-4, atol=1e-7
    )


def test_hard_gates_keep_the_best_that_fit(R):
    w = torch.ones(30, dtype=torch.float64)
    gates = fusion.hard_gates(R[0], w, 7.0)
    assert set(gates.nonzero().flatten().tolist()) == set(R[0].topk(7).indices.tolist())
    assert fusion.hard_gates(R[0], w, 0.5).sum() == 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_gate_at_zero_is_a_unit_removed(family):
    model, whole = tiny(family), tiny(family)
    graph = discover(model)
    groups = {name: g for name, g in graph.groups.items() if g.kind in ("kv_group", "channel")}
    keep = {
        name: list(range(0, g.n_units, 2)) if name in groups else list(range(g.n_units))
        for name, g in graph.groups.items()
    }
    gates = {
        n: torch.zeros(g.n_units, dtype=torch.float64).index_fill(0, torch.tensor(keep[n]), 1)
        for n, g in groups.items()
    }
    with gated(whole, graph, gates), torch.no_grad():
        expected = whole(WINDOWS).logits
    narrow_(model, graph, keep)
    with torch.no_grad():
        torch.testing.assert_close(model(WINDOWS).logits, expected)
        assert not torch.equal(whole(WINDOWS).logits, expected)  # and afterwards it is as it was


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting():
    model = tiny("llama")
    graph = discover(model)
    generator = torch.Generator().manual_seed(3)
    hybrid = {name: torch.rand(2, g.n_units, generator=generator) + 0.01 for name, g in graph.groups.items()}
    ones = lambda name: torch.ones(graph.groups[name].n_units, dtype=torch.float64)
    losing = [name for name, g in graph.groups.items() if g.kind in ("kv_group", "channel")]
    weights = torch.cat([ones(name) * (7 if "attn" in name else 1) for name in losing])
    pools = [Pool((name,), ones(name), len(ones(name))) for name in graph.groups if name not in losing]
    pools.append(Pool(tuple(losing), weights, 0.5 * float(weights.sum())))
    return model, graph, hybrid, pools


def trained(setting, *, steps=6, scratch=None, **options):
    model, graph, hybrid, pools = setting
    blend = Blend(hybrid, pools, graph)
    generator = torch.Generator().manual_seed(0)
    how = dict(steps=steps, generator=generator, scratch=scratch or Scratch(), on_step=lambda *_: None)
    return blend, train_(blend, streamed(model, **options), WINDOWS, **how)


def test_training_moves_the_attention_and_not_the_model(setting):
    before = {name: p.clone() for name, p in setting[0].named_parameters()}
    blend, curve = trained(setting)
    fresh = Blend(*(setting[2], setting[3], setting[1]))
    assert len(curve) == 6
    assert any(not torch.equal(a, b) for a, b in zip(blend.parameters, fresh.parameters, strict=True))
    assert all(torch.equal(before[name], p) for name, p in setting[0].named_parameters())


def test_the_gradient_of_the_attention_is_that_of_the_whole_model(setting):
    """One step by hand, with every gate in one graph, against the pass layer by layer."""
    from qpruner.decide import fusion as training

    model, graph, hybrid, pools = setting
    ours, theirs = Blend(hybrid, pools, graph), Blend(hybrid, pools, graph)
    adam = torch.optim.Adam(ours.parameters, lr=0.0)
    training._step(ours, adam, streamed(model), WINDOWS[:2], 0.3, Scratch())
    with gated(model, graph, theirs.gates(0.3)):
        model(input_ids=WINDOWS[:2], labels=WINDOWS[:2]).loss.backward()
    for a, b in zip(ours.parameters, theirs.parameters, strict=True):
        assert b.grad.abs().max() > 0
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("options", [dict(resident=True), dict(resident=False)])
def test_streamed_and_resident_training_are_the_same(setting, options, tmp_path):
    reference, curve = trained(setting)
    blend, again = trained(setting, scratch=Scratch(tmp_path / "training"), **options)
    assert curve == again
    assert all(torch.equal(a, b) for a, b in zip(blend.parameters, reference.parameters, strict=True))


def test_a_killed_training_goes_on_where_it_stopped(setting, tmp_path, monkeypatch):
    from qpruner.decide import fusion as training

    reference, curve = trained(setting)
    steps, real = [], training._step

    def dying(*args):
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(1)
        return real(*args)

    monkeypatch.setattr(training, "_step", dying)
    with pytest.raises(KeyboardInterrupt):
        trained(setting, scratch=Scratch(tmp_path / "training"))
    counted = []
    monkeypatch.setattr(training, "_step", lambda *args: counted.append(1) or real(*args))
    blend, again = trained(setting, scratch=Scratch(tmp_path / "training"))
    assert len(counted) == 3 and again == curve
    assert all(torch.equal(a, b) for a, b in zip(blend.parameters, reference.parameters, strict=True))


# --- choosing a way --------------------------------------------------------------------------------------------------


def made(setting, way, trial=lambda scores: 0.0):
    model, graph, hybrid, pools = setting
    return fuse(hybrid, pools, graph, way, lambda blend: (1.0,), trial, lambda *_: None)


def test_the_way_that_loses_least_is_taken_and_named(setting):
    number = iter([5.0, 4.0, 2.0, 3.0, 6.0])
    found = made(setting, "best", lambda scores: next(number))
    assert found.way == "mean" and found.losses == dict(zip(WAYS, [5.0, 4.0, 2.0, 3.0, 6.0], strict=True))
    expected = made(setting, "mean").scores
    assert all(torch.equal(found.scores[name], expected[name]) for name in expected)


def test_one_score_alone_keeps_its_order(setting):
    _, _, hybrid, _ = setting
    for row, way in enumerate(("fine", "coarse")):
        for name, scores in made(setting, way).scores.items():
            assert torch.equal(scores.argsort(), hybrid[name][row].argsort())


def test_what_a_run_stores_is_read_back(setting):
    found = made(setting, "best", lambda scores: float(len(scores)))
    again = Fused.from_tensors(found.to_tensors())
    assert (again.way, again.losses, again.curve) == (found.way, found.losses, found.curve)
    assert again.fine == found.fine
    assert all(torch.equal(again.scores[name], found.scores[name]) for name in found.scores)
