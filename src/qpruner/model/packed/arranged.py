"""A packed weight in the order of torch's 4-bit product for CPUs, for few tokens in bfloat16.

The product wants four bits a code: codes of fewer are widened some rows at a time, see `math/nibbles`. It computes
(nibble - 8) * scale + zero in float32, with scale and zero in bfloat16. Scales stay float16 here, and are rounded
anew for every product; that costs less than an eighth of it, and stored scales come back exactly.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from qpruner.math import grids, nibbles
from qpruner.plan import QuantSpec

GROUPS = (256, 128, 64, 32)  # of which the product knows scales
ROWS = 256  # widened together: with the usual widths they stay in a core's own cache
PADDING = 0.04  # zeros that rows and columns may be filled up with, as a share of the weights
SMALLEST_NORMAL = 2.0**-14  # of float16


class Arranged:
    """What `PackedLinear` stores, in another order. Final.

    codes: the planes, flat. scales, zeros: (groups, rows) of each stretch of rows, flat; scales of fewer than 16 bits
    one to a byte, and their steps stay with the layer.
    """

    def __init__(self, rounded: grids.Rounded, spec: QuantSpec):
        """For weights that `fits`."""
        self.spec = spec
        self.d_out, self.d_in = rounded.codes.shape
        self.group, self.rows, self.columns = geometry(self.d_out, self.d_in, spec)
        below = (0, self.rows - self.d_out)
        codes = pad(rounded.codes, (0, self.columns - self.d_in, *below))
        self.planes = nibbles.fold(nibbles.arrange(codes << 4 - spec.bits), spec.bits)
        if len(self.planes) > 1:  # one tensor holds both, as one buffer stands for the codes
            self.codes = torch.cat([plane.flatten() for plane in self.planes])
            flat = self.codes.split([plane.numel() for plane in self.planes])
            self.planes = tuple(part.view(plane.shape) for part, plane in zip(flat, self.planes, strict=True))
        else:
            self.codes = self.planes[0].flatten()
        self.share = self.rows // nibbles.SHARES[spec.bits]
        self.stretch = self.share if spec.bits == 4 else ROWS
        by_stretch = lambda part: torch.cat([p.T.flatten() for p in pad(part, (0, 0, *below)).split(self.lengths())])
        self.scales = by_stretch(rounded.scales)
        self.zeros = None if rounded.zeros is None else by_stretch(rounded.zeros)

    def lengths(self) -> list[int]:
        """Rows of each stretch; the last of a share may be shorter."""
        whole, rest = divmod(self.share, self.stretch)
        return ([self.stretch] * whole + [rest] * (rest > 0)) * nibbles.SHARES[self.spec.bits]

    def by_row(self, part: Tensor, rows: slice = slice(None)) -> Tensor:
        """Scales or zeros of some rows as they are stored, (rows, groups)."""
        n, at, found = len(part) // self.rows, 0, []
        start, stop, _ = rows.indices(self.d_out)
        for length in self.lengths():
            if start < at + length and at < stop:
                stretch = part[n * at : n * (at + length)].view(n, length)
                found.append(stretch[:, max(start - at, 0) : stop - at].T)
            at += length
        return torch.cat(found)

    def codes_of(self, rows: slice) -> Tensor:
        """The codes of some rows, one to a byte."""
        start, stop, _ = rows.indices(self.d_out)
        bits, parts = self.spec.bits, []
        for i in range(start // self.share, -(-stop // self.share)):
            first, last = max(start - i * self.share, 0), min(stop - i * self.share, self.share)
            whole = slice(first // nibbles.BLOCK * nibbles.BLOCK, -(-last // nibbles.BLOCK) * nibbles.BLOCK)
            scratch = self.codes.new_empty(2, len(range(self.share)[whole]), self.columns // 2)
            found = nibbles.disarrange(nibbles.share_of(self.planes, bits, i, whole, scratch))
            parts.append(found[first - whole.start : last - whole.start, : self.d_in] >> 4 - bits)
        return torch.cat(parts)

    def rounded(self, steps: Tensor | None) -> grids.Rounded:
        """What came in."""
        zeros = None if self.zeros is None else self.by_row(self.zeros)
        return grids.Rounded(self.codes_of(slice(None)), self.by_row(self.scales), steps, zeros)

    def product(self, x: Tensor, steps: Tensor | None) -> Tensor:
        """x @ W.T for x of (tokens, d_in), bfloat16."""
        x = pad(x, (0, self.columns - self.d_in)).contiguous()
        lengths, n = self.lengths(), self.columns // self.group
        pairs = self.pairs(n)
        if self.spec.bits == 4:
            y = multiply(x, self.planes[0], self.group, pairs.view(n, self.rows, 2))
        else:
            scratch = self.codes.new_empty(2, min(self.stretch, self.share), self.columns // 2)
            parts, start, at = [], 0, 0
            for rows in lengths:
                i, first = divmod(start, self.share)
                wide = nibbles.share_of(self.planes, self.spec.bits, i, slice(first, first + rows), scratch)
                parts.append(multiply(x, wide, self.group, pairs[at : at + n * rows].view(n, rows, 2)))
                start, at = start + rows, at + n * rows
            y = torch.cat(parts, dim=-1)
        y = y[:, : self.d_out]
        return y if steps is None else (y * steps.float()[:, 0]).to(y.dtype)

    def pairs(self, n: int) -> Tensor:
        """Scale and zero of every group, next to each other, stretch after stretch."""
        spec = self.spec
        if self.scales.dtype == torch.float16:
            scales = bfloat16_of(self.scales, 2.0 ** (spec.bits - 4 + (spec.grid == "binary")))
        else:
            scales = self.scales.to(torch.bfloat16) * 2.0 ** (spec.bits - 4)
        # Both as the halves of an integer: filling every second element takes torch ten times as long.
        pairs = scales.view(torch.int16).int()  # scales are not negative, so that the upper half is 0
        if self.zeros is not None:
            # The zero is that of the rounded scale, so that 0 stays 0.
            zeros = (self.zeros.to(torch.bfloat16) - 2 ** (spec.bits - 1)) * scales * -(2.0 ** (4 - spec.bits))
            pairs |= zeros.view(torch.int16).int() << 16
        elif spec.grid == "binary":  # nibbles 0 and 8 are -1 and 1 stored scales, each four of these
            pairs |= (scales * 4).view(torch.int16).int() << 16
        if len(self.scales) == self.rows and n > 1:  # a scale for the row is one for each of its groups
            pairs = torch.cat([p.expand(n, -1).flatten() for p in pairs.split(self.lengths())])
        return pairs.view(torch.bfloat16).view(-1, 2)


def multiply(x: Tensor, packed: Tensor, group: int, pairs: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, pairs)


def bfloat16_of(halves: Tensor, factor: float) -> Tensor:
    """factor, a power of two, times float16 numbers that are not negative, and normal or 0.

    Their bits, without the three that bfloat16 lacks, are those of 2^-112 times the number. torch's own conversion is
    ten times as slow.
    """
    return (halves.view(torch.int16) + 4 >> 3).view(torch.bfloat16) * (2.0**112 * factor)


def geometry(d_out: int, d_in: int, spec: QuantSpec) -> tuple[int, int, int]:
    """Group of the product, rows and columns."""
    up = lambda d, unit: -(-d // unit) * unit
    if spec.group_size is None:
        group = min(GROUPS, key=lambda g: up(d_in, g))
    else:
        group = spec.group_size
    return group, up(d_out, 16 if spec.bits == 4 else nibbles.BLOCK * nibbles.SHARES[spec.bits]), up(d_in, group)


def fits(spec: QuantSpec, d_out: int, d_in: int) -> bool:
    """Whether there is such an order of a weight."""
    affine = (spec.grid == "integer" and spec.bits in nibbles.SHARES) or spec.grid == "binary"
    if not affine or spec.group_size not in (None, *GROUPS):
        return False
    _, rows, columns = geometry(d_out, d_in, spec)
    return rows * columns <= (1 + PADDING) * d_out * d_in


def scales_fit(scales: Tensor) -> bool:
    """Whether `bfloat16_of` reads them."""
    if scales.dtype != torch.float16:
        return True
    smallest = torch.where(scales == 0, torch.inf, scales).min()
    return bool(smallest >= SMALLEST_NORMAL)


def supported() -> bool:
    """Whether the processor is one that torch has the product for; elsewhere it is a loop over single weights."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and hasattr(
        torch.ops.aten, "_weight_int4pack_mm_for_cpu"
    )
