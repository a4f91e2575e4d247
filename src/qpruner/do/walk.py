"""Layer by layer through a model that is being compressed, with the original beside it where that has the targets."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from qpruner.model.memory import REFIT_TOKENS
from qpruner.model.scratch import Scratch
from qpruner.model.stream import OnLayer, Step, Stream

ROWS = "linears.json"  # beside the files of a finished walk
FACTS = "facts:"  # before the name of a linear, in a layer's result
Facts = Callable[[int, Mapping[str, Tensor]], list[dict]]  # of a layer and its result: rows as JSON holds them


def n_fitted(n_windows: int, held_out: float) -> int:
    """Windows that something is fitted to, the first ones; the fraction `held_out` judges it, one window at least."""
    return max(1, n_windows - max(1, round(held_out * n_windows)))


def side_by_side(
    original: Stream,
    compressed: Stream,
    layers: Sequence[int] | None,
    windows: Tensor,
    scratches: tuple[Scratch, Scratch],
    *,
    border: int,
    tokens: int = REFIT_TOKENS,
    on_layer: OnLayer | None = None,
) -> Iterator[tuple[Step, Step]]:
    """Every layer of the compressed model that is not finished, behind that of the original.

    Whoever takes them passes all windows on in both, and finishes the compressed one.

    Args:
        layers: of the original that the compressed model has; None for all.
        border: no batch holds both windows before this one and windows from it on.
    """
    number = dict(zip(layers or range(original.n_layers), range(compressed.n_layers), strict=True))
    how = dict(batch_size=max(1, tokens // windows.shape[1]), border=border)
    ours = compressed.steps(windows, scratches[1], on_layer=on_layer, **how)
    step = next(ours, None)
    for theirs in original.steps(windows, scratches[0], **how):
        if step is None:
            break  # of the original only layers are left that do not stay
        if number.get(theirs.index) == step.index:
            yield theirs, step
            theirs.finish({})
            step = next(ours, None)
        else:
            theirs.pass_all_on()
            theirs.finish({})


def in_order(step: Step, places: Mapping[str, str]) -> list[str]:
    """The keys as the layer calls the modules at their places; those that it does not call come last."""
    order: dict[str, None] = {}
    with ExitStack() as stack:
        for key, place in places.items():
            note = lambda module, args, key=key: order.setdefault(key)
            stack.callback(step.layer.get_submodule(place).register_forward_pre_hook(note).remove)
        if places:
            step.run(0)
    return list(order | dict.fromkeys(places))


def write_results(results: Iterable[Mapping[str, Tensor]], folder: Path, facts_of: Facts) -> None:
    """One file of tensors for each layer that has some, and the facts of all linears."""
    rows = []
    for layer, result in enumerate(results):
        rows += facts_of(layer, result)
        if tensors := {name: tensor for name, tensor in result.items() if not name.startswith(FACTS)}:
            save_file(tensors, folder / f"{layer}.safetensors")
    (folder / ROWS).write_text(json.dumps(rows, indent=1) + "\n")


def read_facts(folder: Path) -> list[dict]:
    return json.loads((folder / ROWS).read_text())
