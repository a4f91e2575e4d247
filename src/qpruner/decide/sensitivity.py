"""What each choice of bits costs on its own: the divergence it causes when all else is left as it was."""

from collections.abc import Callable, Sequence

from qpruner.decide.information import BitUnit


def measure_sensitivity(
    units: Sequence[BitUnit],
    bits: Sequence[int],
    divergence: Callable[[dict[str, int]], float],
    on_unit: Callable[[int, int], None],
) -> list[list[float]]:
    """KL divergence to the unquantized model, nats per token, for each unit (row) at each of `bits` (column).

    Args:
        divergence: bits of the linears that are quantized -> divergence of the model so stored.
    """
    table = []
    for i, unit in enumerate(units):
        table.append([0.0 if b == 16 else divergence(dict.fromkeys(unit.linears, b)) for b in bits])
        on_unit(i + 1, len(units))
    return table
