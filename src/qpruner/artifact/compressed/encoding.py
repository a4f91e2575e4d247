"""Codes, scales and zero points as compressed-tensors stores them, and back.

Notation
    weight_packed      codes, less half of their range, in a dense stream of 32-bit words    (d_out, ceil(d_in b / 32))
    weight_scale       step of the grid in each group                                        (d_out, n)
    weight_shape       the shape of the weight                                               (2,)
    weight_zero_point  zeros, less half of their range, packed down the outputs              (ceil(d_out b / 32), n)

Codes of 3, 5, 6 and 7 bits go across the borders of words, as vLLM 0.33 and compressed-tensors from 0.18 read them.
Older ones put whole codes into each word: rows of 3 bits then often have as many words, and load as other numbers.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from qpruner.artifact.compressed.schemes import AS_INTEGERS
from qpruner.errors import MissingExtraError, ModelError
from qpruner.math import grids
from qpruner.model.cost import TensorSpec
from qpruner.model.packed.linear import PackedLinear
from qpruner.vllm import Scheme

WORD_BITS = 32
OLDEST = (0, 18)


def require_compressed_tensors() -> None:
    try:
        import compressed_tensors
    except ImportError:
        raise MissingExtraError(
            "exporting to compressed-tensors needs that package: pip install 'qpruner[vllm-format]'"
        ) from None
    found = tuple(int(part) for part in compressed_tensors.__version__.split(".")[:2])
    if found < OLDEST:
        raise MissingExtraError(
            f"compressed-tensors {compressed_tensors.__version__} puts codes into words in another way than vLLM "
            "reads them; 0.18 or newer is needed: pip install -U 'qpruner[vllm-format]'"
        )


def tensor_specs(d_out: int, d_in: int, scheme: Scheme) -> dict[str, TensorSpec]:
    """What is stored of a linear: name -> (dtype, shape)."""
    n = 1 if scheme.group_size is None else d_in // scheme.group_size
    words = lambda codes: math.ceil(codes * scheme.bits / WORD_BITS)
    found = {
        "weight_packed": ("I32", (d_out, words(d_in))),
        "weight_scale": ("F16", (d_out, n)),
        "weight_shape": ("I64", (2,)),
    }
    return found if scheme.symmetric else found | {"weight_zero_point": ("I32", (words(d_out), n))}


def as_coded(layer: PackedLinear, scheme: Scheme) -> dict[str, Tensor]:
    """The codes of a layer in the scheme that `exact_scheme` found for it."""
    spec, rounded = layer.spec, layer.rounded()
    codes = rounded.codes
    if spec.grid in AS_INTEGERS:  # the value as a symmetric integer of 2 bits
        codes = (codes << 1 if spec.grid == "binary" else codes) + 1
    scales = grids.decoded_scales(rounded, spec).half()
    if not scales.isfinite().all():
        raise ModelError("a scale is beyond float16, in which compressed-tensors' scales are written")
    spread = lambda x: x if x is None or spec.group_size is None else _spread(x, layer, scheme)
    return encoded(grids.Rounded(codes, spread(scales), None, spread(rounded.zeros)), scheme)


def encoded(rounded: grids.Rounded, scheme: Scheme) -> dict[str, Tensor]:
    """A rounded weight of `scheme.spec`."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    signed = lambda x: (x.to(torch.int16) - 2 ** (scheme.bits - 1)).to(torch.int8)
    found = {
        "weight_packed": pack_to_int32(signed(rounded.codes), scheme.bits),
        "weight_scale": rounded.scales,
        "weight_shape": torch.tensor(rounded.codes.shape, dtype=torch.int64),
    }
    if rounded.zeros is not None:
        found["weight_zero_point"] = pack_to_int32(signed(rounded.zeros), scheme.bits, packed_dim=0)
    return found


def decoded(tensors: Mapping[str, Tensor], scheme: Scheme) -> grids.Rounded:
    """What `encoded` was given."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    unsigned = lambda x: (x.to(torch.int16) + 2 ** (scheme.bits - 1)).to(torch.uint8)
    shape, scales = torch.Size(tensors["weight_shape"].tolist()), tensors["weight_scale"]
    codes = unsigned(unpack_from_int32(tensors["weight_packed"], scheme.bits, shape))
    if scheme.symmetric:
        return grids.Rounded(codes, scales)
    zeros = unpack_from_int32(tensors["weight_zero_point"], scheme.bits, scales.shape, packed_dim=0)
    return grids.Rounded(codes, scales, None, unsigned(zeros.contiguous()))


def exact_scales(layer: PackedLinear) -> bool:
    """Whether scales keep their values in float16."""
    scales = grids.decoded_scales(layer.rounded(), layer.spec)
    return torch.equal(scales.half().float(), scales)


def _spread(of_groups: Tensor, layer: PackedLinear, scheme: Scheme) -> Tensor:
    """Groups of a spec as those of a scheme, which may be smaller: (d_out, n)."""
    step = scheme.group_size or layer.in_features
    return of_groups[:, torch.arange(0, layer.in_features, step) // layer.spec.group_size]
