"""Models timed in turn, A B B A A B, each time in a fresh process: a machine that slows down slows all of them.

Ratios are taken within a round, so that drift from round to round cancels.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qpruner.judge.speed import SpeedReport, measure_in_fresh_process

ROUNDS = 3
COMPARED = (
    "prefill_tokens_per_second", "decode_tokens_per_second", "seconds_to_first_token", "tensor_bytes",
    "resident_bytes", "peak_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class Ratio:
    """Of one model to another: the median over rounds, the smallest and the largest."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Turns:
    """reports: of each model, one for every round."""

    reports: Mapping[str, tuple[SpeedReport, ...]]

    @property
    def rounds(self) -> int:
        return min(map(len, self.reports.values()))

    def typical(self, name: str) -> dict:
        """As a report: the median of every number over rounds, with a standard error where it was compared.

        With one round the standard error is None.
        """
        values = {key: [getattr(r, key) for r in self.reports[name]] for key in SpeedReport.__dataclass_fields__}
        errors = {
            f"{key}_standard_error": statistics.stdev(values[key]) / len(values[key]) ** 0.5
            if len(values[key]) > 1 and None not in values[key]
            else None
            for key in COMPARED
        }
        medians = {
            key: each[0] if None in each or isinstance(each[0], str) else statistics.median(each)
            for key, each in values.items()
        }
        return medians | errors

    def ratios(self, name: str, to: str) -> dict[str, Ratio]:
        """What was compared of one model, over the same of another in the same round."""
        found = {}
        for key in COMPARED:
            pairs = zip(self.reports[name], self.reports[to], strict=True)
            each = [(getattr(a, key), getattr(b, key)) for a, b in pairs]
            if all(a is not None and b for a, b in each):
                ratios = [a / b for a, b in each]
                found[key] = Ratio(statistics.median(ratios), min(ratios), max(ratios))
        return found


def in_turn(
    folders: Mapping[str, Path],
    *,
    rounds: int = ROUNDS,
    threads: int | None = None,
    trust_remote_code: bool = False,
    on_round: Callable[[int, int], None] | None = None,
) -> Turns:
    """Time saved models in turn; a few seconds a round for each small one. Every other round goes the other way."""
    names, found = list(folders), {name: [] for name in folders}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            how = dict(threads=threads, trust_remote_code=trust_remote_code)
            found[name].append(measure_in_fresh_process(folders[name], **how))
        if on_round is not None:
            on_round(number + 1, rounds)
    return Turns({name: tuple(each) for name, each in found.items()})
