"""HQQ: ranges by half-quadratic fitting of the weights; it looks at no text.

axis1   groups along the inputs, the layout of every fast kernel, and of the other peers
axis0   groups along the outputs, its own default
rtn     plain rounding to the same asymmetric grid: what everything else is measured from
"""

import peer
import torch

VARIANTS = {
    "axis1": {"axis": 1, "optimize": True},
    "axis0": {"axis": 0, "optimize": True},
    "rtn": {"axis": 1, "optimize": False, "round_zero": True},
}


def quantize(job: peer.Job) -> peer.Quantized:
    from hqq.core.quantize import Quantizer

    layers = peer.linears(job.load())
    chosen = {"group_size": job.group_size, **VARIANTS[job.variant]}
    weights, stored = {}, 0
    for name, layer in layers.items():
        with job.timed():
            codes, meta = Quantizer.quantize(layer.weight.data, nbits=job.bits, device="cpu", **chosen)
        scale, zero = (meta[k].half() for k in ("scale", "zero"))  # HQQ keeps both in the 16 bits that it computes in
        stored += peer.tensor_bytes(codes, scale, zero)
        meta |= {"scale": scale.float(), "zero": zero.float(), "compute_dtype": torch.float32}
        weights[name] = Quantizer.dequantize(codes, meta)
    notes = []
    if job.bits == 3:
        n_weights = sum(w.numel() for w in weights.values())
        notes.append(f"packs ten 3-bit codes in 32 bits: {stored * 8 / n_weights:.2f} bits per weight")
    return peer.Quantized(weights, stored, chosen, notes)


if __name__ == "__main__":
    peer.run(quantize, ["hqq"], list(VARIANTS))
