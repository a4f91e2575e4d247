"""The proof that an architecture is served, on a tiny random model of it.

Removing units equals zeroing them; what is left has the predicted tensors; generation with a cache agrees with
generation without; the saved artifact gives the same logits in a process that has seen nothing of this.
"""

import copy
import io
import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qpruner.artifact.save import save_artifact
from qpruner.decide.scores import SCORERS
from qpruner.errors import QPrunerError
from qpruner.model import cost
from qpruner.model.discover import discover
from qpruner.model.graph import Graph
from qpruner.model.load import Source, quiet
from qpruner.model.scratch import Scratch
from qpruner.model.skeleton import build_skeleton
from qpruner.model.surgery import narrow_
from qpruner.model.tensors import Cut
from qpruner.model.whole import Whole, opened
from qpruner.plan import DENSE, Plan
from qpruner.testing.tiny import Held, tiny_config, tiny_model

N_NEW = 4  # tokens that are generated
EXACT = 1e-9
ROUNDED = 1e-4  # for a model that rounds to float32 inside: 2**-24, times what depth and recurrences make of it
LARGEST = 10**8  # parameters of a model that is still called tiny
DTYPES = {torch.float64: "F64", torch.float32: "F32"}
ZEROED = ("kv_group", "query_head", "channel")  # kinds whose removal is zeros in the columns of consumers
ARTIFACT, LOGITS = "artifact", "logits.safetensors"


@dataclass(frozen=True)
class Row:
    """What is known of a model type.

    units: kind -> how many in one layer, for every number that occurs: `2`, `40`, `4 x 20` of four experts.
    whole: groups of a layer that are one indivisible unit. notes: what cannot be pruned, in words of `Graph.notes`.
    exchanges: why its layers cannot run one at a time, in words of `Graph.exchanges`; empty where they can.
    reason: why it does not pass. remark: what it passes with reservations about.
    """

    model_type: str
    model_class: str
    passes: bool = False
    units: dict[str, tuple[str, ...]] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    exchanges: tuple[str, ...] = ()
    reason: str = ""
    remark: str = ""

    def to_json(self) -> dict:
        return asdict(self)


class NotServed(Exception):
    """A sentence for the table."""


def check_architecture(model_type: str, folder: Path | None = None, **over) -> Row:
    """The proof for a model type, on a tiny random model of it. Never raises: what goes wrong is the row's reason.

    Args:
        folder: left with an artifact and the logits it has to give, for `check_loading`; None looks for units only.
        over: fields of the configuration, in place of those of `tiny_config`.
    """
    row = Row(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, ""))
    with quiet(), redirect_stdout(io.StringIO()):  # some models print
        return _checked(row, folder, over)


def _checked(row: Row, folder: Path | None, over: dict) -> Row:
    model_type = row.model_type
    try:
        check_decoder(model_type)
        config = tiny_config(model_type, **over)
        check_small(config)
        remark = ""
        if folder is None:
            graph = discover(build_skeleton(config))
            row = described(row, graph)
        else:
            model, remark = running(config)
            graph = discover(model)
            row = described(row, graph)
            remark = "; ".join(filter(None, (remark, prove(model, graph, folder))))
    except (NotServed, QPrunerError) as error:
        return replace(row, reason=str(error))
    except Exception as error:  # whatever a model's own code raises
        return replace(row, reason=f"{type(error).__name__}: {first_line(error)}")
    return replace(row, passes=True, remark=remark)


def described(row: Row, graph: Graph) -> Row:
    units: dict[str, dict[str, None]] = {}
    whole = {}
    for group in graph.groups.values():
        if group.n_units > group.n_blocks:
            size = group.n_units // group.n_blocks
            text = str(size) if group.n_blocks == 1 else f"{group.n_blocks} x {size}"
            units.setdefault(group.kind, {})[text] = None
        else:
            whole[group.name.removeprefix(f"{graph.layers[group.layer]}.")] = None
    if not units.keys() & set(ZEROED):
        raise NotServed(f"nothing can be cut: {graph.notes[0] if graph.notes else 'its layers hold no linear layers'}")
    return replace(
        row,
        units={k: tuple(v) for k, v in units.items()},
        whole=tuple(whole),
        notes=graph.notes,
        exchanges=graph.exchanges,
    )


def check_decoder(model_type: str) -> None:
    of_parts = getattr(CONFIG_MAPPING[model_type], "sub_configs_defaults", None) or {}
    if "text_config" in of_parts:
        text = of_parts["text_config"].model_type
        raise NotServed(f"a model of several parts; its language model, of type {text}, has a row of its own")
    config = CONFIG_MAPPING[model_type]()
    if getattr(config, "is_encoder_decoder", False):
        raise NotServed("an encoder-decoder model")
    text = config.get_text_config(decoder=True)
    parts = [name for name in config.sub_configs if getattr(config, name, None) is not None]
    if text is not config:
        own_row = f"; its language model, of type {text.model_type}, has a row of its own"
        known = text.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        raise NotServed(f"a model of several parts ({', '.join(parts)}){own_row if known else ''}")
    if getattr(config, "vision_config", None) is not None:
        raise NotServed(f"a model with parts for other than text ({', '.join(parts)})")


def check_small(config: PreTrainedConfig) -> None:
    parameters = sum(p.numel() for p in build_skeleton(config).parameters())
    if parameters > LARGEST:
        raise NotServed(f"no small configuration of it is known: this one has {parameters:,} parameters")


def running(config: PreTrainedConfig) -> tuple[PreTrainedModel, str]:
    """A random model that runs, in float64 where its own code can do that, and a remark where it cannot."""
    model = tiny_model(config)
    try:
        logits_of(model), generated(model, use_cache=True)
    except RuntimeError:
        model = tiny_model(config, dtype=torch.float32)
        logits_of(model), generated(model, use_cache=True)
        return model, "in float32: its own code does not run in float64"
    return model, ""


def prove(model: PreTrainedModel, graph: Graph, folder: Path) -> str:
    """Raises NotServed where a law does not hold; returns the reason for a loosened bound."""
    kept = random_kept(graph, seed=0)
    small, reference = copy.deepcopy(model), zeroed(model, graph, kept)
    narrow_(small, graph, kept)
    remark, bound = "", EXACT
    expected, found = logits_of(reference), logits_of(small)
    if model.dtype != torch.float64:
        bound = ROUNDED
    elif distance(found, expected) > EXACT and rounds_inside(model):
        remark, bound = "to float32 precision: it computes parts in float32", ROUNDED
    if (d := distance(found, expected)) > bound:
        raise NotServed(f"removing units is not zeroing them: logits differ by {d:.1g}")
    if distance(expected, logits_of(model)) < 1e-6:
        raise NotServed("removing units changes nothing, so nothing was shown")
    plan = whole_plan(graph, kept)
    predicted = cost.stored_tensors(cost.named_tensors(model), graph, plan, DTYPES[model.dtype])
    if shapes(cost.named_tensors(small)) != shapes(predicted):
        raise NotServed("its tensors after the cuts are not those that were predicted")
    prove_generation(model, small, reference)
    prove_streaming(model, small, graph, kept)
    save(folder, small, graph, plan, model.config, predicted)
    save_file({"logits": logits_of(small), "bound": torch.tensor(bound, dtype=torch.float64)}, folder / LOGITS)
    return remark


def shapes(tensors: Mapping[str, cost.TensorSpec]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (_, shape) in tensors.items()}


def prove_generation(model: PreTrainedModel, small: PreTrainedModel, reference: PreTrainedModel) -> None:
    """With a cache as without; of a model that does not do so itself, as the zeroed one does with its cache."""
    cached = generated(small, use_cache=True)
    if distance(cached, generated(reference, use_cache=True)) > ROUNDED:
        raise NotServed("generation with a cache is not that of the zeroed model")
    if distance(cached, generated(small, use_cache=False)) > ROUNDED:
        if distance(generated(model, use_cache=True), generated(model, use_cache=False)) < ROUNDED:
            raise NotServed("generation with a cache is not that without")


def prove_streaming(model: PreTrainedModel, small: PreTrainedModel, graph: Graph, kept: Mapping) -> None:
    """Cut while it is read and run layer by layer it is the narrowed model; and its scores are those of all at once."""
    ids = token_ids()
    skeleton, scratch = eager(build_skeleton(model.config)), Scratch()
    narrow_(skeleton, graph, kept)
    stream = opened(skeleton, Cut(Held(model), graph, kept), graph, dtype=model.dtype)
    stream.forward(ids, scratch, batch_size=len(ids))
    (found,) = stream.logits(ids, scratch, batch_size=len(ids))
    if (d := distance(found, logits_of(small))) > EXACT:
        raise NotServed(f"layer by layer it gives other logits, by {d:.1g}")
    if not graph.exchanges:
        one, all_ = eager(build_skeleton(model.config)), eager(build_skeleton(model.config))
        ways = opened(one, Held(model), graph, dtype=model.dtype), Whole(all_, Held(model), dtype=model.dtype)
        scores = [SCORERS["vector"](way, graph, ids, torch.Generator(), Scratch(), None) for way in ways]
        for name, expected in scores[1].items():
            if (scores[0][name] - expected).abs().max() > 1e-5 * expected.abs().max():
                raise NotServed(f"layer by layer the scores of {name!r} are others")


def eager(model: nn.Module) -> nn.Module:
    model.config._experts_implementation = "eager"
    return model


def save(
    folder: Path,
    small: PreTrainedModel,
    graph: Graph,
    plan: Plan,
    config: PreTrainedConfig,
    predicted: dict[str, cost.TensorSpec],
) -> None:
    source = Source(config.model_type, folder, config, digest="", parameters=None, tensors={})
    folder.mkdir(parents=True, exist_ok=True)
    save_artifact(folder / ARTIFACT, small, graph, plan, expected=predicted, dtype=small.dtype, source=source)


def check_loading(folders: Sequence[Path]) -> list[str]:
    """What is wrong with each artifact that `check_architecture` left; all are loaded in one fresh process."""
    command = [sys.executable, "-m", "qpruner.testing.proof", *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process that loads artifacts failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def load_fault(folder: Path) -> str:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder / ARTIFACT)
        model.config._experts_implementation = "eager"
        stored = load_file(folder / LOGITS)
        expected, bound = stored["logits"], stored["bound"].item()
        d = distance(logits_of(model), expected)
    except Exception as error:  # of the model's own code or ours: the table says which
        return f"the saved artifact does not load: {type(error).__name__}: {first_line(error)}"
    return f"the loaded artifact gives other logits, by {d:.1g}" if d > bound else ""


def random_kept(graph: Graph, seed: int) -> dict[str, list[int]]:
    """Random units of every group that zeros can stand for: at least one of each block, and not all where possible."""
    rng = random.Random(seed)
    kept = {}
    for name, group in graph.groups.items():
        size = group.n_units // group.n_blocks
        n = rng.randint(1, max(1, size - 1)) if group.kind in ZEROED else size
        blocks = [rng.sample(range(b * size, (b + 1) * size), n) for b in range(group.n_blocks)]
        kept[name] = sorted(unit for block in blocks for unit in block)
    return kept


@torch.no_grad()
def zeroed(model: nn.Module, graph: Graph, kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy with zeros in the consumer columns of the units that are not kept."""
    model = copy.deepcopy(model)
    for group in graph.groups.values():
        gone = torch.ones(group.n_units, dtype=torch.bool)
        gone[list(kept[group.name])] = False
        for name, table in group.consumers.items():
            site = graph.stacks.get(name) or graph.linears[name]
            weight = model.get_parameter(name if name in graph.stacks else f"{name}.weight")
            columns = table[gone].flatten()
            by_column = weight if site.transposed else weight.transpose(-1, -2)
            experts, inner = columns // site.d_in, columns % site.d_in
            by_column = by_column if by_column.dim() == 3 else by_column[None]
            by_column[experts, inner] = 0
    return model


def whole_plan(graph: Graph, kept: Mapping[str, Sequence[int]]) -> Plan:
    return Plan(
        model_name="tiny",
        model_digest="",
        kept={name: tuple(units) for name, units in kept.items()},
        specs=dict.fromkeys(graph.linears, DENSE),
    )


def token_ids() -> Tensor:
    return torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model(token_ids(), use_cache=False).logits


def generated(model: nn.Module, *, use_cache: bool) -> Tensor:
    """Logits of every new token."""
    ids = token_ids()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=N_NEW, do_sample=False, eos_token_id=None,
        pad_token_id=2, use_cache=use_cache, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(out.logits)


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value where that is above one."""
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


class SeesRounding(TorchDispatchMode):
    """Notices tensors of float64 that are converted to less."""

    seen = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64 and out.is_floating_point():
            self.seen |= out.dtype != torch.float64
        return out


def rounds_inside(model: nn.Module) -> bool:
    with SeesRounding() as mode:
        logits_of(model)
    return mode.seen


def first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ")[:200] if lines else "no message"


if __name__ == "__main__":
    with quiet(), redirect_stdout(io.StringIO()):
        faults = [load_fault(Path(folder)) for folder in sys.argv[1:]]
    print(json.dumps(faults))
