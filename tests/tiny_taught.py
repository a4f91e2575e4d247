"""Tiny models with adapters, something to learn, and what an original gives for it."""

import torch
from test_quantize import candidates
from tiny import tiny
from tiny_stream import streamed

from qpruner.do.objective import compared_layers
from qpruner.do.recover import Material
from qpruner.model.examples import Examples
from qpruner.model.lessons import Lessons, write_lessons
from qpruner.model.scratch import Scratch
from qpruner.plan import Format, Recovery

TEXT = Recovery(loss="next-token", steps=20, batch_size=4, learning_rate=0.02, warmup_steps=2, validations=0)


def examples(n: int = 12, length: int = 16, *, seed: int = 0) -> Examples:
    """Random tokens, of which an uneven part counts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 61, (n, length), generator=generator)
    predicted = torch.rand(n, length, generator=generator) < torch.linspace(0.2, 0.9, n)[:, None]
    predicted[:, 0], predicted[:, 1] = False, True
    return Examples(ids, predicted)


def by_heart(n: int = 12) -> Examples:
    """One sentence that can be learned."""
    ids = torch.arange(3, 19).repeat(n, 1)
    predicted = torch.ones_like(ids, dtype=torch.bool)
    predicted[:, 0] = False
    return Examples(ids, predicted)


def packed(family: str = "llama", *, dropout: float = 0.0, with_plan: bool = False):
    """A packed model with adapters that LoftQ began, and its plan if that is wanted."""
    model, graph, made = candidates(family)
    made.put_({name: Format().spec(4 if i % 2 else 8) for i, name in enumerate(graph.linears)})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return (model, made._plan) if with_plan else model


def taught(some: Examples, folder, *, top: int = 8, layers=(), channels=None, model=None) -> Material:
    """By the original of `packed`, or another."""
    original = model or tiny("llama", dtype=torch.float32)
    folder.mkdir()
    write_lessons(
        streamed(original), some.ids, folder, Scratch(), top=top, layers=layers, channels=channels,
        passes=folder.with_suffix(".passes"),
    )  # fmt: skip
    return Material(some, Lessons(folder))


def adapters_of(model) -> dict:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


LAYERS = compared_layers(3)
