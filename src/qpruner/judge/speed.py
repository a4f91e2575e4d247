"""Memory and speed of a saved model, measured in a process of its own.

    python -m qpruner.judge.speed FOLDER [--threads N] [--dtype float32] [--trust-remote-code]

prints one line of JSON. A fresh process, because memory that was freed elsewhere would hide what the model takes, and
because the highest memory use of a process never goes down again.
"""

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
import transformers
from torch import nn
from transformers.utils import logging as hf_logging

from qpruner.model.load import context_length, original_config

PROMPT_TOKENS = 128
NEW_TOKENS = 32
SECONDS = 1.5  # for the repeats of one measurement, after the first


@dataclass(frozen=True)
class SpeedReport:
    """What one model needs and does, in one process.

    resident_bytes: memory the process gained by loading. tensor_bytes: parameters and buffers, shared ones once.
    peak_bytes: the most the whole process held, Python and torch included. Rates are medians in tokens per second, for
    one sequence; `decode_tokens_per_second` is None where the context leaves no room for a new token.
    seconds_to_first_token: from a prompt to the choice of the first new token, the median too.
    """

    dtype: str
    threads: int
    load_seconds: float
    resident_bytes: int
    tensor_bytes: int
    peak_bytes: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    seconds_to_first_token: float

    def to_dict(self) -> dict:
        return asdict(self)


def measure_in_fresh_process(
    folder: str | Path, *, threads: int | None = None, dtype: str = "float32", trust_remote_code: bool = False
) -> SpeedReport:
    """Start Python anew, load the folder there and measure; a few seconds for a small model."""
    command = [sys.executable, "-m", "qpruner.judge.speed", str(folder), "--dtype", dtype]
    command += ["--threads", str(threads)] if threads else []
    command += ["--trust-remote-code"] if trust_remote_code else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(f"measuring the speed of {folder} failed with status {done.returncode}:\n{last}")
    return SpeedReport(**json.loads(done.stdout.strip().splitlines()[-1]))


def measure(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> SpeedReport:
    """Load and time in this process; `measure_in_fresh_process` is what to call from outside."""
    options = dict(local_files_only=True, trust_remote_code=trust_remote_code)
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    with torch.device("meta"):  # imports the modelling code, whose memory is then not counted as the model's
        original = original_config(config, folder, trust_remote_code=trust_remote_code)
        transformers.AutoModelForCausalLM.from_config(original, trust_remote_code=trust_remote_code)
    before, start = resident_bytes(), time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    load_seconds = time.perf_counter() - start
    _touch(model)
    resident = resident_bytes() - before

    context = context_length(model.config) or PROMPT_TOKENS + NEW_TOKENS
    new = min(NEW_TOKENS, context // 2)
    ids = torch.randint(0, model.get_input_embeddings().num_embeddings, (1, max(1, min(PROMPT_TOKENS, context - new))))
    prefill, decode, first = _rates(model, ids, new)
    return SpeedReport(
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        load_seconds=load_seconds,
        resident_bytes=resident,
        tensor_bytes=tensor_bytes(model),
        peak_bytes=peak_bytes(),
        prompt_tokens=ids.shape[1],
        new_tokens=new,
        prefill_tokens_per_second=prefill,
        decode_tokens_per_second=decode,
        seconds_to_first_token=first,
    )


def _rates(model: nn.Module, ids: torch.Tensor, new: int) -> tuple[float, float | None, float]:
    """Median tokens per second over the prompt, and one by one after it, always taking the likeliest token; and the
    median seconds until the first was chosen."""
    prefill, decode, first = [], [], []
    begin = None  # the first round warms up and is not counted
    while begin is None or not prefill or (time.perf_counter() - begin < SECONDS and len(prefill) < 20):
        with torch.inference_mode():
            start = time.perf_counter()
            out = model(input_ids=ids, use_cache=True)
            middle = time.perf_counter()
            token = out.logits[:, -1:].argmax(-1)
            chosen = time.perf_counter()
            for _ in range(new):
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            end = time.perf_counter()
        if begin is None:
            begin = time.perf_counter()
            continue
        prefill.append(ids.shape[1] / (middle - start))
        decode.append(new / (end - chosen))
        first.append(chosen - start)
    return statistics.median(prefill), statistics.median(decode) if new else None, statistics.median(first)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers; a storage that several of them share counts once."""
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _touch(model: nn.Module) -> None:
    """Read a byte of every page: weights that are mapped from the file take no memory until they are used."""
    for tensor in [*model.parameters(), *model.buffers()]:
        torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())[::4096].sum()


def resident_bytes() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def peak_bytes() -> int:
    """The most this process held. Linux keeps it per program in VmHWM; elsewhere `ru_maxrss` has to do."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qpruner.judge.speed", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, help="threads of torch; its own choice if not given")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--trust-remote-code", action="store_true", help="let code that came with the model run")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = measure(args.folder, getattr(torch, args.dtype), trust_remote_code=args.trust_remote_code)
    print(json.dumps(report.to_dict()))


if __name__ == "__main__":
    main()
