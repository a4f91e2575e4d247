"""Packing keeps every code, of every width and in rows of any length."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qpruner.math.packing import TERNARY, WORD_BITS, pack, row_bytes, unpack, unpack_values, value_table

WIDTHS = [1, 2, 3, 4, 5, 6, 7, 8, TERNARY]


def codes_of(width, rows, d, seed=0):
    top = 3 if width == TERNARY else 2**width
    return torch.randint(0, top, (rows, d), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@given(width=st.sampled_from(WIDTHS), rows=st.integers(0, 5), d=st.integers(0, 33), seed=st.integers(0, 2**31))
def test_packing_keeps_every_code(width, rows, d, seed):
    codes = codes_of(width, rows, d, seed)
    packed = pack(codes, width)
    assert packed.shape == (rows, row_bytes(d, width)) and packed.is_contiguous()
    assert torch.equal(unpack(packed, width, d), codes)


@given(
    width=st.sampled_from(list(WORD_BITS)), rows=st.integers(0, 5), d=st.integers(0, 33), seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)  # fmt: skip
def test_values_are_looked_up_by_code(width, rows, d, seed, dtype):
    codes, values = codes_of(width, rows, d, seed), torch.arange(256).sqrt().to(dtype)
    book = values[: 3 if width == TERNARY else 2**width]
    found = unpack_values(pack(codes, width), value_table(book, width), width, d)
    assert found.dtype == dtype and torch.equal(found, book[codes.int()])


@given(width=st.sampled_from(WIDTHS[:-1]), d=st.integers(1, 33), seed=st.integers(0, 2**31))
def test_a_row_is_one_stream_of_bits(width, d, seed):
    codes = codes_of(width, 1, d, seed)
    number = sum(code << j * width for j, code in enumerate(codes[0].tolist()))
    assert bytes(pack(codes, width)[0].tolist()) == number.to_bytes(-(-d * width // 8), "little")


def test_four_bits_are_low_half_first_and_ternary_codes_are_digits():
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]
    assert pack(torch.tensor([[2, 1, 0, 0, 2, 1]], dtype=torch.uint8), TERNARY).tolist() == [[2 + 3 + 2 * 81, 1]]


@pytest.mark.parametrize("width, top", [(4, 15), (3, 7), (TERNARY, 2)])
def test_a_code_that_does_not_fit_is_refused(width, top):
    with pytest.raises(ValueError, match=f"0..{top}, not {top + 1}"):
        pack(torch.tensor([[top + 1]], dtype=torch.uint8), width)
