"""What a step of training takes: counted without numbers, with them, and by what autograd says it keeps."""

import pytest
import torch
from specs import NF4
from tiny import tiny
from torch import nn

from qpruner.do.recover import recomputing
from qpruner.errors import ModelError
from qpruner.math.books import book
from qpruner.model.adapters import inject_adapters_
from qpruner.model.packed.linear import PackedLinear, values_of_words
from qpruner.model.training_memory import Allocations, next_token_loss, step_memory
from qpruner.plan import INT8, QuantSpec

BATCH, LENGTH = 3, 40  # more tokens than products of few tokens are for
BASES = {
    "dense": [None],
    "nf4": [NF4],
    "mixed": [QuantSpec(bits=2, grid="integer", group_size=32), NF4, INT8, None],
}


def adapted(base: str = "mixed", family: str = "llama", *, dtype=torch.bfloat16) -> nn.Module:
    model = tiny(family, dtype=dtype)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    for i, name in enumerate(linears):
        linear, spec = model.get_submodule(name), BASES[base][i % len(BASES[base])]
        if spec is not None:
            model.set_submodule(name, PackedLinear.from_weight(linear.weight, linear.bias, spec))
    inject_adapters_(model, {name: 2 + i % 2 for i, name in enumerate(linears)}, alpha=4, dropout=0.1)
    return model.train()


def tensors_of(model) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def some_ids() -> torch.Tensor:
    return torch.randint(61, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def really(model, autocast=torch.bfloat16) -> tuple[int, int]:
    """(kept, passing) of a step with numbers, the first of its process."""
    for table in (book, values_of_words):
        table.cache_clear()
    ids = some_ids()
    with Allocations(tensors_of(model)) as count:
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = next_token_loss(model, ids)
        kept = count.now
        loss.backward()
    return kept, count.peak


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed-again"])
@pytest.mark.parametrize("base", BASES)
def test_a_step_without_numbers_takes_what_one_with_numbers_takes(base, again):
    model = adapted(base)
    with recomputing(model, again):
        expected = really(model)
        found = step_memory(model, BATCH, LENGTH)
    assert (found.kept, found.passing) == expected


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "bloom", "phi3", "opt", "gpt2"])
def test_of_every_family(family):
    if family == "gpt2":  # whose linears are of another class
        model = tiny(family, dtype=torch.float32).train()
    else:
        model = adapted("nf4", family, dtype=torch.float32)
    expected = really(model, None)
    found = step_memory(model, BATCH, LENGTH, autocast=None)
    assert (found.kept, found.passing) == expected


@pytest.mark.parametrize("base", BASES)
def test_what_is_kept_is_what_autograd_keeps(base):
    model, ids = adapted(base), some_ids()
    known, saved = {t.untyped_storage()._cdata for t in [*tensors_of(model), ids]}, {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage  # held, so that none other gets its address
        return tensor

    def loss_of(model, ids):
        return model(input_ids=ids, use_cache=False).logits.float().square().sum()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, ids)
    specs = [spec for spec in BASES[base] if spec is not None and spec.bits < 8]
    tables = [t for spec in specs for t in (book(spec), values_of_words(spec, torch.float32, loss.device))]
    expected = sum(storage.nbytes() for storage in saved.values()) + loss.nbytes + sum(t.nbytes for t in tables)
    assert step_memory(model, BATCH, LENGTH, loss=loss_of).kept == expected


def test_the_parts():
    model = adapted()
    tensors = {id(t): t for t in tensors_of(model)}.values()
    trained = sum(t.nbytes for t in tensors if t.requires_grad)
    found = step_memory(model, BATCH, LENGTH)
    assert found.base + found.adapters == sum(t.nbytes for t in tensors)
    assert (found.adapters, found.moments) == (trained, 2 * trained)
    assert found.peak == found.base + 3 * trained + found.passing
    assert found.passing > found.kept + trained / 2


def test_computing_layers_again_keeps_less():
    model = adapted()
    usual = step_memory(model, BATCH, LENGTH)
    with recomputing(model, True):
        again = step_memory(model, BATCH, LENGTH)
    assert again.kept < usual.kept / 2 and again.passing < usual.passing


def test_the_meta_device_will_do():
    assert step_memory(adapted().to("meta"), BATCH, LENGTH) == step_memory(adapted(), BATCH, LENGTH)


def test_nothing_without_numbers_is_left_in_tables():
    model, ids = adapted(), some_ids()
    step_memory(adapted(), 1, 8)
    assert model(input_ids=ids).logits.isfinite().all()


def test_what_depends_on_numbers_is_refused():
    def loss_of(model, ids):
        return model(input_ids=ids[:, : int(ids.max()) + 1]).logits.sum()

    with pytest.raises(ModelError, match="cannot be counted without doing it"):
        step_memory(adapted(), BATCH, LENGTH, loss=loss_of)
