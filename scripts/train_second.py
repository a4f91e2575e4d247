"""Train a small model of a second family from scratch: GPT-NeoX, with parallel attention, LayerNorm and biases.

    python scripts/train_second.py --out build/models/neox-m --hidden 160 --layers 6 --heads 10 --minutes 15

It reads the bundled model's tokens and learns from the same modules, so both are judged on the same held-out text.
Optimizers and protocol: `training.py`.
"""

import shutil

import torch
from training import BUNDLED, arguments, run
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from qpruner.model import pystdlib

CONTEXT = 512


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], minutes=15)
    parser.add_argument("--hidden", type=int, default=160)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=10)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden, intermediate_size=4 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, classifier_dropout=0.0,
    )  # fmt: skip
    run(GPTNeoXForCausalLM(config), tokenizer, pystdlib.heldout_modules(BUNDLED), args)
    tokenizer.save_pretrained(args.out)
    shutil.copy(BUNDLED / pystdlib.HELDOUT_FILE, args.out)


if __name__ == "__main__":
    main()
