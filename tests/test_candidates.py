"""Candidates of a joint search: what they are made of, and that it does not matter who makes them, or when."""

import multiprocessing

import pytest
import torch
from safetensors.torch import load_file
from tiny_trials import GPTQ, INT3, INT8, NEAREST, Bench

from qpruner.do.candidates import refitted
from qpruner.math.salient import Rounding
from qpruner.plan import DENSE

FAMILIES = ["llama", "gpt_neox", "gpt2"]


@pytest.fixture(params=FAMILIES)
def bench(request):
    return Bench(request.param)


def weight_of(bench, linear):
    W = bench.model.get_parameter(f"{linear}.weight").detach()
    return W.T if bench.graph.linears[linear].transposed else W


def consumers(bench):
    return {(linear, name): group for name, group in bench.groups.items() for linear in group.consumers}


def test_all_of_it_at_16_bits_is_the_weight(bench):
    for linear in bench.graph.linears:
        assert bench.store.is_original(linear, DENSE, {name: g.n_units for name, g in bench.groups.items()})
        assert torch.equal(bench.store.weight(linear, DENSE), weight_of(bench, linear))


def test_whole_linears_are_rounded_as_one_where_they_are_fused(bench):
    for projection in bench.graph.projections:
        W = torch.cat([weight_of(bench, name) for name in projection.linears])
        rounded = Rounding.of(W, bench.grams[projection.linears[0]], INT3, "mse")(W).dequantize(INT3, torch.float64)
        found = torch.cat([bench.store.weight(name, INT3) for name in projection.linears])
        torch.testing.assert_close(found, rounded)


def test_columns_of_units_that_went_are_zero_and_no_others(bench):
    for (linear, name), group in consumers(bench).items():
        n = max(1, group.n_units // 2)
        gone = group.consumers[linear][bench.orders[name][n:]].flatten()
        for spec in (DENSE, INT8):
            W = bench.store.weight(linear, spec, {name: n})
            assert W.shape == weight_of(bench, linear).shape
            assert not W[:, gone].any()
            stays = torch.ones(W.shape[1], dtype=torch.bool)
            stays[gone] = False
            assert W[:, stays].any(0).all()


def test_what_is_refitted_loses_no_more_than_what_is_sliced(bench):
    for (linear, name), group in consumers(bench).items():
        W, G = weight_of(bench, linear), bench.grams[linear]
        loss = lambda V, W=W, G=G: float(((V - W) @ G * (V - W)).sum())
        for n in range(1, group.n_units):
            V = bench.store.weight(linear, DENSE, {name: n})
            sliced = torch.where(V.any(0), W, 0.0)
            assert loss(V) <= loss(sliced) * (1 + 1e-9)


def test_what_is_refitted_is_rounded_for_the_inputs_that_stay(bench):
    for (linear, name), group in consumers(bench).items():
        kept = {name: max(1, group.n_units // 2)}
        V = bench.store.weight(linear, DENSE, kept)
        stays = V.any(0).nonzero()[:, 0]
        G = bench.grams[linear][stays][:, stays]
        rounded = Rounding.of(V[:, stays], G, INT3, "mse")(V[:, stays]).dequantize(INT3, torch.float64)
        torch.testing.assert_close(bench.store.weight(linear, INT3, kept)[:, stays], rounded)


def test_refitting_is_least_squares(rand):
    X, W, stays = rand(50, 6), rand(4, 6), torch.tensor([0, 2, 5])
    expected = torch.linalg.lstsq(X[:, stays], X @ W.T).solution.T
    torch.testing.assert_close(refitted(W, X.T @ X, stays, 0.0), expected)


def test_what_is_stored_decodes_to_the_weight(bench, tmp_path):
    store = bench.new_store(folder=tmp_path)
    for (linear, name), group in consumers(bench).items():
        kept = {name: max(1, group.n_units // 2)}
        W, parts = store.weight(linear, INT3, kept), store.parts(linear, INT3, kept)
        stays = store.weight(linear, DENSE, kept).any(0)
        assert torch.equal(W[:, stays], parts.dequantize(torch.float64))
        files = [load_file(path) for path in tmp_path.iterdir()]
        assert any(file.keys() == {f"{linear}.{key}" for key in parts.state_dict()} for file in files)


@pytest.mark.parametrize("settings", [GPTQ, NEAREST])
def test_who_makes_it_and_when_does_not_matter(settings, tmp_path):
    bench = Bench(settings=settings)
    asked = [(linear, spec, kept) for linear in bench.graph.linears for spec in (DENSE, INT3) for kept in some(bench)]
    one, other = bench.new_store(folder=tmp_path / "one"), bench.new_store(folder=tmp_path / "other", memory_bytes=0)
    first = [one.weight(*each).clone() for each in asked]
    backwards = [other.weight(*each).clone() for each in reversed(asked)]
    assert all(map(torch.equal, first, reversed(backwards)))
    assert digests(tmp_path / "one") == digests(tmp_path / "other")
    again = bench.new_store(folder=tmp_path / "one")
    assert all(torch.equal(again.weight(*each), W) for each, W in zip(asked, first, strict=True))
    assert not again.n_made


def test_processes_make_the_same(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(made_in, [str(tmp_path / name) for name in ("one", "other")])
    assert found[0] == found[1] == made_in(str(tmp_path / "here"))


def test_embeddings_are_rounded_to_nearest():
    bench = Bench()
    from qpruner.model.packed.split import packed

    E = bench.model.get_input_embeddings().weight.detach()
    found = bench.store.weight("model.embed_tokens", INT3)
    assert torch.equal(found, packed(E, None, INT3, ranges="mse").dequantize(torch.float64))


def test_what_was_decoded_is_bounded():
    bench = Bench()
    store = bench.new_store(memory_bytes=4 * 24 * 24 * 8)
    for linear in bench.graph.linears:
        store.weight(linear, INT8)
        assert store._held_bytes == sum(W.nbytes for W in store._decoded.values())
        assert store._held_bytes <= 4 * 24 * 24 * 8 or len(store._decoded) == 1


def some(bench):
    return {}, {name: max(1, g.n_units // 2) for name, g in bench.groups.items()}


def digests(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def made_in(folder):
    torch.set_num_threads(1)
    from pathlib import Path

    bench = Bench(folder=Path(folder))
    for linear in bench.graph.linears:
        for kept in some(bench):
            bench.store.make(linear, INT3, kept)
    return digests(Path(folder))
