"""What a quantized linear stores: names, dtypes and shapes of its tensors, by spec."""

from qpruner.math.groups import group_count
from qpruner.math.packing import TERNARY, Width, row_bytes
from qpruner.plan import QuantSpec

# The codes were chosen for the exact values of these: no conversion of a model may touch them.
EXACT = (".scales", ".steps")


def code_width(spec: QuantSpec) -> Width:
    """Bits that a code takes."""
    return TERNARY if spec.grid == "ternary" else spec.bits


def signed_bytes(spec: QuantSpec) -> bool:
    """Whether codes are their values, one to an int8."""
    return spec.bits == 8 and spec.symmetric


def stored_parts(d_out: int, d_in: int, spec: QuantSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Attribute -> (dtype as safetensors calls it, shape)."""
    if spec.salient:
        of_rest = stored_parts(d_out, d_in - spec.salient, spec.rest)
        of_high = stored_parts(d_out, spec.salient, spec.high)
        split = {f"rest.{part}": tensor for part, tensor in of_rest.items()}
        split |= {f"high.{part}": tensor for part, tensor in of_high.items()}
        return split | {"salient": ("I32", (spec.salient,))}
    n = group_count(d_in, spec.group_size)
    parts = {"codes": ("I8" if signed_bytes(spec) else "U8", (d_out, row_bytes(d_in, code_width(spec))))}
    if spec.scale_bits == 16:
        parts["scales"] = ("F16", (d_out, n))
    else:
        parts |= {"scales": ("U8", (d_out, row_bytes(n, spec.scale_bits))), "steps": ("F16", (d_out, 1))}
    if not spec.symmetric:
        parts["zeros"] = ("U8", (d_out, row_bytes(n, spec.bits)))
    return parts
