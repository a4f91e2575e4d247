"""What the output of linear maps loses with a unit if the units that stay make up for it (optimal brain surgeon).

Notation
    X  inputs of a linear map, one row per token                               (tokens, d)
    C  Gram matrix X^T X                                                        (d, d), float64
    W  weight, y = x @ W.T, refitted whenever units go                          (d_out, d)
    H  inverse of C on the columns that are left, damped                        (d, d)
    U  columns of one unit                                                      (k,)

Without U and with all other columns refitted, |X W^T - X V^T|^2 grows by tr(W_U (H_UU)^-1 W_U^T). Units go one after
the other, each time the one that costs least, and W and H follow: of two units that say the same, one is free and the
other then is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

AT_ONCE = 32  # units that go before W and H follow on all columns


@dataclass
class Reader:
    """A linear map that reads units: W and H, changed as units go."""

    W: Float[Tensor, "d_out d"]
    H: Float[Tensor, "d d"]
    units: Int[Tensor, "n k"]

    @classmethod
    def of(
        cls, W: Float[Tensor, "d_out d"], C: Float[Tensor, "d d"], units: Int[Tensor, "n k"], damping: float
    ) -> "Reader":
        C = C.double()
        ridge = damping * C.diagonal().mean().clamp_min(torch.finfo(C.dtype).tiny)
        factor = torch.linalg.cholesky(C + ridge * torch.eye(len(C), dtype=C.dtype, device=C.device))
        return cls(W.double().clone(), torch.cholesky_inverse(factor), units)

    def errors(self, left: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
        """tr(W_U (H_UU)^-1 W_U^T) of every unit that is left."""
        columns = self.units[left]
        own = self.W[:, columns].permute(1, 2, 0)  # (m, k, d_out)
        if columns.shape[1] == 1:
            return own.square().sum((1, 2)) / self.H.diagonal()[columns[:, 0]].clamp_min(torch.finfo(own.dtype).tiny)
        blocks = self.H[columns[:, :, None], columns[:, None, :]]
        return (own * torch.linalg.solve(blocks, own)).sum((1, 2))

    def drop_(self, gone: Int[Tensor, " r"]) -> None:
        """W and H without the columns of these units."""
        R = self.units[gone].flatten()
        K = torch.linalg.solve(self.H[R[:, None], R], self.H[R])
        self.W -= self.W[:, R] @ K
        self.H -= self.H[:, R] @ K

    def only(self, some: Int[Tensor, " m"]) -> "Reader":
        """The same on the columns of some units: all that their errors depend on."""
        S = self.units[some].flatten()
        units = torch.arange(len(S), device=S.device).view(len(some), -1)
        return Reader(self.W[:, S].clone(), self.H[S[:, None], S].clone(), units)


def elimination_scores(
    readers: Sequence[tuple[Float[Tensor, "_out _d"], Float[Tensor, "_d _d"], Int[Tensor, "n _k"]]],
    *,
    damping: float = 0.01,
    at_once: int = AT_ONCE,
) -> Float[Tensor, " n"]:
    """For every unit, the share of the squared outputs that is lost when it goes; ascending in the order of going.

    Args:
        readers: (W, C, columns of every unit) of each linear map that reads the units.
        damping: as a fraction of the mean diagonal of C.
        at_once: units that go in one round. Within a round the order is exact among the cheapest 2 `at_once`.
    Source: arXiv:2302.04089 (ZipLM), equations 1 to 3, after Hassibi and Stork's optimal brain surgeon.
    """
    whole = sum(float(((W.double() @ C.double()) * W.double()).sum()) for W, C, _ in readers)
    if whole == 0:  # no input ever came, so nothing is lost
        return torch.zeros(len(readers[0][2]), dtype=torch.float64)
    state = [Reader.of(W, C, units, damping) for W, C, units in readers]
    n = len(readers[0][2])
    left, scores, level = torch.arange(n, device=readers[0][2].device), torch.zeros(n, dtype=torch.float64), 0.0
    while len(left):
        errors = torch.stack([reader.errors(left) for reader in state]).sum(0)
        cheapest = left[errors.argsort(stable=True)[: 2 * at_once]]
        gone = []
        for unit, error in _cheapest_first([reader.only(cheapest) for reader in state], cheapest, at_once):
            level = max(level * (1 + 1e-9), error / whole, 1e-300)  # never less than what went before
            scores[unit] = level
            gone.append(unit)
        if len(gone) < len(left):
            for reader in state:
                reader.drop_(torch.tensor(gone, device=left.device))
        left = left[~torch.isin(left, torch.tensor(gone, device=left.device))]
    return scores


def _cheapest_first(readers: list[Reader], units: Int[Tensor, " m"], n: int) -> list[tuple[int, float]]:
    """The first n units that go out of these, one by one, and what each costs then."""
    left, order = torch.arange(len(units), device=units.device), []
    while len(left) and len(order) < n:
        errors = torch.stack([reader.errors(left) for reader in readers]).sum(0)
        at = int(errors.argmin())
        order.append((int(units[left[at]]), float(errors[at])))
        for reader in readers:
            reader.drop_(left[at : at + 1])
        left = torch.cat([left[:at], left[at + 1 :]])
    return order
