"""Bytes on disk, exactly, from names, shapes and a plan: no tensor is touched.

A tensor is described as `(dtype, shape)`, with the dtype names of safetensors (BF16, F16, F32, U8, I8, ...), so that
the header of a file, a model on the meta device and a plan's result all read alike.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from qpruner.errors import PlanError, listed
from qpruner.model.check import check_embeddings, check_fused, check_salient
from qpruner.model.embeddings import embedding_shapes
from qpruner.model.graph import Graph, LinearSite, Stack
from qpruner.model.packed.storage import stored_parts
from qpruner.model.surgery import remaining, remaining_slices
from qpruner.plan import Plan, QuantSpec

TensorSpec = tuple[str, tuple[int, ...]]

# Bytes of one element, in the order in which safetensors lays out a file: it sorts by dtype, then by name.
ITEMSIZE = {
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
    "F32": 4,
    "U32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "U16": 2,
    "I16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
ORDER = {dtype: i for i, dtype in enumerate(ITEMSIZE)}
TORCH_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
WIDE = ("F32", "F64")
FILE_METADATA = {"format": "pt"}


@dataclass(frozen=True)
class StoredSize:
    """Bytes of the tensor files of an artifact.

    linears: weights of the decoder layers' linears and experts, codes and scales.
    embeddings: matrices outside the decoder layers.
    other: norms, biases, buffers. adapters: factors stored beside the base. headers: what the files spend on names.
    """

    linears: int
    embeddings: int
    other: int
    adapters: int
    headers: int

    @property
    def total(self) -> int:
        return self.linears + self.embeddings + self.other + self.adapters + self.headers

    def parts(self) -> dict[str, int]:
        return asdict(self)


def named_tensors(model: nn.Module) -> dict[str, TensorSpec]:
    """What a model stores, every tensor once, also on the meta device.

    Of tied tensors the one that transformers stores is named (`model.embed_tokens`, not `lm_head`), or the first.
    """
    state = model.state_dict(keep_vars=True)
    tied = getattr(model, "all_tied_weights_keys", {})
    seen, unique = set(), {}
    for name, tensor in state.items():
        if id(tensor) in seen or tied.get(name) in state:
            continue
        seen.add(id(tensor))
        unique[name] = (TORCH_NAMES[tensor.dtype], tuple(tensor.shape))
    return unique


def parameter_count(tensors: Mapping[str, TensorSpec]) -> int:
    return sum(math.prod(shape) for _, shape in tensors.values())


def tensor_bytes(tensor: TensorSpec) -> int:
    dtype, shape = tensor
    return ITEMSIZE[dtype] * math.prod(shape)


def linear_bytes(d_out: int, d_in: int, spec: QuantSpec, dense_itemsize: int = 2) -> int:
    """Bytes of one linear's weight, codes and scales, without its bias and its share of the header."""
    return sum(
        map(tensor_bytes, weight_tensors(d_out, d_in, spec, {2: "BF16", 4: "F32", 8: "F64"}[dense_itemsize]).values())
    )


def weight_tensors(d_out: int, d_in: int, spec: QuantSpec, dense_dtype: str) -> dict[str, TensorSpec]:
    """Attribute -> tensor, for the weight of one linear as stored."""
    if spec.bits == 16:
        return {"weight": (dense_dtype, (d_out, d_in))}
    return stored_parts(d_out, d_in, spec)


def kept_shapes(graph: Graph, kept: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of every linear, and of every expert of a stack, after the cuts."""
    shapes = {name: (site.d_out, site.d_in) for name, site in (graph.linears | graph.stacks).items()}
    for name, (rows, columns) in remaining(graph, kept).items():
        n = graph.stacks[name].n_experts if name in graph.stacks else 1
        shapes[name] = (len(rows) // n, len(columns) // n)
    return shapes


def stored_tensors(
    tensors: Mapping[str, TensorSpec], graph: Graph, plan: Plan, dtype: str = "BF16"
) -> dict[str, TensorSpec]:
    """The tensors of model.safetensors once the plan is applied to a model that stores `tensors`.

    dtype: what tensors of 32 and 64-bit floats are stored in; those of 16 bits keep theirs.
    """
    check_names(graph, plan)
    stored = {name: (dtype if d in WIDE else d, shape) for name, (d, shape) in tensors.items()}
    shapes = kept_shapes(graph, plan.kept)
    origin = f"plan for {plan.model_name!r}"
    check_fused(plan.specs, graph, origin=origin)
    check_salient(plan.specs, shapes, origin=origin)
    for name, site in graph.linears.items():
        (d_out, d_in), spec = shapes[name], plan.specs[name]
        weight, bias = f"{name}.weight", f"{name}.bias"
        check_shape(tensors, weight, stored_shape(site, site.d_out, site.d_in))
        if spec.bits == 16:
            stored[weight] = (stored[weight][0], stored_shape(site, d_out, d_in))
        else:
            del stored[weight]
            stored |= {f"{name}.{part}": t for part, t in weight_tensors(d_out, d_in, spec, dtype).items()}
        if bias in stored:
            stored[bias] = (stored[bias][0], (d_out,))
        elif name in plan.added_biases:
            stored[bias] = (dtype, (d_out,))
    for name, stack in graph.stacks.items():
        d_out, d_in = shapes[name]
        check_shape(tensors, name, stored_shape(stack, stack.d_out, stack.d_in))
        stored[name] = (stored[name][0], stored_shape(stack, d_out, d_in))
        if stack.bias is not None:
            stored[stack.bias] = (stored[stack.bias][0], (stack.n_experts, d_out))
    for name, slices in remaining_slices(graph, plan.kept).items():
        if name in stored:  # of tied tensors one is; tables that the model makes itself are not
            d, shape = stored[name]
            for dim, stay in slices:
                shape = (*shape[:dim], len(stay), *shape[dim + 1 :])
            stored[name] = (d, shape)
    matrices = embedding_shapes(graph, plan.kept)
    for name, spec in plan.packed_embeddings.items():
        site, weight = graph.embeddings[name], f"{name}.weight"
        check_shape(tensors, weight, (site.n_rows, site.width))
        del stored[weight]
        stored |= {f"{name}.{part}": t for part, t in weight_tensors(*matrices[name], spec, dtype).items()}
    return stored


def stored_shape(site: LinearSite | Stack, d_out: int, d_in: int) -> tuple[int, ...]:
    """Of the weight of a linear or of a stack, as the model stores it."""
    matrix = (d_in, d_out) if site.transposed else (d_out, d_in)
    return (site.n_experts, *matrix) if isinstance(site, Stack) else matrix


def check_shape(tensors: Mapping[str, TensorSpec], name: str, expected: tuple[int, ...]) -> None:
    found = tensors[name][1] if name in tensors else "no tensor"
    if found != expected:
        raise PlanError(f"{name!r} is {found}, not {expected}: the graph was made for another model")


def check_names(graph: Graph, plan: Plan) -> None:
    for what, planned, known in (
        ("group", plan.kept, graph.groups),
        ("linear", plan.specs, graph.linears),
        ("linear", plan.adapter_ranks, graph.linears),
        ("linear", plan.added_biases, graph.linears),
    ):
        if strangers := sorted(set(planned) - set(known)):
            raise PlanError(
                f"plan for {plan.model_name!r} names {len(strangers)} {what}(s) the model does not have: "
                f"{listed(strangers)}. Was it made for another model?"
            )
    check_embeddings(plan.embeddings, graph, origin=f"plan for {plan.model_name!r}")
    for what, planned, known in (("group", plan.kept, graph.groups), ("linear", plan.specs, graph.linears)):
        if missing := sorted(set(known) - set(planned)):
            raise PlanError(f"plan for {plan.model_name!r} does not decide {len(missing)} {what}(s): {listed(missing)}")


def adapter_tensors(graph: Graph, plan: Plan, dtype: str = "BF16") -> dict[str, TensorSpec]:
    """The tensors of adapter_model.safetensors, under PEFT's names; none where adapters are merged."""
    if plan.adapters == "merged":
        return {}
    check_names(graph, plan)
    return factor_tensors(kept_shapes(graph, plan.kept), plan.adapter_ranks, dtype)


def factor_tensors(
    shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], dtype: str = "BF16"
) -> dict[str, TensorSpec]:
    """The factors of adapters beside linears of (d_out, d_in), under PEFT's names."""
    tensors = {}
    for name, rank in ranks.items():
        d_out, d_in = shapes[name]
        tensors[f"base_model.model.{name}.lora_A.weight"] = (dtype, (rank, d_in))
        tensors[f"base_model.model.{name}.lora_B.weight"] = (dtype, (d_out, rank))
    return tensors


def safetensors_size(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = FILE_METADATA) -> int:
    """Bytes of the file that safetensors writes: 8 for the header's length, the header, the data."""
    return header_bytes(tensors, metadata) + sum(map(tensor_bytes, tensors.values()))


def header_bytes(tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = FILE_METADATA) -> int:
    return len(safetensors_header(tensors, metadata)[0])


def safetensors_header(
    tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = FILE_METADATA
) -> tuple[bytes, dict[str, int]]:
    """What safetensors writes before the data, and where behind it each tensor starts: by dtype, then by name."""
    header = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset, starts = 0, {}
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (ORDER[item[1][0]], item[0])):
        starts[name], end = offset, offset + tensor_bytes((dtype, shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, starts


def predict_size(tensors: Mapping[str, TensorSpec], graph: Graph, plan: Plan, dtype: str = "BF16") -> StoredSize:
    """Size of the artifact's tensor files: model.safetensors, and adapter_model.safetensors if there are adapters."""
    base, adapters = stored_tensors(tensors, graph, plan, dtype), adapter_tensors(graph, plan, dtype)
    parts = {name: weight_tensors(1, 1 + plan.specs[name].salient, plan.specs[name], dtype) for name in graph.linears}
    weights = {f"{name}.{part}" for name in graph.linears for part in parts[name]} | {*graph.stacks}
    inside = tuple(f"{layer}." for layer in graph.layers)
    sizes = {"linears": 0, "embeddings": 0, "other": 0}
    for name, tensor in base.items():
        matrix_outside = len(tensor[1]) > 1 and not name.startswith(inside)
        kind = "linears" if name in weights else "embeddings" if matrix_outside else "other"
        sizes[kind] += tensor_bytes(tensor)
    return StoredSize(
        **sizes,
        adapters=sum(map(tensor_bytes, adapters.values())),
        headers=header_bytes(base) + (header_bytes(adapters) if adapters else 0),
    )
