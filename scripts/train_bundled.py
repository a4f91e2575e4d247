"""Train the bundled model further, in the same shape and under the same rule of what is held out.

    python scripts/train_bundled.py --out DIR --minutes 60 --stdlib LIB [LIB ...]

Texts, optimizers and protocol: `training.py`.
"""

from pathlib import Path

import torch
from training import BUNDLED, arguments, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from qpruner.model import pystdlib


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], minutes=60)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    run(model, tokenizer, pystdlib.heldout_modules(args.model), args, tokens_before=8_000_000)


if __name__ == "__main__":
    main()
