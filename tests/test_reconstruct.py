"""Linears refitted behind a pruned prefix: what may not cost anything, and what may not change the result."""

import math

import pytest
import torch
from tiny import tiny
from tiny_pruned import IDS, Pruned, flat, kept_of, logits_of, plan_for, rows_of, tensors_of, with_doubles
from tiny_stream import streamed
from torch import nn

from qpruner.do import reconstruct as module
from qpruner.do.junction import Junction
from qpruner.do.reconstruct import FACTS
from qpruner.errors import ModelError, PlanError
from qpruner.model.check import check_plan
from qpruner.model.depth import original_names, shortened, shortened_config
from qpruner.model.discover import discover
from qpruner.model.scratch import Scratch
from qpruner.model.surgery import add_biases_, bereft, remaining
from qpruner.plan import Reconstruction

FAMILIES = {
    "llama": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_comes_closer_to_the_original(family):
    model = tiny(family, **FAMILIES[family])
    graph = discover(model)
    pruned = Pruned(model, plan_for(graph, kept_of(graph)), graph)
    distance = lambda logits: (logits - logits_of(model)).square().mean()
    assert distance(pruned.logits(pruned.results())) < 0.5 * distance(pruned.logits())


def test_hidden_channels_that_are_always_zero_go_at_no_loss():
    """The norms, which divide by fewer channels then, scale what they give; what reads it makes up for that, but for
    the head, which is no linear of a layer. Units that nobody reads go too, so linears lose rows as well as columns."""
    model = tiny("llama", rms_norm_eps=1e-30)
    graph = discover(model)
    stay = tuple(u for u in range(24) if u % 6)
    gone = [u for u in range(24) if u not in stay]
    model.get_input_embeddings().weight.data[:, gone] = 0
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.data[gone] = 0
            linear.weight.data[:, : linear.in_features // 2] = 0
    second_half = lambda g: range(g.n_units // 2 if g.kind in ("kv_group", "channel") else 0, g.n_units)
    kept = {name: tuple(second_half(g)) for name, g in graph.groups.items()} | {"residual": stay}
    exact = Reconstruction(method="least-squares", dampings=(0.0,), held_out=0.25)
    pruned = Pruned(model, plan_for(graph, kept, exact), graph)
    results = pruned.results()
    assert {row["linear"] for row in rows_of(results)} == set(bereft(graph, kept))
    torch.testing.assert_close(pruned.logits(results) * (24 / len(stay)) ** 0.5, logits_of(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mixtral"])
def test_doubles_go_at_no_loss(family):
    model = tiny(family)
    graph = discover(model)
    with_doubles(model, graph)
    exact = Reconstruction(method="least-squares", dampings=(0.0,), held_out=0.25)
    pruned = Pruned(model, plan_for(graph, kept_of(graph), exact), graph)
    assert not torch.allclose(pruned.logits(), logits_of(model), atol=1e-2)
    torch.testing.assert_close(pruned.logits(pruned.results()), logits_of(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_units_that_nobody_reads_go_at_no_loss(family):
    model = tiny(family)
    graph = discover(model)
    kept = kept_of(graph)
    whole = {name: tuple(range(g.n_units)) for name, g in graph.groups.items()}
    read, left = (remaining(graph, k) for k in (whole, kept))
    assert not read
    for name, (_, columns) in left.items():
        if len(columns) < graph.linears[name].d_in:
            weight = model.get_submodule(name).weight.data
            gone = sorted(set(range(graph.linears[name].d_in)) - set(columns.tolist()))
            (weight if graph.linears[name].transposed else weight.T)[gone] = 0
    pruned = Pruned(model, plan_for(graph, kept), graph)
    torch.testing.assert_close(pruned.logits(pruned.results()), logits_of(model))


def test_a_layer_is_paired_with_its_own_where_others_go():
    """The middle layer does nothing, so it goes at no loss; then only the right targets make the doubles free."""
    model = tiny("llama")
    graph = discover(model)
    with_doubles(model, graph)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.get_submodule(f"model.layers.1.{name}").weight.data.zero_()
    layers = (0, 2)
    short, config = shortened(graph, layers), shortened_config(model.config, layers)
    exact = Reconstruction(method="least-squares", dampings=(0.0,), held_out=0.25)
    pruned = Pruned(model, plan_for(short, kept_of(short), exact, layers=layers), short)
    pruned.config, pruned.names = config, original_names(short, layers, tensors_of(config))
    results = pruned.results()
    assert len(rows_of(results)) == 4
    torch.testing.assert_close(pruned.logits(results), logits_of(model), rtol=1e-6, atol=1e-6)


# --- one answer, whatever the way ---


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_by_layer_from_disk_gives_the_same_bits(family, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "REFIT_TOKENS", 60)  # five windows together, and one before the border
    model = tiny(family, **FAMILIES[family])
    graph = discover(model)
    plan = plan_for(graph, kept_of(graph), added=True)
    resident = flat(Pruned(model, plan, graph, resident=True).results())
    scratches = Scratch(tmp_path / "theirs"), Scratch(tmp_path / "ours")
    streamed_ = flat(Pruned(model, plan, graph).results(scratches))
    assert resident.keys() == streamed_.keys() and len(resident) >= 3
    for name, tensor in resident.items():
        torch.testing.assert_close(streamed_[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_the_size_of_batches_does_not_matter(monkeypatch):
    found = []
    model = tiny("llama")
    graph = discover(model)
    for tokens in (12, 60, 10**4):
        monkeypatch.setattr(module, "REFIT_TOKENS", tokens)
        found.append(flat(Pruned(model, plan_for(graph, kept_of(graph)), graph).results()))
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-7, equal_nan=True)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("layers", [None, (0, 2)])
def test_it_goes_on_after_the_last_finished_layer(at, layers, tmp_path):
    model = tiny("llama")
    graph = shortened(discover(model), layers)
    pruned = Pruned(model, plan_for(graph, kept_of(graph), layers=layers), graph)
    if layers:
        pruned.config = shortened_config(model.config, layers)
        pruned.names = original_names(graph, layers, tensors_of(pruned.config))
    n_layers = len(layers or range(3))

    def kill(done, total, pace):
        if done == at:
            raise Killed

    scratches = lambda: (Scratch(tmp_path / "theirs"), Scratch(tmp_path / "ours"))
    with pytest.raises(Killed):
        pruned.results(scratches(), on_layer=kill)
    seen = []
    again = flat(pruned.results(scratches(), on_layer=lambda done, total, pace: seen.append(done)))
    assert seen == list(range(at + 1, n_layers + 1))
    for name, tensor in flat(pruned.results()).items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_what_goes_on_is_what_will_be_stored(family):
    """The hidden states behind the last layer are those of a model that reads the refitted tensors as stored."""
    model = tiny(family, dtype=torch.float32, **FAMILIES[family])
    graph = discover(model)
    pruned = Pruned(model, plan_for(graph, kept_of(graph), added=True), graph)
    scratch, again = Scratch(), Scratch()
    results = pruned.results((Scratch(), scratch), stored=torch.bfloat16)
    assert {t.dtype for n, t in flat(results).items() if not n.startswith(FACTS)} == {torch.bfloat16}
    for step in pruned.stream(results).steps(IDS, again, batch_size=8, border=6):
        step.pass_all_on()
        step.finish({})
    for first, n in ((0, 6), (6, 2)):
        hidden = scratch.get("hidden-3", first, n)
        torch.testing.assert_close(hidden, again.get("hidden-3", first, n), rtol=0, atol=0)


# --- biases ---


def test_without_biases_infinite_damping_changes_nothing():
    model = tiny("llama")
    graph = discover(model)
    infinite = Reconstruction(method="least-squares", dampings=(math.inf,), held_out=0.25)
    results = Pruned(model, plan_for(graph, kept_of(graph), infinite), graph).results()
    assert all(name.startswith(FACTS) for name in flat(results))
    assert {row["choice"] for row in rows_of(results)} == {"sliced"}


@pytest.mark.parametrize("family, added", [("opt", False), ("gpt2", False), ("llama", True)])
def test_a_bias_alone_is_flap(family, added):
    """Of the first linear, whose inputs are still those of the original: b + W times the mean of the inputs that go."""
    model = tiny(family)
    graph = discover(model)
    plan = plan_for(graph, kept_of(graph), Reconstruction(method="bias", dampings=(), held_out=0.25), added=added)
    found = flat(Pruned(model, plan, graph).results())
    name = next(iter(bereft(graph, plan.kept)))
    site, linear = graph.linears[name], model.get_submodule(name)
    gone = sorted(set(range(site.d_in)) - set(remaining(graph, plan.kept)[name][1].tolist()))
    inputs = []
    with linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2))):
        logits_of(model)
    W = (linear.weight.T if site.transposed else linear.weight).data
    bias = 0 if linear.bias is None else linear.bias.data
    torch.testing.assert_close(found[f"{name}.bias"], bias + W[:, gone] @ inputs[0][:, gone].mean(0))
    assert not any(n.endswith(".weight") and not n.startswith(FACTS) for n in found)


class Deaf(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


def test_a_bias_is_added_to_a_plain_linear_without_one():
    opt = tiny("opt")
    with pytest.raises(ModelError, match="'model.decoder.layers.0.fc2' is a Linear, and biases are added to"):
        add_biases_(opt, ["model.decoder.layers.0.fc2"])
    llama, name = tiny("llama"), "model.layers.0.mlp.down_proj"
    llama.set_submodule(name, Deaf(40, 24, bias=False))
    with pytest.raises(ModelError, match="is a Deaf, and biases are added to an nn.Linear without one"):
        add_biases_(llama, [name])
    graph = discover(opt)
    plan = plan_for(graph, {name: tuple(range(g.n_units)) for name, g in graph.groups.items()})
    plan = plan.model_copy(update={"added_biases": ("model.decoder.layers.0.fc2",)})
    with pytest.raises(PlanError, match="adds a bias to 'model.decoder.layers.0.fc2', which has one"):
        check_plan(plan, graph)


# --- junctions ---


@pytest.mark.parametrize(
    "family, attention, mlp",
    [
        ("llama", "post_attention_layernorm", ""),
        ("gpt2", "ln_2", ""),
        ("opt", "final_layer_norm", ""),
        ("gpt_neox", "", ""),  # attention and MLP join the same sum
        ("gemma2", None, None),  # a norm between the linear and the sum
    ],
)
def test_where_linears_join_the_hidden_states(family, attention, mlp):
    model = tiny(family, **(dict(head_dim=8) if family == "gemma2" else {}))
    graph = discover(model)
    names = [
        n.removeprefix(f"{graph.layers[0]}.") for n in bereft(graph, kept_of(graph)) if n.startswith(graph.layers[0])
    ]
    walk = streamed(model).steps(IDS, Scratch())
    step = next(walk)
    junctions = [Junction.find(step, inner) for inner in names]
    assert [j.place for j in junctions] == [attention, mlp]
    if mlp == "":
        others = names[:-1] if attention == "" else []
        seen, beside = junctions[-1].look(step, 0, others), [junctions[0].look(step, 0).Y for _ in others]
        torch.testing.assert_close(seen.Y + seen.rest + sum(beside), step.run(0).flatten(0, -2))
