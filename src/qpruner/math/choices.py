"""Choices that gradients pass through: one option is taken of every variable, all of them learn.

Notation
    theta   what each option is worth                                      (n, k); -inf past a variable's last option
    p       probability of every option                                    (n, k)
    D       the options that are taken, one-hot                            (n, k)
    c       what an option takes, all other variables at their p           (n, k)
    price   what a unit of size costs, in units of worth
    T       temperature: noise of the draw, goes to zero
    Q_s     a weight in each of its forms                                  s of (d_out, d_in)

A size is a sum of tables, each over all combinations of the options of a few variables. Under independent draws its
expectation is a polynomial in p that is linear in each variable's row.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

Worth = Float[Tensor, "n k"]

LETTERS = "abcdefgh"  # variables of one table, at most
SWEEPS = 3  # over c and p in turn, at every price
HALVINGS = 40  # of the range of prices
ACCURACY = 1e-3  # of the expected size


def laid_out(rows: Sequence[Sequence[float] | np.ndarray]) -> Worth:
    """Rows of different lengths as one matrix, float64, -inf where an option does not exist."""
    theta = torch.full((len(rows), max(map(len, rows), default=1)), -torch.inf, dtype=torch.float64)
    for row, values in zip(theta, rows, strict=True):
        row[: len(values)] = torch.as_tensor(np.asarray(values), dtype=torch.float64)
    return theta


class Expected:
    """The expectation of a sum of tables under independent draws. Final."""

    def __init__(self, tables: Sequence[tuple[tuple[int, ...], np.ndarray]], k: int):
        """tables: the variables of each, and its values with an axis for each of them. k: options, at most."""
        self._batches: list[tuple[Tensor, Tensor]] = []  # (tables, axes) variables; (tables, k, ...) values
        for order in sorted({len(variables) for variables, _ in tables}):
            some = [(variables, values) for variables, values in tables if len(variables) == order]
            padded = torch.zeros(len(some), *[k] * order, dtype=torch.float64)
            for place, (_, values) in zip(padded, some, strict=True):
                place[tuple(slice(0, n) for n in values.shape)] = torch.as_tensor(values, dtype=torch.float64)
            self._batches.append((torch.tensor([variables for variables, _ in some]), padded))

    def total(self, p: Worth) -> Float[Tensor, ""]:
        found = p.new_zeros(())
        for variables, values in self._batches:
            for axis in reversed(range(variables.shape[1])):  # the last axis first: what is left is smaller each time
                values = (values * p[variables[:, axis]].view(len(variables), *[1] * axis, -1)).sum(-1)
            found = found + values.sum()
        return found

    def of_each(self, p: Worth) -> Worth:
        """c: the gradient, which is the size when a variable takes an option, less what does not depend on it."""
        with torch.enable_grad():
            leaf = p.detach().requires_grad_()
            total = self.total(leaf)
            return torch.autograd.grad(total, leaf)[0] if total.requires_grad else torch.zeros_like(p)


def soft(theta: Worth, c: Worth, price: float | Tensor, T: float) -> Worth:
    """p: softmax((theta - price c) / T)."""
    return torch.softmax((theta - price * c) / T, dim=1)


def priced(
    theta: Worth, size: Expected, target: float, T: float, conditions: Sequence[int] = ()
) -> tuple[Worth, float]:
    """p at the price at which the expected size is `target`, and the price; 0 where nothing need be paid.

    c depends on p and p on c: they are found in turn, for every price from the same start. The price moves with theta,
    and the gradient knows it: no change of theta makes all of the model better without making some of it worse. Out of
    reach, p is the smallest there is.

    Args:
        conditions: variables whose last option is a condition for others to matter, such as that a layer stays. What is
            inside a layer takes what it does if the layer stays; else whatever goes would be free, and never come back.
    """
    fixed = theta.detach()
    finite = fixed.isfinite()
    sure = torch.tensor(list(conditions), dtype=torch.long)

    def at(price: float) -> tuple[Tensor, Tensor]:
        p = free
        for _ in range(SWEEPS):
            c = size.of_each(_granted(p, finite, sure))
            p = soft(fixed, c, price, T)
        return p, c

    free = soft(fixed, torch.zeros_like(fixed), 0.0, T)
    if size.total(free) <= target:
        return soft(theta, torch.zeros_like(fixed), 0.0, T), 0.0
    c = size.of_each(_granted(free, finite, sure))
    spread = torch.where(finite, fixed, -torch.inf).amax(1) - torch.where(finite, fixed, torch.inf).amin(1)
    low, high = 0.0, (float(spread.max()) + T) / max(float((c.amax(1) - c.amin(1)).max()), 1.0)
    for _ in range(HALVINGS):  # up to a price that is high enough
        p, c = at(high)
        if size.total(p) <= target:
            break
        low, high = high, 2 * high
    price = high
    for _ in range(HALVINGS):
        if abs(excess := float(size.total(p)) / target - 1) < ACCURACY:
            break
        low, high = (price, high) if excess > 0 else (low, price)
        price = (low + high) / 2
        p, c = at(price)
    # By the implicit function theorem, c held: d total = sum c dp = 0 gives d price = cov(c, d theta) / var(c).
    pull = p * (c - (p * c).sum(1, keepdim=True))
    moved = torch.where(finite, theta - fixed, 0.0)
    moving = price + (pull * moved).sum() / (pull * c).sum().clamp_min(1e-300)
    return soft(theta, c, moving, T), price


def _granted(p: Worth, finite: Tensor, sure: Tensor) -> Worth:
    """p with the conditions met."""
    p = p.clone()
    p[sure] = torch.nn.functional.one_hot(finite[sure].sum(1) - 1, p.shape[1]).to(p)
    return p


def drawn(p: Worth, generator: torch.Generator) -> Int[Tensor, " n"]:
    """An option of every variable: the largest sum of log p and Gumbel noise, which is a draw from p."""
    uniform = torch.rand(p.shape, generator=generator, dtype=p.dtype).clamp_(1e-300, 1 - 1e-16)
    return (p.detach().log() - (-uniform.log()).log()).argmax(1)


def one_hot(p: Worth, chosen: Int[Tensor, " n"]) -> Worth:
    """D. Backward it is ReinMax's estimate of the gradient of an expectation over draws from p.

    On average over draws that is the true gradient for any loss quadratic in D. Plain straight-through takes the slope
    at the option that was drawn for the difference to another: from a coarse one it sees twice of what a finer one
    would win, and from a fine one nothing of what a coarse one would lose.

    Source: Liu et al. 2023, "Bridging discrete and backpropagation: straight-through and beyond" (arXiv:2304.08612),
    algorithm 2.
    """
    fixed = p.detach()
    hard = torch.nn.functional.one_hot(chosen, p.shape[1]).to(p.dtype)
    halfway = (fixed + hard) / 2
    logs = p.clamp_min(1e-300).log()
    carried = logs - logs.detach()  # zero, with the gradient of the logits
    through = lambda q: q * (carried - (q * carried).sum(1, keepdim=True))  # softmax(log q + carried) - q
    return hard + 2 * through(halfway) - through(fixed) / 2


class Form(torch.autograd.Function):
    """The form of a weight that was taken; the gradient of every option is <dL/dW, Q_s>. Forms are made when needed."""

    @staticmethod
    def forward(ctx, D: Tensor, chosen: int, form: Callable[[int], Tensor], n: int) -> Tensor:
        ctx.form, ctx.n, ctx.like = form, n, D
        return form(chosen).clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        found = torch.zeros_like(ctx.like)
        for s in range(ctx.n):
            found[s] = torch.dot(gradient.flatten(), ctx.form(s).to(gradient).flatten()).to(found)
        return found, None, None, None
