"""Claim: judged one story a window, hybrid-grained pruning of stories260K loses less than others' Taylor scores.

    python benchmarks/story_windows.py STUDY --text ../shared/data/tinystories/dev.jsonl.gz [--out FILE.json]

A study's windows hold several stories, which stories260K was not trained on; the losses it is compared with are of
single stories. This judges the artifacts that a study kept (`--keep-artifacts`) that way: `<s>` and one story, cut to
the model's context, every token with the same weight. The standard error is of the mean increase over stories.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qpruner  # noqa: F401  registers the model type of its artifacts
from qpruner.facts import machine
from qpruner.model.corpus import read_corpus


def story_losses(folder: str, stories: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss and number of predicted tokens of every story."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums, counts = [], []
    with torch.no_grad():
        for story in stories:
            ids = [tokenizer.bos_token_id, *tokenizer(story, add_special_tokens=False)["input_ids"]]
            ids = torch.tensor([ids[: model.config.max_position_embeddings]])
            counts.append(ids.shape[1] - 1)
            sums.append(float(model(ids, labels=ids).loss) * counts[-1])
    return torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--model", default="../shared/models/stories260K")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    stories = read_corpus(args.text, "evaluation").documents
    original, counts = story_losses(args.model, stories)
    dense = float(original.sum() / counts.sum())
    print(f"{len(stories)} stories, {int(counts.sum()):,} tokens; the original loses {dense:.4f} nats per token")
    found: dict[tuple[str, str], list[torch.Tensor]] = {}
    for cell in json.loads((args.study / "study.json").read_text())["cells"]:
        folder = args.study / "runs" / cell["run"]
        if cell["model"] == Path(args.model).name and folder.is_dir():
            losses, _ = story_losses(str(folder), stories)
            found.setdefault((cell["limit"], cell["recipe"]), []).append(losses - original)
    rows = []
    for (limit, recipe), runs in found.items():
        increase = torch.stack(runs).mean(0)  # over seeds, of every story
        mean = float(increase.sum() / counts.sum())
        error = float((increase - mean * counts).std() / counts.mean() / len(stories) ** 0.5)  # of a ratio of means
        rows.append(dict(limit=limit, recipe=recipe, seeds=len(runs), increase=mean, standard_error=error))
        print(f"{limit:10} {recipe:40} {mean:+.4f} ± {error:.4f}  ({len(runs)} seeds)", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    if args.out:
        date = time.strftime("%Y-%m-%d")
        facts = dict(commit=commit, date=date, machine=machine(), torch=torch.__version__, dense=dense, rows=rows)
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
