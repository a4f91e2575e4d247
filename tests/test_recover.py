"""Training adapters: the loss falls, only they change, and the same seed gives the same result."""

import torch
from test_quantize import candidates

from qpruner.do.recover import train_adapters_
from qpruner.plan import Format, Recovery

WINDOWS = torch.arange(3, 19).repeat(12, 1)  # one sentence that can be learned by heart
RECOVERY = Recovery(steps=20, batch_size=4, learning_rate=0.05, warmup_steps=2, adapter_dropout=0.0)


def trained():
    model, graph, made = candidates()
    made.put_({name: Format().spec(4 if i % 2 else 8) for i, name in enumerate(graph.linears)})
    before = {n: t.clone() for n, t in model.state_dict().items()}
    steps = []
    curve = train_adapters_(model, RECOVERY, WINDOWS, seed=0, on_step=lambda *step: steps.append(step))
    return model, before, curve, steps


def test_the_loss_falls_and_only_adapters_change():
    model, before, curve, steps = trained()
    assert curve[-1][1] < 0.8 * curve[0][1]
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed and all("lora_" in name for name in changed)
    assert steps[-1][:2] == (20, 20) and not model.training


def test_the_same_seed_gives_the_same_adapters():
    (one, _, first, _), (two, _, second, _) = trained(), trained()
    assert first == second
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
