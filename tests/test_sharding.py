"""What is shared out between processes computes what the model does, and leaves the model alone. Here one process has
all parts; `test_recover_processes.py` has two."""

import os

import pytest
import torch
from test_embedding import packed_llama
from tiny import TINY, tiny
from tiny_taught import adapters_of, packed
from typer.testing import CliRunner

from qpruner.cli import app
from qpruner.do import sharding
from qpruner.errors import RecipeError
from qpruner.model import adapters
from qpruner.model.discover import discover
from qpruner.model.packed.embedding import PackedEmbedding
from qpruner.model.packed.linear import PackedLinear
from qpruner.model.packed.split import packed as packed_linear
from qpruner.plan import QuantSpec

IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(5))
SPEC = QuantSpec(bits=3, grid="integer", group_size=8, scale_bits=6, symmetric=False, salient=2)


@pytest.fixture
def connected():
    """This process, as if it were one of several."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def every_linear_packed(family: str):
    model = tiny(family, dtype=torch.float32)
    for name in discover(model).linears:
        linear = model.get_submodule(name)
        weight = linear.weight.T if family == "gpt2" else linear.weight
        model.set_submodule(name, packed_linear(weight, linear.bias, SPEC))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


MODELS = {
    **{family: lambda family=family: every_linear_packed(family) for family in TINY},
    "mixtral": lambda: tiny("mixtral", dtype=torch.float32),
    "dense": lambda: tiny("llama", dtype=torch.float32),
    "codes as embedding and head": packed_llama,
    "codes as embedding alone": lambda: packed_llama(tied=False),
    "adapters": packed,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_shared_out_computes_the_same(connected, name):
    model = MODELS[name]()
    if not adapters.adapter_layers(model):
        model.requires_grad_(False)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kind = type(model)
    twin = sharding.shared_out(model, torch.device("cpu"))
    there = {id(p) for p in model.parameters()}
    for path, parameter in twin.named_parameters():
        shared = hasattr(parameter, "to_local")
        assert shared != (parameter.requires_grad or parameter.dim() == 0), path
        assert parameter.requires_grad == (id(parameter) in there), path  # trained parameters are the very same
    assert {id(b) for b in twin.buffers()}.isdisjoint(id(b) for b in model.buffers())  # theirs may be moved
    kept = [n for n, b in twin.named_buffers() if n.rsplit(".")[-1] in ("codes", "scales", "steps", "zeros")]
    assert not kept
    looked_up = [m.matrix for m in twin.modules() if isinstance(m, PackedEmbedding)]
    assert len(looked_up) == name.startswith("codes")
    assert all(hasattr(matrix.codes, "to_local") and matrix.weight.dtype == torch.uint8 for matrix in looked_up)
    with torch.no_grad():
        assert torch.equal(twin(input_ids=IDS).logits, expected)
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert type(model) is kind and model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_became_parameters_stays_in_the_order_that_is_stored(rand):
    layer = PackedLinear.from_weight(rand(32, 64), None, QuantSpec(bits=4, grid="integer", group_size=32))
    stored = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert layer.arrangeable and layer.arranged(make=True) is not None
    layer.as_parameters_()
    assert layer.arranged(make=True) is None and not list(layer.buffers())
    assert {name for name, _ in layer.named_parameters()} == stored.keys()
    assert all(torch.equal(parameter, stored[name]) for name, parameter in layer.named_parameters())


def test_gradients_of_adapters_are_those_without_sharing(connected):
    model = packed()
    loss = lambda m: m(input_ids=IDS).logits.square().mean()
    for layer in adapters.adapter_layers(model).values():  # those that were loaded stand still
        for factor in adapters.factors(layer):
            factor.requires_grad_(True)
    loss(model).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert expected and adapters_of(model).keys() == expected.keys()
    for parameter in model.parameters():
        parameter.grad = None
    loss(sharding.shared_out(model, torch.device("cpu"))).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in expected)
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, expected[name]), name


def test_accelerate_is_not_told(monkeypatch):
    monkeypatch.setenv(sharding.WANTED, "true")
    with sharding.without_accelerates():
        assert sharding.WANTED not in os.environ
    assert os.environ[sharding.WANTED] == "true"


def launched(monkeypatch, n: int, **says: str) -> None:
    for name in (sharding.WANTED, *sharding.REFUSED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", str(n))
    for name, value in says.items():
        monkeypatch.setenv(name, value)


def test_sharing_is_wanted_where_the_launcher_says_so(monkeypatch):
    launched(monkeypatch, 2)
    assert not sharding.wanted() and "each has the whole model" in sharding.in_words()
    launched(monkeypatch, 1, ACCELERATE_USE_FSDP="true")
    assert not sharding.wanted() and sharding.in_words() is None  # there is nobody to share with
    launched(monkeypatch, 3, ACCELERATE_USE_FSDP="true", FSDP_OFFLOAD_PARAMS="false")
    assert sharding.wanted() and "the model (FSDP): each has 1/3 of every weight" in sharding.in_words()


def test_what_a_launcher_asks_in_vain_is_refused(monkeypatch):
    launched(monkeypatch, 2, ACCELERATE_USE_FSDP="true", FSDP_OFFLOAD_PARAMS="true")
    with pytest.raises(RecipeError, match="FSDP_OFFLOAD_PARAMS=true, which is not served: parts of the model are kept"):
        sharding.wanted()
    launched(monkeypatch, 2, ACCELERATE_USE_FSDP="true", FSDP_ACTIVATION_CHECKPOINTING="true")
    with pytest.raises(RecipeError, match="set gradient_checkpointing in the recipe"):
        sharding.wanted()


def test_the_command_begins_with_what_each_process_has(monkeypatch):
    launched(monkeypatch, 2, ACCELERATE_USE_FSDP="true")
    monkeypatch.delenv("RANK", raising=False)
    first = CliRunner().invoke(app, ["recover", "nowhere", "-o", "never"])
    assert first.exit_code == 2 and first.stderr.startswith(sharding.in_words())
    monkeypatch.setenv("RANK", "1")
    assert "processes" not in CliRunner().invoke(app, ["recover", "nowhere", "-o", "never"]).stderr
