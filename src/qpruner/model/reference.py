"""What a model predicts for windows of text, kept so that others can be compared with it many times.

Notation
    z   logits of another model                                         (tokens, vocabulary)
    r   log-probabilities of the first, as they are kept                 (tokens, vocabulary) or (tokens, k + 1)
    p   softmax of r; of k tokens, and in the last place of all others together
    KL  sum p (log p - log q), q those of z in the same classes

What float16 takes from r is normalised away: of the same model, KL is below 1e-6. With a part of the vocabulary KL is
a lower bound, the closer the less probability lies outside.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qpruner.files import replacing
from qpruner.math.divergence import CHUNK_ELEMENTS, divergence, lumped, wide

LARGEST_BYTES = 2**31  # of all that is kept


@dataclass(frozen=True, eq=False)
class Reference:
    """Final. values: r, (windows, positions, vocabulary or k + 1). classes: ids of the k tokens; None for all."""

    values: Tensor
    classes: Tensor | None

    @classmethod
    def of(
        cls,
        logits: Iterator[Tensor],
        n_windows: int,
        *,
        dtype: torch.dtype = torch.float16,
        largest: int = LARGEST_BYTES,
        top: int | None = None,
    ) -> "Reference":
        """
        Args:
            logits: (batch, length, vocabulary) in the order of the windows; the last position predicts nothing known.
            top: keep so many tokens of each prediction, or all of a vocabulary with one more at most; without it, as
                many as `largest` bytes hold of all windows.
        """
        values: Tensor | None = None
        classes: Tensor | None = None
        start = 0
        for batch in logits:
            for z in batch[:, :-1]:
                if values is None:
                    k = _fitting(z.shape[1], dtype, largest // (n_windows * len(z))) if top is None else top
                    whole = k >= z.shape[1] - 1
                    k = z.shape[1] if whole else k
                    values = torch.empty(n_windows, len(z), k + (not whole), dtype=dtype)
                    classes = None if whole else torch.empty(n_windows, len(z), k, dtype=torch.int32)
                r = torch.log_softmax(wide(z), dim=-1)
                if classes is not None:
                    classes[start] = places = r.topk(classes.shape[2]).indices
                    r = lumped(r, places)
                values[start] = r
                start += 1
        assert values is not None and start == n_windows
        return cls(values, classes)

    def __len__(self) -> int:
        return len(self.values)

    def kl(self, first: int, logits: Tensor) -> Tensor:
        """(batch,) float64: mean KL per token of the windows from number `first` on, in nats. logits as for `of`."""
        found = []
        for i, z in enumerate(logits[:, :-1]):
            r = self.values[first + i]
            known = None if self.classes is None else self.classes[first + i]
            total = torch.zeros((), dtype=torch.float64)
            step = max(1, CHUNK_ELEMENTS // z.shape[1])
            for at in range(0, len(z), step):
                rows = slice(at, at + step)
                places = None if known is None else known[rows].to(z.device)
                total += divergence(r[rows].to(z.device), z[rows], places).double().sum().cpu()
            found.append(total / len(z))
        return torch.stack(found)

    def save(self, path: Path) -> None:
        parts = {"values": self.values} | ({} if self.classes is None else {"classes": self.classes})
        with replacing(path) as temporary:
            save_file(parts, temporary)

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Mapped: workers on one machine share the pages."""
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            return cls(file.get_tensor("values"), file.get_tensor("classes") if "classes" in names else None)


def _fitting(vocabulary: int, dtype: torch.dtype, size: int) -> int:
    """Tokens of a prediction that can be kept in so many bytes."""
    each = torch.empty((), dtype=dtype).itemsize
    return vocabulary if vocabulary * each <= size else min(vocabulary, max(1, (size - each) // (each + 4)))
