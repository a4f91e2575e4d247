import pytest
import torch

from qpruner.math import nibbles


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("share, d", [(16, 6), (64, 32), (240, 10)])
def test_arranging_and_folding_have_inverses(bits, share, d):
    codes = torch.randint(2**bits, (nibbles.SHARES[bits] * share, d), dtype=torch.uint8) << 4 - bits
    arranged = nibbles.arrange(codes)
    assert torch.equal(nibbles.disarrange(arranged), codes)
    planes = nibbles.fold(arranged, bits)
    assert sum(p.numel() for p in planes) * 8 == bits * codes.numel()
    assert torch.equal(nibbles.unfold(planes, bits), arranged)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_rows_of_a_share_are_those_of_the_whole(bits):
    share, d = 160, 8
    arranged = nibbles.arrange(torch.randint(2**bits, (nibbles.SHARES[bits] * share, d), dtype=torch.uint8) << 4 - bits)
    planes = nibbles.fold(arranged, bits)
    scratch = torch.empty(2, 64, d // 2, dtype=torch.uint8)
    for i in range(nibbles.SHARES[bits]):
        for start in range(0, share, 64):
            rows = slice(start, start + 64)
            assert torch.equal(nibbles.share_of(planes, bits, i, rows, scratch), arranged.split(share)[i][rows])


@pytest.mark.parametrize("rows", [16, 48, 64, 240])
def test_arrangement_is_torchs(rows):
    codes = torch.randint(16, (rows, 6), dtype=torch.uint8)
    ours, theirs = nibbles.arrange(codes), torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    assert torch.equal(ours.flatten(), theirs.flatten())
    assert torch.equal(nibbles.disarrange(ours), codes)


def test_another_processor_has_another_order(monkeypatch):
    rows = torch.randperm(64)
    codes = torch.randint(16, (128, 6), dtype=torch.uint8)
    monkeypatch.setattr(nibbles, "order", lambda n: rows)
    assert torch.equal(nibbles.disarrange(nibbles.arrange(codes)), codes)
