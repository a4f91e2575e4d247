"""Other weights in a model for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@contextmanager
def swapped(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, linears and embeddings have these weights, (d_out, d_in) each; what is tied to one changes with it.

    Nothing is copied. The model's own have to be in place.
    """
    before: list[tuple[nn.Module, Tensor]] = []
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    for name, W in weights.items():
        module = model.get_submodule(name)
        own = module._parameters["weight"]
        tied = [end for end in ends if end is not module and end._parameters["weight"] is own]
        for each in (module, *tied):
            before.append((each, own))
            each._parameters["weight"] = nn.Parameter(W.T if isinstance(module, Conv1D) else W, requires_grad=False)
    try:
        yield
    finally:
        for module, own in before:
            module._parameters["weight"] = own
