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

LARGEST_BYTES = 2**31  # of all that is kept
CHUNK_ELEMENTS = 1 << 20  # logits that are worked on at a time: what the caches of a processor hold


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
    ) -> "Reference":
        """logits: (batch, length, vocabulary) in the order of the windows; the last position predicts nothing known."""
        values: Tensor | None = None
        classes: Tensor | None = None
        start = 0
        for batch in logits:
            for z in batch[:, :-1]:
                if values is None:
                    each = torch.empty((), dtype=dtype).itemsize
                    fits = largest // (n_windows * len(z))
                    whole = z.shape[1] * each <= fits
                    k = z.shape[1] if whole else min(z.shape[1], max(1, (fits - each) // (each + 4)))
                    values = torch.empty(n_windows, len(z), k + (not whole), dtype=dtype)
                    classes = None if whole else torch.empty(n_windows, len(z), k, dtype=torch.int32)
                r = torch.log_softmax(_wide(z), dim=-1)
                if classes is not None:
                    classes[start] = places = r.topk(classes.shape[2]).indices
                    r = _lumped(r, places)
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
                total += _divergence(
                    r[rows].to(z.device), known if known is None else known[rows].to(z.device), z[rows]
                )
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


def _wide(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _divergence(r: Tensor, classes: Tensor | None, z: Tensor) -> Tensor:
    """Summed over tokens, float64 on the CPU."""
    z = _wide(z)
    r = r.to(z.dtype)
    log_p, log_q = torch.log_softmax(r, dim=-1), torch.log_softmax(z, dim=-1)
    if classes is not None:
        log_q = _lumped(log_q, classes.long())
    p = log_p.exp()
    # Where p underflows to zero its term is zero, whatever q is.
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
    return terms.sum(-1).double().sum().cpu()


def _lumped(r: Tensor, places: Tensor) -> Tensor:
    """Log-probabilities of some tokens, and of all others together."""
    rest = torch.logsumexp(r.scatter(-1, places, -torch.inf), dim=-1, keepdim=True)
    return torch.cat([r.gather(-1, places), rest], dim=-1)
