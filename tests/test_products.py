"""Fast products equal the plain ones, whichever library is behind them."""

from __future__ import annotations

import pytest
import torch

from kfac_opt import linalg, panels, products

SINGLE, DOUBLE = torch.float32, torch.float64


@pytest.fixture(params=["small", "split"])
def split(request, monkeypatch):
    """Sizes at which products are split, so small that the tests go through the recursion."""
    if request.param == "split":
        monkeypatch.setattr(products, "SPLIT_DIM", 5)
        monkeypatch.setattr(products, "BLOCK_DIM", 5)


@pytest.mark.parametrize("n", [1, 7, 12, 33])
def test_structured_products_equal_plain_ones(n, split):
    torch.manual_seed(0)
    rows, square = torch.randn(n, 9, dtype=DOUBLE), torch.randn(n, n, dtype=DOUBLE)
    left = torch.randn(4, n, dtype=DOUBLE)
    torch.testing.assert_close(products.outer_gram(rows), rows @ rows.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(products.times_lower(left, square.tril()), left @ square.tril().T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(products.upper_times(square.triu(), left), square.triu() @ left.T, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("n", [3, 64, 130, 257])
def test_recursive_inverse_equals_the_inverse(n, split):
    torch.manual_seed(0)
    rows = torch.randn(2 * n, n, dtype=DOUBLE)
    matrix = rows.T @ rows / n + 0.1 * torch.eye(n, dtype=DOUBLE)
    inverse, failed = products.cholesky_inverse_(matrix.clone())
    assert not failed
    torch.testing.assert_close(inverse, torch.linalg.inv(matrix), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inverse, inverse.T, rtol=1e-13, atol=1e-13)


def test_recursive_inverse_reports_indefinite_matrices(split):
    matrix = torch.eye(130, dtype=DOUBLE)
    matrix[129, 129] = -1.0
    assert products.cholesky_inverse_(matrix)[1]


def test_the_ladder_takes_the_recursive_inverse_and_mends_what_fails(monkeypatch):
    monkeypatch.setattr(linalg, "RECURSIVE_DIM", 1)
    monkeypatch.setattr(linalg, "onednn_is_faster", lambda: True)
    torch.manual_seed(0)
    rows = torch.randn(2, 40, 20, dtype=DOUBLE)
    factor = rows.mT @ rows
    factor[1] -= 2.0 * torch.linalg.eigvalsh(factor[1])[0] * torch.eye(20, dtype=DOUBLE)  # indefinite at damping 1e-3
    damping = torch.full((2,), 1e-3, dtype=DOUBLE)
    found = linalg.damped_inverse(factor, damping)
    eye = torch.eye(20, dtype=DOUBLE)
    torch.testing.assert_close(found[0], torch.linalg.inv(factor[0] + 1e-3 * eye), rtol=1e-8, atol=1e-10)
    values, vectors = torch.linalg.eigh(factor[1])
    mended = (vectors / (values.clamp_min(0) + 1e-3)) @ vectors.T
    torch.testing.assert_close(found[1], mended, rtol=1e-8, atol=1e-8)


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


def test_panels_keep_little_more_than_half():
    assert panels.panel_size(4608) == 4608**2 * 9 // 16
