"""Training adapters: what is learned, what stays, and that parts, processes and interruptions change nothing."""

import pytest
import torch
from tiny import tiny
from tiny_taught import LAYERS, TEXT, adapters_of, by_heart, examples, packed, taught

from qpruner import recipe
from qpruner import shape as shaping
from qpruner.decide.widths import counts as widths_of
from qpruner.do.objective import Objective, compared_layers, labels_of
from qpruner.do.recover import Material, Trained, last_checkpoint, order_of, part_of, train_adapters_
from qpruner.errors import RecipeError
from qpruner.facts import training_warnings
from qpruner.model.adapters import inject_adapters_
from qpruner.model.load import inspect_source


@pytest.fixture
def float32(monkeypatch):
    """Where bfloat16 is fast, its rounding is larger than what a test asks for."""
    monkeypatch.setattr("qpruner.do.recover.fast_bfloat16", lambda device: False)


def trained(recovery=TEXT, training=None, validation=None, *, dropout=0.0, **how):
    model = packed(dropout=dropout)
    found = train_adapters_(model, recovery, training or Material(by_heart()), validation, seed=0, **how)
    return model, found


def changed(recovery, **fields):
    return recovery.model_copy(update=fields)


@pytest.fixture(scope="module")
def once():
    """A training with nothing else asked for: the model, what was found, and the steps that were shown."""
    steps = []
    return *trained(on_step=lambda *step: steps.append(step)), steps


def test_the_loss_falls_and_only_adapters_change(once):
    model, found, steps = once
    before = packed().state_dict()
    assert found.curve[-1][1] < 0.9 * found.curve[0][1]
    differ = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert differ and all("lora_" in name for name in differ)
    assert steps[-1][:2] == (20, 20) and not model.training and model.config.use_cache
    assert "forward" not in model.__dict__ and found.best_step is None


def test_the_same_seed_gives_the_same_adapters(once):
    (one, first, _), (two, second) = once, trained()
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


# --- losses ----------------------------------------------------------------------------------------------------------


def batch_of(material) -> dict:
    some = material.examples
    found = {"input_ids": some.ids, "labels": labels_of(some.ids, some.predicted)}
    if material.lessons is not None:
        each = [material.lessons[i] for i in range(len(some))]
        found |= {key: torch.stack([one[key] for one in each]) for key in each[0]}
    return found


def test_next_token_is_the_mean_over_tokens_that_count():
    model, some = packed(), examples()
    total = Objective(model)(model, batch_of(Material(some)))
    logits = model(input_ids=some.ids).logits.double()
    expected = sum(
        -torch.log_softmax(logits[i, t - 1], -1)[some.ids[i, t]] for i, t in some.predicted.nonzero().tolist()
    )
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("top", [5, 60, 200])
def test_distillation_is_the_divergence_from_the_original_over_tokens_that_count(tmp_path, top):
    from tiny import tiny

    model, some = packed(), examples()
    total = Objective(model)(model, batch_of(taught(some, tmp_path / "lessons", top=top)))
    expected = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        theirs = tiny("llama", dtype=torch.float32)(input_ids=some.ids).logits.double().softmax(-1)
        ours = model(input_ids=some.ids).logits.double().softmax(-1)
    for i, t in some.predicted.nonzero().tolist():
        p, q = theirs[i, t - 1], ours[i, t - 1]
        if top < 60:
            some_of = p.topk(top).indices
            p, q = (torch.cat([x[some_of], 1 - x[some_of].sum()[None]]) for x in (p, q))
        expected += (p * (p / q).log()).sum()
    torch.testing.assert_close(total.detach(), expected, rtol=2e-3, atol=1e-4)


def test_gradients_of_chunks_are_those_of_the_whole(monkeypatch):
    from qpruner.math import divergence

    model, some = packed(), examples()
    labels = labels_of(some.ids, some.predicted)
    torch.nn.functional.cross_entropy(
        model(input_ids=some.ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    ).backward()
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    few = lambda *args: divergence.sum_in_chunks(*args, elements=200)  # three rows
    monkeypatch.setattr("qpruner.do.objective.sum_in_chunks", few)
    Objective(model)(model, batch_of(Material(some))).backward()
    parts = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_hidden_states_of_the_original_itself_are_at_no_distance(tmp_path):
    from tiny import tiny

    original, some = tiny("llama", dtype=torch.float32), examples()
    batch = batch_of(taught(some, tmp_path / "lessons", top=200, layers=LAYERS))
    near = Objective(original, LAYERS, 1.0)(original, batch) / some.predicted.sum()
    batch["hidden"] = batch["hidden"].flip(1)
    far = Objective(original, LAYERS, 1.0)(original, batch) / some.predicted.sum()
    assert near < 1e-4 < 0.01 < far  # what bfloat16 takes


def test_some_channels_of_hidden_states(tmp_path):
    some = examples()
    whole = taught(some, tmp_path / "whole", layers=LAYERS).lessons
    part = taught(some, tmp_path / "part", layers=LAYERS, channels=(0, 3, 23)).lessons
    assert len(part) == len(some) and part[5]["hidden"].shape == (3, 16, 3)
    assert torch.equal(part[5]["hidden"], whole[5]["hidden"][..., [0, 3, 23]])


def test_layers_that_are_compared_are_spread_and_end_at_the_last():
    assert compared_layers(32) == (7, 15, 23, 31)
    assert compared_layers(3) == (0, 1, 2) and compared_layers(5) == (0, 1, 2, 4)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_parts_of_a_batch_add_up_to_the_whole(tmp_path, float32):
    material = taught(examples(), tmp_path / "lessons", layers=LAYERS)
    recovery = changed(TEXT, loss="distillation", block_weight=0.5, steps=3, learning_rate=0.01)
    whole, first = trained(recovery, material)
    parts, second = trained(changed(recovery, micro_batch=3), material)  # of 4, so parts are of 2
    torch.testing.assert_close(first.curve, second.curve, rtol=1e-5, atol=0)
    ours, theirs = adapters_of(whole), adapters_of(parts)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_a_layer_that_is_computed_again_gives_the_same_gradients(tmp_path):
    material = taught(examples(), tmp_path / "lessons", layers=LAYERS)
    recovery = changed(TEXT, loss="distillation", block_weight=0.5, steps=3)
    one, first = trained(recovery, material)
    two, second = trained(changed(recovery, gradient_checkpointing=True), material)
    assert first.curve == second.curve
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not any(getattr(module, "gradient_checkpointing", False) for module in two.modules())


def test_parts_are_equal_shares():
    assert [part_of(8, 1, most) for most in (None, 8, 5, 3, 1)] == [8, 8, 4, 2, 1]
    assert part_of(8, 2, None) == 4 and part_of(6, 2, 2) == 1
    with pytest.raises(RecipeError, match=r"batch of 9 cannot be shared evenly by 2 processes"):
        part_of(9, 2, None)


def test_the_forecast_counts_what_is_in_memory_at_once(small_llama):
    shape = shaping.shape_of(inspect_source(small_llama))

    def work(**changes):
        chosen = recipe.load("llm-pruner").but({"batch_size": 8, **changes})
        return shaping.work_for(shape, chosen, widths_of(shape.graph, chosen, 1.0), 64)

    def tokens(**changes) -> int:
        return work(**changes).training_tokens

    assert [tokens(micro_batch=most) // 64 for most in (None, 8, 5, 3, 1)] == [8, 8, 4, 2, 1]
    assert tokens(steps=0) == tokens(adapter_rank=0) == 0
    assert work(micro_batch=1, network_steps=3, bits=[4], loftq_iterations=0, tuning_batch=4).tuning_tokens == 4 * 64


def test_no_example_comes_up_again_before_all_others_have():
    order = order_of(5, 13, seed=1)
    assert len(order) == 13 and all(sorted(order[i : i + 5].tolist()) == [0, 1, 2, 3, 4] for i in (0, 5))


# --- validation, interruptions ---------------------------------------------------------------------------------------


def test_what_does_best_on_validation_stays(float32):
    recovery = changed(TEXT, steps=40, validations=20)  # learns its sentence by heart
    other = Material(examples(6, seed=1))
    model, found = trained(recovery, None, other)
    best = min(found.validation, key=lambda point: point[1])
    assert [step for step, _ in found.validation] == list(range(0, 41, 2))
    assert best[0] == found.best_step < 40 and best[1] < found.validation[-1][1]
    total = float(Objective(model)(model, batch_of(other)).detach()) / int(other.examples.predicted.sum())
    assert total == pytest.approx(best[1], rel=1e-3)


@pytest.mark.parametrize("rate, better", [(0.02, True), (3.0, False)])
def test_a_training_that_only_does_harm_says_so_and_leaves_its_best_step(rate, better):
    """Adapters that start at zero are no candidate as they start: an artifact with them would be one without."""
    model = tiny("llama", dtype=torch.float32)
    inject_adapters_(model, {"model.layers.1.mlp.up_proj": 2}, alpha=4.0, dropout=0.0)
    recovery = changed(TEXT, steps=6, warmup_steps=0, learning_rate=rate, validations=3)
    found = train_adapters_(model, recovery, Material(by_heart()), Material(by_heart(6)), seed=0)
    start, best = found.before_and_best
    assert start == found.validation[0][1] and best == min(loss for step, loss in found.validation if step)
    assert found.best_step and (best < start) == better
    said = training_warnings(found)
    assert bool(said) != better
    assert better or f"{start:.4f} nats per token of its own loss before, {best:.4f} after step" in said[0]


def test_where_nothing_was_looked_at_nothing_is_said():
    assert Trained(((1, 2.0),)).before_and_best is None and training_warnings(Trained(((1, 2.0),))) == []


class Cut(Exception):
    pass


@pytest.fixture(scope="module")
def uninterrupted():
    recovery, other = changed(TEXT, validations=5, micro_batch=2), Material(examples(6, seed=1))
    return recovery, other, *trained(recovery, None, other, dropout=0.1)


@pytest.mark.parametrize("after", [3, 11, 19])
def test_an_interrupted_training_ends_in_the_same_adapters(tmp_path, uninterrupted, after):
    recovery, other, whole, expected = uninterrupted

    def stop(step, steps, loss):
        if step == after:
            raise Cut

    with pytest.raises(Cut):
        trained(recovery, None, other, dropout=0.1, folder=tmp_path / "passes", on_step=stop)
    left = last_checkpoint(tmp_path / "passes")
    assert (left is None) == (after < 4)
    seen = []
    note = lambda step, *rest: seen.append(step)
    model, found = trained(recovery, None, other, dropout=0.1, folder=tmp_path / "passes", on_step=note)
    assert found == expected
    assert seen[0] == 1 + after // 4 * 4
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_checkpoints_hold_adapters_and_nothing_that_has_to_be_trusted(tmp_path):
    from safetensors.torch import load_file

    model, _ = trained(changed(TEXT, steps=4), folder=tmp_path / "passes")
    folder = tmp_path / "passes" / "checkpoint-4"
    assert set(load_file(folder / "adapters.safetensors")) == set(adapters_of(model))
    assert {f.name for f in folder.iterdir()} == {
        "adapters.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
    }  # fmt: skip
    from transformers.trainer import safe_globals

    with safe_globals():  # of numpy's arrays, for its generator
        assert all(torch.load(file, weights_only=True) for file in folder.glob("*.pt*"))
