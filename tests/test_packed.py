import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from specs import EVERY
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.pytorch_utils import Conv1D

from qpruner.errors import ModelError, PlanError
from qpruner.math import grids, loftq
from qpruner.model import adapters, cost
from qpruner.model.packed import split
from qpruner.model.packed.linear import PackedLinear
from qpruner.plan import INT8, NF4, QuantSpec

SHAPES = [(12, 70), (5, 33), (1, 1)]


def dense_twin(packed: PackedLinear, dtype=torch.float64) -> nn.Linear:
    twin = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None, dtype=dtype)
    twin.weight.data = packed.dequantize(dtype)
    if packed.bias is not None:
        twin.bias.data = packed.bias.data.to(dtype)
    return twin


@pytest.fixture(params=[None, 40], ids=["one tile", "tiles"])
def tile_weights(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(grids, "TILE_WEIGHTS", request.param)


@pytest.mark.parametrize("spec", EVERY, ids=str)
@pytest.mark.parametrize("d_out, d_in", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradients_are_those_of_the_dense_layer(rand, spec, d_out, d_in, bias, tile_weights):
    packed = PackedLinear.from_weight(rand(d_out, d_in), rand(d_out) if bias else None, spec)
    packed.requires_grad_(True)
    twin = dense_twin(packed)
    x, seen = rand(2, 3, d_in).requires_grad_(), rand(2, 3, d_out)
    results = []
    for layer in (packed, twin):
        x.grad = None
        y = layer(x)
        (y * seen).sum().backward()
        results.append([y, x.grad] + ([layer.bias.grad] if bias else []))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_dequantize_is_the_grid(rand, spec, tile_weights):
    W = rand(9, 41)
    rounded, packed = grids.quantize(W, spec), PackedLinear.from_weight(W, None, spec)
    for name, tensor in vars(packed.rounded()).items():
        assert (getattr(rounded, name) is None) if tensor is None else torch.equal(tensor, getattr(rounded, name))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(packed.dequantize(dtype), grids.dequantize(rounded, spec, dtype))


@pytest.mark.parametrize("spec", EVERY, ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
def test_short_inputs_come_back_as_they_went_in(rand, spec, dtype, tolerance, tile_weights):
    packed = PackedLinear.from_weight(rand(12, 70), rand(12), spec)
    x = rand(5, 70).to(dtype).requires_grad_()
    y = packed(x)
    expected = dense_twin(packed)(x.detach().double())
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    y.sum().backward()
    column_sums = packed.dequantize(torch.float64).sum(0)
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad[0].double(), column_sums, rtol=tolerance, atol=5 * tolerance)


@pytest.mark.parametrize("shape", [(0, 128), (1, 128), (3, 2, 128), (8, 128), (9, 128), (128,), (1, 129)])
@pytest.mark.parametrize("spec", [NF4, INT8], ids=str)
def test_a_few_tokens_in_bfloat16(rand, shape, spec, tile_weights):
    packed = PackedLinear.from_weight(rand(7, shape[-1]), rand(7), spec)
    x = rand(*shape).bfloat16()
    expected = dense_twin(packed)(x.double())
    assert packed(x).dtype == torch.bfloat16
    torch.testing.assert_close(packed(x).double(), expected, rtol=1e-2, atol=0.1)


def test_float16_on_a_cpu_is_computed_in_float32(rand):
    packed = PackedLinear.from_weight(rand(9, 70), rand(9), NF4)
    x = rand(5, 70).half()
    assert torch.equal(packed(x), packed(x.float()).half())


def test_gradients_of_many_tiles_are_not_rounded_one_by_one(rand, monkeypatch):
    monkeypatch.setattr(grids, "TILE_WEIGHTS", 16)
    packed = PackedLinear.from_weight(rand(900, 8).abs(), None, NF4)
    x = torch.zeros(1, 8, dtype=torch.bfloat16, requires_grad=True)
    packed(x).sum().backward()  # beyond 512 a bfloat16 sum would stand still
    torch.testing.assert_close(x.grad[0].double(), packed.dequantize(torch.float64).sum(0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("spec", [NF4, INT8, QuantSpec(bits=3, grid="integer", group_size=64, salient=2)], ids=str)
def test_under_autocast_it_computes_forth_and_back_as_in_its_dtype(rand, spec):
    layer, x, seen = split.packed(rand(9, 70), rand(9), spec), rand(300, 70).float(), rand(300, 9).bfloat16()
    narrow, wide = x.bfloat16().requires_grad_(), x.requires_grad_()
    layer(narrow).backward(seen)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(wide)
    y.backward(seen)
    assert y.dtype == nn.functional.linear(narrow, narrow).dtype == torch.bfloat16  # as a dense one would
    assert torch.equal(y, layer(narrow)) and torch.equal(wide.grad, narrow.grad.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.double()).dtype == torch.float64


def test_float16_sums_may_leave_the_range_of_float16(rand):
    packed = PackedLinear.from_weight(rand(3, 2000).abs(), None, INT8)  # codes sum to about 60 000 times x
    assert torch.isfinite(packed(torch.full((1, 2000), 10.0, dtype=torch.float16))).all()


@pytest.mark.parametrize("spec", EVERY, ids=str)
@pytest.mark.parametrize("d_out, d_in", SHAPES)
def test_what_is_stored_is_what_was_predicted(rand, spec, d_out, d_in):
    packed = PackedLinear.from_weight(rand(d_out, d_in), rand(d_out), spec)
    packed(rand(4, d_in))
    state = packed.state_dict()
    assert {n: (cost.TORCH_NAMES[t.dtype], tuple(t.shape)) for n, t in state.items() if n != "bias"} == (
        cost.weight_tensors(d_out, d_in, spec, "BF16")
    )
    assert not [n for n, v in vars(packed).items() if isinstance(v, torch.Tensor)]
    stored = sum(t.nbytes for n, t in state.items() if n != "bias")
    assert stored == cost.linear_bytes(d_out, d_in, spec)


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_an_empty_layer_loads_the_state_of_a_full_one(rand, spec):
    full = PackedLinear.from_weight(rand(5, 33), rand(5), spec)
    for empty in (
        PackedLinear.empty(5, 33, True, spec, device="cpu", dtype=torch.float64),
        PackedLinear.empty(5, 33, True, spec).to_empty(device="cpu").to(torch.float64),
    ):
        empty.load_state_dict(full.state_dict())
        x = rand(2, 33)
        assert torch.equal(empty(x), full(x))
    meta = PackedLinear.empty(5, 33, True, spec)
    meta.load_state_dict(full.state_dict(), assign=True)
    assert torch.equal(meta(x), full(x))


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_moving_a_model_leaves_codes_and_scales_alone(rand, move, spec):
    model = nn.Sequential(PackedLinear.from_weight(rand(5, 33), rand(5).float(), spec))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    after = move(model).state_dict()
    assert after.pop("0.bias").dtype != before.pop("0.bias").dtype
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)


def test_arithmetic_on_the_stored_bytes_fails_aloud(rand):
    square = PackedLinear.from_weight(rand(8, 8), None, INT8)
    assert square.weight.data_ptr() == square.codes.data_ptr()
    with pytest.raises(RuntimeError):
        square.weight.data += torch.zeros(8, 8)
    with pytest.raises(KeyError, match="already exists"):
        square.weight = nn.Parameter(torch.zeros(8, 8))


def tiny_llama(**kw):
    config = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2)
    config |= dict(num_hidden_layers=12, max_position_embeddings=32) | kw
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**config)).eval()


def tiny_gpt2():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=50, n_embd=24, n_head=4, n_layer=3, n_positions=32, bos_token_id=1, eos_token_id=2)
    ).eval()


def pack_(model, names, spec):
    for name in names:
        old = model.get_submodule(name)
        W = old.weight.T if isinstance(old, Conv1D) else old.weight
        model.set_submodule(name, PackedLinear.from_weight(W, old.bias, spec))


def mixed_llama():
    """Some linears packed to 4 bits, some to 8, some dense, and a rank that differs in almost every linear."""
    model = tiny_llama()
    pack_(model, [f"model.layers.{i}.mlp.{n}_proj" for i in (1, 11) for n in ("up", "gate")], NF4)
    pack_(model, [f"model.layers.{i}.self_attn.q_proj" for i in range(12)], INT8)
    ranks = {f"model.layers.{i}.mlp.up_proj": i + 1 for i in range(12)}
    ranks |= {f"model.layers.{i}.self_attn.q_proj": 3 for i in range(12)} | {"model.layers.1.mlp.down_proj": 2}
    return model, ranks


def mixed_gpt2():
    model = tiny_gpt2()
    pack_(model, ["transformer.h.1.mlp.c_fc", "transformer.h.1.attn.c_attn"], NF4)
    return model, {"transformer.h.0.mlp.c_fc": 2, "transformer.h.1.mlp.c_fc": 3, "transformer.h.2.attn.c_attn": 4}


MODELS = [mixed_llama, mixed_gpt2]
IDS = torch.arange(20).view(2, 10)
OLD_NAME = "ignore:`is_gradient_checkpointing` is deprecated"  # PEFT still asks transformers for it


def random_factors(model, rand):
    shapes = {n: [p.shape for p in adapters.factors(layer)] for n, layer in adapters.adapter_layers(model).items()}
    return {n: tuple(rand(*s).bfloat16() * 0.3 for s in pair) for n, pair in shapes.items()}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("make", MODELS)
def test_adapters_stand_beside_exactly_the_named_linears(rand, make):
    model, ranks = make()
    kind, before, names = type(model), logits(model), list(model.state_dict())
    state = torch.get_rng_state()
    adapters.inject_adapters_(model, ranks, alpha=6.0, dropout=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(model) is kind and torch.equal(logits(model), before)
    layers = adapters.adapter_layers(model)
    assert {n: len(adapters.factors(layer)[0]) for n, layer in layers.items()} == ranks
    assert all(layer.scaling["default"] == 6.0 / ranks[n] for n, layer in layers.items())
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(ranks) and all(".lora_" in n for n in trained)
    assert all(model.get_parameter(n).dtype == torch.float32 for n in trained)
    assert list(adapters.base_state(model)) == names


def test_a_name_that_ends_another_name_keeps_its_own_rank():
    linear = lambda: nn.Linear(4, 4)
    model = nn.ModuleDict({"up": linear(), "outer": nn.ModuleDict({"up": linear(), "down": linear()})})
    ranks = {"up": 1, "outer.up": 2, "outer.down": 2}
    adapters.inject_adapters_(model, ranks, alpha=6.0, dropout=0.0)
    assert {n: len(adapters.factors(layer)[0]) for n, layer in adapters.adapter_layers(model).items()} == ranks


@pytest.mark.parametrize("make", MODELS)
def test_adapters_add_scaling_times_b_a_and_learn(rand, make):
    model, ranks = make()
    adapters.inject_adapters_(model, ranks, alpha=6.0, dropout=0.0)
    weights = random_factors(model, rand)
    adapters.set_adapter_weights_(model, weights)
    for name, layer in adapters.adapter_layers(model).items():
        x = rand(3, layer.in_features).float()
        A, B = (t.float() for t in weights[name])
        torch.testing.assert_close(layer(x), layer.base_layer(x) + 6.0 / ranks[name] * x @ A.T @ B.T)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad.any() for layer in adapters.adapter_layers(model).values() for p in adapters.factors(layer))


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to", OLD_NAME)  # what PEFT warns of for GPT-2
def test_saved_adapters_load_here_and_in_plain_peft(rand, make, dtype, tmp_path):
    model, ranks = make()
    adapters.inject_adapters_(model, ranks, alpha=6.5, dropout=0.1)
    adapters.set_adapter_weights_(model, random_factors(model, rand))
    adapters.save_adapters(model, tmp_path / "a", dtype)
    ours = make()[0]
    adapters.load_adapters_(ours, tmp_path / "a")
    assert all(torch.equal(t, adapters.adapter_state(ours)[n]) for n, t in adapters.adapter_state(model).items())
    adapters.save_adapters(ours, tmp_path / "b", dtype)
    for file in (adapters.CONFIG_FILE, adapters.TENSORS_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    config = json.loads((tmp_path / "a" / adapters.CONFIG_FILE).read_text())
    assert config["target_modules"] == sorted(ranks)
    theirs = PeftModel.from_pretrained(make()[0], str(tmp_path / "a"))
    assert torch.equal(logits(theirs), logits(ours))
    assert not torch.allclose(logits(ours), logits(make()[0]))


@pytest.mark.filterwarnings(OLD_NAME)
def test_what_peft_saves_loads_here(rand, tmp_path):
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(12)]
    theirs = get_peft_model(tiny_llama(), LoraConfig(r=3, lora_alpha=5, target_modules=names, init_lora_weights=False))
    theirs.save_pretrained(str(tmp_path))
    ours = tiny_llama()
    adapters.load_adapters_(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs.eval()))


def saved(rand, folder):
    model, ranks = mixed_llama()
    adapters.inject_adapters_(model, ranks, alpha=6.0, dropout=0.1)
    adapters.set_adapter_weights_(model, random_factors(model, rand))
    adapters.save_adapters(model, folder)
    return model, ranks


def test_adapters_that_would_change_nothing_are_an_error(rand, tmp_path):
    model, ranks = mixed_llama()
    adapters.inject_adapters_(model, ranks, alpha=6.0, dropout=0.1)
    with pytest.raises(ModelError, match="every B is zero"):
        adapters.save_adapters(model, tmp_path)
    assert not list(tmp_path.iterdir())
    saved(rand, tmp_path)
    with pytest.raises(ModelError, match="no linear of the model"):  # fewer layers: PEFT loads it in silence
        adapters.load_adapters_(tiny_llama(num_hidden_layers=1), tmp_path)
    with pytest.raises(ModelError, match="was it trained on a model of other widths"):
        adapters.load_adapters_(tiny_llama(intermediate_size=36), tmp_path)
    zeros = adapters.load_file(tmp_path / adapters.TENSORS_FILE)
    zeros = {n: t * (".lora_A." in n) for n, t in zeros.items()}
    adapters.save_file(zeros, tmp_path / adapters.TENSORS_FILE)
    with pytest.raises(ModelError, match="every B is zero"):
        adapters.load_adapters_(mixed_llama()[0], tmp_path)


def test_damaged_adapters_are_refused(rand, tmp_path):
    with pytest.raises(ModelError, match="there is no adapter_config.json"):
        adapters.load_adapters_(tiny_llama(), tmp_path)
    saved(rand, tmp_path)
    config = json.loads((tmp_path / adapters.CONFIG_FILE).read_text())
    (tmp_path / adapters.CONFIG_FILE).write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ModelError, match="not supported"):
        adapters.load_adapters_(mixed_llama()[0], tmp_path)
    tensors = (tmp_path / adapters.TENSORS_FILE).read_bytes()
    (tmp_path / adapters.TENSORS_FILE).write_bytes(tensors[:-1])
    with pytest.raises(ModelError, match="damaged"):
        adapters.load_adapters_(mixed_llama()[0], tmp_path)


def test_ranks_that_do_not_fit_are_refused():
    model = tiny_llama(num_hidden_layers=1)
    inject = lambda ranks: adapters.inject_adapters_(model, ranks, alpha=6.0, dropout=0.0)
    with pytest.raises(PlanError, match="no linear of the model: 'model.norm', 'q_proj'"):
        inject({"model.norm": 1, "q_proj": 1})
    with pytest.raises(PlanError, match="has rank 25; 1 to 24 fit"):
        inject({"model.layers.0.mlp.up_proj": 25})
    with pytest.raises(PlanError, match="at least one"):
        inject({})
    inject({"model.layers.0.mlp.up_proj": 2})
    with pytest.raises(PlanError, match="has adapters already"):
        inject({"model.layers.0.mlp.down_proj": 2})


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_merging_keeps_the_function_and_leaves_the_stock_model(rand, make):
    model = make().double()
    names = list(model.state_dict())
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and "lm_head" not in n]
    adapters.inject_adapters_(model, dict.fromkeys(targets, 2), alpha=6.0, dropout=0.1)
    model.eval()
    adapters.set_adapter_weights_(model, random_factors(model, rand))
    before = logits(model)
    adapters.merge_adapters_(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)  # the adapters worked in float32
    assert list(model.state_dict()) == names and not hasattr(model, "peft_config")


def test_merging_into_a_packed_linear_rounds_the_sum_on_its_grid(rand):
    model, ranks = mixed_llama()
    adapters.inject_adapters_(model, ranks, alpha=6.0, dropout=0.1)
    weights = random_factors(model, rand)
    adapters.set_adapter_weights_(model, weights)
    name = "model.layers.11.mlp.up_proj"
    A, B = (t.double() for t in weights[name])
    total = model.get_submodule(name).base_layer.dequantize(torch.float64) + 6.0 / ranks[name] * B @ A
    adapters.merge_adapters_(model)
    layer = model.get_submodule(name)
    assert layer.spec == NF4 and torch.equal(layer.codes, PackedLinear.from_weight(total, None, NF4).codes)


def test_a_loftq_start_brings_the_packed_layer_closer(rand):
    model = tiny_llama(num_hidden_layers=1)
    name = "model.layers.0.mlp.up_proj"
    W = model.get_submodule(name).weight.detach().double()

    def rounding(M):
        packed = PackedLinear.from_weight(M, None, NF4)
        return packed, packed.dequantize(M.dtype)

    kw = dict(rank=4, scaling=16 / 4, iterations=3, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    result = loftq.split(W, rounding, **kw)
    model.set_submodule(name, result.stored)
    adapters.inject_adapters_(model, {name: 4}, alpha=16.0, dropout=0.0)
    adapters.set_adapter_weights_(model, {name: (result.A, result.B)})
    with torch.no_grad():
        W_now = model.get_submodule(name)(torch.eye(24, dtype=torch.float32)).T.double()
    assert (W - W_now).norm().item() == pytest.approx(result.error, rel=1e-4)
    assert result.error < result.plain_error


def test_a_copied_layer_is_independent(rand):
    layer = PackedLinear.from_weight(rand(4, 6), rand(4), INT8)
    twin = copy.deepcopy(layer)
    twin.codes.zero_()
    assert layer.codes.any()
