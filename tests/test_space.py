"""The space of a joint search: its sizes are those of the plans that its points stand for."""

import numpy as np
import pytest
from tiny import tiny_config

from qpruner.decide import widths
from qpruner.decide.space import space_of
from qpruner.model import load
from qpruner.plan import DENSE, QuantSpec
from qpruner.recipe import Recipe
from qpruner.shape import shape_of

INTEGERS = [
    QuantSpec(bits=b, grid="integer", group_size=g, symmetric=False, scale_bits=4) for b in (2, 3) for g in (8, 16)
]
SPECS = [*INTEGERS, QuantSpec(bits=8, grid="integer"), DENSE]
RECIPE = Recipe(name="whole", adapter_rank=0)


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "gpt2", "qwen3"])
def shape(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny_config(request.param).save_pretrained(folder)
    return shape_of(load.inspect_source(str(folder / "config.json")))


def space_for(shape, **options):
    kinds = {name: g for name, g in shape.graph.groups.items() if g.kind in widths.LAYER_KINDS and g.n_blocks == 1}
    return space_of(
        shape.graph, shape.tensors, dtype=shape.dtype, specs=SPECS,
        widths={name: range(1, g.n_units + 1) for name, g in kinds.items()}, **options,
    )  # fmt: skip


def plan_of(shape, selection):
    """The plan that a selection stands for, of any units of the right number."""
    whole = {name: range(group.n_units) for name, group in shape.graph.groups.items()}
    kept = {name: tuple(units) for name, units in (whole | {n: range(k) for n, k in selection.kept.items()}).items()}
    specs = {n: selection.specs[p.name] for p in shape.graph.projections for n in p.linears}
    return shape.plan(RECIPE, kept, 16).model_copy(update={"specs": specs})


def points_of(space, n, seed=0):
    return np.random.default_rng(seed).integers(0, space.sizes, (n, len(space.sizes)))


def test_a_point_weighs_what_its_plan_weighs(shape):
    space = space_for(shape)
    for point, size in zip(points := points_of(space, 20), space.size_bytes(points), strict=True):
        stored = shape.size(plan_of(shape, space.selection(tuple(point)))).total
        assert 0 <= size - stored < 16 * len(shape.tensors) + 64


def test_layers_that_go_weigh_nothing_and_say_nothing(shape):
    space = space_for(shape, droppable=(1,))
    of_layer, inside = space.layers[1]
    points = points_of(space, 20)
    points[:, of_layer] = 0
    other = points.copy()
    other[:, inside] = points_of(space, 20, seed=1)[:, inside]
    assert (space.size_bytes(points) == space.size_bytes(other)).all()
    assert (space.canonical(points) == space.canonical(other)).all()
    selection = space.selection(tuple(points[0]))
    assert 1 not in selection.layers and not any(".1." in name for name in [*selection.kept, *selection.specs])
    whole = points.copy()
    whole[:, of_layer] = 1
    assert (space.size_bytes(whole) > space.size_bytes(points)).all()


def test_more_of_anything_weighs_more(shape):
    space = space_for(shape)
    for point in points_of(space, 5):
        for v, n in enumerate(space.sizes):
            rows = np.tile(point, (n, 1))
            rows[:, v] = range(n)
            if space.variables[v].kind == "width":
                assert (np.diff(space.size_bytes(rows)) > 0).all()


def test_a_restricted_space_says_the_same_of_what_is_left(shape):
    space = space_for(shape, droppable=(0, 1))
    some = {v: sorted({0, n - 1}) for v, n in enumerate(space.sizes)}
    small = space.restricted(some)
    points = points_of(small, 10)
    same = np.stack([np.array(some[v])[points[:, v]] for v in range(points.shape[1])], axis=1)
    assert (small.size_bytes(points) == space.size_bytes(same)).all()
    for a, b in zip(points, same, strict=True):
        assert small.selection(tuple(a)) == space.selection(tuple(b))
