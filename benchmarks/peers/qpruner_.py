"""qpruner itself, on the same tokens. Groups of 16 whose scales have 4 bits, which is no more than 32 with float16.

nearest   plain rounding, ranges by squared error; it looks at no text
fast      recipe gptaq, no descent; it needs no more than the first quarter of the tokens
full      recipe low-bits: from there all codes and scales learned from the predictions of the original
layers    recipe gptaq with descent layer by layer, for models whose training does not fit in memory
binary    recipe low-bits at about 1.6 bits, whatever is asked for: signs, and 20 input channels at 4 bits
"""

import tempfile
from pathlib import Path

import peer
import torch

VARIANTS = {
    "nearest": "gptq[rounding=nearest,group_size=16,scale_bits=4]",
    "fast": "gptaq[held_out=0.1]",
    "full": "low-bits",
    "layers": "gptaq[held_out=0.1,layer_steps=200]",
    "binary": "low-bits",
}


CHANNELS = {64: 0, 256: 20}  # that are salient in every linear, by the hidden size: 1.6 bits or less in all


def quantize(job: peer.Job) -> peer.Quantized:
    from qpruner import recipe as recipes
    from qpruner.artifact.opened import open_stream
    from qpruner.do.quantize import Candidates
    from qpruner.do.rounding import facts_of, round_
    from qpruner.do.tune import layer_tuner, tune_network_
    from qpruner.do.walk import write_results
    from qpruner.model import load
    from qpruner.model.scratch import Scratch
    from qpruner.model.tensors import Stored
    from qpruner.shape import shape_of

    recipe, bits = recipes.load(VARIANTS[job.variant]), job.bits
    if job.variant == "binary":
        bits, width = 1, job.load().config.hidden_size
        recipe = recipe.but(
            {"grid": "binary", "symmetric": True, "salient_bits": 4, "salient": CHANNELS[width], "bits": [1]}
        )
    else:
        recipe = recipe.but({"bits": [bits]})
    source = load.inspect_source(str(job.model_folder))
    shape = shape_of(source)
    kept = {name: tuple(range(group.n_units)) for name, group in shape.graph.groups.items()}
    plan = shape.plan(recipe, kept, bits, job.seed)
    settings, tuning, ids = plan.rounding, None, job.ids[: len(job.ids) // 4]
    opened = lambda: open_stream(source, graph=shape.graph, dtype=torch.float32, resident=True, device="cpu")
    model = job.load()
    with tempfile.TemporaryDirectory() as folder, job.timed():
        original = opened()
        candidates = Candidates(model, shape.graph, plan, adapter_dtype=torch.float32)
        if settings.needs_text:
            results = round_(
                original if settings.needs_original else None, opened(), shape.graph, plan,
                ids, dtype=torch.float32, scratches=(Scratch(), Scratch()),
                tune=layer_tuner(plan, len(ids)) if settings.layer_steps else None,
            )  # fmt: skip
            write_results(results, Path(folder), lambda i, result: facts_of(plan, i, result))
            candidates.put_stored_(plan.specs, Stored(sorted(Path(folder).glob("*.safetensors"))))
        else:
            candidates.put_(plan.specs)
        if settings.network_steps:
            scratch = Scratch()
            original.forward(job.ids, scratch)
            with original.predicting(job.ids, scratch) as predictions:
                tuning = tune_network_(
                    model, predictions, job.ids, steps=settings.network_steps, batch_size=settings.tuning_batch,
                    held_out=settings.held_out, seed=job.seed, weights=candidates.weights(),
                )  # fmt: skip
    stored = peer.tensor_bytes(*candidates.stored(plan.specs).values())
    weights = {name: model.get_submodule(name).dequantize() for name in plan.specs}
    notes = [] if tuning is None else [f"divergence on held-out windows {tuning.before:.4f} -> {tuning.after:.4f}"]
    return peer.Quantized(weights, stored, settings.model_dump(mode="json"), notes)


if __name__ == "__main__":
    peer.run(quantize, ["qpruner"], list(VARIANTS))
