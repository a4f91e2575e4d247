"""What is not beaten in two quantities at once, both wanted small.

Notation
    points      one pair per row                                  (n, 2)
    reference   a pair that every point of interest lies below    (2,)
"""

import numpy as np
from jaxtyping import Int, Num


def front(points: Num[np.ndarray, "n 2"]) -> Int[np.ndarray, " m"]:
    """Indices of the points that no other point matches in both quantities and beats in one.

    Ascending in the first quantity, and so descending in the second. Of equal points the first is named.
    """
    order = np.lexsort((points[:, 1], points[:, 0]))
    second = points[order, 1]
    lowest_before = np.minimum.accumulate(np.concatenate(([np.inf], second)))[:-1]
    return order[second < lowest_before]


def hypervolume(points: Num[np.ndarray, "n 2"], reference: tuple[float | int, float | int]) -> float:
    """The area that the points dominate, up to the reference; a larger one is a better front."""
    corner = np.array(reference, dtype=np.float64)
    inside = points[(points < corner).all(axis=1)].astype(np.float64)
    corners = inside[front(inside)]
    ceilings = np.concatenate((corner[1:], corners[:-1, 1]))
    return float(((corner[0] - corners[:, 0]) * (ceilings - corners[:, 1])).sum())
