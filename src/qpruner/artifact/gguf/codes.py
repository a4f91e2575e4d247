"""Codes of an artifact in those of ggml's types that hold them as they are: nothing is rounded again.

    float16 scales        types with blocks of 32 codes, each with a float16 scale
    float16 scales of ternary and binary groups of 256 and more        TQ1_0
    scales of few bits    K-types: the step of a row is the unit of its blocks, a scale's code that of a part

Zero points go with float16 scales alone, as a minimum that float16 rounds; in K-types a minimum is a product that has
no room in its few bits.
"""

import numpy as np
import torch
from torch import Tensor

from qpruner.errors import ModelError
from qpruner.math import kquants, packing
from qpruner.math.kblocks import Blocks, laid_out
from qpruner.model.packed.linear import PackedLinear
from qpruner.plan import QuantSpec

SMALL_BLOCK = 32

# Blocks of 32 codes with a float16 scale, of which those with zero points have a float16 minimum: bits, symmetric.
SMALL = {(4, True): "Q4_0", (4, False): "Q4_1", (5, True): "Q5_0", (5, False): "Q5_1", (8, True): "Q8_0"}
# K-types: grid, bits -> name, bits that a scale may have, what a code counts there, which code there stands for zero.
LARGE = {
    ("binary", 1): ("Q2_K", 4, 2, 1), ("ternary", 2): ("Q2_K", 4, 1, 1), ("integer", 2): ("Q2_K", 4, 1, 2),
    ("integer", 3): ("Q3_K", 4, 1, 4), ("integer", 4): ("Q4_K", 6, 1, 8), ("integer", 5): ("Q5_K", 6, 1, 16),
    ("integer", 6): ("Q6_K", 6, 1, 32),
}  # fmt: skip


def exact_type(spec: QuantSpec, d_in: int) -> str | None:
    """A type whose blocks hold the same codes and scales."""
    group = spec.group_size or d_in
    whole = lambda block, part: d_in % block == 0 and (group % part == 0 or group >= d_in)
    if spec.salient:
        return None
    if spec.scale_bits < 16:
        name, most, *_ = LARGE.get((spec.grid, spec.bits), (None, 0))
        fits = spec.symmetric and spec.scale_bits <= most and whole(kquants.BLOCK, part_of(name))
        return name if fits else None
    if spec.grid == "integer" and whole(SMALL_BLOCK, SMALL_BLOCK):
        return SMALL.get((spec.bits, spec.symmetric))
    if spec.grid in ("ternary", "binary") and whole(kquants.BLOCK, kquants.BLOCK):
        return "TQ1_0"
    return None


def part_of(name: str) -> int:
    """Weights of a K-type that share a scale."""
    return kquants.BLOCK // kquants.KINDS[name].parts


def bytes_as_coded(layer: PackedLinear) -> np.ndarray:
    """(d_out, bytes) in the type of `exact_type`."""
    if layer.spec.scale_bits < 16:
        return _large(layer).numpy()
    return _ternary(layer) if layer.spec.grid != "integer" else _small(layer).numpy()


def _ternary(layer: PackedLinear) -> np.ndarray:
    """A block of TQ1_0 takes its scale from its largest weight, which is the scale of a ternary or binary group."""
    import gguf

    return gguf.quantize(layer.dequantize(torch.float32).numpy(), gguf.GGMLQuantizationType.TQ1_0)


def _small(layer: PackedLinear) -> Tensor:
    spec, (d_out, d_in) = layer.spec, (layer.out_features, layer.in_features)
    rounded = layer.rounded()
    of_block = torch.arange(0, d_in, SMALL_BLOCK) // (spec.group_size or d_in)
    halves = lambda x: x.half()[:, of_block].unsqueeze(-1).view(torch.uint8)
    codes, parts = rounded.codes.view(d_out, -1, SMALL_BLOCK), [halves(rounded.scales)]
    if rounded.zeros is not None:
        parts.append(halves(-rounded.scales.float() * rounded.zeros))
    if spec.bits == 8:
        parts.append(codes ^ 128)
    else:
        upper = packing.pack((codes >> 4).flatten(0, -2), 1).view(d_out, -1, 4)
        parts += [upper] * (spec.bits == 5)
        parts.append(codes[..., :16] & 15 | codes[..., 16:] << 4)
    return torch.cat(parts, dim=-1).flatten(1)


def _large(layer: PackedLinear) -> Tensor:
    spec, d_in = layer.spec, layer.in_features
    name, _, count, zero = LARGE[spec.grid, spec.bits]
    rounded, per_row = layer.rounded(), d_in // kquants.BLOCK
    of_part = torch.arange(0, d_in, part_of(name)) // (spec.group_size or d_in)
    scales = rounded.scales[:, of_part].to(torch.int8).view(-1, kquants.KINDS[name].parts).T.contiguous()
    codes = (rounded.codes * count).view(-1, kquants.BLOCK).T.contiguous()
    d = rounded.steps.repeat(1, per_row).view(1, -1)
    dmin = d * zero
    if not dmin.isfinite().all():
        raise ModelError(f"scales of {d.max():g} steps are beyond float16 in {name}.")
    minima = (scales, dmin) if kquants.KINDS[name].minima else ()
    return laid_out(Blocks(codes, scales, d, *minima), name).view(len(rounded.codes), -1)
