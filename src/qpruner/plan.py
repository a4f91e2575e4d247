"""The values that pass between deciding and doing. No torch, no tensors; everything reads and writes as JSON.

Budget    a limit, with its unit
QuantSpec how one linear layer is stored
Plan      everything that will be done to a model
"""

import json
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qpruner.errors import BudgetError, PlanError

UNITS_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class Value(BaseModel):
    """Frozen, compared by content, and strict: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Budget(Value):
    """A limit on the stored size: `50%` of the 16-bit bytes, `3.5GiB`, or `4.5bpw` (bits per original parameter)."""

    amount: float = Field(gt=0)
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Budget":
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z%]+)\s*", text)
        accepted = ["%", "bpw", *UNITS_BYTES]
        unit = match and next((u for u in accepted if u.lower() == match[2].lower()), None)
        if not unit or float(match[1]) <= 0:
            raise BudgetError(
                f"the budget {text!r} cannot be read. Accepted: a percentage of the 16-bit size (50%), "
                f"a size (3.5GiB; {', '.join(UNITS_BYTES)}), or bits per original parameter (4.5bpw)."
            )
        return cls(amount=float(match[1]), unit=unit)

    def to_bytes(self, *, parameters: int) -> int:
        """The limit in whole bytes, for a model of so many parameters (tied tensors counted once)."""
        if self.unit == "%":
            return int(2 * parameters * self.amount / 100)
        if self.unit == "bpw":
            return int(parameters * self.amount / 8)
        return int(self.amount * UNITS_BYTES[self.unit])

    def __str__(self) -> str:
        return f"{self.amount:g}{self.unit}"


GRIDS: dict[str, tuple[int, ...]] = {
    "integer": (2, 3, 4, 5, 6, 8), "normal-float": (2, 3, 4), "ternary": (2,), "binary": (1,), "none": (16,),
}  # fmt: skip


class QuantSpec(Value):
    """How one linear layer is stored and what its inputs are rounded to.

    bits: per code; 16 means unquantized. Ternary codes are of 2 bits and stored five to a byte, 1.6 bits each.
    grid: the code book. group_size: weights that share one scale, counted along the input dimension; None means a whole
        row.
    symmetric: False adds to each group an integer zero point of `bits` bits; on the integer grid only.
    scale_bits: 16 for float16. With fewer, scales are unsigned codes times one float16 step per row.
    salient: input channels that are kept on an integer grid of `salient_bits` bits with one scale per row.
    activation_bits: inputs are rounded to so many, symmetric, one scale for each token; 16 leaves them alone. Those of
        salient channels have scales of their own, and `salient_bits` if that is more.
    """

    bits: Literal[1, 2, 3, 4, 5, 6, 8, 16]
    grid: Literal["normal-float", "integer", "ternary", "binary", "none"]
    group_size: int | None = None
    symmetric: bool = True
    scale_bits: Literal[4, 6, 8, 16] = 16
    salient: int = Field(default=0, ge=0)
    salient_bits: Literal[4, 8] = 8
    activation_bits: Literal[4, 8, 16] = 16

    @model_validator(mode="after")
    def _exists(self) -> "QuantSpec":
        if self.bits not in GRIDS[self.grid]:
            raise ValueError(
                f"there is no {self.bits}-bit {self.grid} grid; {self.grid} has {', '.join(map(str, GRIDS[self.grid]))}"
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size is {self.group_size}; it counts the weights that share a scale, 1 or more")
        if not self.symmetric and self.grid != "integer":
            raise ValueError(f"the {self.grid} grid has no zero points; symmetric=False goes with the integer grid")
        if self.salient and self.salient_bits <= self.bits:
            raise ValueError(f"salient channels have {self.salient_bits} bits, not above the {self.bits} of the others")
        if self.grid == "none" and self != QuantSpec.model_construct(bits=16, grid="none"):
            raise ValueError("a weight of 16 bits has no groups, scales, salient channels or rounded inputs")
        return self

    @property
    def rest(self) -> "QuantSpec":
        """Of the channels that are not salient."""
        return self.model_copy(update={"salient": 0, "salient_bits": 8})

    @property
    def high(self) -> "QuantSpec":
        """Of the salient channels."""
        rounded = 16 if self.activation_bits == 16 else max(self.activation_bits, self.salient_bits)
        return QuantSpec(bits=self.salient_bits, grid="integer", activation_bits=rounded)

    def __str__(self) -> str:
        if self.grid == "none":
            return "16 bits"
        words = [{"integer": f"int{self.bits}", "normal-float": f"nf{self.bits}"}.get(self.grid, self.grid)]
        words += [f"g{self.group_size}"] * (self.group_size is not None)
        words += ["asymmetric"] * (not self.symmetric)
        words += [f"scales of {self.scale_bits} bits"] * (self.scale_bits < 16)
        words += [f"+ {self.salient} channels int{self.salient_bits}"] * (self.salient > 0)
        words += [f"inputs int{self.activation_bits}"] * (self.activation_bits < 16)
        return " ".join(words)


class Format(Value):
    """How weights are stored at any bits: the keys of a recipe that say so; field meanings are those of `QuantSpec`.

    grid: None for the usual one: normal-float at 4 bits, binary at 1, integer otherwise. group_size: None for the usual
        one: whole rows at 8 bits, 64 otherwise; 0 for whole rows.
    """

    grid: Literal["integer", "normal-float", "ternary", "binary"] | None = None
    group_size: int | None = Field(default=None, ge=0)
    symmetric: bool = True
    scale_bits: Literal[4, 6, 8, 16] = 16
    salient: int = Field(default=0, ge=0)
    salient_bits: Literal[4, 8] = 8
    activation_bits: Literal[4, 8, 16] = 16

    def spec(self, bits: int) -> QuantSpec:
        """How a linear is stored at so many bits. A grid that has no such width gives way to the usual one."""
        if bits == 16:
            return DENSE
        usual = {1: "binary", 4: "normal-float"}.get(bits, "integer")
        grid = self.grid if self.grid is not None and bits in GRIDS[self.grid] else usual
        group_size = (None if bits == 8 else 64) if self.group_size is None else self.group_size or None
        salient = self.salient if self.salient_bits > bits else 0
        return QuantSpec(
            bits=bits, grid=grid, group_size=group_size, symmetric=self.symmetric or grid != "integer",
            scale_bits=self.scale_bits, salient=salient, salient_bits=self.salient_bits if salient else 8,
            activation_bits=self.activation_bits,
        )  # fmt: skip


DENSE = QuantSpec(bits=16, grid="none")
NF4 = QuantSpec(bits=4, grid="normal-float", group_size=64)
INT8 = QuantSpec(bits=8, grid="integer")


class Recovery(Value):
    """How adapters are trained after the cuts. Field meanings are those of the recipe's keys of the same names."""

    loss: Literal["distillation", "next-token"] = "distillation"
    teacher_top: int = 64
    block_weight: float = 0.0
    mask_prompts: bool = True
    adapter_alpha: float = 16.0
    adapter_dropout: float = 0.05
    loftq_iterations: int = 5
    loftq_weighting: Literal["none", "gram"] = "none"
    steps: int = 100
    batch_size: int = 8
    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    learning_rate: float = 1e-4
    warmup_steps: int = 10
    validation_windows: int = 16
    validations: int = 10


class Reconstruction(Value):
    """How linears that read pruned units are refitted. Field meanings are those of the recipe's keys of the same names.

    method: `bias` moves biases only; `least-squares` moves weights too.
    """

    method: Literal["bias", "least-squares"]
    dampings: tuple[float, ...]
    held_out: float


class Rounding(Value):
    """How weights find their codes. Field meanings are those of the recipe's keys of the same names.

    method: `nearest` looks at weights alone; `gptq` makes up for each rounding in the weights that are not rounded yet.
    """

    method: Literal["nearest", "gptq"] = "nearest"
    ranges: Literal["absmax", "mse", "half-quadratic"] = "absmax"
    propagation: bool = False
    dampings: tuple[float, ...] = ()
    held_out: float = 0.25
    transforms: tuple[Literal["rotate", "rescale"], ...] = ()
    layer_steps: int = 0
    network_steps: int = 0
    tuning_batch: int = 8

    @property
    def needs_text(self) -> bool:
        """Whether calibration text goes through the model for it."""
        return self.method != "nearest" or "rescale" in self.transforms or bool(self.layer_steps or self.network_steps)

    @property
    def needs_original(self) -> bool:
        """Whether the original walks along, layer by layer."""
        return self.propagation or self.layer_steps > 0


class Selection(Value):
    """A point of a joint search: all that it leaves open, decided. Units of a group go in the order of their scores.

    layers: decoder layers of the original that stay, ascending; names are those of the original.
    kept: how many units stay, of groups that may lose some. specs: of fused linears and of embeddings, by name.
    """

    layers: tuple[int, ...]
    kept: dict[str, int]
    specs: dict[str, QuantSpec]


class Plan(Value):
    """Everything that will be done to a model, complete: it decides every group and every linear of its decoder layers.

    model_digest: of the configuration and tensor shapes of the model it is for.
    layers: decoder layers of the original that stay, ascending; None for all. They are numbered anew, and everything
        else in the plan is named in the model of these layers.
    kept: indices of the units that stay, ascending, for every group of the graph. A kv group that goes takes its query
        heads with it, whatever is said of those.
    reconstruction: of the linears that lost inputs, right after the cuts; None for slicing alone.
    added_biases: linears that get a bias they did not have.
    specs: for every linear inside the decoder layers.
    embeddings: matrices outside the decoder layers that are stored in codes, by the path of the module that stores
        them: the embedding (with a tied head in one), a head of its own. One that is not named keeps its 16 bits.
    rounding: how weights find their codes.
    adapter_ranks: rank of the adapter of each linear that gets one; empty for no adapters.
    adapters: whether adapters are stored beside the base or merged into it.
    """

    format_version: Literal[1] = 1
    model_name: str
    model_digest: str
    layers: tuple[int, ...] | None = None
    kept: dict[str, tuple[int, ...]]
    reconstruction: Reconstruction | None = None
    added_biases: tuple[str, ...] = ()
    specs: dict[str, QuantSpec]
    embeddings: dict[str, QuantSpec] = {}
    rounding: Rounding = Rounding()
    adapter_ranks: dict[str, int] = {}
    adapters: Literal["beside", "merged"] = "beside"
    recovery: Recovery = Recovery()
    seed: int = 0

    @property
    def packed_embeddings(self) -> dict[str, QuantSpec]:
        """Those of `embeddings` that are stored in codes indeed."""
        return {name: spec for name, spec in self.embeddings.items() if spec.bits < 16}

    @property
    def weighs_adapters(self) -> bool:
        """Whether adapters start from errors that are counted as the inputs make them count."""
        if not (self.adapter_ranks and self.recovery.loftq_iterations and self.quantizes):
            return False
        return self.recovery.loftq_weighting == "gram" or self.rounding.method == "gptq"

    @property
    def quantizes(self) -> bool:
        """Whether any linear has fewer than 16 bits."""
        return any(spec.bits < 16 for spec in self.specs.values())

    @property
    def rounds_with_text(self) -> bool:
        """Whether calibration text goes through the model for the codes, or for what adapters start from."""
        return self.quantizes and (self.rounding.needs_text or self.weighs_adapters)

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, *, origin: str = "plan") -> "Plan":
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise PlanError(
                f"{origin} is not a plan: {first['msg']} at {place!r} ({error.error_count()} in all)."
            ) from None

    @classmethod
    def read(cls, path: Path) -> "Plan":
        if not path.is_file():
            raise PlanError(f"there is no plan at {path}")
        return cls.from_json(path.read_text(), origin=str(path))
