"""How far predictions are from what others were known to be, token by token, with gradients.

Notation
    z   logits                                                           (tokens, vocabulary)
    r   log-probabilities of the other model, as they are kept            (tokens, vocabulary) or (tokens, k + 1)
    p   softmax of r; of k tokens, and in the last place of all others together
    KL  sum p (log p - log q), q those of z in the same classes
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 20  # logits that are worked on at a time: what the caches of a processor hold


def lumped(r: Float[Tensor, "tokens vocabulary"], places: Int[Tensor, "tokens k"]) -> Float[Tensor, "tokens classes"]:
    """Log-probabilities of some tokens, and of all others together."""
    rest = torch.logsumexp(r.scatter(-1, places, -torch.inf), dim=-1, keepdim=True)
    return torch.cat([r.gather(-1, places), rest], dim=-1)


def divergence(
    r: Float[Tensor, "tokens classes"],
    z: Float[Tensor, "tokens vocabulary"],
    places: Int[Tensor, "tokens k"] | None = None,
) -> Float[Tensor, " tokens"]:
    """KL of every token in nats, differentiable in z; at least in float32, and summed over tokens of the vocabulary in
    float64.

    Args:
        places: ids of the k tokens; None where r has the whole vocabulary.
    """
    z = wide(z)
    r = r.to(z.dtype)
    log_p, log_q = torch.log_softmax(r, dim=-1), torch.log_softmax(z, dim=-1)
    if places is not None:
        log_q = lumped(log_q, places.long())
    p = log_p.exp()
    # Where p underflows to zero its term is zero, whatever q is.
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1, dtype=torch.float64)


def surprise(z: Float[Tensor, "tokens vocabulary"], ids: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """- log q of the token that came, in nats; at least in float32."""
    return torch.nn.functional.cross_entropy(wide(z), ids, reduction="none")


def wide(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def sum_in_chunks(
    of_rows: Callable[[Tensor, slice], Tensor],
    z: Float[Tensor, "rows vocabulary"],
    places: Int[Tensor, " tokens"],
    *,
    elements: int = CHUNK_ELEMENTS,
) -> Float[Tensor, ""]:
    """The sum of a loss over some rows of z, float64; what it takes besides z is one gradient of it and one chunk.

    Args:
        of_rows: the loss of each of these rows, which are those of a slice of `places`.
        places: rows of z that count, each once.
        elements: of z in a chunk.
    """
    return _Chunked.apply(z, places, of_rows, max(1, elements // z.shape[1]))


class _Chunked(torch.autograd.Function):
    """Takes the gradient on the way there: what log_softmax would keep of all rows is as large as several z."""

    @staticmethod
    def forward(ctx, z: Tensor, places: Tensor, of_rows: Callable[[Tensor, slice], Tensor], step: int) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(z) if wanted else None
        total = torch.zeros((), dtype=torch.float64, device=z.device)
        for at in range(0, len(places), step):
            rows = slice(at, at + step)
            chunk = z[places[rows]]
            with torch.set_grad_enabled(wanted):
                chunk.requires_grad_(wanted)
                loss = of_rows(chunk, rows).double().sum()
            if wanted:
                gradient[places[rows]] = torch.autograd.grad(loss, chunk)[0]
            total += loss.detach()
        if wanted:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None, None
