"""What single choices lose: the estimate is that of small changes, without bias, and measurements take its place."""

import gc
import weakref

import numpy as np
import pytest
import torch
from tiny_stream import streamed
from tiny_trials import INT3, INT8, Bench

from qpruner.decide.fisher import Change, contributions, drawn_labels, estimated
from qpruner.decide.space import Space, Table, Variable
from qpruner.joint.sensitivities import Sensitivities, combined, correlation, measure, scores_of_options, wanted
from qpruner.model.scratch import Scratch
from qpruner.model.swap import swapped
from qpruner.plan import DENSE

DRAWS = 30  # of labels for every window; the error of an estimate falls with its root


def space_of(bench, specs=(INT8, DENSE), *, drop=(1,), embeddings=()):
    """All that sensitivities look at of a space."""
    variables = [Variable(bench.graph.layers[layer], "layer", layer, (0, 1)) for layer in drop]
    for name, group in bench.groups.items():
        variables.append(Variable(name, "width", group.layer, (group.n_units // 2, group.n_units)))
    for projection in bench.graph.projections:
        variables.append(Variable(projection.name, "bits", projection.layer, tuple(specs)))
    variables += [Variable(name, "bits", -1, tuple(specs)) for name in embeddings]
    return Space(
        tuple(variables), bench.graph.layers, 0, tuple(Table((v,), np.arange(2)) for v in range(len(variables)))
    )


def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "gpt2"])
def bench(request):
    return Bench(request.param)


def kl_of(bench, changed):
    """What the model loses with other weights."""
    whole = streamed(bench.model).loaded()
    with torch.no_grad():
        p = torch.log_softmax(bench.model(bench.windows).logits[:, :-1], -1)
        with swapped(whole, changed):
            q = torch.log_softmax(whole(bench.windows).logits[:, :-1], -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_small_changes_lose_what_is_estimated_alone_and_together(bench):
    some = [list(bench.graph.linears)[i] for i in (1, -1)]
    changes = {}
    for number, name in enumerate(some):
        W = bench.store.weight(name, DENSE)
        noise = torch.randn(W.shape, generator=torch.Generator().manual_seed(number), dtype=W.dtype)
        changes[name] = 1e-3 * noise
    ids = bench.windows.repeat(DRAWS, 1)
    labels = drawn_labels(bench.stream, ids, Scratch(), generator(), batch_size=64)
    of_layer = lambda i: [Change(n, n, D) for n, D in changes.items() if bench.graph.linears[n].layer == i]
    found = {}
    for result in contributions(bench.stream, ids, labels, of_layer, Scratch()):
        found |= result
    both = estimated(torch.stack([found[name] for name in some]), span=ids.shape[1])
    moved = {name: bench.store.weight(name, DENSE) + D for name, D in changes.items()}
    alone = [kl_of(bench, {name: W}) for name, W in moved.items()]
    assert (both.diagonal() / 2).tolist() == pytest.approx(alone, rel=0.25)
    # of one sign where changes are alike; its error is that of the roots of both
    error = 0.25 * 2 * (alone[0] * alone[1]) ** 0.5
    assert float(both[0, 1]) == pytest.approx(kl_of(bench, moved) - sum(alone), abs=error)


def test_a_change_made_twice_loses_four_times_as_much(bench):
    name = list(bench.graph.linears)[-1]
    D, layer = 1e-3 * bench.store.weight(name, DENSE), bench.graph.linears[list(bench.graph.linears)[-1]].layer
    changes = lambda i: [Change("a", name, D), Change("b", name, D), Change("b", name, D)] if i == layer else []
    labels = drawn_labels(bench.stream, bench.windows, Scratch(), generator())
    (found,) = (r for r in contributions(bench.stream, bench.windows, labels, changes, Scratch()) if r)
    torch.testing.assert_close(found["b"], 2 * found["a"])
    both = estimated(torch.stack([found["a"], found["b"]]))
    torch.testing.assert_close(both, both[0, 0] * torch.tensor([[1.0, 2], [2, 4]]).double())


def test_nothing_of_a_pass_stays():
    bench, alive = Bench(), []
    space = space_of(bench, embeddings=[bench.embedding])
    for module in bench.stream.model.modules():
        module.register_forward_hook(
            lambda _, __, output: alive.append(weakref.ref(output)) if torch.is_tensor(output) else None
        )
    scores_of_options(bench.stream, bench.graph, bench.store, space, bench.windows, Scratch(), generator=generator())
    gc.collect()
    assert len(alive) > 100 and not any(output() is not None for output in alive)


@pytest.mark.parametrize("tied", [True, False])
def test_what_eight_bits_lose_is_estimated_within_half(tied):
    bench = Bench("llama", over=dict(tie_word_embeddings=tied))
    space = space_of(bench, drop=(), embeddings=["model.embed_tokens"] + ["lm_head"] * (not tied))
    ids = bench.windows.repeat(DRAWS // 2, 1)
    found = scores_of_options(bench.stream, bench.graph, bench.store, space, ids, Scratch(), generator=generator())
    guessed = estimated(found, span=ids.shape[1]).diagonal().numpy()
    options = [(v, 0) for v, variable in enumerate(space.variables) if variable.kind == "bits"]
    _, seen = measure(space, options, evaluate_in(bench))
    starts = np.concatenate([[0], np.cumsum(space.sizes)])
    for (v, o), value in seen.items():
        assert guessed[starts[v] + o] / 2 == pytest.approx(value, rel=0.5), space.variables[v].name


def evaluate_in(bench, log=None):
    def evaluate(selections, common):
        return [bench.trials.evaluate(s, remember=n) for s, n in zip(selections, common, strict=True)]

    return evaluate


def test_a_layer_that_goes_takes_what_it_adds(bench):
    path, length = bench.graph.layers[1], bench.windows.shape[1]
    labels = drawn_labels(bench.stream, bench.windows, Scratch(), generator())
    scratch, seen = Scratch(), []
    hook = bench.stream.model.get_submodule(path).register_forward_hook(
        lambda _, args, output: seen.append((args[0] - (output if torch.is_tensor(output) else output[0])).detach())
    )
    results = contributions(
        bench.stream, bench.windows, labels, lambda i: [Change("goes", path)] if i == 1 else [], scratch
    )
    hook.remove()
    found = next(r["goes"] for r in results if r)
    again, gradients = Scratch(), {}

    whole = streamed(bench.model).loaded()
    whole.get_submodule(path).register_forward_hook(
        lambda _, args, output: (output if torch.is_tensor(output) else output[0]).register_hook(
            lambda g: gradients.setdefault(len(gradients), g)
        ) and None
    )  # fmt: skip
    for rows, wanted_ in zip(bench.windows.split(1), labels.split(1), strict=True):
        whole.requires_grad_(True)
        whole(rows, labels=wanted_).loss.backward()
    del again
    moved = torch.cat(seen[-len(bench.windows) :])
    expected = (length - 1) * (torch.cat(list(gradients.values())) * moved).sum(-1)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)


def test_layers_come_and_go_without_a_difference():
    bench = Bench()
    space = space_of(bench, embeddings=[bench.embedding])
    found = [
        scores_of_options(stream, bench.graph, bench.store, space, bench.windows, Scratch(), generator=generator())
        for stream in (bench.stream, streamed(bench.model))
    ]
    assert torch.equal(*found) and all(found[0][:-1:2].flatten(1).any(1)) and not found[0][1::2].any()


def test_the_best_of_everything_loses_nothing_more():
    bench = Bench()
    space = space_of(bench, specs=(INT3, INT8))
    options = [(v, 0) for v in range(len(space.sizes))]
    trials = bench.new_trials()
    found = measure(space, options, lambda s, c: [trials.evaluate(x, remember=n) for x, n in zip(s, c, strict=True)])
    base, seen = found
    assert base == trials.evaluate(space.selection(space.top)).kl > 0
    # every choice of a layer begins where the first trial left what reaches that layer
    assert trials.cost.passes < 0.75 * (len(options) + 2)
    fresh = bench.new_trials(memory_bytes=0)
    for (v, o), value in seen.items():
        point = list(space.top)
        point[v] = o
        assert value == max(0, fresh.evaluate(space.selection(tuple(point))).kl - base)


def test_measurements_take_the_place_of_estimates_and_set_their_scale():
    bench = Bench()
    space = space_of(bench, drop=())
    n = sum(space.sizes)
    root = np.where(np.arange(n) % 2, 0, 1 + np.arange(n))
    both = np.outer(root, root).astype(float)
    bits = [v for v, variable in enumerate(space.variables) if variable.kind == "bits"]
    found = combined(
        space, both, 0.5, {(v, 0): 3 * both[2 * v, 2 * v] / 2 for v in bits[:2]} | {(0, 0): both[0, 0] / 2}
    )
    for v in range(len(space.sizes)):
        times = 3 if v in bits else 1
        assert found.single[v] == pytest.approx([times * both[2 * v, 2 * v] / 2, 0])
        assert not found.interaction[2 * v : 2 * v + 2, 2 * v : 2 * v + 2].any()
    a, b = bits[0], bits[-1]
    assert found.interaction[2 * a, 2 * b] == pytest.approx(3 * both[2 * a, 2 * b])
    assert np.isnan(found.measured[bits[-1]][0]) and found.measured[0].tolist() == [both[0, 0] / 2, 0]
    again = Sensitivities.from_tensors(found.to_tensors())
    assert again.base == found.base and (again.interaction == found.interaction).all()
    for name in ("single", "estimated", "measured"):
        assert all(map(np.array_equal, getattr(again, name), getattr(found, name), [True] * len(space.sizes)))


def test_what_is_measured_when_not_all_can_be():
    bench = Bench()
    space = space_of(bench, specs=(INT3, INT8, DENSE), drop=())
    guesses = [np.arange(n)[::-1] * (1.0 + v) for v, n in enumerate(space.sizes)]
    every = wanted(space, [], guesses, 1000)
    assert every == [(v, o) for v, n in enumerate(space.sizes) for o in range(n - 1)]
    v = len(space.sizes) - 1
    assert wanted(space, [(v, 2), (0, 0)], guesses, 10) == [(0, 0), (v, 1)]
    assert wanted(space, [(v, 1), (0, 0)], guesses, 2) == [(v, 0), (v, 1)]


def test_correlation(rand):
    a = rand(50).exp().numpy()
    assert correlation(a, 2 * a) == pytest.approx({"n": 50, "spearman": 1, "pearson": 1, "log_ratio": np.log(2)})
    assert abs(correlation(a, rand(50).exp().numpy())["spearman"]) < 0.4
