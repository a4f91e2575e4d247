"""AutoRound: signed gradient descent on rounding and ranges, block by block.

    iters200       its default, asymmetric grid
    iters50        the same with 50 iterations, its "light" recipe
    iters1000      its "best" recipe
    ext            200 iterations with its algorithm extension
    sym            200 iterations, symmetric grid
    rtn            no iterations: its rounding with searched ranges

All calibration windows are given; each step sees 8 of them, as by default.
"""

import shutil
from pathlib import Path

import peer
from safetensors import safe_open

VARIANTS = {
    "iters200": {"iters": 200},
    "iters50": {"iters": 50},
    "ext": {"iters": 200, "enable_alg_ext": True},
    "sym": {"iters": 200, "sym": True},
    "rtn": {"iters": 0},
    "iters1000": {"iters": 1000},
}


def quantize(job: peer.Job) -> peer.Quantized:
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    model = job.load()
    names = list(peer.linears(model))
    length = job.ids.shape[1]
    settings = {
        "bits": job.bits, "group_size": job.group_size, "sym": False, "seqlen": length, "nsamples": len(job.ids),
        "batch_size": 8, "seed": job.seed, **VARIANTS[job.variant],
    }  # fmt: skip
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.model_folder),
        scheme=f"W{job.bits}A16",
        dataset=list(job.ids.split(8)),
        device_map="cpu",
        enable_torch_compile=False,  # its default is true; compiling costs minutes a block, and saves none here
        **settings,
    )
    with job.timed():
        model, layers = rounder.quantize()
    modules = dict(model.named_modules())
    weights = {name: modules[name].weight.detach().float().clone() for name in names}
    return peer.Quantized(weights, packed_bytes(rounder, job.out / "packed", names), settings)


def packed_bytes(rounder, folder: Path, names: list[str]) -> int:
    """Bytes of codes, scales and zero points as AutoRound's own format packs them."""
    rounder.save_quantized(str(folder), format="auto_round:auto_gptq", inplace=True)
    total = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            for key in tensors.keys():
                layer, kind = key.rsplit(".", 1)
                if layer in names and kind != "bias":
                    total += peer.tensor_bytes(tensors.get_tensor(key))
    shutil.rmtree(folder)
    return total


if __name__ == "__main__":
    peer.run(quantize, ["auto-round"], list(VARIANTS))
