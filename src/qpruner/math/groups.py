"""Inputs that share a scale: `group_size` of them, counted along a row; the last group may be shorter."""

from jaxtyping import Shaped
from torch import Tensor


def group_count(d_in: int, group_size: int | None) -> int:
    """Scales of one row."""
    return 1 if group_size is None else -(-d_in // group_size)


def by_group(values: Shaped[Tensor, "out d"], group_size: int | None) -> list[tuple[Shaped[Tensor, "out m g"], slice]]:
    """Views of `values` with its groups as the second dimension, and which groups those are; the ragged one apart."""
    d = values.shape[1]
    g = d if group_size is None else min(group_size, d)
    whole = d // g if g else 0
    views = [(values[:, : whole * g].unflatten(1, (whole, g)), slice(0, whole))] if whole else []
    if whole * g < d:
        views.append((values[:, whole * g :].unsqueeze(1), slice(whole, whole + 1)))
    return views
