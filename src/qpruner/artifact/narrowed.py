"""What a loader that cannot discover a model has to be told of an artifact: counts of modules, and shared codes.

narrowed    module -> the attributes that are not those of the original's module of that name, `config` among them
            where a module sees counts of its own in the configuration
embeddings  path of an embedding in codes -> its width, what its rows are multiplied by, the heads tied to it
shapes      tensor -> its shape at 16 bits, where it is not the original's, for those who build before they read
coded       whether anything lies in codes of ours
own_linears whether the original's linears are of a class of its own
"""

from inspect import signature

from torch import Tensor, nn

from qpruner.artifact.compressed.schemes import out_of_reach
from qpruner.artifact.dense import Dense
from qpruner.errors import ModelError
from qpruner.model.graph import Graph
from qpruner.model.packed.embedding import PackedEmbedding
from qpruner.model.surgery import PER_HEAD_ARGUMENTS, LayerConfig
from qpruner.plan import QuantSpec

PLAIN = int | float | str | bool | tuple | None
# Of a packed module: the rest is seen from what is stored.
WIDTH = "in_features"


def told_of(original: nn.Module, narrowed: nn.Module, dense: Dense, *, coded: bool) -> dict:
    """All that config.json says to the code beside the weights, and to those who read weights themselves.

    Args:
        narrowed: what is stored; `dense` has the same with plain linears. coded: in codes of ours.
    Raises:
        ModelError: there is more to tell.
    """
    return {
        "narrowed": narrowed_of(original, narrowed),
        "embeddings": embeddings_of(narrowed, dense.graph),
        "shapes": shapes_of(original, dense.model),
        "coded": coded,
        "own_linears": bool(out_of_reach(original, dense.graph.linears)),
    }


def narrowed_of(original: nn.Module, narrowed: nn.Module) -> dict[str, dict]:
    """By module path, what to set on the modules of the original class.

    Raises:
        ModelError: more than counts and stored tensors tells the two apart, such as slopes of the heads that stayed.
    """
    whole, found, inside = dict(original.named_modules()), {}, ""
    for path, module in narrowed.named_modules():
        if inside and path.startswith(inside):
            continue  # parts of a packed module
        if isinstance(getattr(module, "spec", None), QuantSpec):
            inside = f"{path}."
            if getattr(whole[path], WIDTH, None) != getattr(module, WIDTH, None):
                found[path] = {WIDTH: module.in_features}
            continue
        _check_seen(path, whole[path], module)
        if changed := _differences(whole[path], module):
            found[path] = changed
    return found


def shapes_of(original: nn.Module, plain: nn.Module) -> dict[str, list[int]]:
    """plain: the narrowed model, nothing packed."""
    tensors = lambda model: {**dict(model.named_parameters()), **dict(model.named_buffers())}
    whole = tensors(original)
    return {name: list(t.shape) for name, t in tensors(plain).items() if name in whole and whole[name].shape != t.shape}


def embeddings_of(narrowed: nn.Module, graph: Graph) -> dict[str, dict]:
    found = {}
    for path, module in narrowed.named_modules():
        if isinstance(module, PackedEmbedding):
            scales = [float(module.factor), module.number]
            heads = list(graph.embeddings[path].heads)
            found[path] = {"width": module.embedding_dim, "scales": scales, "heads": heads}
    return found


def _differences(whole: nn.Module, module: nn.Module) -> dict:
    before, changed = vars(whole), {}
    for name, value in vars(module).items():
        if isinstance(value, LayerConfig):
            changed["config"] = {k: v for k, v in vars(value).items() if k != "_config"}
        elif isinstance(value, PLAIN) and not name.startswith("_") and before.get(name, ...) != value:
            changed[name] = value
    if isinstance(module, nn.Linear):  # their shapes are seen from their weights
        changed = {k: v for k, v in changed.items() if k not in ("in_features", "out_features")}
    return changed


def _check_seen(path: str, whole: nn.Module, module: nn.Module) -> None:
    stored = set(module.state_dict())
    tables = {n: t for n, t in [*module._buffers.items(), *vars(module).items()] if isinstance(t, Tensor)}
    odd = [n for n, t in tables.items() if n not in stored and getattr(whole, n).shape != t.shape]
    hooked = len(module._forward_pre_hooks) > len(whole._forward_pre_hooks)
    handed = [n for n in PER_HEAD_ARGUMENTS if n in signature(module.forward).parameters] if hooked else []
    if odd or handed:
        what = f"a table of its own ({odd[0]})" if odd else f"values for the heads that stayed ({handed[0]})"
        raise ModelError(
            f"{path!r} of this {type(whole).__name__} has {what}, which the code beside the weights does not "
            "know. Load the artifact with qpruner installed."
        )
