"""The model and the tokens that every peer gets: MODEL -> DIR with two files of token ids and a float32 copy.

    python benchmarks/peers/inputs.py MODEL -o DIR [--calibration-text FILE] [--evaluation-text FILE]

    calibration.safetensors, evaluation.safetensors   ids, int64, (windows, length)
    model/                                            the model in float32, and its tokenizer
    inputs.json                                       digests, and the weights counted before padding

Without texts it is the bundled corpus. Where the inputs of a linear are no whole number of groups, as in an MLP of
172 channels, the copy gets channels of zeros up to the next multiple, which changes nothing of the function: peers
refuse such widths, or fall back to other grids, each in its own way. Stored bytes are counted with the padding.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
from peer import linears
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from qpruner.model import load
from qpruner.model.corpus import Corpus, bundled_corpus, read_corpus, token_windows
from qpruner.model.overlap import check_disjoint

MOST_EVALUATION_WINDOWS = 200


def pad(model: nn.Module, group_size: int) -> int:
    """Zero channels behind the MLP's own, so that its width is a multiple of group_size; how many were added."""
    config = model.config
    width = config.intermediate_size
    more = -width % group_size
    if not more:
        return 0
    for module in linears(model).values():
        weight, bias = module.weight.data, module.bias
        rows, columns = (more if n == width else 0 for n in weight.shape)
        module.weight.data = nn.functional.pad(weight, (0, columns, 0, rows))
        if bias is not None and rows:
            bias.data = nn.functional.pad(bias.data, (0, rows))
        module.out_features, module.in_features = module.weight.shape
    config.intermediate_size = width + more
    return more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--calibration-text", type=Path)
    parser.add_argument("--evaluation-text", type=Path)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of calibration windows")
    args = parser.parse_args()

    def corpus(path: Path | None, role: str) -> Corpus:
        return read_corpus(path, role) if path else bundled_corpus(role)

    source = load.inspect_source(args.model)
    tokenizer = load.load_tokenizer(source)
    calibration, evaluation = (
        corpus(args.calibration_text, "calibration"),
        corpus(args.evaluation_text, "evaluation"),
    )
    check_disjoint(calibration, evaluation)
    cut = {
        "calibration": token_windows(
            calibration, tokenizer, length=args.length, n_windows=args.windows, seed=args.seed
        ),
        "evaluation": token_windows(evaluation, tokenizer, length=args.length).first(MOST_EVALUATION_WINDOWS),
    }
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    few = cut["evaluation"].ids[:2]
    with torch.no_grad():
        before = model(few).logits
        n_weights = sum(m.weight.numel() for m in linears(model).values())
        n_padded = pad(model, args.group_size)
        difference = float((model(few).logits - before).abs().max())
    if difference > 1e-3:
        raise SystemExit(f"padding changed the logits by {difference:.2g}: it does not fit this architecture")
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    facts = {"model": args.model, "n_weights": n_weights, "padded_channels": n_padded, "seed": args.seed}
    for name, windows in cut.items():
        save_file({"ids": windows.ids.contiguous()}, args.out / f"{name}.safetensors")
        facts[name] = {
            "text": windows.corpus_name, "shape": list(windows.ids.shape), "first_token": windows.first_token,
            "digest": hashlib.sha256(windows.ids.numpy().tobytes()).hexdigest(), "corpus_digest": windows.corpus_digest,
            "covered_bytes": windows.covered_bytes,
        }  # fmt: skip
    (args.out / "inputs.json").write_text(json.dumps(facts) + "\n")
    print({k: v["shape"] if isinstance(v, dict) else v for k, v in facts.items()})


if __name__ == "__main__":
    main()
