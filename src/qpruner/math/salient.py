"""Rounding with feedback of any spec, also where a few input channels are kept at more bits.

Those come first, so that the others make up for what even they lose. Which they are is decided by what plain rounding
would cost: the squared error of a channel's column times the mean square of the channel.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qpruner.math import grids
from qpruner.math.gptq import Feedback
from qpruner.math.gptq import quantize as fed_back
from qpruner.plan import QuantSpec


@dataclass(frozen=True)
class Parts:
    """A weight as it is stored. salient: input channels, ascending, that `high` holds and `rest` does not."""

    rest: grids.Rounded
    high: grids.Rounded | None = None
    salient: Int[Tensor, " n"] | None = None

    def rows(self, some: slice) -> "Parts":
        """Of a few outputs."""
        return Parts(self.rest.rows(some), None if self.high is None else self.high.rows(some), self.salient)

    def dequantize(self, spec: QuantSpec, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out d"]:
        rest = grids.dequantize(self.rest, spec.rest, dtype)
        if self.high is None:
            return rest
        W = rest.new_empty(len(rest), rest.shape[1] + spec.salient)
        W[:, self.salient] = grids.dequantize(self.high, spec.high, dtype)
        W[:, others(self.salient, W.shape[1])] = rest
        return W


@dataclass(frozen=True)
class Rounding:
    """What is common to all weights that see the same inputs. Final.

    G: Gram matrix of the inputs. ranges: a name in `RANGES`.
    """

    G: Float[Tensor, "d d"]
    spec: QuantSpec
    ranges: str
    feedback: Feedback
    salient: Int[Tensor, " n"] | None

    @classmethod
    def of(
        cls,
        W: Float[Tensor, "out d"],
        G: Float[Tensor, "d d"],
        spec: QuantSpec,
        ranges: str = "absmax",
        salient: Int[Tensor, " n"] | None = None,
    ) -> "Rounding":
        """W: decides which channels are salient, if that is not said."""
        if not spec.salient:
            return cls(G, spec, ranges, Feedback.of(G), None)
        if salient is not None:
            return cls(G, spec, ranges, Feedback.of(G, first=salient.tolist()), salient.long().sort().values)
        plain = grids.dequantize(grids.quantize(W, spec.rest, ranges), spec.rest, W.dtype)
        cost = (W - plain).double().square().sum(0) * G.diagonal()
        salient = cost.sort(descending=True, stable=True).indices[: spec.salient].sort().values
        return cls(G, spec, ranges, Feedback.of(G, first=salient.tolist()), salient)

    def __call__(self, W: Float[Tensor, "out d"]) -> Parts:
        spec, ranges = self.spec, self.ranges
        if self.salient is None:
            return Parts(fed_back(W, self.G, self.feedback, spec.rest, ranges))
        n, rest = spec.salient, others(self.salient, len(self.G))
        block = lambda places: self.G[places][:, places]
        high = fed_back(W[:, self.salient], block(self.salient), self.feedback.of_first(n), spec.high)
        made_up = self.feedback.made_up(W, grids.dequantize(high, spec.high, W.dtype))
        low = fed_back(made_up, block(rest), self.feedback.of_rest(n), spec.rest, ranges)
        return Parts(low, high, self.salient)

    def nearest(self, W: Float[Tensor, "out d"], parts: Parts) -> Parts:
        """Plain rounding with the scales of `parts`: what there is to be gained on."""
        if self.salient is None:
            return Parts(parts.rest.nearest(W, self.spec.rest))
        rest = parts.rest.nearest(W[:, others(self.salient, W.shape[1])], self.spec.rest)
        return Parts(rest, parts.high.nearest(W[:, self.salient], self.spec.high), self.salient)


def others(salient: Int[Tensor, " n"], d: int) -> Int[Tensor, " m"]:
    """The inputs that are not salient, ascending."""
    stays = torch.ones(d, dtype=torch.bool, device=salient.device)
    stays[salient.long()] = False
    return stays.nonzero()[:, 0]
