"""GPTQModel: GPTQ and what it builds on it; asymmetric unless the name says otherwise.

gptq        its default: columns in an order that leaves groups where they are ("act group aware")
symmetric   the same with a symmetric grid
mse         the same with ranges that minimise the error
gptaq       targets from the original stream (GPTAQ, formerly `v2`)
gptaq-mse   both
desc_act    columns by activation order, groups follow: a grid that few kernels run
foem        its first-order correction
"""

import os

import peer
import torch

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it takes one, and then refuses to start

VARIANTS = {
    "gptq": {},
    "symmetric": {"sym": True},
    "mse": {"mse": 2.4},
    "gptaq": {"gptaq": True},
    "gptaq-mse": {"gptaq": True, "mse": 2.4},
    "desc_act": {"desc_act": True},
    "desc_act-mse": {"desc_act": True, "mse": 2.4},
    "foem": {"foem": True},
}
CLASSES = {"gptaq": "GPTAQConfig", "foem": "FOEMConfig"}


def quantize(job: peer.Job) -> peer.Quantized:
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization import config

    names = list(peer.linears(job.load()))
    chosen = {"sym": False, "mse": 0.0, **VARIANTS[job.variant]}
    made = {k: getattr(config, CLASSES[k])() if k in CLASSES else v for k, v in chosen.items()}
    settings = config.QuantizeConfig(
        bits=job.bits, group_size=job.group_size, device="cpu", format="gptq_v2", offload_to_disk=False, **made
    )
    model = GPTQModel.load(str(job.model_folder), settings, dtype=torch.float32)
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in job.ids]
    with job.timed():
        model.quantize(rows, batch_size=8, calibration_sort=None, backend=BACKEND.TORCH)
    modules = dict(model.model.named_modules())
    weights, stored = {}, 0
    for name in names:
        packed = modules[name]
        with torch.no_grad():
            weights[name] = packed.dequantize_weight().T.float().contiguous()
        tensors = {k: t for k, t in packed.state_dict().items() if k != "bias"}
        stored += peer.tensor_bytes(*tensors.values())
        if name == names[0]:
            print({k: (tuple(t.shape), t.dtype) for k, t in tensors.items()}, type(packed))
    return peer.Quantized(weights, stored, chosen)


if __name__ == "__main__":
    peer.run(quantize, ["gptqmodel"], list(VARIANTS))
