"""NVIDIA ModelOpt's auto_quantize: a format for every linear, by an integer program over squared gradient x error.

    presets         its INT4 weight-only and INT8 weight-only formats
    awq             the same with scaled input channels at 4 bits (its awq_lite)
    integers        symmetric integers of 2, 3, 4 bits by its custom formats, and INT8 weight-only
    integers-mse    the same, ranges by squared error instead of the largest value
    nvfp4           NVFP4 weight-only and INT8 weight-only; its kernel needs CUDA

Leaving a linear in 16 bits is always one of its choices; query, key and value share a format, and so do gate and up.
On a CPU it rounds and multiplies in floating point, and packs nothing. Bytes are therefore counted from the formats it
chose, without gaps: bits for each weight, 16 for the scale of a block of inputs (at 8 bits, of a row), and 16 for each
scaled input channel. It is told an average of bits, which counts the scales of blocks; the largest that keeps the model
within the target is found with its own solver. Scores do not depend on the target, so all cells of a model share them,
in its own checkpoint; the CPU seconds they took are counted for every cell.
"""

import copy
from contextlib import nullcontext

import peer
import torch
from torch import nn

INT8, INT4, AWQ, NVFP4 = "INT8_WEIGHT_ONLY_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT4_AWQ_CFG", "W4A16_NVFP4_CFG"
# (its format, bits, algorithm), None where it stays as it is
VARIANTS = {
    "presets": [(INT4, 4, None), (INT8, 8, None)],
    "awq": [(AWQ, 4, None), (INT8, 8, None)],
    "integers": [(INT4, 2, None), (INT4, 3, None), (INT4, 4, None), (INT8, 8, None)],
    "integers-mse": [(INT4, 2, "mse"), (INT4, 3, "mse"), (INT4, 4, "mse"), (INT8, 8, None)],
    "nvfp4": [(NVFP4, None, None), (INT8, 8, None)],
}
BATCH, SCALE_BITS, DENSE_BITS = 8, 16, 16
SCORED = 32  # windows, as many as AutoScheme gets


def quantize(job: peer.Job) -> peer.Quantized:
    sizes = peer.Sizes.of(job.load(), job.inputs)

    def cost(chosen: dict[str, int]) -> int:
        return sizes.whole_bytes(
            lambda name, rows, columns: stored(rows, columns, chosen[name], job.group_size, job.variant == "awq")
        )

    smallest = cost(dict.fromkeys(sizes.shapes, min(bits or 4 for _, bits, _ in VARIANTS[job.variant])))
    if smallest > job.target_bytes:
        raise peer.out_of_reach(smallest, job.target_bytes, sizes.dense_bytes)
    import modelopt.torch.quantization as mtq

    formats = [format_of(getattr(mtq, name), job.group_size, *rest) for name, *rest in VARIANTS[job.variant]]
    batches, n_scored = list(job.ids.split(BATCH)), SCORED // BATCH
    n_calibrated = 4 * n_scored if job.variant == "awq" else n_scored  # it takes a quarter for AWQ; ranges need no text
    job.shared.mkdir(parents=True, exist_ok=True)
    checkpoint = job.shared / f"{job.variant}.pt"

    def search(average: float) -> tuple[nn.Module, dict]:
        return mtq.auto_quantize(
            job.load(), {"effective_bits": average}, formats, batches,
            forward_step=lambda model, ids: model(input_ids=ids, labels=ids, use_cache=False),
            loss_func=lambda output, ids: output.loss,
            num_calib_steps=n_calibrated, num_score_steps=n_scored, disabled_layers=["*lm_head*"],
            checkpoint=str(checkpoint),
        )  # fmt: skip

    def chosen_at(average: float) -> dict[str, int]:
        config = mtq.get_auto_quantize_config(state, {"effective_bits": average})["quant_cfg"]
        bits = {e["quantizer_name"]: e["cfg"]["num_bits"] for e in config if e["enable"] and "cfg" in e}
        return {name: bits.get(f"{name}.weight_quantizer", DENSE_BITS) for name in sizes.shapes}

    kept = checkpoint.with_suffix(".json")
    if kept.exists():
        job.spent_elsewhere(kept)
    else:
        checkpoint.unlink(missing_ok=True)  # of a search that did not end
    with job.timed():
        with nullcontext() if kept.exists() else job.measuring(kept):
            _, state = search(DENSE_BITS)  # scores; nothing has to be rounded at this average
        average = largest(state, lambda average: cost(chosen_at(average)) <= job.target_bytes)
        model, state = search(average)
    chosen, weights = chosen_at(average), dense_weights(model, list(sizes.shapes))
    check(model, job.load(), weights, job.ids[:2])
    counted = sum(stored(*w.shape, chosen[name], job.group_size, job.variant == "awq") for name, w in weights.items())
    notes = ["bytes are counted from the formats it chose; nothing is packed on a CPU"]
    return peer.Quantized(weights, counted, {"average_bits": average}, notes, cost(chosen), chosen)


def format_of(preset: dict, group_size: int, bits: int | None, algorithm: str | None) -> dict:
    """One of its formats with another width, blocks of the group size, and scales counted in the average."""
    config = copy.deepcopy(preset)
    for entry in config["quant_cfg"]:
        if entry["quantizer_name"] == "*weight_quantizer" and bits:
            entry["cfg"]["num_bits"] = bits
            if "block_sizes" in entry["cfg"]:
                entry["cfg"]["block_sizes"] = {-1: group_size, "type": "static"}
                entry["cfg"]["effective_bits"] = bits + SCALE_BITS / group_size
    if algorithm:
        config["algorithm"] = algorithm
    return config


def stored(rows: int, columns: int, bits: int, group_size: int, scaled: bool) -> int:
    if bits == DENSE_BITS:
        return 2 * rows * columns
    channels = 2 * columns if scaled and bits == 4 else 0
    return channels + peer.linear_bytes(rows, columns, bits, columns if bits == 8 else group_size, SCALE_BITS)


def largest(state: dict, fits, steps: int = 14) -> float:
    """The largest average that fits, to a thousandth of a bit. Below the smallest, its solver answers at random."""
    costs = [each["costs"] for each in state["candidate_stats"].values()]
    low = DENSE_BITS * sum(map(min, costs)) / state["cost_denominator"] + 1e-6
    high = float(DENSE_BITS)
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def dense_weights(model: nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    """What its linears multiply by; a scale of the inputs is moved to the weight."""
    weights = {}
    with torch.no_grad():
        for name in names:
            layer = model.get_submodule(name)
            scale = layer.input_quantizer.pre_quant_scale
            weight = layer.weight_quantizer(layer.weight)
            weights[name] = (weight if scale is None else weight * scale).detach().float().clone()
    return weights


@torch.no_grad()
def check(model: nn.Module, plain: nn.Module, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> None:
    """The plain model with the dense weights computes what its own model computes."""
    for name, weight in weights.items():
        plain.get_submodule(name).weight.copy_(weight)
    difference = float((model(ids).logits - plain(ids).logits).abs().max())
    if difference > 1e-3:
        raise SystemExit(f"the dense weights give other logits than its own model, by {difference:.2g}")


if __name__ == "__main__":
    peer.run(quantize, ["nvidia-modelopt"], list(VARIANTS))
