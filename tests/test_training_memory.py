"""What a step of training takes: counted without numbers, with them, and by what autograd says it keeps."""

import pytest
import torch
from specs import NF4
from tiny import tiny, tiny_config
from torch import nn

from qpruner import recipe as recipes
from qpruner.do.recover import recomputing
from qpruner.errors import ModelError
from qpruner.math.books import book
from qpruner.model import cost, load, memory
from qpruner.model.adapters import inject_adapters_
from qpruner.model.discover import discover
from qpruner.model.packed.linear import PackedLinear, values_of_words
from qpruner.model.skeleton import build_skeleton
from qpruner.model.training_memory import Allocations, next_token_loss, step_memory
from qpruner.plan import INT8, QuantSpec
from qpruner.shape import shape_of, work_for

LAYERS = ("model.layers.", "gpt_neox.layers.", "model.decoder.layers.", "transformer.h.")
BATCH, LENGTH = 3, 40  # more tokens than products of few tokens are for
SIZED = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=4, vocab_size=512)
BASES = {
    "dense": [None],
    "nf4": [NF4],
    "mixed": [QuantSpec(bits=2, grid="integer", group_size=32), NF4, INT8, None],
}


def adapted(base: str = "mixed", family: str = "llama", *, dtype=torch.bfloat16, **over) -> nn.Module:
    model = tiny(family, dtype=dtype, **over)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(LAYERS)]
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


# --- what a run is told beforehand ------------------------------------------------------------------------------------


def forecast(model, family, dtype, again) -> float:
    skeleton = build_skeleton(tiny_config(family, **SIZED))
    sizes = memory.Sizes(cost.named_tensors(skeleton), discover(skeleton))
    work = memory.Work(
        score="magnitude", calibration=(1, LENGTH), score_tokens=0, judged=(1, LENGTH), judged_windows=1,
        vocabulary=SIZED["vocab_size"], dtype=dtype, quantizes=True, measures_information=False,
        measures_influence=False, whole_bytes=0, training_tokens=BATCH * LENGTH, recomputes=again,
    )  # fmt: skip
    return memory.training_bytes(sizes, work, model.config.hidden_size)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed-again"])
@pytest.mark.parametrize("autocast", [torch.bfloat16, None])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_forecast_of_a_run_is_no_less_and_not_twice_as_much(family, autocast, again):
    model = adapted("nf4", family, dtype=autocast or torch.float32, **SIZED)
    with recomputing(model, again):
        found = step_memory(model, BATCH, LENGTH, autocast=autocast)
    counted = found.passing - found.adapters  # gradients are as large, and count as a copy of the adapters
    assert counted <= forecast(model, family, autocast or torch.float32, again) < 2 * counted


def test_the_forecast_is_of_the_part_of_a_batch_that_is_in_memory_at_once():
    shape = shape_of(load.inspect_source("pystdlib-5M"))
    recipe = recipes.load("llm-pruner[batch_size=8,steps=5,adapter_rank=2]")
    counts = {name: group.n_units for name, group in shape.graph.groups.items()}
    work = lambda **keys: work_for(shape, recipe.model_copy(update=keys), counts, 32)
    assert (work().training_tokens, work(micro_batch=3).training_tokens) == (8 * 32, 2 * 32)  # 2 divides 8
    assert work(steps=0).training_tokens == 0 and work(gradient_checkpointing=True).recomputes
