"""The table of what loads where: every cell is what is said before a run, and what the export then does.

A row is a family, widths and a way of storing; a column a target. `said` reads what is said of the plan, `done` has the
model exported and opened by the real loader.
"""

import itertools
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from qpruner import exporting, recipe
from qpruner import shape as shaping
from qpruner.artifact.opened import open_stream
from qpruner.artifact.save import save_artifact
from qpruner.body import body_of, body_of_plan
from qpruner.do.quantize import Candidates
from qpruner.errors import QPrunerError
from qpruner.exporting import fresh
from qpruner.exporting.comparing import logits_of, off
from qpruner.loading import Loads, loading
from qpruner.model import load
from qpruner.model.depth import shortened_config
from qpruner.model.graph import Group
from qpruner.model.surgery import narrow_
from qpruner.plan import DENSE, INT8, NF4, Plan, QuantSpec
from qpruner.testing.tiny import LAYER_COUNTS, SIZES, tiny_config

COMMAND = "pytest tests/test_target_table.py --run-targets --write-targets docs/targets-table.md"
INTRODUCTION = f"""# Every row of the target table

Made by `{COMMAND}`: random models of two layers, cut and stored as
the row says, exported, and opened by the real loader, whose logits agree where it says yes. A cell is red where
`qpruner inspect` says something else before the run than the export then does. Where it says no, the export was refused
before weights were written, with a sentence below. "Whole" keeps every unit, "one width" half of them in each layer,
"uneven" half in one layer and a quarter in the other; int4 is symmetric in groups of 32, int8 in whole rows."""
MOST_OFF = 1e-3
INT4 = QuantSpec(bits=4, grid="integer", group_size=32)


@dataclass(frozen=True)
class Widths:
    """parts: of heads and channels that stay in each layer. experts: of whole experts. layers: that stay; None: all."""

    parts: tuple[float, float] = (1, 1)
    experts: float = 1
    layers: tuple[int, ...] | None = None


class Row(NamedTuple):
    family: str
    widths: str
    storage: str


FAMILIES: dict[str, dict] = {
    "llama": {}, "mistral": dict(sliding_window=None), "qwen2": dict(head_dim=16), "qwen3": {},
    "qwen3, tied": dict(tie_word_embeddings=True), "phi3": {},
    "gemma2": {}, "gemma3_text": {}, "gpt_neox": {}, "gpt2": {}, "opt": {}, "bloom": {}, "mixtral": {},
    "qwen3_moe": {}, "olmo2": {}, "granite": {}, "starcoder2": {}, "stablelm": {}, "cohere": {},
    "falcon": dict(new_decoder_architecture=True, num_kv_heads=4, alibi=False),
}  # fmt: skip
MIXTURES = ("mixtral", "qwen3_moe")
N_LAYERS = 2
# Wide enough for llama.cpp's blocks of 32; what `tiny_config` calls by these sizes gets them.
WIDE = {32: 128, 40: 256, 20: 64, 61: 128, 8: 16}
HEADS = dict.fromkeys("num_attention_heads n_head n_heads num_heads".split(), 8) | {"num_key_value_heads": 4}

# What stays of the units of each layer, by kind; whole experts stay, and all layers, but where they are named.
WIDTHS: dict[str, Widths] = {
    "whole": Widths(),
    "one width": Widths((0.5, 0.5)),
    "uneven": Widths((0.5, 0.25)),
    "three quarters": Widths((0.75, 0.75)),
    "experts gone": Widths(experts=0.5),
    "a layer gone": Widths((0.5, 0.5), layers=(1,)),
}
STORAGE = {"16 bits": (DENSE,), "int4": (INT4,), "NF4": (NF4,), "int4 and int8": (INT4, INT8)}
KINDS = ("kv_group", "channel")


def rows() -> list[Row]:
    """Every family, cut or not, in every storage, and what is special to one."""
    cut = itertools.product(FAMILIES, ("one width", "uneven"), STORAGE)
    found = [*(Row(family, "whole", "int4") for family in FAMILIES), *itertools.starmap(Row, cut)]
    found.sort(key=lambda row: list(FAMILIES).index(row.family))
    found += [Row(family, "three quarters", "int4") for family in ("llama", "qwen3", "gpt_neox")]
    found += [Row(family, "experts gone", storage) for family in MIXTURES for storage in ("16 bits", "int4")]
    return [*found, Row("llama", "a layer gone", "int4")]


def config_of(family: str) -> PreTrainedConfig:
    wide = {name: WIDE[size] for name, size in SIZES.items() if size in WIDE and size is not True}
    wide |= HEADS | dict.fromkeys(LAYER_COUNTS.split(), N_LAYERS)
    model_type = family.partition(",")[0]
    small = tiny_config(model_type)
    known = small.to_dict()
    fields = {name: value for name, value in wide.items() if name in known}
    if kinds := known.get("layer_types"):
        fields["layer_types"] = list(itertools.islice(itertools.cycle(dict.fromkeys(kinds)), N_LAYERS))
    return tiny_config(model_type, **(fields | FAMILIES[family]))


def write_model(family: str, folder: Path) -> Path:
    config = config_of(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def kept_of(group: Group, part: float) -> tuple[int, ...]:
    """The last of each block, so that their places change too."""
    size = group.n_units // group.n_blocks
    n = max(1, int(size * part))
    return tuple(b * size + u for b in range(group.n_blocks) for u in range(size - n, size))


def planned(shape: shaping.Shape, row: Row) -> tuple[shaping.Shape, Plan]:
    """The layers that stay, and the plan for them."""
    widths = WIDTHS[row.widths]
    shape = shape.of_layers(widths.layers)
    part = lambda group: widths.parts[group.layer] if group.kind in KINDS else 1
    kept = {
        name: kept_of(group, widths.experts if group.kind == "expert" else part(group))
        for name, group in shape.graph.groups.items()
    }
    dealt = zip(shape.graph.projections, itertools.cycle(STORAGE[row.storage]), strict=False)
    specs = {name: spec for projection, spec in dealt for name in projection.linears}
    plan = shape.plan(recipe.load("qpruner[adapter_rank=0]"), kept, dict.fromkeys(specs, 16), embeddings={})
    return shape, plan.model_copy(update={"specs": specs})


def write_artifact(shape: shaping.Shape, plan: Plan, folder: Path) -> Path:
    model = load.load_model(shape.source)
    if shape.layers is not None:
        model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in shape.layers)
    narrow_(model, shape.graph, plan.kept)
    Candidates(model, shape.graph, plan, adapter_dtype=torch.bfloat16).put_(plan.specs)
    expected = shape.stored(plan)
    save_artifact(folder, model, shape.graph, plan, expected=expected, dtype=torch.bfloat16, source=shape.source)
    return folder


@dataclass(frozen=True)
class Answer:
    """why_not: "" where it loads. how: what a yes comes with, as the column has it."""

    why_not: str = ""
    how: str = ""


@dataclass(frozen=True)
class Cell:
    """said: before the run. done: what the export did; late: it was refused after weights were written."""

    said: Answer
    done: Answer
    late: bool = False

    @property
    def agrees(self) -> bool:
        return bool(self.said.why_not) == bool(self.done.why_not) and self.said.how == self.done.how and not self.late


# --- what is said, by the place it is said of and the command that the column is about -------------------------------


def as_it_is(row: Loads, command: str) -> Answer:
    return Answer("" if row.loads else row.sentence)


def if_named(row: Loads, command: str) -> Answer:
    """By the command that makes it load; one that loads as it is needs none, and is refused."""
    return Answer("" if row.command == command else row.sentence)


def stock_or_named(row: Loads, command: str) -> Answer:
    return Answer("" if row.loads or row.command == command else row.sentence)


def stock_or_filled(row: Loads, command: str) -> Answer:
    """Where layers are equally wide nothing has to be filled up."""
    return Answer("" if row.loads or row.command in (command, command.removesuffix(" --padded")) else row.sentence)


def in_codes(row: Loads, command: str) -> Answer:
    found = stock_or_named(row, command)
    ways = {"by code in the folder": "by code", "qpruner imported": "with qpruner", "": ""}
    return found if found.why_not else Answer(how=next(how for said, how in ways.items() if said in row.sentence))


def in_architecture(row: Loads, command: str) -> Answer:
    if not row.command.startswith(f"{command} "):
        return Answer(row.sentence)
    return Answer(how=re.search("architecture '(.*)'", row.sentence)[1])


@dataclass(frozen=True)
class Target:
    """name: the column. place: of `loading`. said: what its row says of this.

    to, options: of the export; none for the artifact as it is, opened with qpruner imported.
    """

    name: str
    place: str
    said: Callable[[Loads, str], Answer]
    to: str = ""
    options: tuple[str, ...] = ()


TARGETS = (
    Target("transformers with qpruner", "transformers with qpruner", as_it_is),
    Target("`--to hf`", "transformers alone", stock_or_named, "hf"),
    Target("`--to hf --padded`", "transformers alone", stock_or_filled, "hf", ("padded",)),
    Target("`--to hf --with-code`", "transformers with remote code", if_named, "hf", ("with_code",)),
    Target("`--to compressed-tensors`", "transformers with compressed-tensors", in_codes, "compressed-tensors"),
    Target("`--to deci`", "vLLM's DeciLM", if_named, "deci"),
    Target("`--to gguf`", "llama.cpp", in_architecture, "gguf"),
)


def said(rows: Sequence[Loads], target: Target) -> Answer:
    """What the sentences and commands of `loading` say of an export."""
    row = next(row for row in rows if row.target == target.place)
    return target.said(row, f"qpruner export OUT {target.name.strip('`')}")


# --- what is done ----------------------------------------------------------------------------------------------------


def done(artifact: Path, target: Target, folder: Path) -> tuple[Answer, bool]:
    """What the export did, and whether a refusal came late."""
    if not target.to:
        return Answer(opened_with_us(artifact)), False
    path = folder / f"{target.to}-{'-'.join(target.options)}"
    try:
        made = exporting.export(artifact, target.to, path, **dict.fromkeys(target.options, True))
    except QPrunerError as error:
        return Answer(str(error)), "Nothing was written" in str(error)  # what is said where a file had been written
    assert made.loaded is not None, "the real loader was not asked"
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if target.to == "gguf":
        return Answer(how=made.written.architecture), False
    if target.to == "compressed-tensors":
        return Answer(how="by code" if made.written.code else "with qpruner" if made.written.own else ""), False
    return Answer(), False


def opened_with_us(artifact: Path) -> str:
    source = load.inspect_source(artifact)
    ids = torch.randint(source.original.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
    try:
        answer = fresh.ask(artifact, ids[0].tolist(), own=True)
    except fresh.Refused as error:
        return str(error)
    found = off(torch.from_numpy(answer.logits["float32"].copy()), logits_of(open_stream(source), ids))
    return "" if found.relative < MOST_OFF else f"transformers with qpruner computes something else ({found})"


def cells(row: Row, folder: Path, targets: Sequence[Target] = TARGETS) -> dict[str, Cell]:
    """By target. folder: holds models that rows share."""
    model = folder / row.family
    if not model.is_dir():
        write_model(row.family, model)
    shape = shaping.shape_of(load.inspect_source(model))
    shape, plan = planned(shape, row)
    config = shortened_config(shape.source.config, shape.layers)
    before = loading(body_of_plan(shape.source, config, shape.graph, plan), "OUT")
    artifact = write_artifact(shape, plan, folder / "MODEL")
    try:
        if row.storage == "int4":  # once for all widths, since it takes as long as an export
            after = loading(body_of(load.inspect_source(artifact)), "OUT")
            assert before == after, "of the artifact is said what was said of its plan"
        return {target.name: Cell(said(before, target), *done(artifact, target, folder)) for target in targets}
    finally:
        shutil.rmtree(artifact)


# --- the table -------------------------------------------------------------------------------------------------------


def markdown(found: Mapping[Row, Mapping[str, Cell]]) -> str:
    """A row for each, a column for each target; below, what refusals say."""
    sentences: dict[str, int] = {}

    def text(cell: Cell) -> str:
        if not cell.done.why_not:
            return f"yes, {cell.done.how}" if cell.done.how else "yes"
        return f"no [{sentences.setdefault(cell.done.why_not, len(sentences) + 1)}]"

    head = ("family", "widths", "storage", *(target.name for target in TARGETS))
    body = [(*row, *(text(one[target.name]) for target in TARGETS)) for row, one in found.items()]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]
    notes = [f"{number}. {sentence}" for sentence, number in sentences.items()]
    every = [cell for one in found.values() for cell in one.values()]
    yes = sum(not cell.done.why_not for cell in every)
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "compressed-tensors", "xllamacpp"))
    counted = f"{len(found)} rows, {len(every)} cells: {yes} load, {len(every) - yes} are refused. With {versions}."
    return "\n".join([INTRODUCTION, "", counted, "", *lines, "", "## What refusals say", "", *notes, ""])
