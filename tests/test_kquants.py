import pytest
import torch

from qpruner.math import kblocks, kquants
from qpruner.math.kblocks import Blocks, laid_out
from qpruner.math.kquants import KINDS, encode

gguf = pytest.importorskip("gguf")

# The error that llama.cpp's own encoders make in normal weights where all count the same: root mean square over that of
# the weights; libggml of October 2026, given an importance matrix of ones, which is the better of its two ways.
LLAMA_CPP = {"Q2_K": 0.2682, "Q3_K": 0.1446, "Q4_K": 0.0708, "Q5_K": 0.0354, "Q6_K": 0.0173}


def decode(coded: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(coded.numpy(), gguf.GGMLQuantizationType[kind]))


def normal(*shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def uneven(cols: int) -> torch.Tensor:
    return torch.rand(cols, generator=torch.Generator().manual_seed(1)) ** 4 + 0.001


def error(q, W, h=None) -> float:
    h = torch.ones(W.shape[1]) if h is None else h
    return float((h * (q - W) ** 2).sum() / (h * W**2).sum()) ** 0.5


def values(b: Blocks, kind: str) -> torch.Tensor:
    """What the blocks mean, weight by weight: (B, 256)."""
    each = lambda x: x.float().repeat_interleave(256 // len(x), 0)
    if b.minima is None:
        return ((b.d.float() * each(b.scales)) * (b.codes.float() - 2 ** (KINDS[kind].bits - 1))).T
    return ((b.d.float() * each(b.scales)) * b.codes.float() - b.dmin.float() * each(b.minima)).T


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_mean_what_they_say_bit_by_bit(kind):
    k, rng, B = KINDS[kind], torch.Generator().manual_seed(0), 40
    integers = lambda low, high, n: torch.randint(low, high, (n, B), generator=rng)
    codes = integers(0, 2**k.bits, 256).to(torch.uint8)
    unit = lambda: torch.rand(1, B, generator=rng).half()
    if k.minima:
        minima = integers(0, k.top + 1, k.parts).to(torch.int8)
        blocks = Blocks(codes, integers(0, k.top + 1, k.parts).to(torch.int8), unit(), minima, unit())
    else:
        blocks = Blocks(codes, integers(-k.top, k.top, k.parts).to(torch.int8), unit())
    assert torch.equal(decode(laid_out(blocks, kind), kind), values(blocks, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_normal_weights_lose_no_more_than_in_llama_cpp(kind):
    W = normal(64, 2048)
    assert error(decode(encode(W, kind), kind), W) <= LLAMA_CPP[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_count_lose_less(kind):
    W, h = normal(64, 1024), uneven(1024)
    weighted, flat = (decode(encode(W, kind, i), kind) for i in (h, None))
    assert error(weighted, W, h) < 0.97 * error(flat, W, h)
    assert error(flat, W) < error(weighted, W)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_importance_is_none(kind):
    W = normal(8, 512)
    assert torch.equal(encode(W, kind, torch.full((512,), 4.0)), encode(W, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_no_unit_of_weights_and_importance_and_no_order_of_rows_matters(kind):
    W, h = normal(40, 512), uneven(512)
    coded, order = encode(W, kind, h), torch.randperm(40)
    assert torch.equal(encode(W[order], kind, h), coded[order])
    assert torch.equal(encode(W, kind, 64 * h), coded)
    assert torch.equal(decode(encode(8 * W, kind, h), kind), 8 * decode(coded, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_do_not_know_what_they_are_worked_on_with(kind, monkeypatch):
    W, h = normal(24, 768), uneven(768)
    coded = encode(W, kind, h)
    monkeypatch.setattr(kquants, "BLOCKS_AT_A_TIME", 5)
    assert torch.equal(encode(W, kind, h), coded)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_on_the_grid_stays_and_what_was_encoded_hardly_moves_again(kind):
    bits, parts = KINDS[kind].bits, KINDS[kind].parts
    low = -(2 ** (bits - 1))
    grid = torch.randint(low, -low, (16, 512), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([low, -low - 1]).repeat(512 // (256 // parts), 1)
    grid.view(16, -1, 256 // parts)[..., :2] = ends  # every part uses the whole range
    W = 0.125 * grid.float()
    assert torch.allclose(decode(encode(W, kind), kind), W, rtol=1e-3, atol=0)
    W = normal(64, 512)
    once = decode(encode(W, kind), kind)
    assert error(decode(encode(once, kind), kind), once) < 0.12 * error(once, W)


@pytest.mark.parametrize("kind", KINDS)
def test_no_worse_than_the_whole_range_of_each_part_in_equal_steps(kind):
    k = KINDS[kind]
    W = normal(32, 512) * torch.rand(32, 512, generator=torch.Generator().manual_seed(2)) ** 3
    part = W.view(32, -1, 256 // k.parts)
    if k.minima:
        low, high = part.amin(-1, keepdim=True).clamp(max=0), part.amax(-1, keepdim=True).clamp(min=0)
        step = (high - low) / (2**k.bits - 1)
        plain = ((part - low) / step).round() * step + low
    else:
        step = part.abs().amax(-1, keepdim=True) / (2 ** (k.bits - 1) - 1)
        plain = (part / step).round() * step
    assert error(decode(encode(W, kind), kind), W) < error(plain.view(W.shape), W)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_and_lonely_and_constant_weights(kind):
    W = torch.zeros(6, 512)
    W[1, 7], W[2], W[3], W[4, 256:], W[5, ::2] = 3.0, 0.7, -0.7, 1e-3, -5.0
    for importance in (None, torch.zeros(512), torch.cat([torch.zeros(256), torch.ones(256)])):
        q = decode(encode(W, kind, importance), kind)
        assert torch.allclose(q[:5], W[:5], rtol=1e-2, atol=1e-6)
        assert torch.allclose(q[5], W[5], rtol=1e-2, atol=1e-2)  # scale and minimum are rounded apart
    assert torch.equal(decode(encode(torch.zeros(1, 256), kind), kind), torch.zeros(1, 256))


def test_what_has_no_place_is_refused():
    with pytest.raises(ValueError, match="multiple of 256 weights, not 300"):
        encode(torch.zeros(2, 300), "Q4_K")
    for value in (torch.inf, torch.nan, 1e5):
        with pytest.raises(ValueError, match="not finite, or beyond the largest float16"):
            encode(torch.full((1, 256), value), "Q4_K")


def test_fields_share_bytes_as_far_apart_as_said():
    fields = torch.arange(8, dtype=torch.uint8)[:, None] % 4
    together = [0 | 2 << 2 | 0 << 4 | 2 << 6, 1 | 3 << 2 | 1 << 4 | 3 << 6]
    assert kblocks.interleaved(fields, 2, 2).flatten().tolist() == together
