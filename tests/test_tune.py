"""Learning codes and scales: what is computed is what is stored, and it is never worse on what was held out."""

import copy

import pytest
import torch
from tiny_stream import streamed

from qpruner.do.tune import Learned, kl, learning, rate_at, shuffled, tune_layer_, tune_network_
from qpruner.math import grids
from qpruner.math.books import book
from qpruner.math.straight import Snap, latents_near, on_grid
from qpruner.model.packed.learned import LearnedLinear, learnable
from qpruner.model.packed.linear import PackedLinear
from qpruner.model.packed.split import packed
from qpruner.model.scratch import Scratch
from qpruner.plan import QuantSpec
from qpruner.testing.tiny import tiny_config, tiny_model

SPECS = [
    QuantSpec(bits=2, grid="integer", group_size=8, symmetric=False),
    QuantSpec(bits=3, grid="integer", group_size=16),
    QuantSpec(bits=4, grid="normal-float", group_size=8, scale_bits=8),
    QuantSpec(bits=2, grid="ternary", group_size=8),
    QuantSpec(bits=1, grid="binary", group_size=8),
    QuantSpec(bits=3, grid="integer", group_size=8, symmetric=False, scale_bits=6, activation_bits=8),
]
IDS = torch.randint(2, 61, (32, 24), generator=torch.Generator().manual_seed(0))


def quantized_model(spec: QuantSpec):
    """A tiny Llama in float32, and the same with packed linears whose scales are a fifth too large."""
    model = tiny_model(tiny_config("llama"), dtype=torch.float32).eval()
    rounded = copy.deepcopy(model)
    for name, module in list(rounded.named_modules()):
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            rounded.set_submodule(name, spoilt(module, spec))
    return model, rounded


def spoilt(linear, spec: QuantSpec) -> PackedLinear:
    layer = packed(linear.weight, linear.bias, spec)
    (layer.scales if layer.steps is None else layer.steps).mul_(1.2)
    return layer


def predictions(model):
    def of(window: int):
        with torch.no_grad():
            return model(IDS[window : window + 1]).logits

    return of


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_learning_begins_at_what_is_stored_and_ends_there(rand, spec):
    W = rand(6, 37).float()
    layer = PackedLinear.from_weight(W, rand(6).float(), spec)
    learned = LearnedLinear(layer, W)
    torch.testing.assert_close(learned.weight, layer.dequantize())
    x = rand(2, 37).float()
    torch.testing.assert_close(learned(x), layer(x))
    again = learned.packed()
    assert torch.equal(again.rounded().codes, layer.rounded().codes)
    for p in learned.parameters():
        p.data += 0.3 * rand(*p.shape).float()
    torch.testing.assert_close(learned.packed().dequantize(), learned.weight.detach())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_latents_round_to_their_codes(rand, spec):
    W = rand(5, 24).float()
    codes = torch.randint(0, len(book(spec)), W.shape, dtype=torch.uint8)
    rounded = grids.quantize(W, spec)
    scales = grids.decoded_scales(rounded, spec)
    u = latents_near(W, codes, scales, rounded.zeros, spec)
    assert torch.equal(Snap.apply(u, spec), book(spec).float()[codes.int()])


def test_a_gradient_passes_inside_the_grid_only():
    spec = QuantSpec(bits=2, grid="integer", symmetric=False)
    u = torch.tensor([[-2.0, -0.4, 1.2, 3.4, 3.6]], requires_grad=True)
    Snap.apply(u, spec).sum().backward()
    assert u.grad.tolist() == [[0, 1, 1, 1, 0]] == on_grid(u, spec).float().tolist()


def test_the_divergence_is_zero_between_equals_and_positive_otherwise(rand):
    a, b = rand(2, 3, 7), rand(2, 3, 7)
    assert kl(a, a) == 0 and kl(a, a + 1).abs() < 1e-6
    p, q = a.float().softmax(-1), b.float().softmax(-1)
    torch.testing.assert_close(kl(a, b), (p * (p / q).log()).sum(-1).mean())


@pytest.mark.parametrize("spec", SPECS[1:4], ids=str)
def test_the_network_comes_nearer_to_the_original(spec, monkeypatch):
    monkeypatch.setattr("qpruner.do.tune.GROWTHS_RATE", 1e-2)  # scales are what is wrong
    model, rounded = quantized_model(spec)
    tuned = tune_network_(
        rounded, predictions(model), IDS, steps=50, batch_size=6, held_out=0.25, seed=0,
        weights={name: p for name, p in model.named_parameters()},
    )  # fmt: skip
    assert tuned.after < 0.8 * tuned.before
    assert not [m for m in rounded.modules() if isinstance(m, LearnedLinear)]
    with torch.no_grad():
        found = kl(model(IDS[24:]).logits[:, :-1], rounded(IDS[24:]).logits[:, :-1])
    assert float(found) == pytest.approx(tuned.after, rel=0.1)


def test_an_interrupted_process_is_gone_on_with_to_the_same_end(tmp_path):
    model, _ = quantized_model(SPECS[0])
    how = dict(steps=20, batch_size=2, held_out=0.25, seed=0)

    class Killed(Exception):
        pass

    def kill(step: int, *rest) -> None:
        if step == 12:
            raise Killed

    whole, again = quantized_model(SPECS[0])[1], quantized_model(SPECS[0])[1]
    expected = tune_network_(whole, predictions(model), IDS, **how)
    with pytest.raises(Killed):
        tune_network_(again, predictions(model), IDS, **how, kept=Scratch(tmp_path), on_step=kill)
    seen = []
    again = quantized_model(SPECS[0])[1]
    found = tune_network_(
        again, predictions(model), IDS, **how, kept=Scratch(tmp_path), on_step=lambda step, *_: seen.append(step)
    )
    assert seen == list(range(11, 21)) and found == expected
    assert all(torch.equal(t, whole.state_dict()[name]) for name, t in again.state_dict().items())


def test_what_does_not_help_on_held_out_windows_is_undone(monkeypatch):
    model, rounded = quantized_model(SPECS[0])
    before = {name: t.clone() for name, t in rounded.state_dict().items()}
    monkeypatch.setattr("qpruner.do.tune.LATENTS_RATE", 3e4)
    tuned = tune_network_(rounded, predictions(model), IDS, steps=3, batch_size=2, held_out=0.25, seed=0)
    assert not tuned.helped
    assert all(torch.equal(t, before[name]) for name, t in rounded.state_dict().items())


def test_a_layer_comes_nearer_to_the_original(monkeypatch):
    monkeypatch.setattr("qpruner.do.tune.GROWTHS_RATE", 1e-2)
    model, _ = quantized_model(SPECS[0])
    walks = [streamed(model).steps(IDS, Scratch(), batch_size=4) for _ in range(2)]  # kept, as weights go with them
    theirs, ours = map(next, walks)
    for name, module in list(ours.layer.named_modules()):
        if isinstance(module, torch.nn.Linear):
            ours.layer.set_submodule(name, spoilt(module, SPECS[0]))
    theirs.pass_all_on()
    tuned = tune_layer_(ours, theirs, steps=60, n_learned=7, seed=0)
    assert tuned.after < 0.8 * tuned.before
    error = (ours.run(7) - theirs.passed_on(7)).square().sum(-1) / theirs.passed_on(7).square().sum(-1)
    assert float(error.mean()) == pytest.approx(tuned.after, rel=1e-4)


def test_split_linears_are_learned_in_both_parts(rand):
    spec = QuantSpec(bits=1, grid="binary", group_size=8, salient=3)
    W = rand(6, 32).float()
    module = torch.nn.Sequential(packed(W, None, spec))
    assert list(learnable(module, {"0": W})) == ["0.rest", "0.high"]
    x = rand(4, 32).float()
    expected = module(x)
    with learning(module, {"0": W}) as learned:
        assert isinstance(learned, Learned)
        torch.testing.assert_close(module(x), expected)
        learned.keep = True
    torch.testing.assert_close(module(x), expected)


def test_the_rate_goes_up_and_comes_down_to_nothing():
    rates = [rate_at(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2, rel=0.01) and max(rates) > 0.95 and rates[100] == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_every_number_comes_up_equally_often():
    batches = shuffled(10, 4, seed=0)
    numbers = torch.cat([next(batches) for _ in range(5)])
    assert numbers.bincount().tolist() == [2] * 10
