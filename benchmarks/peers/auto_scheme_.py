"""AutoRound's AutoScheme: a width for every linear, by a knapsack over |gradient x rounding error|, then its rounding.

    248-rtn, 2348-rtn              widths of 2, 4, 8 bits, or also 3; asymmetric grids, no iterations: plain rounding
    248-opt, 2348-opt              the same with symmetric grids, whose ranges it searches by activations
    248-iters200, 2348-iters200    asymmetric grids and 200 iterations, its default
    248-iters50, 2348-iters50      the same with 50 iterations

Its grids of 8 bits are always symmetric. It is told an average of bits; the largest that keeps the model within the
target is found with its own solver. Scores do not depend on the target, so all cells of a model share them, in its own
cache; the CPU seconds they took are counted for every cell.
"""

import os
from pathlib import Path

import peer
import torch
from auto_round_ import packed_bytes

WIDTHS = {"248": (2, 4, 8), "2348": (2, 3, 4, 8)}
ROUNDING = {
    "rtn": {"iters": 0, "sym": False},
    "opt": {"iters": 0, "sym": True},
    "iters200": {"iters": 200, "sym": False},
    "iters50": {"iters": 50, "sym": False},
}
VARIANTS = [f"{widths}-{rounding}" for widths in WIDTHS for rounding in ROUNDING]
SCALE_BITS = 16
SCORED = 32  # windows; by default it scores 16 of 256 tokens


def quantize(job: peer.Job) -> peer.Quantized:
    os.environ["AR_AUTO_SCHEME_CACHE"] = str(job.shared / "scores")
    widths, _, rounding = job.variant.partition("-")
    bits, n, length = WIDTHS[widths], len(job.ids), job.ids.shape[1]
    model = job.load()
    sizes, n_weights = peer.Sizes.of(model, job.inputs), sum(m.weight.numel() for m in peer.linears(model).values())
    cost = lambda chosen: sizes.whole_bytes(
        lambda name, rows, columns: peer.linear_bytes(
            rows, columns, chosen[name], job.group_size, SCALE_BITS + chosen[name]
        )
    )
    smallest = cost(dict.fromkeys(sizes.shapes, min(bits)))
    if smallest > job.target_bytes:
        raise peer.out_of_reach(smallest, job.target_bytes, sizes.dense_bytes)
    from auto_round import AutoRound, AutoScheme
    from transformers import AutoTokenizer

    give_tokens(job.ids)
    watch = Scores(job)

    def rounder(average: float):
        options = [f"W{b}A16G{job.group_size}" for b in bits]
        scheme = AutoScheme(
            avg_bits=average, options=options, nsamples=min(n, SCORED), seqlen=length, dataset="calibration",
            device_map="cpu",
        )  # fmt: skip
        return AutoRound(
            job.load(), AutoTokenizer.from_pretrained(job.model_folder), scheme=scheme, dataset="calibration",
            device_map="cpu", enable_torch_compile=False, seqlen=length, nsamples=n, batch_size=8, seed=job.seed,
            **ROUNDING[rounding],
        )  # fmt: skip

    with job.timed():
        rounder(max(bits) + (SCALE_BITS + max(bits)) / job.group_size).post_init()  # scores, and chooses nothing yet
        budget = watch.largest_budget(bits, lambda chosen: cost(chosen) <= job.target_bytes)
        average = (budget + 0.5) / n_weights  # it rounds the product down
        last = rounder(average)
        model, layers = last.quantize()
    for kept in watch.read_back({(b, ROUNDING[rounding]["sym"] or b == 8) for b in bits}):
        job.spent_elsewhere(kept)
    modules = dict(model.named_modules())
    chosen = {name: int(modules[name].bits) for name in sizes.shapes}
    weights = {name: modules[name].weight.detach().float().clone() for name in chosen}
    counted = sum(
        peer.linear_bytes(*w.shape, chosen[k], job.group_size, SCALE_BITS + chosen[k]) for k, w in weights.items()
    )
    stored = packed_bytes(last, job.out / "packed", list(chosen))
    notes = [] if counted == stored else [f"{counted} bytes were counted, its own packing has {stored}"]
    settings = {"average_bits": average, "options": bits, "scored_windows": min(n, SCORED), **ROUNDING[rounding]}
    return peer.Quantized(weights, stored, settings, notes, cost(chosen), chosen)


def give_tokens(ids: torch.Tensor) -> None:
    """AutoScheme takes the name of a data set and no tokens: whatever it asks for, it gets the calibration windows."""
    from auto_round import calib_dataset
    from auto_round.auto_scheme import delta_loss

    def loader(tokenizer, seqlen, dataset_name=None, seed=42, bs=8, nsamples=512):
        return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids[:nsamples].split(bs)]

    calib_dataset.get_dataloader = delta_loss.get_dataloader = loader


class Scores:
    """Looks on while AutoScheme scores and solves: what its solver is given, how long scoring a width takes."""

    def __init__(self, job: peer.Job):
        from auto_round.auto_scheme import delta_loss

        self.folder, self.scored = job.shared, set()
        self.solve, score = delta_loss.choose_bits_per_layer_with_path, delta_loss.get_score_for_scheme

        def watched_solve(layers, budget, max_states=None):
            self.layers, self.budget = layers, budget
            return self.solve(layers, budget, max_states)

        def watched_score(model, tokenizer, names, *rest, **more):
            layer = model.get_submodule(next(iter(names)))
            scheme = (layer.bits, layer.sym)
            self.scored.add(scheme)
            with job.measuring(self._file(*scheme)):
                return score(model, tokenizer, names, *rest, **more)

        delta_loss.choose_bits_per_layer_with_path = watched_solve
        delta_loss.get_score_for_scheme = watched_score

    def _file(self, bits: int, symmetric: bool) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"scoring-{bits}-{'symmetric' if symmetric else 'asymmetric'}.json"

    def read_back(self, schemes: set[tuple[int, bool]]) -> list[Path]:
        """What earlier cells spent on scores that this one found; a scheme is bits and whether it is symmetric."""
        return [self._file(*one) for one in schemes - self.scored]

    def largest_budget(self, bits: tuple[int, ...], fits) -> int:
        """The largest budget, in bits of all linears, whose solution fits."""
        costs = [[option[1] for option in options] for options in self.layers.values()]
        low, high = sum(map(min, costs)), sum(map(max, costs))
        while low < high:
            middle = (low + high + 1) // 2
            _, path = self.solve(self.layers, middle)
            if fits({name: bits[index] for names, index in path for name in names}):
                low = middle
            else:
                high = middle - 1
        return low


if __name__ == "__main__":
    peer.run(quantize, ["auto-round"], VARIANTS)
