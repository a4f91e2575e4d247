"""Where adapters start: codes and factors of a linear, found together, and how they lie in the files of a stage."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qpruner.math import loftq
from qpruner.model.adapters import tensor_names
from qpruner.model.tensors import Stored
from qpruner.plan import Plan

ERRORS = "errors:"  # before the name of a linear, among the tensors of a stage

Rounds = Callable[[Tensor], tuple[nn.Module, Tensor]]  # a weight -> the linear that stores it, and its dense value


@dataclass(frozen=True)
class Candidate:
    """One linear stored one way. Errors are what is lost over the size of the weight, with and without the adapter: in
    the Frobenius norm, or counted as the inputs make them count."""

    layer: nn.Module
    factors: tuple[Tensor, Tensor] | None  # A (rank, d_in), B (d_out, rank)
    error: float
    plain_error: float


def started(
    W: Tensor, name: str, rounding: Rounds, plan: Plan, dtype: torch.dtype, L: Tensor | None = None
) -> Candidate:
    """A weight of (d_out, d_in) rounded, with the start of the adapter that the plan gives its linear.

    Args:
        rounding: its last call need not be for what is taken.
        L: as in `loftq.split`.
    """
    rank, recovery = plan.adapter_ranks.get(name, 0), plan.recovery
    found = loftq.split(
        W, rounding, rank=rank, scaling=scaling_of(plan, max(rank, 1)), iterations=recovery.loftq_iterations,
        dtype=dtype, generator=generator_for(plan, name), L=L,
    )  # fmt: skip
    plain_error, error = found.relative
    return Candidate(found.stored, (found.A, found.B) if rank else None, error, plain_error)


def fresh(dense: nn.Module, shape: tuple[int, int], name: str, plan: Plan, dtype: torch.dtype) -> Candidate:
    """A linear that stays as it is, with an adapter that changes nothing yet."""
    rank = plan.adapter_ranks.get(name, 0)
    made = loftq.fresh_adapter(*shape, rank, dtype, generator_for(plan, name), dense.weight.device) if rank else None
    return Candidate(dense, made, 0.0, 0.0)


def scaling_of(plan: Plan, rank: int) -> float:
    return plan.recovery.adapter_alpha / rank


def correction(plan: Plan, factors: tuple[Tensor, Tensor] | None) -> Tensor | float:
    """s B A, (d_out, d_in), float64; zero without an adapter."""
    if factors is None:
        return 0.0
    A, B = factors
    return scaling_of(plan, len(A)) * (B.double() @ A.double())


def generator_for(plan: Plan, name: str) -> torch.Generator:
    """From the name and the seed alone, so that the order in which linears are asked for does not matter."""
    number = hashlib.sha256(f"{plan.seed} {name}".encode()).digest()[:7]
    return torch.Generator().manual_seed(int.from_bytes(number))


def tensors_of(name: str, candidate: Candidate) -> dict[str, Tensor]:
    """Factors under PEFT's names, and errors."""
    found = {ERRORS + name: torch.tensor([candidate.plain_error, candidate.error], dtype=torch.float64)}
    if candidate.factors is not None:
        found |= dict(zip(tensor_names(name), candidate.factors, strict=True))
    return found


def read(codes: Stored, name: str, layer: nn.Module) -> Candidate | None:
    """What `tensors_of` left, beside a linear with codes of the same stage; None where it left nothing."""
    if ERRORS + name not in codes.places:
        return None
    plain_error, error = codes.read(ERRORS + name).tolist()
    names = tensor_names(name)
    factors = tuple(codes.read(each) for each in names) if names[0] in codes.places else None
    return Candidate(layer, factors, error, plain_error)
