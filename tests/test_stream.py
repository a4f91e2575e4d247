"""Layer by layer gives what the whole model gives, to the last bit, with one layer in memory, and can be killed."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny import TINY, tiny
from tiny_stream import streamed
from transformers import AutoModelForCausalLM

from qpruner.decide.scores import SCORERS
from qpruner.errors import ModelError
from qpruner.model.discover import discover
from qpruner.model.scratch import Scratch
from qpruner.model.skeleton import build_skeleton
from qpruner.model.stream import Stream
from qpruner.model.surgery import narrow_
from qpruner.model.tensors import Cut, Named, Stored
from qpruner.model.whole import Whole
from qpruner.testing.tiny import Held

IDS = torch.randint(2, 61, (5, 12), generator=torch.Generator().manual_seed(0))
MOE = dict(num_local_experts=4, num_experts_per_tok=2)
CASES = [
    *((family, {}) for family in TINY),
    ("gemma2", dict(head_dim=8)),
    ("falcon", dict(alibi=True, multi_query=False)),
    ("mixtral", MOE),
    ("gpt_oss", MOE | dict(head_dim=8)),
]


def weight_gradients(stream: Stream):
    """Watches the gradient of every parameter."""

    @contextmanager
    def watch(i: int):
        parameters = dict(stream.model.get_submodule(f"{path_of(stream)}.{i}").named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield lambda: {name: p.grad for name, p in parameters.items() if p.grad is not None}
        for parameter in parameters.values():
            parameter.requires_grad_(False).grad = None

    return watch


def path_of(stream: Stream) -> str:
    from qpruner.model.skeleton import decoder_layers

    return decoder_layers(stream.model)[0].rpartition(".")[0]


def eager(model):
    model.config._experts_implementation = "eager"  # the batched kernels know no float64
    return model


def parts(results: list[dict]) -> dict:
    return {f"{i}.{name}": tensor for i, result in enumerate(results) for name, tensor in result.items()}


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("family, over", CASES)
def test_layer_by_layer_is_the_whole_model(family, over, resident, on_disk, tmp_path):
    model = eager(tiny(family, **over))
    scratch = lambda name: Scratch(tmp_path / name if on_disk else None)
    stream = streamed(model, resident=resident)
    eager(stream.model)
    with torch.no_grad():
        expected = model(IDS).logits
    forward = scratch("forward")
    stream.forward(IDS, forward, batch_size=2)
    found = torch.cat(list(stream.logits(IDS, forward, batch_size=2)))
    assert torch.equal(found, torch.cat([model(rows).logits for rows in IDS.split(2)]))
    torch.testing.assert_close(found, expected)

    gradients = parts(stream.backward(IDS, scratch("backward"), watch=weight_gradients(stream)))
    for window in IDS:
        model(window[None], labels=window[None]).loss.backward()
    whole = dict(model.named_parameters())
    assert len(gradients) > 10
    for name, gradient in gradients.items():
        assert torch.equal(gradient, whole[f"{path_of(stream)}.{name}"].grad), name
    in_memory = [name for name, p in stream.model.named_parameters() if not p.is_meta]
    assert bool(in_memory) == resident, "weights stay only where they may"


def test_scratch_on_disk_holds_what_it_holds_in_memory(tmp_path):
    model = tiny("llama", dtype=torch.bfloat16)
    results = []
    for scratch in (Scratch(), Scratch(tmp_path / "disk")):
        stream = streamed(model)
        results.append(parts(stream.backward(IDS, scratch, watch=weight_gradients(stream))))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 2, 4, 5])
def test_a_pass_goes_on_after_the_last_finished_layer(at, tmp_path):
    model, scratch = tiny("llama"), Scratch(tmp_path / "pass")

    def kill(done, total, pace):
        if done == at:
            raise Killed

    stream = streamed(model)
    expected = parts(stream.backward(IDS, Scratch(), watch=weight_gradients(stream)))
    with pytest.raises(Killed):
        stream = streamed(model)
        stream.backward(IDS, scratch, watch=weight_gradients(stream), on_layer=kill)
    again, seen = streamed(model), []
    note = lambda done, total, pace: seen.append(done)
    results = again.backward(IDS, Scratch(tmp_path / "pass"), watch=weight_gradients(again), on_layer=note)
    assert seen == list(range(at + 1, 7)), "three layers there, three back"
    assert all(torch.equal(expected[name], value) for name, value in parts(results).items())


def test_memory_holds_two_layers_at_most(tmp_path):
    """One at work, and the next as it was read."""
    model = tiny("llama", num_hidden_layers=6)
    stream = streamed(model)
    most = 0

    @contextmanager
    def count(i):
        nonlocal most
        most = max(most, sum(not p.is_meta for layer in stream.model.model.layers for p in layer.parameters()))
        yield dict

    stream.forward(IDS, Scratch(tmp_path / "s"), watch=count)
    assert most == len(list(model.model.layers[0].parameters()))
    reads = [name for name in stream.tensors.names if "layers.5.mlp.up_proj" in name]
    assert len(reads) == 1, "each weight is read once in a pass"


def test_one_file_layout_for_what_transformers_renames_and_joins(tmp_path):
    """Mixtral's checkpoints hold one tensor per expert; the model has them stacked."""
    model = tiny("mixtral", dtype=torch.float32, **MOE)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    stored = Stored.of(tmp_path)
    assert any(".experts.3." in name for name in stored.places), "the layout of the files is the old one"
    skeleton = build_skeleton(model.config)
    named = Named(skeleton, stored)
    for name, tensor in model.state_dict().items():
        assert torch.equal(named.read(name), tensor), name


def test_tied_weights_are_read_once_and_stay_tied(tmp_path):
    model = tiny("llama", dtype=torch.float32, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    skeleton = build_skeleton(model.config)
    stream = Stream(skeleton, Named(skeleton, Stored.of(tmp_path)))
    loaded = stream.loaded()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(IDS).logits, AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits)


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    skeleton = build_skeleton(model.config)
    named = Named(skeleton, Stored.of(tmp_path))
    with pytest.raises(ModelError, match="nothing for 'model.layers.9.mlp.up_proj.weight'"):
        named.read("model.layers.9.mlp.up_proj.weight")


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_cutting_what_is_read_is_narrowing_what_is_there(family):
    model = tiny(family)
    graph = discover(model)
    kept = {name: range(0, g.n_units, 2) for name, g in graph.groups.items()}
    cut = Cut(Held(model), graph, kept)
    narrow_(model, graph, kept)
    for name, tensor in model.state_dict().items():
        assert torch.equal(cut.read(name), tensor), name


def test_files_are_read_without_mapping_them(tmp_path):
    model = tiny("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    stored = Stored.of(tmp_path)
    name = next(iter(stored.places))
    one, other = stored.read(name), stored.read(name)
    assert torch.equal(one, other) and one.data_ptr() != other.data_ptr()
    one.zero_()
    assert torch.equal(stored.read(name), other)
    assert stored.bytes_read == 3 * other.nbytes
    assert str(Path(tmp_path)) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("family, over", [("llama", {}), ("gpt_oss", MOE | dict(head_dim=8)), ("gpt2", {})])
def test_the_whole_model_at_once_measures_the_same(family, over):
    model = eager(tiny(family, **over))
    stream, whole = (
        streamed(model, resident=True),
        Whole(build_skeleton(model.config), Held(model), dtype=torch.float64),
    )
    graph = discover(model)
    for streamable in (stream, whole):
        eager(streamable.model)
    logits = [torch.cat(list(s.logits(IDS, scratch_after_forward(s), batch_size=2))) for s in (stream, whole)]
    assert torch.equal(*logits)
    for score in ("vector", "element-mixed"):
        one, other = (SCORERS[score](s, graph, IDS, torch.Generator(), Scratch(), None) for s in (stream, whole))
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-12)


def scratch_after_forward(streamable) -> Scratch:
    scratch = Scratch()
    streamable.forward(IDS, scratch, batch_size=2)
    return scratch
