"""torchao: integers by rounding, through `quantize_`; it looks at no text.

    intx          its weight-only integers of any width, symmetric
    intx-asym     the same with zero points
    intx-hqq      symmetric, ranges by its half-quadratic fit of the scale

The dense weights come from its own `dequantize`. Stored bytes are those of the tensors that it keeps.
"""

import peer
import torch

VARIANTS = ("intx-asym", "intx", "intx-hqq")


def quantize(job: peer.Job) -> peer.Quantized:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.quant_primitives import MappingType
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    model = job.load()
    layers = peer.linears(model)
    chosen = {"mapping_type": MappingType.SYMMETRIC if job.variant == "intx" else MappingType.ASYMMETRIC}
    if job.variant == "intx-hqq":
        chosen["intx_choose_qparams_algorithm"] = IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY
        chosen["mapping_type"] = MappingType.SYMMETRIC
    settings = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{job.bits}"),
        granularity=PerGroup(job.group_size),
        scale_dtype=torch.float16,
        **chosen,
    )
    wanted = set(layers)
    with job.timed():
        quantize_(model, settings, filter_fn=lambda module, name: name in wanted)
    modules = dict(model.named_modules())
    weights, stored = {}, 0
    for name in wanted:
        weight = modules[name].weight
        weights[name] = weight.dequantize().float()
        parts = [getattr(weight, k) for k in weight.__tensor_flatten__()[0]]
        stored += peer.tensor_bytes(*parts)
    return peer.Quantized(
        weights, stored, {k: str(v) for k, v in chosen.items()}, ["codes of fewer than 8 bits take 8 bits each"]
    )


if __name__ == "__main__":
    peer.run(quantize, ["torchao"], list(VARIANTS))
