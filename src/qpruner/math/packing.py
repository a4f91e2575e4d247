"""Two 4-bit codes in one byte.

Notation
    codes   values 0..15                                              (d_out, d_in)
    packed  byte i of a row: code 2i in the low half, 2i+1 in the high (d_out, ceil(d_in / 2))
    book    the value that each code stands for                        (16,)

A row of odd length ends in a byte whose high half is 0.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import pad

WORD_OF_PAIR = {
    torch.float16: torch.int32,
    torch.bfloat16: torch.int32,
    torch.float32: torch.int64,
    torch.float64: torch.complex128,
}


def pack(codes: UInt8[Tensor, "out d"]) -> UInt8[Tensor, "out bytes"]:
    """Raises ValueError for a code above 15."""
    if codes.numel() and codes.max() > 15:
        raise ValueError(f"a 4-bit code is 0..15, not {codes.max()}")
    even = pad(codes, (0, codes.shape[1] % 2))
    return even[:, 0::2] | (even[:, 1::2] << 4)


def unpack(packed: UInt8[Tensor, "out bytes"], d_in: int) -> UInt8[Tensor, "out d"]:
    """The codes that were packed, d_in of them in each row."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :d_in]


def pair_table(book: Float[Tensor, "16"]) -> Float[Tensor, "256 2"]:
    """The two values that each byte stands for."""
    byte = torch.arange(256, device=book.device)
    return torch.stack((book[byte & 15], book[byte >> 4]), dim=-1)


def unpack_values(
    packed: UInt8[Tensor, "out bytes"], table: Float[Tensor, "256 2"], d_in: int
) -> Float[Tensor, "out d"]:
    """book[unpack(packed)] by one look-up per byte. Both values are one word: rows of two take three times as long."""
    words = table.view(WORD_OF_PAIR[table.dtype]).flatten().index_select(0, packed.flatten().int())
    return words.view(table.dtype).view(len(packed), 2 * packed.shape[1])[:, :d_in]
