"""FSDP: the frozen base shared out to the processes, decoder layer by decoder layer, while adapters are trained.

`fully_shard` (torch's FSDP2; FSDP is arXiv:2304.11277) shares out parameters alone. What packed linears store becomes
parameters for it, of integers and without gradients: each process has its part of the rows, and all rows of a layer
only while that layer runs, forwards or back. Adapters, their gradients and their optimizer are small and whole in every
process, as they are without it, so checkpoints are the same, and one kind of training goes on where the other stopped.

accelerate's own FSDP is not asked: it leaves codes whole in every process, and without a word the model where there is
no GPU. Its DDP, which would average the gradients of adapters, refuses a model of which parts are shared out.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qpruner.errors import RecipeError
from qpruner.model.packed.embedding import PackedEmbedding
from qpruner.model.packed.linear import PackedLinear
from qpruner.model.skeleton import decoder_layers

WANTED = "ACCELERATE_USE_FSDP"  # so says `accelerate launch --use_fsdp`
# What its other flags say, and what stands in their place here.
REFUSED = {
    "FSDP_OFFLOAD_PARAMS": "parts of the model are kept on their devices",
    "FSDP_ACTIVATION_CHECKPOINTING": "set gradient_checkpointing in the recipe instead",
}


def processes() -> int:
    """How many were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def wanted() -> bool:
    """Whether processes were launched to share the model as well as the work.

    Raises:
        RecipeError: they were, with something that there is not.
    """
    if not _true(WANTED) or processes() == 1:
        return False
    for name, instead in REFUSED.items():
        if _true(name):
            raise RecipeError(f"the processes were launched with {name}=true, which is not served: {instead}.")
    return True


def _true(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


@contextmanager
def without_accelerates() -> Iterator[None]:
    """Within, accelerate does not know that FSDP is wanted."""
    said = os.environ.pop(WANTED, None)
    try:
        yield
    finally:
        if said is not None:
            os.environ[WANTED] = said


def shared_out(model: nn.Module, device: torch.device) -> nn.Module:
    """A twin of the model on this process's device, its frozen parameters shared out to all processes.

    What is trained is the model's very own. So the model is as it was at all times, but in any process other than the
    first: that gives its frozen tensors away, and has empty ones in their place.

    Args:
        model: in memory, the same in all processes, which are connected.
    """
    from torch.distributed import get_rank, get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    twin = _twin(model, keep=get_rank() == 0)
    _as_parameters_(twin)
    mesh = init_device_mesh(device.type, (get_world_size(),))
    # What has no rows cannot be shared out.
    whole = {p for p in twin.parameters() if p.requires_grad or p.dim() == 0 or not p.numel()}
    for path in decoder_layers(twin):
        fully_shard(twin.get_submodule(path), mesh=mesh, ignored_params=whole)
    fully_shard(twin, mesh=mesh, ignored_params=whole)
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    return twin


def _twin(model: nn.Module, *, keep: bool) -> nn.Module:
    """A copy with the same contents in memory, and the same parameters where they are trained."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.restore_()
    frozen = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    memo = {id(p): p for p in model.parameters() if p.requires_grad}
    for tensor in frozen:
        alias = tensor.detach().contiguous()  # another object: moving its data leaves the original where it is
        memo[id(tensor)] = nn.Parameter(alias, requires_grad=False) if isinstance(tensor, nn.Parameter) else alias
    twin = copy.deepcopy(model, memo)
    if not keep:
        for tensor in frozen:
            tensor.data = tensor.new_empty(0)
    return twin


def _as_parameters_(twin: nn.Module) -> None:
    """What packed linears and embeddings store, as parameters that heads share where they shared buffers."""
    made: dict[int, dict[str, nn.Parameter]] = {}
    for module in twin.modules():
        packed = module.matrix if isinstance(module, PackedEmbedding) else module
        if isinstance(packed, PackedLinear):
            which = id(packed._buffers)
            made[which] = packed.as_parameters_(made.get(which))
        if packed is not module:  # the matrix is no part of the model, and nobody else would see what becomes of them
            module._parameters = packed._parameters


def averaging(twin: nn.Module) -> nn.Module:
    """The twin, wrapped so that gradients of what is trained are averaged over the processes."""
    trained = {name for name, p in twin.named_parameters() if p.requires_grad}
    others = [n for n, _ in (*twin.named_parameters(), *twin.named_buffers()) if n not in trained]
    ddp = nn.parallel.DistributedDataParallel
    ddp._set_params_and_buffers_to_ignore_for_model(twin, others)
    return ddp(twin)


def in_words() -> str | None:
    """What several processes have of the model, to be said before anything takes long; None in one alone."""
    n = processes()
    if n == 1:
        return None
    if not wanted():
        return (
            f"{n} processes share the training, and each has the whole model. For one that is larger than a device, "
            "have them share it too: accelerate launch --use_fsdp."
        )
    return (
        f"{n} processes share the training and the model (FSDP): each has 1/{n} of every weight, packed or not, and "
        "the whole of a decoder layer while that runs. Embeddings and heads are whole during a step, adapters and "
        "their optimizer always. Every process first reads the whole artifact into its host's memory, and the first "
        "keeps it there."
    )
