"""What compressed-tensors' `pack-quantized` can say of a linear, and which of our specs it holds as they are.

A scheme is an integer grid of 1 to 8 bits with a 16-bit scale, and a zero point if wanted, for each group of inputs or
each row. A group divides the inputs; where ours does not, a divisor of both with every scale written several times says
the same. Ternary and binary codes are integers of 2 bits.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from qpruner.errors import ModelError, listed
from qpruner.plan import DENSE, QuantSpec
from qpruner.vllm import Scheme, scheme_of

FORMAT = "pack-quantized"
AS_INTEGERS = {"ternary": 2, "binary": 2}
FEWEST_IN_GROUP = 8  # below that, scales weigh more than half as much as codes of 4 bits
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def exact_scheme(spec: QuantSpec, d_in: int) -> Scheme | None:
    """The scheme that has room for the very codes of a spec; None where there is none.

    Scales of few bits are products that 16 bits round.
    """
    if spec.grid not in ("integer", *AS_INTEGERS) or spec.salient:
        return None
    group = group_of(spec, d_in)
    if group is not None and group < min(FEWEST_IN_GROUP, spec.group_size):
        return None
    return Scheme(AS_INTEGERS.get(spec.grid, spec.bits), spec.symmetric, group)


def why_not(spec: QuantSpec, d_in: int) -> str:
    """What speaks against taking the codes of a spec as they are, where `exact_scheme` finds nothing."""
    if spec.salient:
        return f"it has one width for a linear, and {spec.salient} channels here have {spec.salient_bits} bits"
    if spec.grid == "normal-float":
        return f"it has integers, and the values of nf{spec.bits} are none"
    return f"its groups divide the inputs, and {d_in} and groups of {spec.group_size} have no large common divisor"


def refused(specs: Mapping[str, tuple[QuantSpec, int]]) -> str:
    """Why codes of these linears are not taken as they are, in clauses; "" where all are.

    Args:
        specs: linear -> how it is stored, and its inputs.
    """
    found: dict[str, list[str]] = {}
    for name, (spec, d_in) in specs.items():
        if spec != DENSE and exact_scheme(spec, d_in) is None:
            found.setdefault(why_not(spec, d_in), []).append(name)
    return "; ".join(f"{listed(names)}: {reason}" for reason, names in found.items())


def out_of_reach(model: nn.Module, linears: Iterable[str]) -> list[str]:
    """Linears whose class multiplies by a way of its own, as GPT-2's and Falcon's do: compressed-tensors puts codes in
    the place of nn.Linear's product alone."""
    return [name for name in linears if type(model.get_submodule(name)).forward is not nn.Linear.forward]


def nearest_scheme(spec: QuantSpec, d_in: int) -> Scheme:
    """Where weights of a spec go if they are rounded once more: as many bits, groups at most as large."""
    bits = AS_INTEGERS.get(spec.grid, spec.bits)
    group = spec.group_size
    if group is None or group >= d_in:
        return Scheme(bits, spec.symmetric)
    dividing = [n for n in range(FEWEST_IN_GROUP, group + 1) if d_in % n == 0]
    return Scheme(bits, spec.symmetric, max(dividing, default=None))


def group_of(spec: QuantSpec, d_in: int) -> int | None:
    """Inputs that share a scale in groups that divide them; None for whole rows."""
    if spec.group_size is None or spec.group_size >= d_in:
        return None
    return math.gcd(spec.group_size, d_in)


# --- which linears ---------------------------------------------------------------------------------------------------


def quantization_config(schemes: Mapping[str, Scheme], linears: Iterable[str]) -> dict:
    """What a config.json says under that name.

    Args:
        schemes: path of a linear -> how it is stored. linears: paths of all that the model has.
    """
    linears = list(linears)
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(scheme, []).append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            scheme.name: {"targets": targets(names, linears), "format": FORMAT, "weights": scheme.to_json()}
            for scheme, names in groups.items()
        },
        "ignore": targets([name for name in linears if name not in schemes], linears),
    }


def targets(names: Sequence[str], linears: Sequence[str]) -> list[str]:
    r"""Regular expressions that match these names and none of the other linears; a name without a number stands alone.

    Linears of the same layers share one: `^model\.layers\.(0|3)\.mlp\.(gate_proj|up_proj)$`.
    """
    of_linears = _numbers_of(linears)
    layers: dict[tuple[str, frozenset[str]], list[str]] = {}
    found = []
    for (prefix, suffix), numbers in _numbers_of(names).items():
        if prefix is None:
            found.append(suffix)
        else:
            layers.setdefault((prefix, frozenset(numbers)), []).append(suffix)
    for (prefix, numbers), suffixes in layers.items():
        whole = all(numbers == set(of_linears[prefix, suffix]) for suffix in suffixes)
        which = r"\d+" if whole else _one_of(sorted(numbers, key=int))
        parent = _common_parent(suffixes)
        last = _one_of([re.escape(suffix[len(parent) :]) for suffix in suffixes])
        found.append(f"re:^{_under_model(prefix)}{which}{re.escape(parent)}{last}$")
    return found


def _under_model(prefix: str) -> str:
    """The same where vLLM's transformers backend has called the decoder `model`: it renames paths, not expressions."""
    first, dot, rest = prefix.partition(".")
    if first == "model" or not rest:
        return re.escape(prefix)
    return f"({re.escape(first)}|model){re.escape(dot + rest)}"


def _numbers_of(names: Iterable[str]) -> dict[tuple[str | None, str], list[str]]:
    """(what stands before the number of the layer, what behind) -> the numbers; before is None without one."""
    found: dict[tuple[str | None, str], list[str]] = {}
    for name in names:
        number = NUMBER.search(name)
        if number is None:
            found.setdefault((None, name), [])
        else:
            found.setdefault((name[: number.start()], name[number.end() :]), []).append(number[0])
    return found


def _one_of(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"({'|'.join(parts)})"


def _common_parent(suffixes: Sequence[str]) -> str:
    """`.mlp.` of `.mlp.gate_proj` and `.mlp.up_proj`."""
    parts = os.path.commonprefix([suffix.split(".")[:-1] for suffix in suffixes])
    return "".join(f"{part}." for part in parts)


# --- and back --------------------------------------------------------------------------------------------------------


def schemes_in(config: Mapping, names: Iterable[str]) -> dict[str, Scheme]:
    """Of these linears those that a `quantization_config` says are stored in codes, and how; ModelError for another
    format."""
    if config.get("quant_method") != "compressed-tensors" or config.get("format") != FORMAT:
        raise ModelError(
            f"weights are stored as {config.get('quant_method')!r}, format {config.get('format')!r}; "
            f"compressed-tensors' {FORMAT!r} is read."
        )
    found = {name: scheme_of(config, name) for name in names}
    return {name: scheme for name, scheme in found.items() if scheme}
