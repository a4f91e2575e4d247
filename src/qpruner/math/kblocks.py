"""How llama.cpp's K-types lay out a block of 256 weights in bytes.

Notation
    B       blocks
    p       parts of a block that have a scale of their own: 8 of 32 weights, or 16 of 16
    codes   of each weight, 0 the lowest                                (256, B)
    scales  of each part, in units of d; signed where there are no minima          (p, B)
    minima  what is subtracted in each part, in units of dmin                       (p, B)
    d, dmin float16, one for each block                                 (1, B)

A weight is d scale code - dmin minimum, or d scale (code - 2^(bits - 1)) where there are no minima. Blocks lie in
columns, so that every step works on many of them at once.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float16, Int8, UInt8
from torch import Tensor


class Blocks(NamedTuple):
    codes: UInt8[Tensor, "256 B"]
    scales: Int8[Tensor, "p B"]
    d: Float16[Tensor, "1 B"]
    minima: Int8[Tensor, "p B"] | None = None
    dmin: Float16[Tensor, "1 B"] | None = None


def laid_out(blocks: Blocks, kind: str) -> UInt8[Tensor, "B bytes"]:
    """kind: Q2_K to Q6_K."""
    return torch.cat(LAYOUTS[kind](blocks)).T.contiguous()


def half_bytes(x: Float16[Tensor, "1 B"]) -> UInt8[Tensor, "2 B"]:
    return x.reshape(-1, 1).view(torch.uint8).T


def interleaved(fields: UInt8[Tensor, "n B"], run: int, width: int) -> UInt8[Tensor, "bytes B"]:
    """Fields of `width` bits, 8 / width to a byte: those that share one are `run` fields apart."""
    several = 8 // width
    fields = fields.view(-1, several, run, fields.shape[1])
    packed = fields[:, 0].clone()
    for i in range(1, several):
        packed |= fields[:, i] << i * width
    return packed.flatten(0, 1)


def q2_k(b: Blocks) -> list[Tensor]:
    scales = (b.scales | b.minima << 4).view(torch.uint8)
    return [scales, interleaved(b.codes, 32, 2), half_bytes(b.d), half_bytes(b.dmin)]


def q3_k(b: Blocks) -> list[Tensor]:
    scales = (b.scales + 32).view(torch.uint8)
    low, high = interleaved(scales & 15, 8, 4), interleaved(scales >> 4, 4, 2)
    return [interleaved(b.codes >> 2, 32, 1), interleaved(b.codes & 3, 32, 2), low, high, half_bytes(b.d)]


def scales_and_minima(b: Blocks) -> Tensor:
    """Eight of each, 6 bits: the upper two bits of the last four lie above the first four."""
    scales, minima = b.scales.view(torch.uint8), b.minima.view(torch.uint8)
    upper = lambda six: six[:4] | (six[4:] >> 4) << 6
    return torch.cat([upper(scales), upper(minima), scales[4:] & 15 | (minima[4:] & 15) << 4])


def q4_k(b: Blocks) -> list[Tensor]:
    return [half_bytes(b.d), half_bytes(b.dmin), scales_and_minima(b), interleaved(b.codes, 32, 4)]


def q5_k(b: Blocks) -> list[Tensor]:
    high, low = interleaved(b.codes >> 4, 32, 1), interleaved(b.codes & 15, 32, 4)
    return [half_bytes(b.d), half_bytes(b.dmin), scales_and_minima(b), high, low]


def q6_k(b: Blocks) -> list[Tensor]:
    low, high = interleaved(b.codes & 15, 64, 4), interleaved(b.codes >> 4, 32, 2)
    return [low, high, b.scales.view(torch.uint8), half_bytes(b.d)]


LAYOUTS = {"Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}
