"""A hypernetwork that makes the gates of a joint search, as TOGA and DISP-LLM have it, instead of a number for each.

Fixed random inputs, one for every decoder layer and one for what is outside of them, go through a recurrent network in
both directions, and a linear head for every variable makes its logits from its layer's state. What one layer learns
moves its neighbours too. Heads begin at zero, so that training begins where a table does.

Source: DISP-LLM (arXiv:2410.11988), its published code: inputs of 32, hidden states of 64, LayerNorm, GELU, heads
without bias.
"""

import torch
from torch import Tensor, nn

from qpruner.decide.space import Space

INPUT, HIDDEN = 32, 64


class Hypernetwork(nn.Module):
    """Final. theta(): a change of the worth of every option of every variable, (variables, options)."""

    rate = 1e-3  # Adam's

    def __init__(self, space: Space, seed: int):
        super().__init__()
        layers = sorted({v.layer for v in space.variables})
        self._layers = [layers.index(v.layer) for v in space.variables]
        self._sizes = space.sizes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.register_buffer("inputs", torch.randn(len(layers), INPUT))
            self.recurrent = nn.GRU(INPUT, HIDDEN, bidirectional=True)
        self.norm = nn.LayerNorm(2 * HIDDEN)
        self.heads = nn.ParameterList([nn.Parameter(torch.zeros(n, 2 * HIDDEN)) for n in space.sizes])

    def theta(self) -> Tensor:
        states = nn.functional.gelu(self.norm(self.recurrent(self.inputs)[0]))
        rows = [head @ states[layer] for head, layer in zip(self.heads, self._layers, strict=True)]
        widest = max(self._sizes)
        return torch.stack([nn.functional.pad(row, (0, widest - len(row))) for row in rows]).double()
