"""Embeddings and heads in codes: what is looked up and multiplied with is what is stored, once."""

import copy
import io

import pytest
import torch
from specs import EVERY
from tiny import tiny, tiny_config
from tiny_folder import save
from torch import nn
from transformers import AutoModelForCausalLM

from qpruner import recipe
from qpruner import shape as shaping
from qpruner.artifact.opened import open_stream
from qpruner.artifact.save import save_artifact, weight_bytes
from qpruner.do.quantize import Candidates
from qpruner.do.tune import tune_network_
from qpruner.errors import PlanError
from qpruner.judge.speed import tensor_bytes
from qpruner.model import cost, load
from qpruner.model.check import check_plan
from qpruner.model.discover import discover
from qpruner.model.embeddings import embedding_sites, scale_of
from qpruner.model.graph import Graph
from qpruner.model.packed.embedding import PackedEmbedding, put_embedding_, put_empty_embeddings_
from qpruner.model.packed.linear import PackedLinear
from qpruner.model.residual import fault_of
from qpruner.model.skeleton import build_skeleton
from qpruner.model.surgery import narrow_
from qpruner.plan import INT8, NF4, Plan, QuantSpec

INT3 = QuantSpec(bits=3, grid="integer", group_size=16, symmetric=False, scale_bits=4)
INT4 = QuantSpec(bits=4, grid="integer", group_size=32)  # of which torch has a product in another order
IDS = torch.arange(3, 23)[None]

# What there is to store, by family: names, and whether one serves both ends.
CASES = {
    "llama": ("llama", dict(tie_word_embeddings=False), ["model.embed_tokens", "lm_head"]),
    "llama tied": ("llama", dict(tie_word_embeddings=True), ["model.embed_tokens"]),
    "qwen3 tied": ("qwen3", dict(tie_word_embeddings=True), ["model.embed_tokens"]),
    "gpt2": ("gpt2", {}, ["transformer.wte"]),
    "gpt_neox": ("gpt_neox", {}, ["gpt_neox.embed_in", "lm_head"]),
    "gpt_neox tied": ("gpt_neox", dict(tie_word_embeddings=True), ["gpt_neox.embed_in"]),
    "opt": ("opt", {}, ["model.decoder.embed_tokens"]),
    "opt projected": ("opt", dict(word_embed_proj_dim=16), ["model.decoder.embed_tokens"]),
    "gptj": ("gptj", dict(n_embd=24, n_layer=3, n_head=4, rotary_dim=4), ["transformer.wte", "lm_head"]),
    "gemma": ("gemma", dict(head_dim=8), ["model.embed_tokens"]),
    "gemma3": ("gemma3_text", dict(head_dim=8, tie_word_embeddings=True), ["model.embed_tokens"]),
    "biogpt": ("biogpt", dict(tie_word_embeddings=True), ["biogpt.embed_tokens"]),
}


def model_of(case: str, dtype=torch.float32) -> nn.Module:
    family, over, _ = CASES[case]
    return tiny(family, dtype=dtype, **over)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("spec", EVERY, ids=str)
@pytest.mark.parametrize("shape", [(2, 7), (1, 1), (0,), ()])
def test_what_is_looked_up_are_rows_of_what_is_stored(rand, spec, shape):
    matrix = PackedLinear.from_weight(rand(11, 70), None, spec)
    embedding = PackedEmbedding(matrix, padding_idx=3, dtype=torch.float64)
    ids = torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(embedding(ids), matrix.dequantize(torch.float64)[ids])
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (11, 70, 3)
    assert embedding.weight.dtype == torch.uint8 and embedding.weight.dim() == 1


@pytest.mark.parametrize("spec", EVERY, ids=str)
def test_a_tied_head_multiplies_by_the_same_codes(rand, spec):
    matrix = PackedLinear.from_weight(rand(11, 70), None, spec)
    head, bias = matrix.sharing(rand(11)), matrix.sharing(None)
    x, seen = rand(3, 70).requires_grad_(), rand(3, 11)
    y = head(x)
    (y * seen).sum().backward()
    W = matrix.dequantize(torch.float64)
    torch.testing.assert_close(y, x @ W.T + head.bias)
    torch.testing.assert_close(x.grad, seen @ W)
    assert list(head.state_dict()) == ["bias"] and not bias.state_dict()


def packed_llama(spec=INT3, dtype=torch.float32, tied=True):
    model = tiny("llama", dtype=dtype, tie_word_embeddings=tied)
    graph = discover(model)
    site = graph.embeddings["model.embed_tokens"]
    put_embedding_(model, site, PackedLinear.from_weight(model.model.embed_tokens.weight, None, spec), dtype=dtype)
    return model


def ends(model):
    return model.get_input_embeddings(), model.get_output_embeddings()


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "copied": copy.deepcopy,
    "moved": lambda model: model.to(torch.bfloat16).to("cpu"),
    "emptied and loaded": lambda model: emptied(model),
    "pickled": pickled,
}


def emptied(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name: b.clone() for name, b in model.named_buffers() if name not in state}
    model.to("meta")
    model.load_state_dict(state, assign=True)
    for name, buffer in buffers.items():
        path, _, attribute = name.rpartition(".")
        model.get_submodule(path)._buffers[attribute] = buffer
    return model


@pytest.mark.parametrize("how", COPIES)
def test_both_ends_go_on_sharing_one_matrix(how):
    model = packed_llama()
    names = [name for name in model.state_dict() if "embed" in name or "head" in name]
    assert names == [f"model.embed_tokens.{part}" for part in ("codes", "scales", "steps", "zeros")]
    W, bytes_before = model.model.embed_tokens.dequantize(), sum(t.nbytes for t in model.state_dict().values())
    again = COPIES[how](model)
    embedding, head = ends(again)
    assert embedding.codes is head.codes and embedding.codes is embedding.matrix.codes
    assert torch.equal(embedding.dequantize(), W) and torch.equal(head.dequantize(), W)
    dtype = next(again.parameters()).dtype
    assert embedding(IDS).dtype == dtype and logits(again).dtype == dtype
    held = tensor_bytes(again) - sum(b.nbytes for n, b in again.named_buffers() if n not in again.state_dict())
    assert held <= bytes_before  # half of it for what is of bfloat16 now
    embedding._buffers["codes"] = torch.zeros_like(embedding.codes)
    assert torch.equal(head.dequantize(), embedding.dequantize()) and not torch.equal(head.dequantize(), W)


def test_codes_that_are_looked_up_stay_in_their_order(rand):
    """The head of one token in bfloat16 would have them in another."""
    W, x = rand(64, 64), rand(1, 64).bfloat16()
    alone, matrix = (PackedLinear.from_weight(W, None, INT4) for _ in range(2))
    embedding, head = PackedEmbedding(matrix, dtype=torch.bfloat16), matrix.sharing(None)
    codes = matrix.codes.clone()
    alone(x), head(x)
    assert alone.arranged() is not None or not alone.arrangeable  # a machine without that product
    assert head.arranged() is None and torch.equal(embedding._buffers["codes"], codes)


@pytest.mark.parametrize("case", CASES)
def test_a_graph_names_what_has_a_row_for_every_token(case):
    model = model_of(case)
    sites = discover(model).embeddings
    assert list(sites) == CASES[case][2]
    for name, site in sites.items():
        assert (site.n_rows, site.width) == tuple(model.get_submodule(name).weight.shape)
        for head in site.heads:
            assert model.get_submodule(head).weight is model.get_submodule(name).weight
    assert embedding_sites(build_skeleton(model.config))[0] == sites  # where tied weights are apart


def compressed(case, folder, spec, *, prunes: bool, dtype=torch.bfloat16):
    """A tiny model whose ends alone are rounded, and perhaps half of its hidden channels removed; with its twin that
    holds the rounded matrices densely."""
    source = load.inspect_source(save(model_of(case).to(dtype), folder / "source"))
    shape = shaping.shape_of(source)
    kept = {name: range(g.n_units) for name, g in shape.graph.groups.items()}
    if prunes:
        kept["residual"] = kept["residual"][::2]
    plan = shape.plan(
        recipe.load("qpruner[adapter_rank=0]"), kept, 16, embeddings=dict.fromkeys(shape.graph.embeddings, spec)
    )
    check_plan(plan, shape.graph)
    model, twin = (open_stream(source).loaded() for _ in range(2))
    for each in (model, twin):
        narrow_(each, shape.graph, plan.kept)
    candidates = Candidates(model, shape.graph, plan, adapter_dtype=dtype)
    candidates.put_(plan.specs | plan.embeddings)
    candidates.forget()
    for name in shape.graph.embeddings:
        twin.get_submodule(name).weight.data = model.get_submodule(name).dequantize()
    twin.tie_weights()
    save_artifact(folder / "out", model, shape.graph, plan, expected=shape.stored(plan), dtype=dtype, source=source)
    return folder / "out", model.eval(), twin.eval(), shape, plan


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prunes", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("spec", [INT3, INT8], ids=str)
def test_artifacts_hold_what_was_predicted_and_load_bit_equal(case, prunes, spec, tmp_path):
    if prunes and "residual" not in discover(model_of(case)).groups:
        pytest.skip("its hidden states cannot be pruned")
    folder, model, twin, shape, plan = compressed(case, tmp_path, spec, prunes=prunes)
    assert weight_bytes(folder) == shape.size(plan).total
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(loaded) is type(model) and torch.equal(logits(loaded), logits(model))
    torch.testing.assert_close(logits(model), logits(twin))
    short = AutoModelForCausalLM.from_pretrained(folder)  # as stored
    assert short.get_input_embeddings()(IDS).dtype == torch.bfloat16
    torch.testing.assert_close(
        short.get_input_embeddings()(IDS), twin.to(torch.bfloat16).get_input_embeddings()(IDS), rtol=0, atol=0
    )
    tokens = short.generate(IDS[:, :4], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] > 4


def test_the_predicted_parts_add_up_and_shrink(tmp_path):
    shape = shaping.shape_of(load.inspect_source(save(tiny("llama", dtype=torch.float32), tmp_path / "m")))
    kept = {name: range(g.n_units) for name, g in shape.graph.groups.items()}
    sizes = [
        shape.size(shape.plan(recipe.load(f"qpruner[adapter_rank=0,embedding_bits={bits},group_size=8]"), kept, 16))
        for bits in (16, 8, 4, 3, 2)
    ]
    assert len({size.linears for size in sizes}) == len({size.other for size in sizes}) == 1
    embeddings = [size.embeddings for size in sizes]
    assert embeddings == sorted(embeddings, reverse=True) and len(set(embeddings)) == 5
    parts = cost.weight_tensors(61, 24, recipe.load("qpruner[group_size=8]").spec(3), "BF16")
    assert embeddings[3] == 2 * sum(map(cost.tensor_bytes, parts.values()))  # untied: two of them


def test_candidates_swap_embeddings_without_a_trace():
    for case in ("llama", "llama tied", "gptj"):
        model = model_of(case)
        graph = discover(model)
        plan = Plan(model_name="m", model_digest="", kept={}, specs={})
        made = Candidates(model, graph, plan, adapter_dtype=torch.bfloat16)
        dense = logits(model)
        put = lambda spec, made=made, graph=graph: made.put_(dict.fromkeys(graph.embeddings, spec))
        put(INT3)
        three = logits(model)
        put(INT8)
        assert 0 < (logits(model) - dense).abs().max() < (three - dense).abs().max()
        put(QuantSpec(bits=16, grid="none"))
        assert torch.equal(logits(model), dense)
        put(INT3)
        assert torch.equal(logits(model), three) and made.errors() == {}


@pytest.mark.parametrize("tied", [True, False])
def test_learning_from_predictions_leaves_both_ends_as_they_are(tied):
    model = tiny("llama", dtype=torch.float32, tie_word_embeddings=tied)
    graph = discover(model)
    plan = Plan(model_name="m", model_digest="", kept={}, specs={})
    made = Candidates(model, graph, plan, adapter_dtype=torch.bfloat16)
    windows = torch.randint(2, 61, (6, 8), generator=torch.Generator().manual_seed(0))
    theirs = logits(model, windows)
    made.put_(dict.fromkeys(graph.linears, NF4) | dict.fromkeys(graph.embeddings, INT3))
    seen = []

    def predicting(window: int) -> torch.Tensor:
        seen.append([type(module) for module in ends(model)])
        return theirs[window : window + 1]

    before = {name: model.get_submodule(name).codes.clone() for name in graph.embeddings}
    tuned = tune_network_(model, predicting, windows, steps=3, batch_size=2, held_out=0.3, seed=0)
    assert tuned.curve and all(types == [PackedEmbedding, PackedLinear] for types in seen)
    assert all(torch.equal(model.get_submodule(name).codes, codes) for name, codes in before.items())


def test_code_that_asks_the_head_for_its_dtype_fails_aloud():
    """Mamba gives what its head reads the dtype of the head's weight, which would be that of codes."""
    skeleton = build_skeleton(tiny_config("mamba", state_size=4, num_hidden_layers=2))
    assert not fault_of(skeleton)
    graph = Graph((), {}, {}, (), embeddings=embedding_sites(skeleton)[0])
    put_empty_embeddings_(skeleton, graph, dict.fromkeys(graph.embeddings, INT3))
    assert "a packed linear takes inputs of floating point, not of torch.uint8" in fault_of(skeleton)


class Normed(nn.Embedding):
    def forward(self, ids):
        found = super().forward(ids)
        return found / found.norm(dim=-1, keepdim=True)


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward((ids + 1) % self.num_embeddings)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 2.5


def test_only_a_look_up_times_a_number_is_taken_for_one():
    assert scale_of(nn.Embedding(7, 5)) == 1 and scale_of(Scaled(7, 5, padding_idx=6)) == 2.5
    for other in (Normed(7, 5), Shifted(7, 5), nn.Embedding(7, 5, max_norm=1.0), nn.Linear(5, 7)):
        assert scale_of(other) is None
    model = tiny("llama")
    model.model.embed_tokens = Normed(61, 24)
    sites, notes = embedding_sites(model)
    assert list(sites) == ["lm_head"] and notes[0].startswith("'model.embed_tokens': Normed does more than look")


def test_plans_that_do_not_fit_are_refused():
    model = tiny("llama", tie_word_embeddings=True)
    graph = discover(model)
    whole = Plan(
        model_name="m", model_digest="", kept={n: range(g.n_units) for n, g in graph.groups.items()},
        specs=dict.fromkeys(graph.linears, NF4),
    )  # fmt: skip
    of = lambda **specs: whole.model_copy(update={"embeddings": {n.replace("__", "."): s for n, s in specs.items()}})
    check_plan(of(model__embed_tokens=INT3), graph)
    for wrong, message in (
        (of(lm_head=INT3), r"1 embedding\(s\) or head\(s\) .*does not have: 'lm_head'. It can .*'model.embed_tokens'"),
        (of(model__embed_tokens=INT3.model_copy(update={"salient": 2})), "keeps salient channels of 'model.embed_tok"),
        (of(model__embed_tokens=INT8.model_copy(update={"activation_bits": 8})), "or rounds inputs"),
    ):
        with pytest.raises(PlanError, match=message):
            check_plan(wrong, graph)
        with pytest.raises(PlanError, match=message):
            cost.stored_tensors(cost.named_tensors(model), graph, wrong)


def test_a_plan_of_before_reads_as_it_did():
    plan = Plan(model_name="m", model_digest="", kept={}, specs={"a": NF4})
    text = plan.to_json().replace(' "embeddings": {},\n', "")
    assert "embeddings" not in text and Plan.from_json(text) == plan and plan.packed_embeddings == {}
    named = plan.model_copy(update={"embeddings": {"e": INT3}})
    assert Plan.from_json(named.to_json()) == named
