import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from specs import EVERY
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from qpruner.errors import PlanError
from qpruner.model import adapters, cost
from qpruner.model.graph import Graph, Group, LinearSite
from qpruner.model.packed.linear import PackedLinear
from qpruner.model.tensors import write_safetensors
from qpruner.plan import DENSE, INT8, NF4, Plan, QuantSpec

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda s: s != "__metadata__")
SHAPES = st.lists(st.integers(0, 12), max_size=3).map(tuple)
TENSORS = st.dictionaries(NAMES, st.tuples(st.sampled_from(list(cost.ITEMSIZE)), SHAPES), max_size=12)
TORCH_DTYPES = {name: dtype for dtype, name in cost.TORCH_NAMES.items()}


@settings(max_examples=300)
@given(
    tensors=TENSORS,
    metadata=st.none() | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), NAMES, max_size=2),
)
def test_predicted_bytes_are_bytes_on_disk(tensors, metadata):
    real = {name: torch.zeros(shape, dtype=TORCH_DTYPES[dtype]) for name, (dtype, shape) in tensors.items()}
    assert cost.safetensors_size(tensors, metadata) == len(save(real, metadata))


def test_offsets_of_many_digits_are_counted_in_the_right_order():
    # The wide tensors come first in the file whatever their names, and push the offsets of the others over 9999.
    tensors = {f"a{i}": ("U8", (3,)) for i in range(50)} | {f"b{i}": ("F64", (40, 5)) for i in range(50)}
    real = {name: torch.zeros(shape, dtype=TORCH_DTYPES[dtype]) for name, (dtype, shape) in tensors.items()}
    assert cost.safetensors_size(tensors) == len(save(real, {"format": "pt"}))


def table(rows):
    return torch.tensor(rows, dtype=torch.int64)


def llama_graph(n_layers, d=24, heads=4, kv_heads=2, head=6, ffn=41):
    """What discovery finds in a llama, by hand: key/value heads with their query heads, and MLP channels."""
    linears, groups, per_kv = {}, {}, heads // kv_heads
    for i in range(n_layers):
        sizes = {
            "self_attn.q_proj": (heads * head, d, True),
            "self_attn.k_proj": (kv_heads * head, d, True),
            "self_attn.v_proj": (kv_heads * head, d, True),
            "self_attn.o_proj": (d, heads * head, True),
            "mlp.gate_proj": (ffn, d, False),
            "mlp.up_proj": (ffn, d, False),
            "mlp.down_proj": (d, ffn, False),
        }
        at = f"model.layers.{i}."
        for name, (d_out, d_in, bias) in sizes.items():
            linears[at + name] = LinearSite(at + name, i, d_out, d_in, bias)
        q = torch.arange(heads * head).view(kv_heads, per_kv * head)
        kv = torch.arange(kv_heads * head).view(kv_heads, head)
        attention = {at + "self_attn.q_proj": q, at + "self_attn.k_proj": kv, at + "self_attn.v_proj": kv}
        groups[at + "kv"] = Group(at + "kv", i, "kv_group", at + "self_attn", attention, {at + "self_attn.o_proj": q})
        channels = torch.arange(ffn)[:, None]
        mlp = {at + "mlp.gate_proj": channels, at + "mlp.up_proj": channels}
        groups[at + "ffn"] = Group(at + "ffn", i, "channel", at + "mlp", mlp, {at + "mlp.down_proj": channels})
    return Graph(tuple(f"model.layers.{i}" for i in range(n_layers)), linears, groups, ())


def llama(n_layers=3, ffn=41, kv_heads=2, tied=True):
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=ffn,
        num_hidden_layers=n_layers,
        num_attention_heads=2 * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=6,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    return AutoModelForCausalLM.from_config(config)


def plan_for(graph, kept=None, specs=None, **kw):
    kept = {n: tuple(range(g.n_units)) for n, g in graph.groups.items()} | (kept or {})
    specs = dict.fromkeys(graph.linears, DENSE) | (specs or {})
    return Plan(model_name="tiny", model_digest="0", kept=kept, specs=specs, **kw)


def compressed(model, graph, plan):
    """The model that a plan stands for, with random weights: cut shapes by slicing, packed where the plan says so."""
    cut = {axis: {name: set() for name in graph.linears} for axis in (0, 1)}
    for group in graph.groups.values():
        for axis, tables in ((0, group.producers), (1, group.consumers)):
            for name, rows in tables.items():
                for unit in set(range(group.n_units)) - set(plan.kept[group.name]):
                    cut[axis][name].update(rows[unit].tolist())
    for name, site in graph.linears.items():
        old, spec = model.get_submodule(name), plan.specs[name]
        rows, columns = (sorted(set(range(n)) - cut[a][name]) for a, n in ((0, site.d_out), (1, site.d_in)))
        W = old.weight.detach()[rows][:, columns]
        bias = None if old.bias is None else old.bias.detach()[rows]
        if spec.bits == 16:
            new = nn.Linear(len(columns), len(rows), bias=site.bias)
            new.weight.data, new.bias = W, bias if bias is None else nn.Parameter(bias)
        else:
            new = PackedLinear.from_weight(W, bias, spec)
        model.set_submodule(name, new)
    return model


def mixed_plan(graph, **kw):
    at = "model.layers.{}.".format
    kept = {at(0) + "kv": (1,), at(0) + "ffn": tuple(range(0, 41, 2)), at(2) + "ffn": tuple(range(33))}
    specs = {n: NF4 for n in graph.linears if ".mlp." in n} | {n: INT8 for n in graph.linears if "layers.1.self" in n}
    specs[at(2) + "self_attn.o_proj"] = QuantSpec(bits=8, grid="integer", group_size=10)
    free = [n for n in graph.linears if "layers.2.self" in n or "layers.0.self" in n]
    specs |= dict(zip(free, EVERY[3::2], strict=False))
    ranks = {n: 2 + i % 3 for i, n in enumerate(graph.linears)}
    return plan_for(graph, kept, specs, adapter_ranks=ranks, **kw)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_predicted_size_of_a_plan_is_the_size_of_its_files(dtype, tied, tmp_path):
    graph, name = llama_graph(3), cost.TORCH_NAMES[dtype]
    plan = mixed_plan(graph)
    tensors = cost.named_tensors(llama(tied=tied))
    predicted = cost.predict_size(tensors, graph, plan, name)
    model = compressed(llama(tied=tied), graph, plan).to(dtype)
    tensors_after = cost.named_tensors(model)
    assert tensors_after == cost.stored_tensors(tensors, graph, plan, name)
    state = model.state_dict()
    save_file({n: state[n].contiguous() for n in tensors_after}, tmp_path / "model.safetensors", {"format": "pt"})
    base = (tmp_path / "model.safetensors").stat().st_size
    assert base == cost.safetensors_size(tensors_after)
    adapters.inject_adapters_(model, plan.adapter_ranks, alpha=16.0, dropout=0.0)
    for layer in adapters.adapter_layers(model).values():
        layer.lora_B["default"].weight.data.fill_(1)
    adapters.save_adapters(model, tmp_path, dtype)
    beside = (tmp_path / adapters.TENSORS_FILE).stat().st_size
    assert predicted.total == base + beside
    assert predicted.adapters == sum(t.nbytes for t in adapters.adapter_state(model, dtype).values())
    assert predicted.embeddings == (1 if tied else 2) * 50 * 24 * 2


def test_merged_adapters_cost_nothing():
    graph = llama_graph(3)
    tensors = cost.named_tensors(llama())
    beside, merged = (cost.predict_size(tensors, graph, mixed_plan(graph, adapters=a)) for a in ("beside", "merged"))
    assert merged.adapters == 0 < beside.adapters and merged.linears == beside.linears


def test_keeping_everything_in_16_bits_is_the_model_itself():
    graph, model = llama_graph(3), llama().bfloat16()
    tensors = cost.named_tensors(model)
    assert cost.stored_tensors(tensors, graph, plan_for(graph), "F16") == tensors
    size = cost.predict_size(tensors, graph, plan_for(graph))
    assert size.linears + size.embeddings + size.other == 2 * cost.parameter_count(tensors)
    assert cost.parameter_count(tensors) == model.num_parameters()


def test_knapsack_bytes_are_the_bytes_of_the_linears():
    graph = llama_graph(3)
    plan = mixed_plan(graph)
    shapes = cost.kept_shapes(graph, plan.kept)
    whole = sum(cost.linear_bytes(*shapes[n], plan.specs[n]) for n in graph.linears)
    assert whole == cost.predict_size(cost.named_tensors(llama()), graph, plan).linears


def test_a_transposed_weight_turns_when_it_is_packed():
    config = GPT2Config(vocab_size=50, n_embd=24, n_head=4, n_layer=1, n_positions=32, bos_token_id=1, eos_token_id=2)
    tensors = cost.named_tensors(AutoModelForCausalLM.from_config(config))
    fc, proj = "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"
    channels = torch.arange(96)[:, None]
    graph = Graph(
        ("transformer.h.0",),
        {fc: LinearSite(fc, 0, 96, 24, True, True), proj: LinearSite(proj, 0, 24, 96, True, True)},
        {"ffn": Group("ffn", 0, "channel", "transformer.h.0.mlp", {fc: channels}, {proj: channels})},
        (),
    )
    stored = cost.stored_tensors(tensors, graph, plan_for(graph, {"ffn": tuple(range(71))}, {proj: NF4}))
    assert stored[f"{fc}.weight"] == ("BF16", (24, 71)) and stored[f"{fc}.bias"] == ("BF16", (71,))
    assert stored[f"{proj}.codes"] == ("U8", (24, 36)) and stored[f"{proj}.scales"] == ("F16", (24, 2))
    assert f"{proj}.weight" not in stored and stored[f"{proj}.bias"] == ("BF16", (24,))


def test_tied_tensors_are_named_once_on_the_meta_device_too():
    real = cost.named_tensors(llama(tied=True))
    with torch.device("meta"):
        assert cost.named_tensors(llama(tied=True)) == real
    assert "model.embed_tokens.weight" in real and "lm_head.weight" not in real
    assert "lm_head.weight" in cost.named_tensors(llama(tied=False))
    not_tied_yet = llama(tied=True)
    not_tied_yet.lm_head.weight = nn.Parameter(not_tied_yet.lm_head.weight.detach().clone())
    assert cost.named_tensors(not_tied_yet) == real
    plain = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    plain["b"].weight = plain["a"].weight
    assert list(cost.named_tensors(plain)) == ["a.weight", "a.bias", "b.bias"]


def test_non_persistent_buffers_are_not_stored():
    assert not [n for n in cost.named_tensors(llama()) if "inv_freq" in n]


def test_a_plan_for_another_model_is_refused():
    graph, tensors = llama_graph(3), cost.named_tensors(llama())
    other = plan_for(llama_graph(4))
    with pytest.raises(PlanError, match=r"names 2 group\(s\) the model does not have: 'model.layers.3.ffn'"):
        cost.stored_tensors(tensors, graph, other)
    with pytest.raises(PlanError, match="does not decide 7 linear"):
        cost.stored_tensors(
            tensors, llama_graph(4), plan_for(graph, {f"model.layers.3.{g}": (0,) for g in ("kv", "ffn")})
        )
    with pytest.raises(PlanError, match="the graph was made for another model"):
        cost.stored_tensors(tensors, llama_graph(3, ffn=40), plan_for(llama_graph(3, ffn=40)))
    with pytest.raises(PlanError, match="linear.s. the model does not have: 'x'"):
        cost.adapter_tensors(graph, plan_for(graph, adapter_ranks={"x": 1}))


def test_a_file_written_tensor_by_tensor_is_the_one_that_safetensors_writes(tmp_path, rand):
    tensors = {
        "b.weight": rand(3, 4).bfloat16(), "a.codes": torch.arange(6, dtype=torch.uint8).view(2, 3),
        "c": rand(5).half(), "d.scale": rand(1).float(), "a.weight": rand(2, 2).bfloat16(), "empty": torch.empty(0, 3),
    }  # fmt: skip
    save_file(tensors, tmp_path / "theirs", metadata=dict(cost.FILE_METADATA))
    specs = {name: (cost.TORCH_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    write_safetensors(tmp_path / "ours", specs, reversed(tensors.items()))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with pytest.raises(AssertionError, match="not written: 'empty'"):
        write_safetensors(tmp_path / "partial", specs, [item for item in tensors.items() if item[0] != "empty"])
    assert not (tmp_path / "partial").exists()
