"""A made-up model of a joint search: sizes as of real linears, and a loss with what two choices cause together."""

import numpy as np

from qpruner.decide.estimate import Estimate
from qpruner.decide.space import Space, Table, Variable
from qpruner.plan import QuantSpec

BITS = (2, 3, 4, 8)


def made_up(n_layers=6, *, widths=3, specs=4, drop=False, embedding=False, hidden=64, seed=0, together=0.0, rank=8):
    """A space, an estimate of it, and the vectors c whose squares and products are what the estimate holds."""
    rng = np.random.default_rng(seed)
    levels = np.linspace(2, 8, specs)
    options = tuple(
        QuantSpec(bits=BITS[min(int(i * len(BITS) / specs), 3)], grid="integer", group_size=8 * (1 + i), symmetric=True)
        for i in range(specs)
    )
    variables: list[Variable] = []
    tables: list[Table] = []
    single: list[np.ndarray] = []
    for layer in range(n_layers):
        name, stays = f"m.{layer}", None
        if drop:
            stays = len(variables)
            variables.append(Variable(name, "layer", layer, (0, 1)))
            single.append(np.array([rng.lognormal(-1, 0.5), 0.0]))
            tables.append(Table((stays,), np.array([0, 2 * hidden])))
        for group, pair, d in (("kv", ("qkv", "o"), hidden), ("mlp", ("up", "down"), 3 * hidden)):
            width = None
            if widths > 1:
                width, counts = len(variables), np.linspace(4, 8, widths).round().astype(int)
                variables.append(Variable(f"{name}.{group}", "width", layer, tuple(int(c) for c in counts)))
                cost = rng.lognormal(-2, 0.7) * (1 - counts / 8) ** 1.5
                single.append(cost)
            for part in pair:
                bits = len(variables)
                variables.append(Variable(f"{name}.{part}", "bits", layer, options))
                single.append(rng.lognormal(0, 1) * (4.0 ** (2 - levels) - 4.0**-6) / n_layers)
                size = (hidden * d * levels / 8).round().astype(np.int64) + rng.integers(0, 9)
                about = (bits,)
                if width is not None:
                    size, about = (size * counts[:, None] // 8), (width, bits)
                if stays is not None:
                    size, about = np.stack([np.zeros_like(size), size]), (stays, *about)
                tables.append(Table(about, size))
    if embedding:
        tables.append(Table((len(variables),), (hidden * 200 * levels / 8).round().astype(np.int64)))
        variables.append(Variable("m.embed", "bits", -1, options))
        single.append(0.3 * (4.0 ** (2 - levels) - 4.0**-6))
    space = Space(tuple(variables), tuple(f"m.{i}" for i in range(n_layers)), 1000, tuple(tables))
    n = sum(space.sizes)
    directions = rng.normal(size=(n, rank))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    c = np.sqrt(2 * np.concatenate(single))[:, None] * directions
    interaction = together * c @ c.T if together else None
    return space, Estimate(space, tuple(single), interaction)


def limit_of(space, share):
    """Between the smallest and the largest size."""
    low, high = space.size_bytes([(0,) * len(space.sizes), space.top])
    return int(low + share * (high - low))


def points_of(space, n, seed=0):
    return space.canonical(np.random.default_rng(seed).integers(0, space.sizes, (n, len(space.sizes))))
