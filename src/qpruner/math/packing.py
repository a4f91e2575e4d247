"""Codes of few bits in a dense stream of bytes.

Notation
    codes   values 0..2^b-1                                                (d_out, d_in)
    packed  code j of a row is bits [j b, (j + 1) b) of its bytes, counted from the lowest bit of the first byte
                                                                           (d_out, ceil(d_in b / 8))
    words   k codes read as one number, the first the least significant: of 8 bits for b of 1, 2 or 4, of 12 for 3
    table   the k values that each word stands for                         (words, k)

Ternary codes 0..2 lie five to a byte: code j is digit j mod 5, base 3, of byte j // 5; the words are the bytes.
What is left of a row's last byte is 0.
"""

import math

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor
from torch.nn.functional import pad

Width = int | float  # bits of a code
TERNARY = 1.6  # the width of ternary codes, as they lie in bytes
# Codes of more bits are turned into numbers faster than they are looked up.
WORD_BITS = {1: 8, 2: 8, 4: 8, 3: 12, TERNARY: 8}
LONGER = {  # a few elements of a dtype as one of another: looking up whole rows takes several times as long
    (torch.float16, 2): torch.int32, (torch.bfloat16, 2): torch.int32, (torch.float32, 2): torch.int64,
    (torch.float64, 2): torch.complex128, (torch.float16, 4): torch.int64, (torch.bfloat16, 4): torch.int64,
    (torch.float32, 4): torch.complex128,
}  # fmt: skip


def row_bytes(d: int, width: Width) -> int:
    """Bytes of a row of d codes."""
    return -(-d // 5) if width == TERNARY else -(-d * width // 8)


def pack(codes: UInt8[Tensor, "out d"], width: Width) -> UInt8[Tensor, "out bytes"]:
    """Raises ValueError for a code that is too large."""
    top = 2 if width == TERNARY else 2**width - 1
    if codes.numel() and codes.max() > top:
        raise ValueError(f"a code of {width} bits is 0..{top}, not {codes.max()}")
    if width == TERNARY:
        digits = blocks_of(codes, 5)
        powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=codes.device)
        return (digits * powers).sum(-1, dtype=torch.uint8)
    n_codes, n_bytes = period(width)
    blocks = blocks_of(codes, n_codes)
    packed = codes.new_zeros(*blocks.shape[:2], n_bytes)
    for i in range(n_codes):
        byte, shift = divmod(i * width, 8)
        packed[..., byte] |= blocks[..., i] << shift
        if shift + width > 8:
            packed[..., byte + 1] |= blocks[..., i] >> (8 - shift)
    return packed.flatten(1)[:, : row_bytes(codes.shape[1], width)].contiguous()


def unpack(packed: UInt8[Tensor, "out bytes"], width: Width, d_in: int) -> UInt8[Tensor, "out d"]:
    """The codes that were packed, d_in of them in each row."""
    if width == TERNARY:
        return torch.stack([packed // 3**i % 3 for i in range(5)], dim=-1).flatten(1)[:, :d_in]
    return read(packed, width, torch.uint8)[:, :d_in]


def period(width: int) -> tuple[int, int]:
    """(fields, bytes) after which fields of so many bits start at a byte again."""
    bits = math.lcm(width, 8)
    return bits // width, bits // 8


def read(packed: UInt8[Tensor, "out bytes"], width: int, dtype: torch.dtype) -> Shaped[Tensor, "out fields"]:
    """Every field of `width` bits of the stream, also those behind the end of what was packed."""
    if width == 8:
        return packed.to(dtype)
    n_fields, n_bytes = period(width)
    blocks = blocks_of(packed, n_bytes).to(dtype)
    fields = torch.empty(*blocks.shape[:2], n_fields, dtype=dtype, device=packed.device)
    for i in range(n_fields):
        byte, shift = divmod(i * width, 8)
        field = blocks[..., byte] >> shift
        if shift + width > 8:
            field = field | blocks[..., byte + 1] << (8 - shift)
        fields[..., i] = field & (2**width - 1)
    return fields.flatten(1)


def blocks_of(row: UInt8[Tensor, "out d"], n: int) -> UInt8[Tensor, "out blocks n"]:
    """n neighbours at a time, the last of them filled up with 0."""
    return pad(row, (0, -row.shape[1] % n)).unflatten(1, (-(-row.shape[1] // n), n))


def value_table(book: Float[Tensor, " values"], width: Width) -> Float[Tensor, "words k"]:
    """The values that each word stands for."""
    if width == TERNARY:
        digits = torch.arange(256, device=book.device)[:, None] // 3 ** torch.arange(5, device=book.device) % 3
        return book[digits]
    n = WORD_BITS[width]
    words = torch.arange(2**n, device=book.device)[:, None]
    return book[words >> torch.arange(0, n, width, device=book.device) & (2**width - 1)]


def unpack_values(
    packed: UInt8[Tensor, "out bytes"], table: Float[Tensor, "words k"], width: Width, d_in: int
) -> Float[Tensor, "out d"]:
    """book[unpack(packed)] by one look-up per word."""
    words = read(packed, WORD_BITS[width], torch.int32)
    k = table.shape[1]
    if longer := LONGER.get((table.dtype, k)):
        found = table.view(longer).flatten().index_select(0, words.flatten()).view(table.dtype)
    else:
        found = table.index_select(0, words.flatten())
    return found.view(len(packed), words.shape[1] * k)[:, :d_in]
