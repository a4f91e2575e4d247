"""The order in which torch's 4-bit product for CPUs reads codes, and codes of fewer bits folded into it.

Notation
    codes    0..15; those of b < 4 bits times 2^(4-b), which leaves the low bits 0   (d_out, d)
    nibbles  codes two to a byte in the product's order: blocks of BLOCK rows (the last of them shorter), in a block
             column after column, in a column all its rows                    (d_out, d / 2), bytes
    shares   nibbles of as many rows each                                     (share, d / 2)
    planes   a byte of the first holds the upper two bits of the codes of two shares; a byte of the last the third or
             only bit of the codes of four

A share is taken out of its planes by a shift and a mask of whole bytes, at the speed of memory.
"""

from functools import cache

import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

BLOCK = 64  # rows; the product for AVX2 has blocks of 32, in whose order 64 rows are two blocks
SHARES = {1: 4, 2: 2, 3: 4, 4: 1}  # by bits of a code
SINGLE = {1: 3, 3: 1}  # where in a nibble the bit lies that the last plane holds


@cache
def order(n: int) -> Tensor | None:
    """Rows of a block of n in the order of the low halves of its bytes, then of the high ones; None if ascending.

    Asked of torch, as it depends on the processor.
    """
    rows = torch.arange(n, dtype=torch.int32)[:, None].expand(n, 2)
    convert = lambda digit: torch.ops.aten._convert_weight_to_int4pack_for_cpu(digit.contiguous(), 1)
    units, sixteens = (convert(digit).flatten()[: n // 2] for digit in (rows % 16, rows // 16))
    found = torch.cat([(units >> shift & 15) + 16 * (sixteens >> shift & 15) for shift in (0, 4)]).long()
    return None if torch.equal(found, torch.arange(n)) else found


def blocks(rows: Shaped[Tensor, "out _"]) -> list[tuple[Shaped[Tensor, "blocks n _"], int]]:
    """The whole blocks together, then the last one if it is shorter, each with the rows of one."""
    whole = len(rows) // BLOCK * BLOCK
    parts = ((rows[:whole], BLOCK), (rows[whole:], len(rows) - whole))
    return [(part.unflatten(0, (-1, n)), n) for part, n in parts if len(part)]


def arrange(codes: UInt8[Tensor, "out d"]) -> UInt8[Tensor, "out half"]:
    """As `_convert_weight_to_int4pack_for_cpu`, several times as fast: for an even number of rows and columns."""
    parts = []
    for block, n in blocks(codes):
        if (rows := order(n)) is not None:
            block = block[:, rows]
        columns = block.transpose(1, 2).contiguous()
        parts.append((columns[..., : n // 2] | columns[..., n // 2 :] << 4).view(-1, codes.shape[1] // 2))
    return torch.cat(parts)


def disarrange(nibbles: UInt8[Tensor, "out half"]) -> UInt8[Tensor, "out d"]:
    """The inverse of `arrange`."""
    d, parts = 2 * nibbles.shape[1], []
    for block, n in blocks(nibbles):
        columns = block.reshape(-1, d, n // 2)
        halves = columns.new_empty(len(columns), d, n)
        torch.bitwise_and(columns, 15, out=halves[..., : n // 2])
        torch.bitwise_right_shift(columns, 4, out=halves[..., n // 2 :])
        found = halves.transpose(1, 2).contiguous()
        if (rows := order(n)) is not None:
            found[:, rows] = found.clone()
        parts.append(found.view(-1, d))
    return torch.cat(parts)


def fold(nibbles: UInt8[Tensor, "out half"], bits: int) -> tuple[UInt8[Tensor, "rows half"], ...]:
    """Planes of codes of so many bits; every share has to be whole blocks."""
    if bits == 4:
        return (nibbles,)
    shares = nibbles.chunk(SHARES[bits])
    planes = []
    if bits > 1:
        pairs = [share & 0xCC for share in shares]
        planes.append(torch.cat([a | b >> 2 for a, b in zip(pairs[::2], pairs[1::2], strict=True)]))
    if bits in SINGLE:
        plane = torch.zeros_like(shares[0])
        for i, share in enumerate(shares):
            plane |= (share >> SINGLE[bits] & 0x11) << i
        planes.append(plane)
    return tuple(planes)


def share_of(
    planes: tuple[UInt8[Tensor, "_ half"], ...], bits: int, i: int, rows: slice, scratch: UInt8[Tensor, "2 most half"]
) -> UInt8[Tensor, "rows half"]:
    """Rows of share i, whole blocks of it; they lie in scratch where the planes do not hold them as such."""
    if bits == 4:
        return planes[0][rows]
    n_rows = len(planes[-1])
    found, third = scratch[:, : len(range(n_rows)[rows])]
    if bits == 1:
        return masked(planes[0][rows], 3 - i, 0x88, found)
    start = i // 2 * n_rows
    masked(planes[0][start : start + n_rows][rows], i % 2 * 2, 0xCC, found)
    if bits == 3:
        found |= masked(planes[1][rows], 1 - i, 0x22, third)
    return found


def masked(plane: Tensor, left: int, mask: int, out: Tensor) -> Tensor:
    """Bytes shifted to the left, or to the right by a negative number, and the bits of the mask of them."""
    if left > 0:
        plane = torch.bitwise_left_shift(plane, left, out=out)
    elif left < 0:
        plane = torch.bitwise_right_shift(plane, -left, out=out)
    return torch.bitwise_and(plane, mask, out=out)


def unfold(planes: tuple[UInt8[Tensor, "_ half"], ...], bits: int) -> UInt8[Tensor, "out half"]:
    """The inverse of `fold`."""
    rows, half = planes[-1].shape  # of a share, but for 4 bits
    shares = range(SHARES[bits])
    return torch.cat([share_of(planes, bits, i, slice(rows), planes[0].new_empty(2, rows, half)) for i in shares])
