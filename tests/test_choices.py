"""Choices that gradients pass through: estimates are exact where they claim to be, and budgets are met."""

import itertools

import numpy as np
import pytest
import torch

from qpruner.math.choices import Expected, Form, drawn, laid_out, one_hot, priced

SIZES = (3, 2, 4)
TABLES = [((0,), [1.0, 4.0, 9.0]), ((1, 2), np.arange(8.0).reshape(2, 4) * 3), ((0, 1, 2), np.ones((3, 2, 4)))]
TABLES = [(variables, np.asarray(values)) for variables, values in TABLES]


@pytest.fixture
def theta(rand):
    return laid_out([rand(n).numpy() for n in SIZES])


def combinations():
    return [torch.tensor(each) for each in itertools.product(*map(range, SIZES))]


def probability(p, chosen):
    return p[range(len(chosen)), chosen].prod()


def test_expected_size_is_the_sum_over_all_combinations(theta):
    p = torch.softmax(theta, 1)
    slow = sum(
        probability(p, chosen) * sum(values[tuple(chosen[list(variables)])] for variables, values in TABLES)
        for chosen in combinations()
    )
    torch.testing.assert_close(Expected(TABLES, 4).total(p), slow)


def test_the_size_of_each_option_is_the_slope_of_the_expected_size(theta):
    size, p = Expected(TABLES, 4), torch.softmax(theta, 1)
    c = size.of_each(p)
    for v, n in enumerate(SIZES):
        taken = [torch.where(torch.arange(4) == o, 1.0, 0.0).double() for o in range(n)]
        totals = [size.total(p.index_copy(0, torch.tensor([v]), row[None])) for row in taken]
        for o in range(1, n):
            torch.testing.assert_close(c[v, o] - c[v, 0], totals[o] - totals[0])


def test_the_gradient_is_exact_on_average_for_quadratic_losses(theta, rand):
    theta.requires_grad_()
    H, b = rand(12, 12), rand(12)
    loss = lambda D: D.flatten() @ H @ D.flatten() + b @ D.flatten()
    hard = lambda chosen: torch.nn.functional.one_hot(chosen, 4).double()
    p = torch.softmax(theta, 1)
    expected = sum(probability(p, chosen) * loss(hard(chosen)) for chosen in combinations())
    (true,) = torch.autograd.grad(expected, theta)
    found = torch.zeros_like(true)
    for chosen in combinations():
        p = torch.softmax(theta, 1)
        D = one_hot(p, chosen)
        assert torch.equal(D.detach(), hard(chosen))  # what is trained is what is kept
        found += probability(p.detach(), chosen) * torch.autograd.grad(loss(D), theta)[0]
    torch.testing.assert_close(found, true)


def test_draws_follow_their_probabilities():
    p = torch.tensor([[0.7, 0.2, 0.1, 0.0]], dtype=torch.float64)
    chosen = drawn(p.expand(4000, -1), torch.Generator().manual_seed(0))
    frequencies = torch.bincount(chosen, minlength=4) / 4000
    torch.testing.assert_close(frequencies, p[0].float(), atol=0.03, rtol=0)
    assert frequencies[3] == 0


def test_options_learn_the_product_of_gradient_and_form(rand):
    forms = [rand(3, 5) for _ in range(4)]
    p = torch.softmax(rand(3), 0).requires_grad_()
    target = rand(3, 5)
    W = Form.apply(p, 1, forms.__getitem__, 3)
    assert torch.equal(W.detach(), forms[1])
    (W - target).square().sum().backward()
    gradient = 2 * (forms[1] - target)
    torch.testing.assert_close(p.grad, torch.stack([(gradient * form).sum() for form in forms[:3]]))


@pytest.mark.parametrize("T", [1.0, 0.1])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_price_makes_the_expected_size_the_budget(theta, T, share):
    size = Expected(TABLES, 4)
    limits = [float(size.total(one)) for one in (torch.eye(4)[[0, 0, 0]].double(), torch.eye(4)[[2, 1, 3]].double())]
    target = limits[0] + share * (limits[1] - limits[0])
    p, price = priced(theta, size, target, T)
    total = float(size.total(p))
    assert total <= target * (1 + 2e-3)
    assert price == 0 or total == pytest.approx(target, rel=2e-3)


def test_what_may_cost_more_than_anything_is_free(theta):
    p, price = priced(theta, Expected(TABLES, 4), 1e9, 0.5)
    assert price == 0
    torch.testing.assert_close(p, torch.softmax(theta / 0.5, 1))


def test_no_change_of_worths_changes_the_expected_size(theta):
    size = Expected(TABLES, 4)
    theta.requires_grad_()
    loose = torch.softmax(theta, 1)
    (free,) = torch.autograd.grad((size.of_each(loose) * loose).sum(), theta)
    p, price = priced(theta, size, 0.8 * float(size.total(loose.detach())), 1.0)
    assert price > 0
    (gradient,) = torch.autograd.grad((size.of_each(p) * p).sum(), theta)
    assert gradient.sum().abs() < 1e-6 and gradient.abs().max() < 0.05 * free.abs().max()


def test_layers_that_go_can_come_back():
    """What is inside costs as if its layer stays; else at a high price layers that went would make all of it free."""
    layer = np.array([[0.0, 0.0], [4.0, 8.0]])
    size = Expected([((0, 1), layer), ((2, 3), layer), ((4,), np.array([0.0, 30.0]))], 2)
    theta = laid_out([[0.0, 2.5], [0.0, 1.0], [0.0, 2.5], [0.0, 1.0], [0.0, 10.0]])
    p, price = priced(theta, size, 23.0, 0.02, conditions=(0, 2))
    assert 8 * price > 2.5  # a layer with all that is in it is not worth its price; with less in it, it is
    assert (p[[0, 2], 1] > 0.9).all() and (p[[1, 3], 0] > 0.9).all()
