import random
import time

import pytest
import torch
from tiny import TINY, tiny, tiny_config
from torch import nn
from transformers import LlamaConfig

from qpruner.errors import ModelError
from qpruner.model.coupling import join, join_columns
from qpruner.model.discover import discover
from qpruner.model.graph import Graph
from qpruner.model.probe import TOKENS
from qpruner.model.skeleton import build_skeleton, decoder_layers

LLAMA_7B = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)

KINDS = ("kv_group", "query_head", "channel")


def as_values(graph: Graph) -> tuple:
    """A graph with lists for tensors, to compare whole."""
    groups = [
        (
            g.name,
            g.layer,
            g.kind,
            g.module,
            g.n_blocks,
            *({k: v.tolist() for k, v in s.items()} for s in (g.producers, g.consumers)),
            {k: (dim, v.tolist()) for k, (dim, v) in g.tensors.items()},
        )
        for g in graph.groups.values()
    ]
    return graph.layers, graph.linears, groups, graph.projections, graph.unreached, graph.notes


def of_layer(graph: Graph, layer: int) -> dict:
    return {g.kind: g for g in graph.groups.values() if g.layer == layer}


def inside(graph: Graph) -> list:
    """The groups of single layers."""
    return [group for group in graph.groups.values() if group.layer >= 0]


def heads(numbers, width: int) -> list[int]:
    return [h * width + i for h in numbers for i in range(width)]


@pytest.mark.parametrize("family", TINY)
def test_every_layer_has_the_kv_groups_and_channels_of_its_configuration(family):
    graph = discover(tiny(family))
    for layer in range(3):
        found = {kind: g.n_units for kind, g in of_layer(graph, layer).items()}
        assert found == {kind: TINY[family][f"{kind}s"] for kind in KINDS if f"{kind}s" in TINY[family]}
    assert len(graph.groups) == 3 * len(found) + 1 and not graph.unreached and not graph.notes


@pytest.mark.parametrize("family", TINY)
def test_every_row_and_column_of_a_group_is_in_one_unit(family):
    graph = discover(tiny(family))
    for g in (g for g in graph.groups.values() if g.kind in ("kv_group", "channel")):
        for name, table in g.producers.items():
            assert table.flatten().sort()[0].tolist() == list(range(graph.linears[name].d_out))
        for name, table in g.consumers.items():
            assert table.flatten().sort()[0].tolist() == list(range(graph.linears[name].d_in))


@pytest.mark.parametrize("family, n_kv, d", [("llama", 2, 6), ("qwen3", 3, 8)])
def test_a_kv_group_is_a_key_and_value_head_with_the_query_heads_that_share_it(family, n_kv, d):
    attention = of_layer(discover(tiny(family)), 1)["kv_group"]
    path = "model.layers.1.self_attn"
    assert attention.name == attention.module == path
    queries = [heads((2 * g, 2 * g + 1), d) for g in range(n_kv)]
    keys = [heads([g], d) for g in range(n_kv)]
    tables = {name: t.tolist() for name, t in attention.producers.items()}
    assert tables == {f"{path}.q_proj": queries, f"{path}.k_proj": keys, f"{path}.v_proj": keys}
    assert {name: t.tolist() for name, t in attention.consumers.items()} == {f"{path}.o_proj": queries}


@pytest.mark.parametrize("family, over, per_group", [("llama", {}, 2), ("falcon", dict(multi_query=True), 4)])
def test_query_heads_lie_in_the_kv_group_whose_keys_they_share(family, over, per_group):
    graph = discover(tiny(family, **over))
    kv, query = of_layer(graph, 1)["kv_group"], of_layer(graph, 1)["query_head"]
    assert query.n_blocks == kv.n_units and query.name == f"{kv.name}.query_heads"
    ((name, rows),) = query.producers.items()
    assert rows.tolist() == [heads([h], 6) for h in range(4)] and query.consumers.keys() == kv.consumers.keys()
    assert query.n_units == 4 == per_group * query.n_blocks
    for g in range(kv.n_units):
        inside = rows[per_group * g : per_group * (g + 1)].flatten()
        assert set(inside.tolist()) <= set(kv.producers[name][g].tolist())


def test_query_heads_of_a_fused_projection_are_its_query_rows():
    phi3, falcon = discover(tiny("phi3")), discover(tiny("falcon", new_decoder_architecture=True, num_kv_heads=2))
    (rows,) = of_layer(phi3, 0)["query_head"].producers.values()  # four query heads, two keys, two values, of 6
    assert rows.tolist() == [heads([h], 6) for h in range(4)]
    (rows,) = of_layer(falcon, 0)["query_head"].producers.values()  # two query heads, key, value, and again
    assert rows.tolist() == [heads([h], 6) for h in (0, 1, 4, 5)]


def test_a_head_that_has_its_key_for_itself_is_no_query_head():
    for family, over in (("gpt2", {}), ("llama", dict(num_key_value_heads=4)), ("olmo2", {})):
        assert "query_head" not in of_layer(discover(tiny(family, **over)), 0)


def test_fused_projections_are_taken_apart():
    phi3 = of_layer(discover(tiny("phi3")), 0)
    (rows,) = phi3["kv_group"].producers.values()  # four query heads, two keys, two values, of 6
    assert rows.tolist() == [heads((2 * g, 2 * g + 1, 4 + g, 6 + g), 6) for g in range(2)]
    (rows,) = phi3["channel"].producers.values()
    assert rows.tolist() == [[u, 40 + u] for u in range(40)]
    (rows,) = of_layer(discover(tiny("gpt_neox")), 0)["kv_group"].producers.values()  # q, k, v head by head
    assert rows.tolist() == [heads([g], 18) for g in range(4)]
    (rows,) = of_layer(discover(tiny("gpt2")), 0)["kv_group"].producers.values()
    assert rows.tolist() == [heads((g, 4 + g, 8 + g), 6) for g in range(4)]


@pytest.mark.parametrize("seed", range(12))
def test_asking_blocks_first_finds_the_components_that_asking_every_column_finds(seed):
    """Columns of hidden components in random order, as one unaligned block after another, or fully interleaved."""
    rng = random.Random(seed)
    n_rows, n_columns, n_parts = rng.randint(1, 150), rng.randint(1, 300), rng.randint(1, 40)
    row_part, column_part = ([rng.randrange(n_parts) for _ in range(n)] for n in (n_rows, n_columns))
    if seed % 2:
        column_part.sort()
    g = torch.Generator().manual_seed(seed)
    same = torch.tensor(row_part)[:, None] == torch.tensor(column_part)
    matrix = torch.randn(n_rows, n_columns, generator=g) * same * (torch.rand(n_rows, n_columns, generator=g) < 0.5)
    leaf = torch.randn(1, TOKENS, n_rows, generator=g).requires_grad_()

    label, witness = join_columns(leaf @ matrix, {"leaf": leaf}, torch.arange(n_rows), torch.arange(n_rows), g)

    parent = list(range(n_rows))

    def root(i):
        return i if parent[i] == i else root(parent[i])

    for column in range(n_columns):
        rows = matrix[:, column].nonzero().flatten().tolist()
        for a in rows:
            low, high = sorted((root(rows[0]), root(a)))
            parent[high] = low
    assert label.tolist() == [root(i) for i in range(n_rows)]
    reached = [matrix[:, c].nonzero().flatten().tolist() for c in range(n_columns)]
    assert all((w < 0 and not rows) or w in rows for w, rows in zip(witness.tolist(), reached, strict=True))


def test_joining_in_any_order_gives_the_same_labels():
    g = torch.Generator().manual_seed(0)
    left, right = torch.randint(40, (60,), generator=g), torch.randint(80, (60,), generator=g)
    at_once = join(torch.arange(80), left, right)
    one_by_one = torch.arange(80)
    for column in left.unique().flip(0):
        rows = right[left == column]
        one_by_one = join(one_by_one, torch.zeros_like(rows), rows)
    assert torch.equal(at_once, one_by_one)


@pytest.mark.parametrize("family", TINY)
def test_the_model_and_the_random_state_are_untouched(family):
    model = tiny(family, dtype=torch.bfloat16).train()
    model.config._attn_implementation = "sdpa"
    state = {name: t.clone() for name, t in model.state_dict().items()}
    modules = {name: dict(vars(m)) for name, m in model.named_modules()}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    discover(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.config._attn_implementation == "sdpa" and all(m.training for m in model.modules())
    assert all(torch.equal(t, state[name]) and t.dtype == state[name].dtype for name, t in model.state_dict().items())
    for name, m in model.named_modules():
        assert vars(m).keys() == modules[name].keys()
        assert not m._forward_hooks and not m._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_draws_random_numbers_does_not_move_the_random_state():
    model = Toy(lambda layer, x: x + layer.down(layer.up(x) * (1 + torch.rand(1))))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    discover(model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", TINY)
def test_the_graph_does_not_depend_on_the_weights_nor_on_having_them(family):
    expected = as_values(discover(build_skeleton(tiny_config(family))))
    with torch.inference_mode():
        assert as_values(discover(tiny(family, dtype=torch.float16))) == expected
    zero = tiny(family, seed=1)
    for parameter in zero.parameters():
        parameter.data.zero_()
    assert as_values(discover(zero)) == expected


def test_what_is_fused_at_run_time_is_one_projection():
    graph = discover(tiny("llama"))
    names = [p.name.removeprefix("model.layers.2.") for p in graph.projections if p.layer == 2]
    assert names == ["self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj"]


@pytest.mark.parametrize("family", TINY)
def test_every_linear_is_in_one_projection(family):
    graph = discover(tiny(family))
    assert sorted(name for p in graph.projections for name in p.linears) == sorted(graph.linears)
    assert all(graph.linears[name].layer == p.layer for p in graph.projections for name in p.linears)


def test_two_halves_that_read_the_same_norm_are_two_projections():
    graph = discover(tiny("falcon", multi_query=False, parallel_attn=True, new_decoder_architecture=False))
    assert [p.linears for p in graph.projections if len(p.linears) > 1] == []


def test_groups_around_a_whole_layer_are_named_after_their_consumer():
    names = [g.name for g in discover(tiny("opt")).groups.values() if g.layer == 0]
    assert names == ["model.decoder.layers.0.self_attn", "model.decoder.layers.0.fc2"]
    assert discover(tiny("opt")).groups[names[1]].module == "model.decoder.layers.0"


@pytest.mark.parametrize("family, over", [("olmo2", {}), ("falcon", dict(multi_query=True))])
def test_attention_that_a_norm_or_a_single_key_head_ties_together_is_one_unit(family, over):
    graph = discover(tiny(family, **over))
    attention = of_layer(graph, 0)["kv_group"]
    assert attention.n_units == 1 and of_layer(graph, 0)["channel"].n_units > 1
    assert len(graph.notes) == 1
    assert f"'{attention.name.rpartition('.')[2]}'" in graph.notes[0]
    assert "one indivisible unit and never pruned (in decoder layers 0-" in graph.notes[0]


def test_values_per_head_belong_to_the_heads_they_are_read_by():
    attention = of_layer(discover(tiny("gpt_oss", num_local_experts=2, num_experts_per_tok=1, head_dim=8)), 1)[
        "kv_group"
    ]
    ((name, (dim, sinks)),) = attention.tensors.items()
    assert (name, dim, sinks.tolist()) == ("model.layers.1.self_attn.sinks", 0, [[0, 1], [2, 3]])


def test_units_within_experts_come_expert_by_expert():
    graph = discover(tiny("mixtral", num_local_experts=3, num_experts_per_tok=1))
    channels = of_layer(graph, 1)["channel"]
    up, down = (f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
    assert channels.n_units == 120 and channels.n_blocks == 3
    assert channels.producers[up].tolist() == [[e * 80 + c, e * 80 + 40 + c] for e in range(3) for c in range(40)]
    assert channels.consumers[down].tolist() == [[u] for u in range(120)]
    stack = graph.stacks[up]
    assert (stack.n_experts, stack.d_out, stack.d_in, stack.transposed, stack.bias) == (3, 80, 24, False, None)


def test_stacks_that_are_stored_the_other_way_round_are_recognized_with_their_biases():
    graph = discover(tiny("gpt_oss", num_local_experts=2, num_experts_per_tok=1, intermediate_size=40))
    up, down = (graph.stacks[f"model.layers.0.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
    assert (up.d_out, up.d_in, up.transposed, up.bias) == (80, 24, True, "model.layers.0.mlp.experts.gate_up_proj_bias")
    assert (down.d_out, down.d_in, down.transposed) == (24, 40, True)
    assert of_layer(graph, 0)["channel"].producers[up.name][:2].tolist() == [[0, 1], [2, 3]]  # gate, up, gate, up


def test_heads_that_come_in_parts_are_as_many_in_each():
    heads = of_layer(discover(tiny("codegen", hidden_size=32, num_attention_heads=8, rotary_dim=2)), 0)["kv_group"]
    assert (heads.n_units, heads.n_blocks) == (8, 4)


def test_the_rows_that_all_heads_of_latent_attention_read_stay():
    sizes = dict(
        num_key_value_heads=4, kv_lora_rank=10, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=5,
        head_dim=4, moe_intermediate_size=12, n_routed_experts=4, num_experts_per_tok=1, n_group=1, topk_group=1,
    )  # fmt: skip
    graph = discover(tiny("deepseek_v3", **sizes))
    heads = next(g for g in graph.groups.values() if g.kind == "kv_group")
    assert heads.n_units == 4 and not any("kv_a_proj" in name for name in heads.producers)
    assert "the rows of 'self_attn.kv_a_proj_with_mqa' are read by every unit alike" in graph.notes[0]


def test_experts_of_any_size_take_no_memory():
    experts = dict(num_local_experts=16, num_experts_per_tok=2, hidden_size=1024, intermediate_size=9000)
    graph = discover(build_skeleton(tiny_config("mixtral", num_hidden_layers=1, **experts)))
    assert [g.n_units for g in inside(graph)] == [2, 16 * 9000, 4, 16]


@pytest.mark.parametrize("over, found", [(dict(num_kv_shared_layers=2), True), (dict(num_kv_shared_layers=0), False)])
def test_layers_that_read_keys_of_other_layers_say_so(over, found):
    sizes = dict(
        num_hidden_layers=4, head_dim=8, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=4,
        activation_sparsity_pattern=[0.0] * 4, vocab_size_per_layer_input=61, hidden_size_per_layer_input=8,
        intermediate_size=[40] * 4, laurel_rank=4,
    )  # fmt: skip
    graph = discover(tiny("gemma3n_text", **sizes, **over))
    assert any("reads more of layer" in sentence for sentence in graph.exchanges) == found
    assert any("in another form" in sentence for sentence in graph.exchanges), "four streams in one tensor"
    if found:
        assert graph.exchanges[0] == "decoder layer 2 reads more of layer 0 than hidden states"


class ToyLayer(nn.Module):
    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.up, self.side, self.down = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 6)

    def forward(self, x):
        return self.steps(self, x)


class Toy(nn.Module):
    """A decoder of one layer, which a test writes as a function of the layer and of its input of width 6."""

    def __init__(self, steps):
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=1)
        self.embeddings = nn.Embedding(5, 6)
        self.layers = nn.ModuleList([ToyLayer(steps)])

    def get_input_embeddings(self):
        return self.embeddings

    def get_output_embeddings(self):
        return None

    def forward(self, inputs_embeds, use_cache=False):
        return self.layers[0](inputs_embeds)


def test_units_of_unequal_size_are_one_unit():
    def steps(layer, x):
        u = layer.up(x)
        return x + layer.down(torch.cat([u[..., :1] * u[..., 1:2], u[..., 2:], u[..., :1]], -1))

    graph = discover(Toy(steps))
    (group,) = inside(graph)
    assert group.name == "layers.0.down" and group.kind == "channel"
    assert group.producers["layers.0.up"].tolist() == [[0, 1, 2, 3, 4, 5]] and group.n_units == 1
    assert "'down': its 5 units are of unequal size, so it is one indivisible unit" in graph.notes[0]


def test_rows_that_nothing_reads_and_columns_that_read_no_row_are_in_no_unit():
    graph = discover(Toy(lambda layer, x: x + layer.down(torch.cat([layer.up(x)[..., :5], x[..., :1]], -1))))
    (group,) = inside(graph)
    assert (
        group.producers["layers.0.up"].tolist() == group.consumers["layers.0.down"].tolist() == [[i] for i in range(5)]
    )
    assert graph.unreached == {"layers.0.up": (5,)}
    assert "1 row(s) of 'up' reach no other linear of the layer and are never removed" in graph.notes[0]
    assert "'side': not used for the few tokens of the probe" in graph.notes[1]


@pytest.mark.parametrize("activation", [torch.relu, lambda u: torch.relu(-u) ** 2, torch.sigmoid, torch.abs])
def test_no_channel_is_silent_under_a_rectifier(activation):
    graph = discover(Toy(lambda layer, x: x + layer.down(activation(layer.up(x)))))
    assert [g.n_units for g in inside(graph)] == [6] and not graph.unreached


def test_a_linear_that_also_writes_to_the_residual_stream_is_no_producer():
    def steps(layer, x):
        u = layer.up(x)
        return x + u + layer.down(u)

    assert not inside(discover(Toy(steps)))


def test_a_weight_that_is_read_in_part_couples_everything():
    def steps(layer, x):
        return x + layer.down(nn.functional.linear(torch.relu(layer.side(x)), layer.up.weight[:, :4]))

    graph = discover(Toy(steps))
    (group,) = inside(graph)
    assert group.n_units == 1 and group.producers.keys() == {"layers.0.side"}


def test_a_weight_that_is_read_without_its_linear_is_a_linear():
    graph = discover(Toy(lambda layer, x: x + nn.functional.linear(torch.relu(layer.up(x)), layer.down.weight)))
    (group,) = graph.groups.values()
    assert group.n_units == 6 and group.consumers.keys() == {"layers.0.down"}


def test_a_linear_that_is_used_twice_is_never_pruned():
    graph = discover(Toy(lambda layer, x: x + layer.down(layer.up(torch.relu(layer.up(x))))))
    assert not any(g.n_units > 1 for g in graph.groups.values())
    assert any("'up': used in several places or in parts, so never pruned" in note for note in graph.notes)


def test_columns_that_are_also_read_from_the_hidden_states_are_one_unit():
    graph = discover(Toy(lambda layer, x: x + layer.down(layer.up(x) * nn.functional.rms_norm(x, (6,)))))
    (group,) = graph.groups.values()
    assert group.n_units == 1 and "values of their own in 'the hidden states'" in graph.notes[0]


@pytest.mark.parametrize(
    "steps, message",
    [
        (lambda layer, x: layer.down((layer.up(x) * 0).sqrt()), "an infinite or undefined derivative"),
        (lambda layer, x: layer.up(x).view(7), "Toy does not run on input embeddings, .* shape .* is invalid"),
    ],
)
def test_what_cannot_be_probed_is_refused(steps, message):
    with pytest.raises(ModelError, match=message):
        discover(Toy(steps))


def test_a_model_without_decoder_layers_or_without_buffers_is_refused():
    model = tiny("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="LlamaForCausalLM has no list of 7 decoder layers"):
        decoder_layers(model)
    with pytest.raises(ModelError, match="is on the meta device. Build the model with build_skeleton"):
        discover(tiny("llama").to("meta"))
    with pytest.raises(ModelError, match="'t5' cannot be built as a causal language model"):
        build_skeleton(tiny_config("t5", num_hidden_layers=2))


def test_a_skeleton_has_no_weights_and_real_buffers():
    config = tiny_config("llama")
    skeleton, real = build_skeleton(config), tiny("llama")
    assert all(p.is_meta for p in skeleton.parameters())
    expected = dict(real.named_buffers())
    for name, buffer in skeleton.named_buffers():
        torch.testing.assert_close(buffer, expected[name].float())
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert skeleton.config is not config


def test_a_model_of_seven_billion_parameters_takes_seconds():
    start = time.process_time()
    graph = discover(build_skeleton(LlamaConfig(**LLAMA_7B)))
    assert time.process_time() - start < 20  # about one on a free core
    assert {g.n_units for g in inside(graph)} == {32, 11008} and len(inside(graph)) == 64


class Handing(nn.Module):
    """Two layers, and a way to go from one to the other and to the end, which a test writes as functions."""

    def __init__(self, between=lambda x: x, at_end=lambda x, embedded: x):
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=2)
        self.embeddings, self.head = nn.Embedding(5, 6), nn.Linear(6, 5, bias=False)
        steps = lambda layer, x: x + layer.down(layer.up(x).relu())
        self.layers = nn.ModuleList([ToyLayer(steps), ToyLayer(steps)])
        self.between, self.at_end = between, at_end

    def get_input_embeddings(self):
        return self.embeddings

    def get_output_embeddings(self):
        return self.head

    def forward(self, inputs_embeds, use_cache=False):
        x = self.layers[1](self.between(self.layers[0](inputs_embeds)))
        return self.head(self.at_end(x, inputs_embeds))


@pytest.mark.parametrize(
    "how, sentence",
    [
        ({}, None),
        (dict(between=lambda x: 2 * x), "hidden states are changed between decoder layers 0 and 1"),
        (dict(at_end=lambda x, embedded: x + embedded), "also reads what came before them"),
    ],
)
def test_what_goes_past_the_layers_is_said(how, sentence):
    exchanges = discover(Handing(**how)).exchanges
    assert (len(exchanges) == 1 and sentence in exchanges[0]) if sentence else not exchanges
