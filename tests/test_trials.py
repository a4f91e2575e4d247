"""Trials of a joint search: they judge the model that a plan would give, and never remember anything wrong."""

import pytest
import torch
from tiny_stream import streamed
from tiny_trials import INT3, INT8, Bench

from qpruner.errors import RecipeError
from qpruner.joint.trials import Observed, hopeless
from qpruner.judge.divergence import kl_to
from qpruner.model.corpus import Windows
from qpruner.model.packed.linear import PackedLinear
from qpruner.model.packed.split import Quantized
from qpruner.model.reference import Reference
from qpruner.model.skeleton import build_skeleton
from qpruner.model.surgery import narrow_, refill_


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "gpt2"])
def bench(request):
    return Bench(request.param)


def windows_of(ids):
    return Windows(
        ids=ids, first_token="text", covered_bytes=(0,) * len(ids), corpus_name="", corpus_digest="", seed=None
    )


def shipped(bench, selection):
    """The narrowed, shortened and packed model with the codes of the candidates."""
    graph, model = bench.graph, build_skeleton(bench.model.config)
    model.load_state_dict({n: t.clone() for n, t in bench.model.state_dict().items()}, assign=True)
    model.tie_weights()
    kept = {name: range(group.n_units) for name, group in graph.groups.items()}
    kept |= {name: sorted(bench.orders[name][:k].tolist()) for name, k in selection.kept.items()}
    for name, spec in selection.specs.items():
        if name not in {p.name for p in graph.projections}:
            refill_(model.get_submodule(name), weight=bench.store.parts(name, spec).dequantize(torch.float64))
    narrow_(model, graph, kept)
    for projection in graph.projections:
        for name in projection.linears if projection.layer in selection.layers else ():
            linear, rows = model.get_submodule(name), rows_of(graph, name, kept)
            part = bench.store.parts(name, selection.specs[projection.name], selection.kept)
            if isinstance(part, Quantized):
                parts = {key: tensor[rows] for key, tensor in part.state_dict().items()}
                model.set_submodule(name, PackedLinear(parts, linear.bias, part.spec, part.in_features))
            else:
                refill_(linear, weight=part[rows].T if graph.linears[name].transposed else part[rows])
    path = graph.layers[0].rpartition(".")[0]
    layers = model.get_submodule(path)
    model.set_submodule(path, torch.nn.ModuleList([layers[i] for i in selection.layers]))
    model.config.num_hidden_layers = len(selection.layers)
    return model


def rows_of(graph, name, kept):
    stays = torch.ones(graph.linears[name].d_out, dtype=torch.bool)
    for group_name, group in graph.groups.items():
        if name in group.producers:
            gone = sorted(set(range(group.n_units)) - set(kept[group_name]))
            stays[group.producers[name][gone]] = False
    return stays


def test_the_original_loses_nothing(bench):
    whole = bench.trials.evaluate(bench.selection())
    assert abs(whole.kl) < 1e-12 and whole.n_windows == len(bench.windows)


@pytest.mark.parametrize("case", [
    dict(spec=INT3), dict(kept=0.5), dict(kept=0.5, spec=INT3), dict(layers=(0, 2)),
    dict(layers=(1, 2), kept=0.5, spec=INT8),
])  # fmt: skip
def test_a_trial_judges_what_would_ship(bench, case):
    selection = bench.selection(**case)
    found = bench.trials.evaluate(selection)
    expected = kl_to(shipped(bench, selection), bench.model, windows_of(bench.windows))
    assert found.kl == pytest.approx(expected.kl, rel=1e-6)
    assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-5)
    assert found.kl > 1e-6


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_what_is_tied_to_them(tied):
    bench = Bench("llama", over=dict(tie_word_embeddings=tied))
    selection = bench.selection(**{"model.embed_tokens": INT3})
    expected = kl_to(shipped(bench, selection), bench.model, windows_of(bench.windows)).kl
    assert bench.trials.evaluate(selection).kl == pytest.approx(expected, rel=1e-9)
    if not tied:
        both = bench.selection(**{"model.embed_tokens": INT3, "lm_head": INT3})
        expected = kl_to(shipped(bench, both), bench.model, windows_of(bench.windows)).kl
        assert bench.trials.evaluate(both).kl == pytest.approx(expected, rel=1e-9)


def neighbours(bench):
    """Selections that have beginnings in common, and some that come again."""
    first = bench.selection(spec=INT8)
    found = [first]
    for projection in reversed(bench.graph.projections):
        found.append(first.model_copy(update={"specs": first.specs | {projection.name: INT3}}))
    found += [bench.selection(layers=(0, 2), spec=INT8), bench.selection(kept=0.5, spec=INT8), first]
    return [*found, bench.selection(spec=INT8, **{bench.embedding: INT3}), first, *found[:4]]


@pytest.mark.parametrize("memory", [2**30, 12_000])
def test_what_is_remembered_changes_nothing(bench, memory):
    trials, fresh = bench.new_trials(memory_bytes=memory), bench.new_trials(memory_bytes=0)
    for i, selection in enumerate(neighbours(bench)):
        n = 3 if i % 4 == 3 else None
        assert trials.evaluate(selection, n) == fresh.evaluate(selection, n)
    assert trials.cost.passes < fresh.cost.passes


def test_what_is_known_is_not_computed_again(bench):
    trials = bench.new_trials()
    selection = bench.selection(spec=INT8)
    trials.evaluate(selection)
    assert trials.cost.passes == pytest.approx(1)
    trials.evaluate(selection)
    assert trials.cost.passes == pytest.approx(1)
    last = bench.graph.projections[-1]
    trials.evaluate(selection.model_copy(update={"specs": selection.specs | {last.name: INT3}}))
    assert trials.cost.passes == pytest.approx(1 + 1 / len(bench.graph.layers))


def test_a_layer_may_change_what_it_is_given():
    def adds(_, args: tuple, kwargs: dict) -> None:
        (args[0] if args else kwargs["hidden_states"]).add_(0.1)

    bench = Bench()
    last, selection = bench.graph.projections[-1], bench.selection(spec=INT8)
    other = selection.model_copy(update={"specs": selection.specs | {last.name: INT3}})
    bench.stream.model.get_submodule(bench.graph.layers[-1]).register_forward_pre_hook(adds, with_kwargs=True)
    trials, fresh = bench.new_trials(), bench.new_trials(memory_bytes=0)
    trials.evaluate(selection)
    assert trials.evaluate(other) == fresh.evaluate(other)


def test_layers_come_and_go_without_a_difference(bench):
    coming = bench.new_trials(stream=streamed(bench.model))
    for selection in neighbours(bench)[-6:]:
        assert coming.evaluate(selection) == bench.trials.evaluate(selection)


def test_a_hopeless_trial_ends_early_and_others_do_not(bench):
    selection = bench.selection(kept=0.3, spec=INT3)
    known = bench.trials.evaluate(selection)
    stopped = bench.trials.evaluate(selection, bar=[loss - 0.01 for loss in known.window_losses])
    assert stopped.n_windows == 2 and stopped.window_losses == known.window_losses[:2]
    assert bench.trials.evaluate(selection, bar=known.window_losses) == known
    assert bench.trials.evaluate(selection, bar=100.0) == known


def test_rounded_inputs_are_refused(bench):
    rounded = INT8.model_copy(update={"activation_bits": 8})
    with pytest.raises(RecipeError, match="Set activation_bits to 16"):
        bench.trials.evaluate(bench.selection(spec=rounded))


def test_hopeless():
    assert hopeless([1.0, 1.1], [0.5, 0.61]) and not hopeless([1.0, 0.1], [0.5, 0.61])
    assert hopeless([float("nan"), 1.0], None) and not hopeless([1.0], 0.5)


def test_what_was_observed_survives_json():
    observed = Observed.of([0.1, 1 / 3, 2e-9])
    assert Observed.from_json(observed.to_json()) == observed


def logits_of(shape, seed):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_reference_in_half_precision_is_close():
    z, other = logits_of((4, 6, 50), 0), logits_of((4, 6, 50), 0) + 0.1 * logits_of((4, 6, 50), 1)
    exact = Reference.of(iter([z]), 4, dtype=torch.float64)
    half = Reference.of(iter([z]), 4)
    assert exact.kl(0, z).abs().max() < 1e-12 and half.kl(0, z).abs().max() < 1e-6
    torch.testing.assert_close(half.kl(0, other), exact.kl(0, other), rtol=1e-3, atol=0)
    torch.testing.assert_close(exact.kl(2, other[2:]), exact.kl(0, other)[2:])


def test_a_reference_of_some_tokens_is_a_close_lower_bound(tmp_path):
    z, other = logits_of((4, 6, 50), 0), logits_of((4, 6, 50), 0) + 0.1 * logits_of((4, 6, 50), 1)
    exact = Reference.of(iter([z]), 4, dtype=torch.float64).kl(0, other)
    found = []
    for largest in (2000, 4000, 7000):
        reference = Reference.of(iter([z]), 4, dtype=torch.float64, largest=largest)
        reference.save(tmp_path / "r.safetensors")
        reference = Reference.load(tmp_path / "r.safetensors")
        assert reference.values.nbytes + reference.classes.nbytes <= largest
        assert reference.kl(0, z).abs().max() < 1e-9
        found.append(reference.kl(0, other))
    assert all((a <= b * (1 + 1e-9)).all() for a, b in zip(found, [*found[1:], exact], strict=True))
    torch.testing.assert_close(found[-1], exact, rtol=0.05, atol=0)
