"""Trained adapters merged into their linears, which are rounded again; or beside them: whichever loses less ships.

What is rounded again is what training ended with, Q + s B A. Where the plan rounds with feedback so does this: layer by
layer, for the inputs that come behind what was merged before; nothing is fitted to the original any more, the recovered
model is itself the target. Otherwise weights are rounded to nearest, with the plan's ranges. Salient channels stay who
they are.
"""

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from qpruner.deciding import search_loss
from qpruner.do.quantize import stored_in
from qpruner.do.rounding import facts_of, round_
from qpruner.do.walk import write_results
from qpruner.job import Job
from qpruner.model import adapters
from qpruner.model.graph import Graph
from qpruner.model.packed.split import Quantized
from qpruner.model.tensors import Stored
from qpruner.model.whole import opened
from qpruner.plan import Plan, Rounding
from qpruner.run import digest_of


@dataclass(frozen=True)
class Merging:
    """Losses on the search text, nats per token, of the adapters beside their linears and merged into them; None for
    what was not tried. plan: that ships, with `adapters` as they are in the model now."""

    plan: Plan
    beside: float | None = None
    merged: float | None = None


def merged_or_beside(job: Job, plan: Plan, model: nn.Module, *, beside: float) -> Merging:
    """Leaves the model with what ships: as the recipe says, or with the better of both. Of equal ones, and where no
    linear is quantized, that is the merged one, which is smaller.

    Args:
        model: with the trained adapters of the plan, as they are stored, beside packed or dense linears.
        beside: its loss on the search text.
    """
    if not plan.adapter_ranks or (plan.adapters == "beside" and job.recipe.adapters != "best"):
        return Merging(plan)
    if plan.adapters == "beside" and not plan.recovery.steps:
        return Merging(plan)  # where LoftQ starts them: merged they would be gone again
    most = beside if plan.adapters == "beside" and plan.quantizes else None
    ships, loss = put_better_(model, merged_linears(job, plan, model), partial(search_loss, job), most=most)
    return Merging(plan.model_copy(update={"adapters": ships}), beside, loss)


def put_better_(
    model: nn.Module, merged: Mapping[str, nn.Module], loss_of: Callable[[nn.Module], float], *, most: float | None
) -> tuple[Literal["beside", "merged"], float]:
    """Put merged linears in the place of those with adapters, unless they lose more. Which it is now, and their loss.

    Args:
        merged: every linear that has an adapter as one without.
        most: that they may lose; None for any loss.
    """
    layers = adapters.adapter_layers(model)
    for name, linear in merged.items():
        model.set_submodule(name, linear)
    loss = loss_of(model)
    if most is not None and loss > most:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        return "beside", loss
    del model.peft_config
    return "merged", loss


def merged_linears(job: Job, plan: Plan, model: nn.Module) -> dict[str, nn.Module]:
    """Every linear that has an adapter as one without, stored as its spec says. The model stays as it is, but for dense
    linears where the plan says merged: those take their adapters in."""
    recovered = Recovered(model, job.graph)
    codes = _rounded_again(job, plan, recovered) if plan.quantizes and plan.rounding.method == "gptq" else None
    found = {}
    for name, base in recovered.bases.items():
        spec, W = plan.specs[name], recovered.weight(name)
        if not isinstance(base, Quantized):
            found[name] = dense = base if plan.adapters == "merged" else copy.deepcopy(base)
            # As it is stored, so that what is judged is what ships.
            dense.weight.data = W.to(job.stored_dtype).to(dense.weight.dtype)
        elif codes is None:
            found[name] = adapters.merged(base, recovered.correction(name), ranges=plan.rounding.ranges)
        else:
            found[name] = stored_in(codes, name, spec, base, W.shape[1])
    return found


class Recovered:
    """The tensors of a model in memory whose adapters are added to its weights, all of them dense. Final.

    bases: the linears that have adapters, without them.
    """

    def __init__(self, model: nn.Module, graph: Graph):
        self._layers = adapters.adapter_layers(model)
        self.bases = {name: layer.get_base_layer() for name, layer in self._layers.items()}
        self._sites, self.bytes_read = graph.linears, 0
        self._linears = {name: self.bases.get(name) or model.get_submodule(name) for name in graph.linears}
        self._state = adapters.base_state(model)

    def read(self, name: str) -> Tensor:
        linear, _, attribute = name.rpartition(".")
        if attribute == "weight" and linear in self._linears:
            found = self.weight(linear)
        else:
            found = self._state[name].detach().cpu().clone()
        self.bytes_read += found.nbytes
        return found

    def weight(self, name: str) -> Tensor:
        """As the module holds it, (d_in, d_out) where that is transposed; float32."""
        linear, transposed = self._linears[name], self._sites[name].transposed
        if isinstance(linear, Quantized):
            W = linear.dequantize(torch.float64)
        else:
            W = linear.weight.detach().double()
            W = W.T if transposed else W
        if name in self._layers:
            W = W + self.correction(name)
        return (W.T if transposed else W).float().cpu().contiguous()

    def correction(self, name: str) -> Tensor:
        """What an adapter adds, (d_out, d_in), float64."""
        return adapters.correction(self._layers[name])

    def digest(self) -> str:
        """Of the adapters."""
        found = hashlib.sha256()
        for name, layer in sorted(self._layers.items()):
            found.update(name.encode())
            for factor in adapters.factors(layer):
                found.update(factor.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    @property
    def salient(self) -> dict[str, Tensor]:
        """Of every linear that keeps some input channels at more bits, which they are."""
        return {name: each.salient.cpu() for name, each in self._linears.items() if hasattr(each, "salient")}


def _rounded_again(job: Job, plan: Plan, recovered: Recovered) -> Stored:
    """What all quantized linears store, of one stage of the run."""
    rounding = Rounding(method="gptq", ranges=plan.rounding.ranges)
    again = plan.model_copy(update={"rounding": rounding, "adapter_ranks": {}})
    windows = job.prepared.calibration.ids
    inputs = job.inputs(
        plan=plan.model_dump(mode="json"), adapters=recovered.digest(), windows=digest_of(windows.tolist())
    )
    with job.scratch("merging", inputs) as scratch:

        def compute(folder: Path) -> None:
            skeleton = job.pruned(plan.kept, job.precision).model
            stream = opened(skeleton, recovered, job.graph, dtype=job.precision, **job.where())
            results = round_(
                None, stream, job.graph, again, windows, dtype=job.stored_dtype, scratches=(scratch, scratch),
                salient=recovered.salient, on_layer=job.progress("merging"),
            )  # fmt: skip
            write_results(results, folder, partial(facts_of, again))

        folder = job.run.files("merging", inputs, compute)
    return Stored(sorted(folder.glob("*.safetensors")))
