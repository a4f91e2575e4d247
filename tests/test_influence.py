"""Block influence: how far a layer turns the hidden states, seen through hooks, equal to the plain computation."""

import pytest
import torch
from tiny import tiny
from tiny_stream import streamed

from qpruner.decide.influence import block_influence
from qpruner.model.scratch import Scratch
from qpruner.model.skeleton import decoder_layers
from qpruner.model.whole import Whole
from qpruner.testing.tiny import Held

WINDOWS = torch.arange(60).reshape(5, 12) % 29 + 1
FAMILIES = ("llama", "gpt2", "gpt_neox", "bloom", "opt")


def plainly(model) -> list[float]:
    """One window after the other through the whole model, and a mean over all tokens at the end."""
    cosines = [[] for _ in decoder_layers(model)]

    def note(i: int):
        def hook(module, args, kwargs, output):
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosines[i].append(torch.cosine_similarity(before, after, dim=-1).flatten())

        return hook

    for i, path in enumerate(decoder_layers(model)):
        model.get_submodule(path).register_forward_hook(note(i), with_kwargs=True)
    with torch.no_grad():
        for window in WINDOWS:
            model(window[None])
    return [float(1 - torch.cat(parts).mean()) for parts in cosines]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_formula(family):
    model = tiny(family)
    found = block_influence(streamed(model), WINDOWS, Scratch())
    assert found.tolist() == pytest.approx(plainly(model), abs=1e-9) and (found > 1e-4).all()


def returning(stream, i: int, made_of) -> None:
    """Has a layer return what is made of its hidden states and of its own output."""
    layer = stream.model.model.layers[i]
    own = type(layer).forward
    forward = lambda self, hidden_states, **kwargs: made_of(hidden_states, own(self, hidden_states, **kwargs))
    layer.__class__ = type("Changed", (type(layer),), {"forward": forward})


def test_a_layer_that_copies_has_none_and_one_that_turns_all_around_has_two():
    stream = streamed(tiny("llama"))
    returning(stream, 0, lambda hidden, output: hidden)
    returning(stream, 1, lambda hidden, output: -3 * hidden)
    assert block_influence(stream, WINDOWS, Scratch())[:2].tolist() == pytest.approx([0, 2], abs=1e-12)


def test_a_layer_that_works_in_place_is_compared_with_what_it_got():
    stream, expected = streamed(tiny("llama")), block_influence(streamed(tiny("llama")), WINDOWS, Scratch())
    returning(stream, 1, lambda hidden, output: hidden.copy_(output))
    torch.testing.assert_close(block_influence(stream, WINDOWS, Scratch()), expected)


def test_streamed_is_resident_is_whole_and_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    model = tiny("llama", dtype=torch.float32)
    expected = block_influence(streamed(model, resident=True), WINDOWS, Scratch())

    class Killed(Exception):
        pass

    def stop(done, total, pace):
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        block_influence(streamed(model), WINDOWS, Scratch(tmp_path), stop)
    seen = []
    found = block_influence(streamed(model), WINDOWS, Scratch(tmp_path), lambda done, *_: seen.append(done))
    whole = block_influence(Whole(streamed(model).model, Held(model), dtype=torch.float32), WINDOWS, Scratch())
    assert seen == [3] and torch.equal(found, expected) and torch.equal(whole, expected)
    monkeypatch.setattr("qpruner.decide.influence.batch_of", lambda windows: 2)
    for windows in (WINDOWS, WINDOWS.flip(0)):
        torch.testing.assert_close(block_influence(streamed(model), windows, Scratch()), expected, rtol=0, atol=1e-6)
