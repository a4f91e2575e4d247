"""What decides where a model loads, without its weights: of a model, of an artifact in its folder, of a plan.

widths of layers, how linears are stored, and whether the original's class holds it as it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from transformers import PreTrainedConfig

from qpruner.artifact.config import MODEL_TYPE
from qpruner.artifact.dense import Dense
from qpruner.artifact.loader import PLAN
from qpruner.artifact.narrowed import narrowed_of
from qpruner.artifact.stock import stock_config
from qpruner.artifact.widths import field_of, widest
from qpruner.errors import ModelError, listed
from qpruner.fields import HEADS
from qpruner.model import cost
from qpruner.model.discover import discover
from qpruner.model.graph import Graph
from qpruner.model.load import Source, quiet
from qpruner.model.skeleton import build_skeleton
from qpruner.model.surgery import narrow_
from qpruner.plan import DENSE, Plan, QuantSpec
from qpruner.targets import LayerWidths, Target, refused, rules_of


@dataclass(frozen=True)
class Body:
    """What decides where a model loads, without weights.

    config: of the original class, of the layers that stay. model: what is left of it, plain, on the meta device.
    plan: None for a model that nothing was done to. stored: name -> (dtype, shape) of its 16-bit form.
    code: what trust_remote_code would run: "" for nothing, "its own", or "ours" beside the weights.
    """

    name: str
    config: PreTrainedConfig
    model: nn.Module
    graph: Graph
    plan: Plan | None
    code: str = ""

    @property
    def kept(self) -> Mapping[str, Sequence[int]]:
        return self.plan.kept if self.plan else {name: range(g.n_units) for name, g in self.graph.groups.items()}

    @property
    def text(self) -> PreTrainedConfig:
        return self.config.get_text_config(decoder=True)

    @cached_property
    def original(self) -> nn.Module:
        """Of the original class, before units went; on the meta device."""
        return build_skeleton(self.config, trust_remote_code=self.code == "its own")

    @cached_property
    def widths(self) -> tuple[LayerWidths, ...]:
        return layer_widths(self.text, self.graph, self.kept)

    @property
    def specs(self) -> dict[str, tuple[QuantSpec, int]]:
        """Linear -> how it is stored, and its inputs that stay."""
        shapes = cost.kept_shapes(self.graph, self.kept)
        found = self.plan.specs if self.plan else dict.fromkeys(self.graph.linears, DENSE)
        return {name: (found[name], shapes[name][1]) for name in self.graph.linears if name in found}

    @property
    def embeddings(self) -> dict[str, QuantSpec]:
        return self.plan.packed_embeddings if self.plan else {}

    @property
    def adapters_beside(self) -> bool:
        return bool(self.plan and self.plan.adapter_ranks and self.plan.adapters == "beside")

    @property
    def coded(self) -> bool:
        return bool(self.embeddings) or any(spec.bits < 16 for spec, _ in self.specs.values())

    @cached_property
    def as_stock(self) -> PreTrainedConfig | None:
        """Configuration under which the class as it is holds it, once it has 16 bits and adapters are merged."""
        if self.plan is None:
            return self.config
        found = stock_form(self.config, self.graph, self.plan, code=self.code == "its own")
        return found and found[0]

    @property
    def holds_as_stock(self) -> bool:
        return self.as_stock is not None

    @property
    def stock(self) -> bool:
        return self.holds_as_stock and not self.coded and not self.adapters_beside

    def why_not_stock(self) -> str:
        """A clause."""
        odd = next((i for i, layer in enumerate(self.widths) if layer != self.widths[0]), None)
        if odd is not None:
            return f"layer 0 keeps {self.widths[0]}, and layer {odd} {self.widths[odd]}"
        if self.plan and self.plan.added_biases:
            return f"{listed(self.plan.added_biases)} got biases that the class does not have"
        return (
            f"the class of {self.config.model_type!r} does not take {self.widths[0]}, or computes something else then"
        )

    @cached_property
    def why_not_filled(self) -> str:
        """A clause; "" where the class holds it once layers are filled up with zeros."""
        try:
            found = filled_form(self.config, self.graph, self.plan)
        except ModelError as error:
            return str(error).rstrip(".")
        return "" if found else "filled up with zeros it does not either"

    def why_not_in(self, target: Target, specs: Mapping[str, tuple[QuantSpec, int]]) -> str:
        """Sentences; "" where the target's rules hold widths, and these ways of storing."""
        config = self.config.to_dict()
        try:
            rules = rules_of(target, config, tied=bool(config.get("tie_word_embeddings")))
        except ModelError as error:
            return str(error)
        return " ".join(refused(rules, self.widths, specs))

    def why_no_code(self) -> str:
        """A sentence; "" where Python files beside the weights build it."""
        try:
            narrowed_of(self.original, self.model)
        except ModelError as error:
            return str(error)
        return ""


def plain_plan(plan: Plan, kept: Mapping[str, Sequence[int]] | None = None) -> Plan:
    """Of the same widths, or of these, all at 16 bits with adapters merged."""
    change = dict(specs=dict.fromkeys(plan.specs, DENSE), embeddings={}, adapter_ranks={})
    return plan.model_copy(update=change | ({"kept": dict(kept)} if kept is not None else {}))


def stock_form(
    original: PreTrainedConfig,
    graph: Graph,
    plan: Plan,
    *,
    dtype: str = "BF16",
    architecture: str | None = None,
    code: bool = False,
) -> tuple[PreTrainedConfig, dict[str, cost.TensorSpec]] | None:
    """Configuration and tensors under which the class as it is holds the plan's widths; None where it does not."""
    with quiet():
        skeleton = build_skeleton(original, trust_remote_code=code)
        plain = plain_plan(plan)
        stored = cost.stored_tensors(cost.named_tensors(skeleton), graph, plain, dtype)
        words = {"BF16": "bfloat16", "F16": "float16"}[dtype]
        content = original.to_dict() | {"architectures": [architecture or type(skeleton).__name__], "dtype": words}
        unused = {"_name_or_path"} if code else {"_name_or_path", "auto_map"}
        content = {k: v for k, v in content.items() if k not in unused}
        config = stock_config(original, content, graph, plain, stored, trust_remote_code=code)
    return config and (config, stored)


def filled_form(
    original: PreTrainedConfig, graph: Graph, plan: Plan, *, dtype: str = "BF16"
) -> tuple[PreTrainedConfig, dict[str, cost.TensorSpec], dict] | None:
    """`stock_form` of the plan with removed units that come back as zeros, as few as the class takes, and the units
    that every group then has.

    Raises:
        ModelError: experts went; there is no padding for them.
    """
    everything = {
        name: plan.kept[name] if group.kind in ("residual", "expert") else tuple(range(group.n_units))
        for name, group in graph.groups.items()
    }
    for kept in (widest(graph, plan.kept), everything):
        if found := stock_form(original, graph, plan.model_copy(update={"kept": kept}), dtype=dtype):
            return *found, kept
    return None


def layer_widths(text: PreTrainedConfig, graph: Graph, kept: Mapping[str, Sequence[int]]) -> tuple[LayerWidths, ...]:
    """Of every decoder layer; what has no units that could go is as the configuration says."""
    heads = next((v for name in HEADS if isinstance(v := field_of(text, name), int)), 1)
    kv_heads, channels = field_of(text, "num_key_value_heads"), field_of(text, "intermediate_size")
    stated = LayerWidths(heads, kv_heads or heads, channels or 1)
    of_heads = [g for g in graph.groups.values() if g.kind in ("kv_group", "query_head")]
    divided = {group.layer for group in of_heads if group.n_units > 1}
    found = []
    for index in range(len(graph.layers)):
        count = lambda kind, index=index: [
            (len(kept[name]) // group.n_blocks, group.n_blocks)
            for name, group in graph.groups.items()
            if group.layer == index and group.kind == kind
        ]
        kv = sum(n for n, _ in count("kv_group")) or stated.kv_heads
        by_kv = next((n for n, _ in count("query_head")), None)
        by_kv = by_kv or (1 if count("kv_group") else stated.heads // stated.kv_heads)
        if index not in divided:  # one unit may stand for all heads, and then none of them can go
            kv, by_kv = stated.kv_heads, stated.heads // stated.kv_heads
        found.append(LayerWidths(kv * by_kv, kv, sum(n for n, _ in count("channel")) or stated.channels))
    return tuple(found)


# --- where from ---------------------------------------------------------------------------------------------------


def body_of(source: Source) -> Body:
    """Of a model, or of an artifact in its folder."""
    if source.config.model_type != MODEL_TYPE:
        model = build_skeleton(source.config, trust_remote_code=source.trust_remote_code)
        return Body(source.name, source.config, model, discover(model), None, "its own" if source.code else "")
    dense = Dense(source)
    code = "ours" if hasattr(source.config, "auto_map") else "its own" if source.code else ""
    return Body(source.name, source.original, dense.model, dense.graph, Plan.read(source.folder / PLAN), code)


def body_of_plan(source: Source, config: PreTrainedConfig, graph: Graph, plan: Plan) -> Body:
    """Of what a plan would make of a model. config: of the layers that stay."""
    model = build_skeleton(config, trust_remote_code=source.trust_remote_code)
    narrow_(model, graph, plan.kept)
    return Body(source.name, config, model, graph, plan, "its own" if source.code else "")
