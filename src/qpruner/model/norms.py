"""What the weight of a norm means."""

import copy

import torch
from torch import Tensor, nn


def offset_of(norm: nn.Module) -> float | None:
    """What is added to the weight of a norm before it multiplies: 0, or 1 where it stores how far it is from one.

    Found by running it. None for a module that has parameters besides a weight and a bias.
    """
    own = {name for name, _ in norm.named_parameters()}
    if "weight" not in own or not own <= {"weight", "bias"}:
        return None
    tried = copy.deepcopy(norm)
    d = norm.weight.shape[0]
    x = torch.randn(8, d, generator=torch.Generator().manual_seed(0)).to(norm.weight)

    def output(weight: float) -> Tensor:
        for name, parameter in tried.named_parameters():
            parameter.data = torch.full_like(parameter, weight if name == "weight" else 0.0)
        return tried(x).detach().double()

    still, moved = output(0.0), output(1.0)
    return float(round(float((still * (moved - still)).sum() / (moved - still).square().sum())))
