"""What a run did to the loss, stage by stage, and the sentences that warn of it.

Losses are in nats per token.
"""

import math

from qpruner.judge.damage import dense_parameters, rise_when_smaller, rises
from qpruner.report.values import Value

DID = {
    "cut": "the cuts, before anything was refitted",
    "embeddings rounded": "rounding the embedding",
    "refitted": "refitting",
    "rounded": "rounding",
    "tuned": "learning the codes",
    "recovered": "training",
    "as shipped": "storing what was made",
}  # stage -> what it does; a name that is not here stands for itself


class StageLoss(Value):
    """Of the model once a stage was through. kl: to the original. standard_error: of the loss; None for one window."""

    stage: str
    loss: float
    standard_error: float | None = None
    kl: float


class Damage(Value):
    """stages: from the original to what ships, on `windows` windows of the search text; empty where not measured.

    tolerance: the rise of the loss that is accepted in silence. unigram: the loss on the evaluation text of predicting
    tokens by their frequencies in it.
    """

    stages: tuple[StageLoss, ...] = ()
    windows: int = 0
    tolerance: float
    unigram: float

    def worst(self) -> tuple[str, float] | None:
        """The stage with which the loss rose most, and by how much; None where it rose with none."""
        steps = rises([stage.loss for stage in self.stages])
        named = [(stage.stage, rise) for stage, rise in zip(self.stages[1:], steps, strict=True) if rise > 0]
        return max(named, key=lambda step: step[1], default=None)


def sentences(damage: Damage, before: float, after: float, *, parameters: int, size_bytes: int) -> tuple[str, ...]:
    """Warnings, worst first; none where all is as it should be.

    Args:
        before, after: loss of the original and of the artifact on the evaluation text.
        parameters: of the original. size_bytes: of the artifact's files.
    """
    found, rise = [], after - before
    if not math.isfinite(after):
        return (f"The loss is {after}: the model is broken.{_blamed(damage)}",)
    if after > damage.unigram:
        too = f" So does the original ({before:.2f})." if before > damage.unigram else ""
        found.append(
            f"The model predicts worse than token frequencies alone: its loss of {after:.2f} nats per token is above "
            f"{damage.unigram:.2f}, that of giving every token its frequency in the evaluation text.{too}"
        )
    if rise > damage.tolerance:
        found.append(
            f"The loss rose by {rise:.2f} nats per token, from {before:.2f} to {after:.2f}; up to "
            f"{damage.tolerance:g} is tolerated.{_blamed(damage)}"
        )
    smaller = dense_parameters(size_bytes)
    if 0 < smaller < parameters and rise > (expected := rise_when_smaller(parameters, smaller)):
        found.append(
            f"A smaller dense model may do better: at 16 bits these {size_bytes:,} bytes hold {smaller:,} of "
            f"{parameters:,} parameters, and by a scaling law such a model, trained on as much text, would lose "
            f"{expected:.3f} nats per token; this one lost {rise:.3f}. That is an estimate: the law (Hoffmann et al. "
            "2022, arXiv:2203.15556, approach 3) was fitted to other models and other text."
        )
    return tuple(found)


def _blamed(damage: Damage) -> str:
    worst = damage.worst()
    if worst is None:
        return ""
    stage, rise = worst
    whole = damage.stages[-1].loss - damage.stages[0].loss
    return (
        f" Most of that came with {DID.get(stage, stage)}: {rise:+.2f}, of {whole:+.2f} by all stages together, on "
        f"{damage.windows} windows of the search text."
    )
