"""Second moments of the inputs of a linear map: all that least squares and rounding with feedback need of a text.

Notation
    X  inputs of a linear map, one row per token    (tokens, d)
    G  Gram matrix X^T X                            (d, d), float64
"""

import torch
from jaxtyping import Float
from torch import Tensor


def add_gram_(G: Float[Tensor, "d d"], X: Float[Tensor, "tokens d"]) -> None:
    """G += X^T X, in place.

    The product is taken in float32 at least, one batch at a time, and summed in the dtype of G: batches of some
    thousand tokens lose nothing that a sum over millions of them would show.
    """
    X = X if X.dtype == torch.float64 else X.float()
    G += (X.T @ X).to(G.dtype)
