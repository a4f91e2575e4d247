"""A fine and a coarse score of every unit made one, and gates by which the way of fusing is learned (HyWIA).

Notation
    S   fine and coarse score of every unit                                (2, units), positive
    w   what a unit weighs in the limit that units compete under           (units,), bytes, or 1
    R   S per weight, either row scaled to a mean of one: comparable       (2, units)
    X   what attention knows of a unit                                     (units, d_x)
    Q   maps a unit to its query                                           (d_x, d_k)
    K   maps a unit to the key of either score                             (2, d_x, d_k)
    a   how far either score is trusted, sums to one                       (2, units)
    s   a R summed over the two: the fused score per weight                (units,)

The authors say that fusion adapts by attention and not how (arXiv:2403.10799). Attention between the two standardised
score vectors of a module cannot do it: it is symmetric, so both get one half. Here every unit asks for itself.
"""

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST = 1e-6  # of the mean: scores of zero have a logarithm too


def comparable(S: Float[Tensor, "2 units"], w: Float[Tensor, " units"]) -> Float[Tensor, "2 units"]:
    """R: scores per weight, either row divided by its mean over all weight, in float64."""
    S, w = S.double(), w.double()
    mean = S.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny) / w.sum()
    return (S / w / mean).clamp_min(SMALLEST)


def fused(R: Float[Tensor, "2 units"], a: Float[Tensor, "2 units"]) -> Float[Tensor, " units"]:
    """s. It lies between the two scores, whatever a is."""
    return (a * R).sum(0)


def attention_of_scores(R: Float[Tensor, "2 units"], *, temperature: float = 1.0) -> Float[Tensor, "2 units"]:
    """a without parameters: the query is the mean of both logarithms, the keys are the logarithms.

    Of a unit that both find important, the score is trusted that finds it more so; of one that both find unimportant,
    the one that finds it less important still.
    """
    logs = R.log()
    return torch.softmax(logs.mean(0) * logs / temperature, dim=0)


def attention(
    X: Float[Tensor, "units d_x"], Q: Float[Tensor, "d_x d_k"], K: Float[Tensor, "2 d_x d_k"]
) -> Float[Tensor, "2 units"]:
    """a of one head with two keys: softmax over the scores of <X Q, X K> / sqrt(d_k)."""
    match = torch.einsum("nk,snk->sn", X @ Q, X @ K)
    return torch.softmax(match / Q.shape[1] ** 0.5, dim=0)


def soft_gates(
    s: Float[Tensor, " units"], w: Float[Tensor, " units"], target: float, *, temperature: float
) -> Float[Tensor, " units"]:
    """sigmoid((log s - t) / temperature), with the threshold t at which w times the gates sums to `target`.

    t moves with s, and the gradient knows it: no change of s opens gates without closing others. Without that,
    training learns to open all gates.

    Args:
        target: what stays, in the unit of w; between zero and the sum of w.
    """
    logs = s.log()
    fixed = logs.detach()
    low, high = fixed.min() - 40 * temperature, fixed.max() + 40 * temperature
    for _ in range(60):
        t = (low + high) / 2
        below = (w * torch.sigmoid((fixed - t) / temperature)).sum() > target  # then t has to grow
        low, high = torch.where(below, t, low), torch.where(below, high, t)
    gates = torch.sigmoid((fixed - t) / temperature)
    pull = w * gates * (1 - gates)  # by the implicit function theorem dt = sum pull ds / sum pull
    t = t + (pull * (logs - fixed)).sum() / pull.sum().clamp_min(torch.finfo(s.dtype).tiny)
    return torch.sigmoid((logs - t) / temperature)


def hard_gates(s: Float[Tensor, " units"], w: Float[Tensor, " units"], target: float) -> Float[Tensor, " units"]:
    """One for the best units whose weight together is at most `target`, at least for the best; zero for the others."""
    order = s.argsort(descending=True, stable=True)
    stay = w[order].cumsum(0) <= target * (1 + 1e-9)
    stay[0] = True
    return torch.zeros_like(s).index_put((order,), stay.to(s.dtype))


def straight_through(hard: Float[Tensor, " units"], soft: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    """The hard gates, with the gradient of the soft ones."""
    return hard + soft - soft.detach()
