"""Claim: Taylor scores, 20 % pruning and saving of a LLaMA-7B take at most 4 GiB of memory, and at most twice the time
of the bare forward and backward arithmetic.

    python benchmarks/streaming_7b.py [--folder DIR] [--score element-first] [--dtype bfloat16] [--profile]

Makes a checkpoint of the shape of LLaMA-7B with random bfloat16 weights (13.5 GB, sharded) in DIR and removes it and
everything else at the end; needs 30 GB of disk. Each measurement is a process of its own: its peak is `ru_maxrss`. The
bare arithmetic is one decoder layer of the same shape, in memory, on the same windows in the same dtype, times the
number of layers, and the head once; it is measured before and after the job. --profile adds peaks against depth and
width.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

WINDOWS, LENGTH = 10, 128
GIB = 2**30


def config_of(hidden: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=11008 * hidden // 4096, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128, vocab_size=32000, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def make_checkpoint(folder: Path, config: LlamaConfig) -> None:
    """One shard for each decoder layer and one for the rest; written tensor by tensor."""
    from qpruner.model.cost import named_tensors
    from qpruner.model.skeleton import build_skeleton
    from qpruner.model.tensors import write_safetensors

    folder.mkdir(parents=True)
    specs = {name: ("BF16", shape) for name, (_, shape) in named_tensors(build_skeleton(config)).items()}
    shard = lambda name: f"model-{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors"
    generator = torch.Generator().manual_seed(0)

    def values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.randn(shape, generator=generator).mul_(0.02).bfloat16()

    for file in sorted({shard(name) for name in specs}):
        inside = {name: spec for name, spec in specs.items() if shard(name) == file}
        write_safetensors(folder / file, inside, ((name, values(name, shape)) for name, (_, shape) in inside.items()))
    index = {"metadata": {}, "weight_map": {name: shard(name) for name in specs}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)


def job(folder: Path, output: Path, score: str, dtype: str) -> dict:
    """What is measured. Peak memory before anything is read is given too: Python, torch, transformers."""
    from qpruner import recipe
    from qpruner import shape as shaping
    from qpruner.artifact.opened import open_stream
    from qpruner.artifact.save import write_artifact
    from qpruner.decide import widths
    from qpruner.decide.scores import SCORERS
    from qpruner.do.streamed import LayerByLayer
    from qpruner.model import load, memory
    from qpruner.model.scratch import Scratch
    from qpruner.model.skeleton import build_skeleton
    from qpruner.model.stream import Stream
    from qpruner.model.surgery import narrow_
    from qpruner.model.tensors import Cut, Named, Stored

    start = time.monotonic()
    source = load.inspect_source(folder)
    shape = shaping.shape_of(source)
    n_layers = len(shape.graph.layers)
    chosen = recipe.load(f"llm-pruner-20[steps=0,adapter_rank=0,layers=[{n_layers // 8},{n_layers - n_layers // 16}]]")
    at_rest = memory.peak_bytes()
    counts = widths.counts(shape.graph, chosen, chosen.kept)
    asked = chosen.model_copy(update={"calibration_windows": WINDOWS, "precision": dtype, "score": score})
    work = shaping.work_for(shape, asked, counts, LENGTH)
    sizes = memory.Sizes(shape.tensors, shape.graph)
    promised = memory.stages_of(sizes, work, shape.hidden_size, resident=False)["importance"]
    ids = torch.randint(3, 32000, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))
    show = lambda done, total, pace: print(f"layer {done} of {total}: {pace}", file=sys.stderr, flush=True)
    scratch = Scratch(output / "scratch")
    stream = open_stream(source, dtype=getattr(torch, dtype))
    scores = SCORERS[score](stream, shape.graph, ids, torch.Generator(), scratch, show)
    scratch.clear()
    scored = time.monotonic()
    kept = widths.select(shape.graph, scores, counts)
    plan = shape.plan(chosen, kept, 16)
    model = build_skeleton(source.config)
    whole = Named(model, Stored.of(folder))
    narrow_(model, shape.graph, kept)
    pruned = Stream(model, Cut(whole, shape.graph, kept))
    doing = LayerByLayer(pruned, shape.graph, plan, shape.stored(plan), scratch)
    write_artifact(
        output / "artifact", doing.tensors(torch.bfloat16), dict, shape.graph, plan, expected=shape.stored(plan),
        architecture=type(model).__name__, dtype=torch.bfloat16, source=source,
    )  # fmt: skip
    end = time.monotonic()
    size = shape.size(plan)
    on_disk = sum(path.stat().st_size for path in (output / "artifact").glob("*.safetensors"))
    assert on_disk == size.total, (on_disk, size.total)
    return dict(
        scores_s=scored - start, saving_s=end - scored, total_s=end - start, at_rest=at_rest, promised=promised,
        peak=memory.peak_bytes(), parameters=(size.linears + size.embeddings + size.other) // 2, artifact_bytes=on_disk,
    )  # fmt: skip


def arithmetic(score: str, dtype: str) -> dict:
    """Seconds of forward and backward, weight gradients included, without reading or writing anything."""
    from qpruner.decide.saliences import batch_of

    config = config_of(4096, 1)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    model.lm_head.requires_grad_(False)
    ids = torch.randint(3, 32000, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))
    layer, rotary = model.model.layers[0], model.model.rotary_emb
    together = batch_of(ids) if score in ("element-first", "vector") else 1  # as the job does it
    hidden = torch.randn(WINDOWS, LENGTH, 4096).to(getattr(torch, dtype)).split(together)
    position = rotary(hidden[0], torch.arange(LENGTH)[None])

    def one_layer() -> float:
        start = time.monotonic()
        for batch in hidden:
            x = batch.clone().requires_grad_()
            layer(x, position_embeddings=position, attention_mask=None).backward(batch)
        layer.zero_grad()
        return time.monotonic() - start

    def head() -> float:
        start = time.monotonic()
        for batch, rows in zip(hidden, ids.split(together), strict=True):
            x = batch.clone().requires_grad_()
            logits = model.lm_head(model.model.norm(x)).float()
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).backward()
        return time.monotonic() - start

    one_layer(), head()
    layers, ends = sorted(one_layer() for _ in range(5)), sorted(head() for _ in range(3))
    return dict(layer_s=layers[2], head_s=ends[1], total_s=32 * layers[2] + ends[1])


def in_fresh_process(what: str, *words: str) -> dict:
    command = [sys.executable, __file__, "--only", what, *words]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def measured(folder: Path, hidden: int, layers: int, score: str, dtype: str) -> dict:
    with tempfile.TemporaryDirectory(dir=folder) as place:
        model = Path(place) / "model"
        make_checkpoint(model, config_of(hidden, layers))
        return in_fresh_process("job", "--folder", str(model), "--output", place, "--score", score, "--dtype", dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--score", default="element-first")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", action="store_true", help="last, everything measured in one line of JSON")
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=["job", "arithmetic"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only == "job":
        print(json.dumps(job(args.folder, args.output, args.score, args.dtype)))
        return
    if args.only == "arithmetic":
        print(json.dumps(arithmetic(args.score, args.dtype)))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.score}, {args.dtype}", flush=True)
    if args.profile:
        print("| hidden | layers | at rest GiB | predicted GiB | peak GiB |\n|---|---|---|---|---|")
        for hidden, layers in ((2048, 16), (4096, 4), (4096, 8), (4096, 16)):
            found = measured(args.folder, hidden, layers, args.score, args.dtype)
            cells = [hidden, layers, *(f"{found[key] / GIB:.2f}" for key in ("at_rest", "promised", "peak"))]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    before = in_fresh_process("arithmetic", "--score", args.score, "--dtype", args.dtype)
    found = measured(args.folder, 4096, 32, args.score, args.dtype)
    after = in_fresh_process("arithmetic", "--score", args.score, "--dtype", args.dtype)
    bare = (before["total_s"] + after["total_s"]) / 2
    print(f"arithmetic: {before['total_s']:.0f} s before, {after['total_s']:.0f} s after the job")
    gib = {key: f"{found[key] / GIB:.2f}" for key in ("peak", "promised", "at_rest")}
    print(
        f"job: {found['total_s']:.0f} s ({found['scores_s']:.0f} scores, {found['saving_s']:.0f} pruning and saving), "
        f"{found['total_s'] / bare:.2f} times the arithmetic\n"
        f"peak {gib['peak']} GiB, {gib['promised']} predicted, {gib['at_rest']} before any weight was read\n"
        f"{found['parameters']:,} parameters left, {found['artifact_bytes']:,} bytes"
    )
    if args.json:
        print(json.dumps(found | {"arithmetic_s": bare}))


if __name__ == "__main__":
    main()
