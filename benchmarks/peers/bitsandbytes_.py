"""bitsandbytes: NormalFloat 4 by rounding to a fixed table, absolute maximum per block; it looks at no text.

    nf4           blocks of its smallest size on the CPU, 64 or less where it takes them
    nf4-double    the same, maxima quantized again to 8 bits

Blocks run along the flattened weight. There are no 2 or 3 bits.
"""

import peer

VARIANTS = {"nf4": False, "nf4-double": True}
BLOCKS = (32, 64)


def quantize(job: peer.Job) -> peer.Quantized:
    from bitsandbytes import functional

    if job.bits != 4:
        raise SystemExit("bitsandbytes has no grid of 2 or 3 bits")
    layers, weights, stored = peer.linears(job.load()), {}, 0
    block, notes = job.group_size, []
    if block not in BLOCKS:
        raise SystemExit(f"bitsandbytes has no blocks of {block}")
    for name, layer in layers.items():
        with job.timed():
            codes, state = functional.quantize_4bit(
                layer.weight.data, blocksize=block, quant_type="nf4", compress_statistics=VARIANTS[job.variant]
            )
        weights[name] = functional.dequantize_4bit(codes, state).float().reshape(layer.weight.shape)
        stored += peer.tensor_bytes(codes, state.absmax)  # float32 maxima, or their 8-bit codes
        if state.nested:
            stored += peer.tensor_bytes(state.state2.absmax, state.offset)
    notes.append("maxima are float32" if not VARIANTS[job.variant] else "maxima in 8 bits, with a float32 for each 256")
    return peer.Quantized(weights, stored, {"blocksize": block, "double": VARIANTS[job.variant]}, notes)


if __name__ == "__main__":
    peer.run(quantize, ["bitsandbytes"], list(VARIANTS))
