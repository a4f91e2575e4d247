"""Products with a stack of experts among the calls of torch: seen whichever way they are written, and no others."""

import pytest
import torch
from torch.nn import functional as F

from qpruner.model.products import Answered

STACK = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))  # three experts
X = torch.ones(2, 5)
WITH_ONE = {  # of (3, 4, 5), or as it lies transposed
    "linear": lambda s: F.linear(X, s[1]),
    "linear, bias": lambda s: F.linear(X, s[1], torch.ones(4)),
    "matmul": lambda s: X @ s[1].T,
    "expert by tensor": lambda s: torch.mm(X, s[torch.tensor(1)].t()),
    "addmm": lambda s: torch.addmm(torch.ones(4), X, s[1].T),
    "transposed": lambda s: torch.ones(2, 4) @ s[1],
}
OTHERS = {
    "part of a matrix": lambda s: F.linear(X[:, :3], s[1][:, :3]),
    "rows of a matrix": lambda s: F.linear(X, s[1][:2]),
    "copy": lambda s: F.linear(X, s[1].clone()),
    "some experts": lambda s: torch.bmm(torch.ones(2, 2, 5), s[:2].mT),
    "no product": lambda s: s[1] + 1,
}


def seen(call, stack=STACK) -> list:
    found = []

    def answer(matrix, x):
        found.append((matrix.expert, matrix.d_out, matrix.d_in, matrix.transposed, tuple(x.shape)))
        return x.new_zeros(*x.shape[:-1], matrix.d_out)

    with Answered(stack, answer):
        out = call(stack)
    assert not found or not out.any()
    return found


@pytest.mark.parametrize("way", WITH_ONE)
def test_products_with_one_expert_are_seen(way):
    expected = (1, 5, 4, True, (2, 4)) if way == "transposed" else (1, 4, 5, False, (2, 5))
    assert seen(WITH_ONE[way]) == [expected]


def test_a_product_with_all_experts_is_seen():
    assert seen(lambda s: torch.bmm(torch.ones(3, 2, 5), s.mT)) == [(None, 4, 5, False, (3, 2, 5))]


@pytest.mark.parametrize("way", OTHERS)
def test_others_are_computed_as_ever(way):
    with torch.no_grad():
        plain = OTHERS[way](STACK)
    assert not seen(OTHERS[way])
    with Answered(STACK, lambda matrix, x: pytest.fail("is no product with an expert")):
        assert torch.equal(OTHERS[way](STACK), plain)


def test_another_stack_of_the_same_shape_is_not_meant():
    with Answered(STACK, lambda matrix, x: pytest.fail("is another stack")):
        assert F.linear(X, STACK.clone()[1]).shape == (2, 4)
