"""llm-compressor: GPTQ through its `oneshot`, layer after layer, each fed by the quantized ones before it.

    gptq        asymmetric grid, columns by activation order inside the fixed groups (its default)
    mse         the same, ranges by its error-minimising search
    imatrix     the same, the search weighted by squared inputs
    symmetric   symmetric grid
    noorder     asymmetric grid, columns in their own order

Grids other than 4 and 8 bits are given as a scheme of our own; it takes them all.
"""

import shutil
from pathlib import Path

import peer
import torch
from safetensors import safe_open

VARIANTS = {
    "gptq": {},
    "mse": {"observer": "memoryless_mse"},
    "imatrix": {"observer": "imatrix_mse"},
    "symmetric": {"symmetric": True},
    "noorder": {"actorder": None},
}


def quantize(job: peer.Job) -> peer.Quantized:
    from compressed_tensors.offload import disable_onloading  # noqa: F401  fails early where the version differs
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, forward
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from torch.utils.data import DataLoader

    model = job.load()
    layers = peer.linears(model)
    chosen = dict(VARIANTS[job.variant])
    actorder = chosen.pop("actorder", "static")
    grid = QuantizationArgs(
        num_bits=job.bits,
        type="int",
        strategy="group",
        group_size=job.group_size,
        symmetric=chosen.get("symmetric", False),
        **({"observer": chosen["observer"]} if "observer" in chosen else {}),
    )
    recipe = GPTQModifier(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=grid)},
        ignore=[n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n not in layers],
        actorder=actorder,
    )
    loader = DataLoader([{"input_ids": row} for row in job.ids], batch_size=8)
    with job.timed():
        oneshot(
            model=model,
            dataset=loader,
            recipe=recipe,
            pipeline="sequential",
            num_calibration_samples=len(job.ids),
            max_seq_length=job.ids.shape[1],
        )
    weights = {}
    for name, layer in layers.items():
        with torch.no_grad():
            scale, zero = layer.weight_scale.half().float(), getattr(layer, "weight_zero_point", None)
            weights[name] = forward.fake_quantize(layer.weight.float(), scale, zero, layer.quantization_scheme.weights)
            layer.weight_scale.data = scale
    model.half()  # scales are stored in the model's type, and 16 bits are what anybody stores them in
    return peer.Quantized(weights, packed_bytes(model, job.out / "packed", layers), {"actorder": actorder, **chosen})


def packed_bytes(model, folder: Path, names) -> int:
    """Bytes of codes, scales and zero points in the compressed-tensors folder that it writes."""
    model.save_pretrained(folder, save_compressed=True)
    total = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            for key in tensors.keys():
                layer, kind = key.rsplit(".", 1)
                if layer in names and kind not in ("bias", "weight_shape"):
                    total += peer.tensor_bytes(tensors.get_tensor(key))
    shutil.rmtree(folder)
    return total


if __name__ == "__main__":
    peer.run(quantize, ["llmcompressor", "compressed-tensors"], list(VARIANTS))
