"""Specs of every grid, for tests that hold for all of them."""

from qpruner.plan import INT8, NF4, QuantSpec

INTEGERS = [
    QuantSpec(bits=bits, grid="integer", group_size=16, symmetric=symmetric)
    for bits in (2, 3, 4, 5, 6, 8)
    for symmetric in (True, False)
]
FLOATS = [QuantSpec(bits=bits, grid="normal-float", group_size=16) for bits in (2, 3, 4)]
TERNARY = QuantSpec(bits=2, grid="ternary", group_size=16)
BINARY = QuantSpec(bits=1, grid="binary", group_size=16)
DOUBLE = [
    QuantSpec(bits=4, grid="integer", group_size=8, scale_bits=6),
    QuantSpec(bits=3, grid="integer", group_size=8, symmetric=False, scale_bits=4),
    QuantSpec(bits=4, grid="normal-float", group_size=8, scale_bits=8),
]
BOUNDED = [*INTEGERS, *FLOATS, TERNARY, *DOUBLE]  # absmax clips nothing
EVERY = [NF4, INT8, *BOUNDED, BINARY]


def of_groups(spec: QuantSpec, group_size: int | None) -> QuantSpec:
    return spec.model_copy(update={"group_size": group_size})
