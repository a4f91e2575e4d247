"""What the two variants do with positions; a file that only the modelling file imports."""

import torch


def alibi_slopes(n_heads):
    """2^(-8/n), 2^(-16/n), ...: those of half as many heads are not half of these."""
    return 2.0 ** (-8.0 * torch.arange(1, n_heads + 1) / n_heads)


def rotate(x, positions):
    """x: (batch, heads, tokens, head_dim)."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
