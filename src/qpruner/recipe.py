"""A recipe: every choice of a method, one field each, with its unit. The files in `recipes/` are published methods."""

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from qpruner.errors import RecipeError, listed
from qpruner.plan import GRIDS, Format, QuantSpec, Recovery, Rounding, Value
from qpruner.targets import Target, held

Score = Literal[
    "vector", "element-first", "element-second", "element-mixed", "coarse", "hybrid", "wanda-sp", "flap",
    "brain-surgeon", "magnitude", "random",
]  # fmt: skip
Fusion = Literal["fine", "coarse", "mean", "attention", "learned", "best"]
Units = Literal["kv_group", "query_head", "channel", "expert", "residual"]
Allocation = Literal["uniform", "random", "mutual-information", "sensitivity", "bayesian", "joint"]


class Recipe(Value):
    """How a model is compressed.

    Pruning
        score: importance of a unit. `vector` and `element-*` are LLM-Pruner's; `coarse` sums over a unit before the
            modulus is taken, and `hybrid` fuses it with `element-mixed` (HyWIA); `wanda-sp` and `flap` look at the
            inputs of linears that read a unit; `brain-surgeon` asks what is lost if these linears are refitted without
            it; `magnitude` and `random` are controls.
        fisher: what the quadratic terms of `element-mixed`, `coarse` and `hybrid` take for a sample: a `window`, as
            their authors do, or a `token`, which makes them as much larger as a window has tokens.
        fusion, fusion_steps: of `hybrid`: how its two scores become one; `best` tries all and keeps what loses least on
            the search text. Steps that the learned attention is trained.
        units: kinds of units that are pruned: kv groups (key/value heads with the query heads that share them), query
            heads inside kv groups, MLP channels, whole experts, channels of the hidden states.
        scope: `layer`: every pruned layer keeps the same fraction. `global`: units of all pruned layers compete, by
            score per stored byte.
        kept: fraction of the units that stays in each pruned layer, at most; of their bytes in scope `global`.
        worth: what units compete by in scope `global`: their score per stored byte, or the bare score.
        shrink_to_fit: prune below `kept` as far as the budget asks for it.
        fit_by: what shrinks: the width of the layers, or their number.
        mean_bits: bits per weight that the pruned linears are to have on average when widths are fitted to the budget;
            what it leaves above the smallest of `bits` is what an allocation can give out.
        kept_per_layer: `kept` of single layers, by index; these are pruned exactly so, even where protected.
        layers_kept: fraction of the decoder layers that stays at all; those with the lowest scores go before anything
            else, and the other keys speak of the layers that are left.
        layer_score: of a whole layer: the sum over its units, or how much it changes the hidden states (ShortGPT).
        layers: first and last-plus-one decoder layer to prune; without it the protected fractions below decide.
        protect_first, protect_last: fraction of the decoder layers left whole at either end, rounded up.
        width_grid: kept channels are a multiple of this (or all).
        selection: `grid`, or `llm-pruner` for that method's own rule of counting, which knows no grid.
        calibration_windows, window: texts for the scores, and tokens in each.
        precision: that scores, mutual information and losses are computed in; bfloat16 is faster where hardware has it.
    Reconstruction
        reconstruction: what the linears that read pruned units get to make up for them: nothing, another bias (FLAP),
            or the weights that imitate the original best (least squares).
        added_biases: give them a bias where they have none; the artifact is then of a type of our own.
        dampings: strengths that are tried, as fractions of the mean diagonal of the Gram matrix; the one that does best
            on held-out calibration tokens is taken, or none at all if that does.
        held_out: fraction of the calibration windows that dampings are tried on.
    Bits
        bits: choices for each linear inside the decoder layers; 16 means unquantized.
        allocation: who decides between them.
        bit_unit: what shares a choice: a whole decoder layer, or the linears that runtimes fuse (q, k, v; gate, up).
        information: estimator of the mutual information of a unit's output and the prediction.
        trials, search_windows: Bayesian optimization, and windows of the search text that each trial is judged on.
        grid, group_size, symmetric, scale_bits: how codes and scales are stored below 16 bits; so many weights along
            an input share a scale, 0 for a whole row. Without a grid: NF4 at 4 bits, whole rows of integers at 8,
            binary at 1, and integers otherwise, in groups of 64.
        salient, salient_bits: input channels of each linear that are kept at more bits (those whose rounding would hurt
            most).
        activation_bits: inputs of linears are rounded to so many when the model runs, one scale for each token.
        embedding_bits: of the embedding and of the head, one matrix where they are tied; 16 means unquantized.
    Joint search (allocation joint): widths, layers and bits are chosen together, by the loss of the whole network
        group_sizes, salients: other values of `group_size` and `salient` that linears may be stored with.
        least_kept: fraction of the units of a group that stays at least.
        width_choices: widths that a group may have, at most.
        drop_layers: whether whole layers may go. pack_embeddings: whether embedding and head may be stored in codes.
        target: what has to load the result: our own loader in `transformers`, `vllm`, vLLM's DeciLM (`deci`), `gguf`,
            or `any` of transformers, vllm and gguf.
        gate_steps: that learned gates are trained; 0 for none. gates: a `table` of numbers, or a `hypernetwork` that
            makes them.
        trials_at_once: trials that are chosen before the first of them is known; as many can run side by side.
        sensitivity_windows: of the search text, that single choices are measured on.
        finalists: best plans that are carried out as far as their codes; what is then nearest to the original on the
            search text is taken.
    Rounding
        rounding: `nearest`, or `gptq`, which makes up for each rounding in the weights that are still to come.
        ranges: where the grid of a group ends: at its largest weight, where the squared error is least, or by
            half-quadratic fitting (HQQ).
        propagation: weights are first fitted to give what the original gives, from what the compressed layers before
            them put out; `dampings` are the strengths that are tried on `held_out` windows.
        transforms: changes of the weights that leave the model as it is and its rounding better: `rotate` the hidden
            states, `rescale` channels between linears.
        layer_steps: of gradient descent on the codes and scales of a layer, so that its output is the original's.
        network_steps: of the same on those of the whole model, so that its predictions are the original's. It has to
            fit in memory.
        tuning_batch: windows in each such step.
    Recovery
        adapter_rank: of each linear, and no more than 1/32 of its smaller side. 0 for none.
        rank_by: `uniform`, or `cut`: more for linears that lost more of their bytes, in the bytes that `adapter_rank`
            for all would take. With allocation sensitivity or bayesian widths alone count: adapters come before bits.
        adapters: stored beside the base, or merged into it (packed linears are rounded again, as they were before);
            `best` tries both once they are trained, and takes what loses less on the search text.
        adapter_alpha, adapter_dropout: the adapters' output is scaled by alpha / rank.
        loftq_iterations, loftq_weighting: of the start that makes up for rounding; `gram` counts errors as the inputs
            of each linear make them count, which rounding gptq always does. Trials of a search do not.
        loss: `distillation`, the divergence from the original's predictions, or `next-token` of the text.
        teacher_top: of the original's predictions for a token so many are kept, and all others together.
        block_weight: of the squared relative distance between hidden states and the original's, beside distillation.
        mask_prompts: rows that are instructions with answers are trained on their answers alone.
        steps, batch_size, learning_rate, warmup_steps: of training. Without a rate: 1 / hidden size, which is what
            QLoRA (arXiv 2305.14314) settled on from 7B to 65B, and what a 5 M model wants too.
        micro_batch: windows that are in memory at once; the gradients of `batch_size` are added up. Without it: all.
        gradient_checkpointing: layers are computed again on the way back, which saves most of the memory of training.
        validation_windows, validations: of search text, and how often they are looked at while training; what was best
            on them stays. 0 validations: the last step stays.
    Judging
        evaluation_windows: of held-out text.
    """

    name: str
    description: str = ""

    score: Score = "element-mixed"
    fisher: Literal["window", "token"] = "window"
    fusion: Fusion = "best"
    fusion_steps: int = Field(default=60, ge=1)
    units: tuple[Units, ...] = ("kv_group", "channel")
    scope: Literal["layer", "global"] = "layer"
    kept: float = Field(default=0.75, gt=0, le=1)
    worth: Literal["per-byte", "score"] = "per-byte"
    shrink_to_fit: bool = True
    fit_by: Literal["width", "depth"] = "width"
    mean_bits: float = Field(default=16, ge=1, le=16)
    kept_per_layer: dict[int, float] = {}
    layers_kept: float = Field(default=1, gt=0, le=1)
    layer_score: Literal["units", "block-influence"] = "units"
    layers: tuple[int, int] | None = None
    protect_first: float = Field(default=0.125, ge=0, le=1)
    protect_last: float = Field(default=0.0625, ge=0, le=1)
    width_grid: int = Field(default=64, ge=1)
    selection: Literal["grid", "llm-pruner"] = "grid"
    calibration_windows: int = Field(default=64, ge=1)
    window: int = Field(default=512, ge=8)
    precision: Literal["float32", "bfloat16"] = "float32"

    reconstruction: Literal["none", "bias", "least-squares"] = "none"
    added_biases: bool = False
    dampings: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    held_out: float = Field(default=0.25, gt=0, lt=1)

    bits: tuple[Literal[1, 2, 3, 4, 5, 6, 8, 16], ...] = (16,)
    grid: Literal["integer", "normal-float", "ternary", "binary"] | None = None
    group_size: int | None = Field(default=None, ge=0)
    symmetric: bool = True
    scale_bits: Literal[4, 6, 8, 16] = 16
    salient: int = Field(default=0, ge=0)
    salient_bits: Literal[4, 8] = 8
    activation_bits: Literal[4, 8, 16] = 16
    embedding_bits: Literal[1, 2, 3, 4, 5, 6, 8, 16] = 16
    allocation: Allocation = "uniform"
    bit_unit: Literal["layer", "projection"] = "projection"
    information: Literal["gaussian", "binned"] = "gaussian"
    trials: int = Field(default=32, ge=1)
    search_windows: int = Field(default=32, ge=1)

    group_sizes: tuple[int, ...] = ()
    salients: tuple[int, ...] = ()
    least_kept: float = Field(default=0.25, gt=0, le=1)
    width_choices: int = Field(default=8, ge=1)
    drop_layers: bool = True
    pack_embeddings: bool = True
    target: Target = "transformers"
    gate_steps: int = Field(default=0, ge=0)
    gates: Literal["table", "hypernetwork"] = "table"
    trials_at_once: int = Field(default=4, ge=1)
    sensitivity_windows: int = Field(default=8, ge=1)
    finalists: int = Field(default=1, ge=1)

    rounding: Literal["nearest", "gptq"] = "nearest"
    ranges: Literal["absmax", "mse", "half-quadratic"] = "absmax"
    propagation: bool = False
    transforms: tuple[Literal["rotate", "rescale"], ...] = ()
    layer_steps: int = Field(default=0, ge=0)
    network_steps: int = Field(default=0, ge=0)
    tuning_batch: int = Field(default=8, ge=1)

    adapter_rank: int = Field(default=8, ge=0)
    rank_by: Literal["uniform", "cut"] = "cut"
    adapters: Literal["beside", "merged", "best"] = "best"
    adapter_alpha: float = Field(default=16, gt=0)
    adapter_dropout: float = Field(default=0.05, ge=0, lt=1)
    loftq_iterations: int = Field(default=5, ge=0)
    loftq_weighting: Literal["none", "gram"] = "none"
    loss: Literal["distillation", "next-token"] = "distillation"
    teacher_top: int = Field(default=64, ge=1)
    block_weight: float = Field(default=0, ge=0)
    mask_prompts: bool = True
    steps: int = Field(default=100, ge=0)
    batch_size: int = Field(default=8, ge=1)
    micro_batch: int | None = Field(default=None, ge=1)
    gradient_checkpointing: bool = False
    learning_rate: float | None = Field(default=None, gt=0)
    warmup_steps: int = Field(default=10, ge=0)
    validation_windows: int = Field(default=16, ge=1)
    validations: int = Field(default=10, ge=0)

    evaluation_windows: int = Field(default=200, ge=2)

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.score == "hybrid" and (self.fit_by == "depth" or self.layers_kept < 1):
            raise ValueError("score hybrid is fused for a model that keeps all its layers: leave layers whole")
        if self.score == "hybrid" and self.worth == "score":
            raise ValueError("score hybrid is fused per stored byte: it needs worth per-byte")
        if self.fisher == "token" and self.score not in ("element-mixed", "coarse", "hybrid"):
            raise ValueError(f"fisher token scales a quadratic term, and score {self.score} has none to scale")
        if list(self.bits) != sorted(set(self.bits)) or not self.bits:
            raise ValueError("bits must be different and ascending, for instance [4, 8]")
        if self.grid is not None and not any(bits in GRIDS[self.grid] for bits in self.bits):
            raise ValueError(f"grid {self.grid} has {GRIDS[self.grid]} bits, and none of {self.bits} is among them")
        if self.propagation and self.rounding == "nearest":
            raise ValueError("propagation fits weights before gptq rounds them: it needs rounding gptq")
        if self.adapter_rank and self.loftq_iterations and (self.layer_steps or self.network_steps):
            raise ValueError(
                "LoftQ finds codes and adapters together, and codes that are learned afterwards would undo that: with "
                "layer_steps or network_steps set loftq_iterations to 0 (adapters then start at zero), or adapter_rank"
            )
        if "rescale" in self.transforms and self.network_steps:
            raise ValueError("rescale changes weights that network_steps would go on from: leave one of them out")
        if self.allocation == "joint" and "rotate" in self.transforms:
            raise ValueError("allocation joint tries weights in the basis that the model has: leave rotate out")
        if self.allocation == "joint" and self.activation_bits < 16:
            raise ValueError("allocation joint does not round inputs in its trials: activation_bits has to be 16")
        if self.allocation == "joint" and (self.fit_by == "depth" or self.layers_kept < 1 or self.scope == "global"):
            raise ValueError("allocation joint chooses widths and layers itself: leave fit_by, layers_kept, scope out")
        if self.target != "transformers" and self.allocation != "joint":
            raise ValueError(
                f"target bounds a joint search, and allocation {self.allocation} is none: take allocation joint, as "
                "recipe auto does, or leave target out; `qpruner inspect` says before a run what its result loads in"
            )
        if self.allocation == "joint" and not self.formats():
            bits = " or ".join(map(str, self.bits))
            raise ValueError(f"target {self.target} has no format of {bits} bits; all targets have some of 4 and 8")
        if "rotate" in self.transforms and "residual" in self.units:
            raise ValueError("rotate turns the hidden states as a whole: leave residual out of units")
        if not self.units or len(set(self.units)) < len(self.units):
            raise ValueError("units must be different kinds, one at least, for instance [kv_group, channel]")
        if self.scope == "global" and self.selection == "llm-pruner":
            raise ValueError("selection llm-pruner counts the units of each layer, which scope global does not")
        fewer = "fit_by: depth" if self.fit_by == "depth" else "layers_kept" if self.layers_kept < 1 else None
        if self.fit_by == "depth" and self.layers_kept < 1:
            raise ValueError("fit_by: depth finds the number of layers that layers_kept would set")
        if fewer and (self.layers is not None or self.kept_per_layer):
            raise ValueError(f"layers and kept_per_layer number the decoder layers, which {fewer} numbers anew")
        if self.score == "flap" and fewer and self.layer_score == "units":
            raise ValueError("score flap is standardised in each layer, so its sums say nothing of whole layers")
        if self.score == "flap" and self.scope == "global" and self.worth == "per-byte":
            raise ValueError("score flap is below zero for half of the units: in scope global it wants worth: score")
        return self

    @property
    def tries_adapters(self) -> bool:
        """Whether bits are chosen on the pruned model, with adapters beside what is tried."""
        return len(self.bits) > 1 and self.allocation in ("sensitivity", "bayesian")

    @property
    def weighs_adapters(self) -> bool:
        """Whether adapters start from errors that are counted as the inputs make them count."""
        if not (self.adapter_rank and self.loftq_iterations and self.bits[0] < 16):
            return False
        return self.loftq_weighting == "gram" or self.rounding == "gptq"

    @property
    def rounds_with_text(self) -> bool:
        """Whether calibration text goes through the model for the codes, or for what adapters start from."""
        return self.bits[0] < 16 and (self.rounds().needs_text or self.weighs_adapters)

    def spec(self, bits: int) -> QuantSpec:
        """How a linear is stored at so many bits."""
        return Format(**{key: getattr(self, key) for key in Format.model_fields}).spec(bits)

    def embedding_spec(self) -> QuantSpec:
        """How the embedding and the head are stored. They have no salient channels and take inputs as they are."""
        how = Format(**{key: getattr(self, key) for key in Format.model_fields})
        return how.model_copy(update={"salient": 0, "activation_bits": 16}).spec(self.embedding_bits)

    def formats(self) -> tuple[QuantSpec, ...]:
        """How a joint search may store a linear: every bits, with every group size and number of salient channels, each
        as the target holds it."""
        found: dict[QuantSpec, None] = {}
        for group_size in (self.group_size, *self.group_sizes):
            for salient in (self.salient, *self.salients):
                like = self.model_copy(update={"group_size": group_size, "salient": salient})
                found |= {like.spec(bits): None for bits in self.bits}
        return held(self.target, found)

    def rounds(self) -> Rounding:
        fields = {key: getattr(self, key) for key in Rounding.model_fields if key != "method"}
        if not self.propagation:
            fields["dampings"] = ()
        if not (self.propagation or self.layer_steps or self.network_steps):
            fields["held_out"] = Rounding().held_out  # nothing is held out, so nothing may depend on it
        return Rounding(method=self.rounding, **fields)

    def recovery(self, hidden_size: int) -> Recovery:
        fields = {key: getattr(self, key) for key in Recovery.model_fields}
        return Recovery(**{**fields, "learning_rate": self.learning_rate or 1 / hidden_size})

    def but(self, changes: dict[str, Any]) -> "Recipe":
        """The same recipe with some fields changed; its name says which."""
        if not changes:
            return self
        named = ",".join(f"{k}={_plain(v)}" for k, v in changes.items())
        name = f"{self.name[:-1]},{named}]" if self.name.endswith("]") else f"{self.name}[{named}]"
        return parse({**self.model_dump(), **changes, "name": name}, origin=f"recipe {self.name!r}")


def _plain(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def parse(fields: Any, *, origin: str) -> Recipe:
    if not isinstance(fields, dict):
        raise RecipeError(f"{origin} holds no mapping of keys to values.")
    unknown = [key for key in fields if key not in Recipe.model_fields]
    if unknown:
        raise RecipeError(
            f"{origin} has unknown key(s): {listed(unknown)}. Accepted: {', '.join(sorted(Recipe.model_fields))}."
        )
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        said = f"{place}: {first['msg']} (found {first['input']!r})" if place else first["msg"]
        raise RecipeError(f"{origin}: {said}.") from None


def shipped() -> list[str]:
    files = resources.files("qpruner") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in files.iterdir() if f.name.endswith(".yaml"))


def load(text: str) -> Recipe:
    """A recipe by name or file, with changes if wanted: `qpruner`, `my.yaml`, `qpruner[allocation=uniform,steps=9]`."""
    match = re.fullmatch(r"([^\[\]]+)(?:\[(.*)\])?", text.strip())
    if not match:
        raise RecipeError(
            f"{text!r} is no recipe. Accepted: NAME, FILE.yaml, or either with changes: NAME[key=value,key=value]."
        )
    name, changes = match[1], match[2] or ""
    if name in shipped():
        source = (resources.files("qpruner") / "recipes" / f"{name}.yaml").read_text()
    elif Path(name).is_file():
        source = Path(name).read_text()
    else:
        raise RecipeError(f"there is no recipe {name!r}. Accepted: {', '.join(shipped())}, or the path of a YAML file.")
    try:
        fields = yaml.safe_load(source)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {name!r} is not YAML: {error}") from None
    if isinstance(fields, dict):
        fields = {"name": Path(name).stem, **fields}
    return parse(fields, origin=f"recipe {name!r}").but(changes_of(changes))


def split_recipes(texts: Sequence[str]) -> list[str]:
    """Recipes from one or several arguments: apart at spaces, and at commas outside brackets."""
    one = r"[^\s,\[]+(?:\[(?:[^\[\]]|\[[^\]]*\])*\])?"  # a name, and changes in brackets that may hold lists
    return [name for text in texts for name in re.findall(one, text)]


def changes_of(text: str) -> dict[str, Any]:
    """`key=value,key=value`, each value read as YAML; commas inside brackets belong to the value."""
    changes = {}
    for item in filter(None, re.split(r",(?![^\[{(]*[\])}])", text)):
        key, equals, value = item.partition("=")
        if not equals:
            raise RecipeError(f"{item!r} is no change of a recipe. Accepted: key=value.")
        changes[key.strip()] = yaml.safe_load(value)
    return changes
