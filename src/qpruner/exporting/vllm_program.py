"""vLLM computing logits from a folder; a program for an interpreter that has vLLM and not qpruner.

Where vLLM has no kernel for the codes of a folder on this machine, or is asked for float32, a product written out
here stands in for its kernels. What is tested then is all the rest: its configuration, loader, fused linears, layout
of codes, scales and zero points, attention and cache.
"""

import json
import os
import sys

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model is in this process, where its logits can be seen
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # one token follows the last, and is not computed
    "HF_HUB_OFFLINE": "1",
}


def main(request_path: str, answer_path: str) -> None:
    with open(request_path) as file:
        request = json.load(file)
    os.environ |= SETTINGS
    sys.modules["qpruner"] = None  # from here on its import is an error
    import numpy as np
    import torch
    import vllm

    torch.set_num_threads(request["threads"])
    try:
        model, kernels = started(request, torch, vllm)
        found = np.concatenate(logits_of(model, request, vllm), dtype=np.float32)
        head = {"class": class_of(model), "shape": found.shape, "kernels": kernels, "version": vllm.__version__}
    except Exception as error:  # whatever vLLM raises is what it says of the folder
        head, found = {"refused": f"{type(error).__name__}: {error}"}, np.empty(0)
    with open(answer_path, "wb") as file:
        file.write(json.dumps(head).encode() + b"\n" + found.tobytes())


def started(request: dict, torch, vllm):
    """The model in vLLM, and the names of the kernels that multiply codes; none for plain weights."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16 as scheme
    from vllm.platforms import current_platform

    available = linear._POSSIBLE_KERNELS[current_platform._enum]
    if request["written_out"]:
        available.insert(0, written_out(torch, linear.MPLinearKernel))
    how = dict(
        model=request["folder"], model_impl=request["model_impl"], dtype=request["dtype"],
        trust_remote_code=request["code"], seed=0,
        max_model_len=len(request["tokens"]) + 1, max_num_seqs=1, enforce_eager=True, skip_tokenizer_init=True,
        enable_prefix_caching=False, disable_log_stats=True, gpu_memory_utilization=0.9,
    )  # fmt: skip
    if request["adapter"]:
        how |= dict(enable_lora=True, max_lora_rank=request["rank"])
    model = vllm.LLM(**how)
    return model, sorted(scheme.CompressedTensorsWNA16._kernel_backends_being_used)


def class_of(model) -> str:
    return model.apply_model(lambda module: type(module).__name__)[0]


def logits_of(model, request: dict, vllm) -> list:
    """(tokens, vocabulary): of all tokens but the last, then of the last, which vLLM computes first."""
    seen = []

    def watch(module):
        compute = module.compute_logits

        def watched(hidden, *args, **kwargs):
            logits = compute(hidden, *args, **kwargs)
            seen.append(logits.float().cpu().numpy())
            return logits

        module.compute_logits = watched

    model.apply_model(watch)
    ask = vllm.SamplingParams(prompt_logprobs=1, max_tokens=1, temperature=0.0, detokenize=False)
    beside = {}
    if request["adapter"]:
        from vllm.lora.request import LoRARequest

        beside["lora_request"] = LoRARequest("recovered", 1, request["adapter"])
    model.generate([{"prompt_token_ids": request["tokens"]}], ask, use_tqdm=False, **beside)
    n = len(request["tokens"])
    rows = seen[::-1]
    if [len(row) for row in rows] != [n - 1, 1]:
        raise RuntimeError(f"vLLM computed logits of {[len(row) for row in seen]} tokens, not of 1 and {n - 1}")
    return rows


def written_out(torch, kernel: type) -> type:
    class WrittenOut(kernel):
        """Decodes weights once and multiplies them as plain ones."""

        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, config) -> tuple[bool, None]:
            return True, None

        def process_weights_after_loading(self, layer) -> None:
            codes, scales, zeros = (None if part is None else part.data for part in self._get_weight_params(layer))
            (d_in, d_out), bits = self.config.partition_weight_shape, self.config.weight_type.size_bits
            in_group = d_in // scales.shape[1]
            lowest = 2 ** (bits - 1)
            if self.config.zero_points:
                lowest = unpacked(torch, zeros.T, bits, d_out).T.repeat_interleave(in_group, 1)
            scales = scales.float().repeat_interleave(in_group, 1)
            self.weight = ((unpacked(torch, codes, bits, d_in) - lowest) * scales).to(self.config.act_type)

        def apply_weights(self, layer, x, bias=None):
            return torch.nn.functional.linear(x, self.weight, bias)

    return WrittenOut


def unpacked(torch, words, bits: int, n: int):
    """n codes of each row of int32 words: code j is bits [j bits, (j + 1) bits) of the row, across words."""
    first = torch.arange(n, device=words.device) * bits
    words = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    both = words[:, first // 32] | words[:, first // 32 + 1] << 32
    return both >> first % 32 & 2**bits - 1


if __name__ == "__main__":
    del sys.path[0]  # this file's folder, whose files have names of packages
    main(*sys.argv[1:])
