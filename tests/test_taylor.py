import pytest
import torch

from qpruner.math.taylor import SALIENCES, first_order, second_order, unit_scores


def elementwise(kind, W, G, F):
    """The formula weight by weight, before any sum."""
    return {
        "vector": W * G,
        "element-first": (W * G).abs(),
        "element-second": W**2 * F,
        "element-mixed": (W * G - W**2 * F / 2).abs(),
    }[kind]


@pytest.fixture
def streamed(rand):
    """A weight and the gradients of nine samples, with G and F as their means."""
    W, g = rand(6, 4), rand(9, 6, 4)
    return W, g, g.mean(0), g.square().mean(0)


@pytest.mark.parametrize("kind", SALIENCES)
def test_rows_and_columns_sum_the_formula(streamed, kind):
    W, _, G, F = streamed
    s = elementwise(kind, W, G, F)
    rows = [abs(sum(s[i, j].item() for j in range(4))) for i in range(6)]
    columns = [abs(sum(s[i, j].item() for i in range(6))) for j in range(4)]
    torch.testing.assert_close(SALIENCES[kind](W, G, F, dim=1), torch.tensor(rows, dtype=torch.float64))
    torch.testing.assert_close(SALIENCES[kind](W, G, F, dim=0), torch.tensor(columns, dtype=torch.float64))


@pytest.mark.parametrize("dim", [0, 1])
def test_reduced_while_streaming_equals_reduced_at_the_end(streamed, dim):
    W, g, G, F = streamed
    first = torch.stack([first_order(W, sample, dim=dim) for sample in g]).mean(0)
    second = torch.stack([second_order(W, sample, dim=dim) for sample in g]).mean(0)
    torch.testing.assert_close(first.abs(), SALIENCES["vector"](W, G, dim=dim))
    torch.testing.assert_close(second, SALIENCES["element-second"](W, None, F, dim=dim))


def test_element_mixed_is_the_exact_change_of_a_quadratic_loss_of_one_weight_per_row():
    W, G, F = (torch.tensor([[v], [2 * v]], dtype=torch.float64) for v in (0.7, 0.3, 0.5))
    loss = lambda w: G * (w - W) + F / 2 * (w - W) ** 2
    change = loss(torch.zeros_like(W)) - loss(W)
    torch.testing.assert_close(SALIENCES["element-mixed"](W, G, F, dim=1), change.abs()[:, 0])


@pytest.mark.parametrize("kind", SALIENCES)
def test_half_precision_gradients_do_not_underflow(kind):
    W = torch.full((2, 2), 0.01, dtype=torch.float16)
    g = torch.full((2, 2), 1e-5, dtype=torch.float16)
    scores = SALIENCES[kind](W, g, g.float().square(), dim=1)
    assert scores.dtype == torch.float32 and (scores > 0).all()
    assert (second_order(W, g, dim=1) > 0).all()


def test_query_heads_are_credited_to_the_key_value_head_that_they_share():
    """Two key/value heads of width 2, each shared by three query heads; only the last query head matters."""
    q, k = torch.zeros(12, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    q[10:] = 5
    k[:2] = 1
    tables = [torch.arange(12).view(2, 6), torch.arange(4).view(2, 2)]
    assert unit_scores([q, k], tables).tolist() == [2, 10]


def test_permuting_units_permutes_scores(rand):
    vectors, tables = [rand(12), rand(6)], [torch.arange(12).view(6, 2), torch.arange(6).view(6, 1)]
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    permuted = unit_scores(vectors, [table[order] for table in tables])
    torch.testing.assert_close(permuted, unit_scores(vectors, tables)[order])


def test_units_need_a_table_for_every_vector(rand):
    with pytest.raises(ValueError, match="2 vectors and 1 index tables"):
        unit_scores([rand(4), rand(4)], [torch.arange(4).view(2, 2)])
