"""What a study compares: models, how much is to stay of them, recipes, seeds. The command line or a YAML file says it.

models: [pystdlib-5M, {model: build/models/neox-m, name: neox, calibration: mine.jsonl}]
kept: [80%, 50%]
recipes: {first order: "llm-pruner[steps=0]", the same + bias: "llm-pruner[steps=0,reconstruction=bias]"}
seeds: 3
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from qpruner import recipe as recipes
from qpruner.errors import StudyError, listed
from qpruner.plan import Value
from qpruner.recipe import Recipe, split_recipes

# A study by kept fractions gives every recipe the same stored bytes, to be spent on nothing but units.
BY_KEPT = {"kept": 1, "shrink_to_fit": True, "bits": [16], "allocation": "uniform", "adapters": "merged"}
HALF = "50%"


class Subject(Value):
    """A model of a study, and its texts where they are not those of all. name: what the table calls it."""

    model: str
    name: str = ""
    calibration: Path | None = None
    search_text: Path | None = None
    evaluation: Path | None = None


class Matrix(Value):
    """Every recipe meets every limit on every model with every seed.

    models: names or folders, or mappings with texts of their own.
    budgets: limits on the stored size, as `compress` takes them; 50% by default.
    kept: limits as fractions of the prunable parameters, those of the kv groups and channels of all decoder layers.
        Every recipe then has the keys of `BY_KEPT`.
    recipes: label -> recipe with changes. In a label such as `A + B` the plot takes B for a variant of A.
    baseline: label of the recipe that the others are compared with; the first by default.
    changes: of every recipe.
    vary: one key of the recipes and the values that each is tried with.
    seeds: their number, from 0.
    calibration, search_text, evaluation: texts of the models that have none of their own.
    memory_limit: of each process.
    processes: that cells are computed in, side by side.
    keep_artifacts: without it the weights of a finished cell are removed.
    """

    models: tuple[Subject, ...] = Field(min_length=1)
    budgets: tuple[str, ...] = ()
    kept: tuple[float, ...] = ()
    recipes: dict[str, str] = Field(min_length=1)
    baseline: str = ""
    changes: dict[str, Any] = {}
    vary: dict[str, tuple[int | float, ...]] = Field(default={}, max_length=1)
    seeds: int = Field(default=3, ge=1)
    calibration: Path | None = None
    search_text: Path | None = None
    evaluation: Path | None = None
    memory_limit: str | None = None
    trust_remote_code: bool = False
    processes: int = Field(default=1, ge=1)
    keep_artifacts: bool = False

    @field_validator("models", mode="before")
    @classmethod
    def _named(cls, models: Any) -> Any:
        models = [models] if isinstance(models, (str, dict)) else models
        return [{"model": m} if isinstance(m, str) else m for m in models]

    @field_validator("recipes", mode="before")
    @classmethod
    def _labelled(cls, texts: Any) -> Any:
        texts = [texts] if isinstance(texts, str) else texts
        return texts if isinstance(texts, dict) else {text: text for text in split_recipes(texts)}

    @field_validator("kept", mode="before")
    @classmethod
    def _fractions(cls, values: Any) -> Any:
        return [_fraction(v) for v in (values if isinstance(values, (list, tuple)) else [values])]

    @model_validator(mode="after")
    def _consistent(self) -> "Matrix":
        names = [subject.name for subject in self.subjects]
        if len(set(names)) < len(names):
            raise ValueError("two models have the same name; give one of them another: {model: ..., name: ...}")
        if self.reference not in self.recipes:
            known = ", ".join(self.recipes)
            raise ValueError(f"the baseline {self.reference!r} is none of the study's recipes: {known}")
        if self.budgets and self.kept:
            raise ValueError("give budgets or kept fractions, not both")
        return self

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """The models, each with its name and its texts."""
        all_texts = {key: getattr(self, key) for key in ("calibration", "search_text", "evaluation")}
        own = lambda m: {key: getattr(m, key) or text for key, text in all_texts.items()}
        return tuple(m.model_copy(update=own(m) | {"name": m.name or Path(m.model).name}) for m in self.models)

    @property
    def reference(self) -> str:
        """The recipe that the others are compared with."""
        return self.baseline or next(iter(self.recipes))

    @property
    def limits(self) -> tuple[str, ...]:
        """What the table calls them."""
        return tuple(f"{100 * fraction:g}% kept" for fraction in self.kept) or self.budgets or (HALF,)

    @property
    def varied(self) -> tuple[str | None, tuple[int | float | None, ...]]:
        """The key that differs within a recipe's line, and its values; nothing and one nothing if there is none."""
        return next(iter(self.vary.items()), (None, (None,)))

    def recipe(self, label: str, value: int | float | None) -> Recipe:
        """The recipe of one line, with the changes of all and one value of the key that is varied."""
        key, _ = self.varied
        varied = {} if key is None else {key: value}
        return recipes.load(self.recipes[label]).but((BY_KEPT if self.kept else {}) | self.changes | varied)


def _fraction(value: Any) -> float:
    """80% or 0.8."""
    text = str(value).strip()
    try:
        fraction = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction < 1:
        raise ValueError(f"{value!r} is no kept fraction. Accepted: 80%, or 0.8; more than nothing and less than all")
    return fraction


def varied_of(text: str) -> dict[str, list]:
    """`key=4,8,16`."""
    key, equals, values = text.partition("=")
    if not equals:
        raise StudyError(f"{text!r} does not say what varies. Accepted: key=value,value,value.")
    return {key.strip(): [yaml.safe_load(value) for value in values.split(",")]}


def parse(fields: Mapping[str, Any], *, origin: str = "the study") -> Matrix:
    """A checked study.

    Raises:
        StudyError: a key is unknown, a value is not accepted, or parts do not go together.
        RecipeError: a recipe does not exist, or cannot be changed so.
    """
    if unknown := [key for key in fields if key not in Matrix.model_fields]:
        accepted = ", ".join(sorted(Matrix.model_fields))
        raise StudyError(f"{origin} has unknown key(s): {listed(unknown)}. Accepted: {accepted}.")
    try:
        matrix = Matrix.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise StudyError(
            f"{origin}: {place + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}."
        ) from None
    for value in matrix.varied[1]:
        judged = {}  # on what -> the first label of it
        for label in matrix.recipes:
            recipe = matrix.recipe(label, value)
            judged.setdefault((recipe.evaluation_windows, recipe.window), label)
        if len(judged) > 1:
            raise StudyError(
                f"{origin}: recipes {listed(judged.values())} are judged on different windows, and cannot be compared. "
                "Give all of them the same evaluation_windows and window, under `changes`."
            )
    return matrix


def read(path: Path, **given: Any) -> Matrix:
    """The study of a YAML file, with the keys that are `given` in place of the file's.

    Paths in it are relative to the folder that the program runs in, as those on a command line are.
    """
    try:
        fields = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise StudyError(f"{path} is not YAML: {error}") from None
    if not isinstance(fields, dict):
        raise StudyError(f"{path} holds no mapping of keys to values.")
    return parse(fields | given, origin=str(path))


def of(models: str | Path | Sequence[str | Path | dict], **given: Any) -> Matrix:
    """A study of some models, or the one in a file: a single name that ends in .yaml or .yml."""
    listed_models = [models] if isinstance(models, (str, Path)) else list(models)
    models = [str(m) if isinstance(m, Path) else m for m in listed_models]
    if len(models) == 1 and str(models[0]).endswith((".yaml", ".yml")):
        path = Path(models[0])
        if not path.is_file():
            raise StudyError(f"there is no study file {str(path)!r}")
        return read(path, **given)
    return parse({"models": models, **given})
