"""What training makes smaller: the surprise at the next token, or the distance from what the original gives.

Sums over the tokens that count, so that parts of a batch, in one process or several, add up to the whole of it.

Sources: distillation of all of a model's predictions arXiv:1503.02531; from a pruned or quantized model's original,
arXiv:2305.17888, arXiv:2408.11796, whose relative distance of hidden states this is not: ours is each token's squared
distance over its own square, as what comes next sees hidden states through a norm.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qpruner.math.divergence import divergence, sum_in_chunks, surprise
from qpruner.model.lessons import CLASSES, HIDDEN, VALUES
from qpruner.model.skeleton import decoder_layers
from qpruner.model.stage import bare

MOST_LAYERS = 4  # whose hidden states are compared
NOT_PREDICTED = -100  # the label that says so in transformers, and in torch


@dataclass(frozen=True)
class Objective:
    """Final. layers: decoder layers of the model that is trained whose hidden states are compared; block_weight: of
    their mean distance beside the divergence."""

    model: nn.Module
    layers: tuple[int, ...] = ()
    block_weight: float = 0.0

    def __call__(self, forward: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The sum over predicted tokens, nats, float64.

        Args:
            forward: the model, or what wraps it.
            batch: input_ids and labels, (batch, length), and what the original gives for them: values, classes, hidden.
                Without values the loss is that of the next token.
        """
        ids, length = batch["input_ids"], batch["input_ids"].shape[1]
        with self._noting() as hidden:
            logits = forward(input_ids=ids, use_cache=False).logits
        predicted = batch["labels"] != NOT_PREDICTED
        places = F.pad(predicted[:, 1:], (0, 1)).flatten().nonzero()[:, 0]  # of what predicts
        if VALUES not in batch:
            following = ids.flatten()[places + 1]
            of_rows = lambda z, rows: surprise(z, following[rows])
        else:
            known = places - places // length  # the last position of a window predicts nothing known
            r = batch[VALUES].flatten(0, 1)
            classes = batch[CLASSES].flatten(0, 1) if CLASSES in batch else None
            of_rows = lambda z, rows: divergence(
                r[known[rows]], z, None if classes is None else classes[known[rows]]
            )  # fmt: skip
        total = sum_in_chunks(of_rows, logits.flatten(0, 1), places)
        for number, found in enumerate(hidden):
            target = batch[HIDDEN][:, number].flatten(0, 1)[places]
            distances = relative_distance(found.flatten(0, 1)[places], target)
            total = total + self.block_weight / len(self.layers) * distances.double().sum()
        return total

    @contextmanager
    def _noting(self) -> Iterator[list[Tensor]]:
        """What comes out of the layers while the model runs; not again when they are computed again on the way back."""
        paths, found = decoder_layers(self.model), []
        note = lambda module, args, output: found.append(bare(output))
        handles = [self.model.get_submodule(paths[i]).register_forward_hook(note) for i in self.layers]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


def relative_distance(found: Tensor, target: Tensor) -> Tensor:
    """(tokens,): squared distance over the target's square. Takes (tokens, width)."""
    found, target = found.float(), target.float()
    return (found - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)


def compared_layers(n: int) -> tuple[int, ...]:
    """At most four of n decoder layers, evenly spaced, the last among them."""
    m = min(MOST_LAYERS, n)
    return tuple(n * (i + 1) // m - 1 for i in range(m))


def labels_of(ids: Tensor, predicted: Tensor) -> Tensor:
    return torch.where(predicted, ids, NOT_PREDICTED)
