"""A model's shape without its weights, and the places in it that everything else names.

Nothing here knows a model family: decoder layers are found by their number, linear layers by their two widths.
"""

import copy
from math import prod

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from qpruner.errors import ModelError
from qpruner.model.graph import LinearSite

LARGE = 2**22  # elements; buffers are smaller, but for masks, which are not made by torch.empty
INITIALIZERS = ("torch.nn.init", "transformers.initialization")  # whose functions change their tensor in place


def build_skeleton(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> nn.Module:
    """The causal language model of a configuration, parameters on the meta device, buffers (rotary tables) real.

    The configuration is copied; what is built holds the copy. `trust_remote_code`: whether a class that the model
    brought may run.
    """
    from transformers import AutoModelForCausalLM  # its import registers our loader, which imports this module

    try:
        with init_empty_weights(include_buffers=False), WithoutWeights():
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ModelError(f"{config.model_type!r} cannot be built as a causal language model: {error}") from error
    return model.eval()


class WithoutWeights(TorchFunctionMode):
    """Never allocates a large parameter, not even for a moment: a stack of experts may not fit in memory.

    Nor are values drawn for what has none: torch goes through such a draw in Python, which took two thirds of the time.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) in INITIALIZERS:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        if func is torch.empty and "device" not in kwargs and "size" not in kwargs:
            shape = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
            if prod(shape) > LARGE:
                kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def decoder_layers(model: nn.Module) -> tuple[str, ...]:
    """Module paths of the decoder layers, in order: the children of the list that has one entry per hidden layer."""
    config = model.config.get_text_config(decoder=True)
    expected = config.num_hidden_layers
    # where each decoder layer counts as two, because it has two attentions, num_layers says how many there are
    counts = {expected, getattr(config, "num_layers", expected)}
    lists = {
        name: sum(linear_dims(m) is not None for m in module.modules())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) in counts
    }
    if not lists or not max(lists.values()):
        raise ModelError(
            f"{type(model).__name__} has no list of {expected} decoder layers, the number its configuration gives. "
            "qpruner needs a decoder language model that keeps its layers in one nn.ModuleList."
        )
    path = max(lists, key=lists.get)  # lists of norms or caches hold no linears; an enclosing list comes first
    return tuple(f"{path}.{i}" for i in range(len(model.get_submodule(path))))


def linear_dims(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear layer, stored in whatever way; None for any other module."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    dims = getattr(module, "out_features", None), getattr(module, "in_features", None)
    weight = getattr(module, "weight", None)
    shaped = weight is None or weight.shape == dims or weight.dim() == 1  # a packed weight is flat
    return dims if all(isinstance(d, int) for d in dims) and shaped else None


def linear_sites(model: nn.Module) -> dict[str, LinearSite]:
    """Every linear inside the decoder layers, in the model's order."""
    sites = {}
    for i, path in enumerate(decoder_layers(model)):
        for name, module in model.get_submodule(path).named_modules(prefix=path):
            if dims := linear_dims(module):
                bias = getattr(module, "bias", None) is not None
                sites[name] = LinearSite(name, i, *dims, bias=bias, transposed=isinstance(module, Conv1D))
    return sites
