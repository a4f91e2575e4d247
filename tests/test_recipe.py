import pytest

from qpruner import recipe
from qpruner.errors import RecipeError


@pytest.mark.parametrize("name", recipe.shipped())
def test_every_shipped_recipe_is_read(name):
    found = recipe.load(name)
    assert found.name == name
    assert found.description


def test_the_papers_recipes_are_there():
    assert {"qpruner", "llm-pruner", "wanda-sp", "flap", "shortgpt", "magnitude"} <= set(recipe.shipped())
    assert recipe.load("qpruner").allocation == "bayesian"
    assert recipe.load("llm-pruner").bits == (16,)


def test_changes_are_read_as_yaml_and_named():
    found = recipe.load("qpruner[allocation=uniform,bits=[4, 8],layers=[1, 3],steps=7]")
    assert (found.allocation, found.bits, found.layers, found.steps) == ("uniform", (4, 8), (1, 3), 7)
    assert found.name == "qpruner[allocation=uniform,bits=[4, 8],layers=[1, 3],steps=7]"
    assert recipe.load(found.name) == found


def test_a_file_is_read(tmp_path):
    (tmp_path / "mine.yaml").write_text("kept: 0.5\n")
    assert recipe.load(str(tmp_path / "mine.yaml")).kept == 0.5


@pytest.mark.parametrize(
    "text, message",
    [
        ("nothing", "no recipe 'nothing'.*qpruner"),
        ("qpruner[colour=blue]", "unknown key.*'colour'.*Accepted.*allocation"),
        ("qpruner[allocation=best]", "allocation.*bayesian.*'best'"),
        ("qpruner[kept=1.5]", "kept.*less than or equal to 1"),
        ("qpruner[bits=[8, 4]]", "ascending"),
        ("qpruner[steps]", "no change of a recipe"),
        ("flap[worth=per-byte]", "below zero for half of the units: in scope global it wants worth: score"),
        ("flap[layers_kept=0.5]", "standardised in each layer, so its sums say nothing of whole layers"),
    ],
)
def test_bad_recipes_are_refused(text, message):
    with pytest.raises(RecipeError, match=message):
        recipe.load(text)


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(RecipeError, match="no mapping"):
        recipe.load(str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="not YAML"):
        recipe.load(str(tmp_path / "broken.yaml"))


def test_what_is_held_out_counts_wherever_something_is():
    held_out = lambda changes: recipe.load(f"gptq[held_out=0.1{changes}]").rounds().held_out
    assert held_out(",propagation=true") == held_out(",layer_steps=1") == held_out(",network_steps=1") == 0.1
    assert held_out("") == recipe.load("gptq").rounds().held_out


def test_a_layer_that_learns_needs_the_original_beside_it():
    assert recipe.load("gptq[layer_steps=1]").rounds().needs_original
    assert not recipe.load("gptq[network_steps=1]").rounds().needs_original
