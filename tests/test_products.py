"""Fast products equal the plain ones, whichever library is behind them."""

from __future__ import annotations

import pytest
import torch

from kfac_opt._kernels import panels, products

SINGLE, DOUBLE = torch.float32, torch.float64


@pytest.fixture(params=["small", "split"])
def split(request, monkeypatch):
    """Sizes at which products are split, so small that the tests go through the recursion."""
    if request.param == "split":
        monkeypatch.setattr(products, "SPLIT_DIM", 5)
        monkeypatch.setattr(products, "BLOCK_DIM", 5)


@pytest.mark.parametrize("n", [1, 7, 12, 33])
def test_one_triangle_of_a_gram_matrix_is_enough(n, split):
    torch.manual_seed(0)
    rows = torch.randn(n, 9, dtype=DOUBLE)
    torch.testing.assert_close(products.outer_gram(rows), rows @ rows.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(200, 70, 90), (3, 4, 5), (65, 1000, 65)], ids=str)
def test_single_precision_products_up_to_rounding(shape):
    torch.manual_seed(0)
    m, k, n = shape
    left, right = torch.randn(m, k), torch.randn(n, k)
    exact = (left.double() @ right.double().T).float()
    bound = 1.2e-7 * k**0.5 * 10 * float(exact.abs().max())  # eps · sqrt(terms), margin 10
    for a, b in (
        (left, right),
        (left, right.T.contiguous().T),
        (left.T.contiguous().T, right),
        (left[:, : k - 1], right[:, : k - 1]),
    ):
        expected = exact if a.shape[1] == k else (a.double() @ b.double().T).float()
        assert float((products.times_transposed(a, b) - expected).abs().max()) <= bound


def test_products_keep_the_graph_when_a_gradient_is_wanted():
    left, right = torch.randn(80, 80, requires_grad=True), torch.randn(80, 80)
    products.times_transposed(left, right).sum().backward()
    torch.testing.assert_close(left.grad, right.sum(0).expand(80, 80))


@pytest.mark.parametrize("n", [1, 8, 9, 61])
def test_panels_multiply_like_the_matrix_they_hold(n):
    torch.manual_seed(0)
    matrix = torch.randn(2, n, n, dtype=DOUBLE)
    matrix = matrix + matrix.mT
    packed = torch.zeros(2, panels.panel_size(n), dtype=DOUBLE)
    panels.pack_panels_(packed, matrix)
    assert torch.equal(panels.unpack_panels(packed, n), matrix)
    rows = torch.randn(5, n, dtype=DOUBLE)
    torch.testing.assert_close(panels.times_panels(rows, packed[1]), rows @ matrix[1], rtol=1e-12, atol=1e-12)
    transposed = torch.randn(n, 5, dtype=DOUBLE).T
    torch.testing.assert_close(panels.times_panels(transposed, packed[0]), transposed @ matrix[0], rtol=1e-12, atol=1e-12)


def test_the_lower_triangle_goes_in_and_out_of_panels():
    torch.manual_seed(0)
    n = 61
    matrix = torch.randn(1, n, n, dtype=DOUBLE)
    matrix = matrix + matrix.mT
    packed = torch.zeros(1, panels.panel_size(n), dtype=DOUBLE)
    panels.pack_lower_(packed[0], matrix[0].tril())
    assert torch.equal(panels.unpack_panels(packed, n), matrix)
    target = torch.zeros(n, n, dtype=DOUBLE)
    panels.unpack_lower_(target, packed[0], panels.NUM_PANELS, 4.0)
    assert torch.equal(target.tril(), matrix[0].tril() / 4.0)


def test_panels_keep_little_more_than_half():
    assert panels.panel_size(4608) == 4608**2 * 9 // 16
