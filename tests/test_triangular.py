"""Inverses of large matrices within their own memory."""

from __future__ import annotations

import pytest
import torch

from kfac_opt._curvature import linalg
from kfac_opt._kernels import triangular, workspace

DOUBLE = torch.float64


@pytest.fixture(params=["whole", "halved"])
def leaves(request, monkeypatch):
    """Smallest blocks so small that the tests go through the recursion, unevenly."""
    if request.param == "halved":
        monkeypatch.setattr(triangular, "LEAF_DIM", 5)
        monkeypatch.setattr(triangular, "STRIP_DIM", 3)


def positive(n: int) -> torch.Tensor:
    torch.manual_seed(0)
    rows = torch.randn(2 * n, n, dtype=DOUBLE)
    return rows.T @ rows / n + 0.1 * torch.eye(n, dtype=DOUBLE)


@pytest.mark.parametrize("n", [3, 64, 130, 257])
def test_inverse_in_place_equals_the_inverse(n, leaves):
    matrix = positive(n)
    # the upper triangle and the space beside the matrix belong to nobody: what stands there must not matter
    buffer = torch.full((n + 3, n + 3), torch.nan, dtype=DOUBLE)
    target = buffer[:n, :n]
    target.copy_(matrix)
    assert not triangular.invert_lower_(target)
    torch.testing.assert_close(target.tril(), torch.linalg.inv(matrix).tril(), rtol=1e-10, atol=1e-10)
    assert torch.equal(triangular.mirror_lower_(target), target.T)
    assert bool(buffer[n:].isnan().all())
    assert bool(buffer[:, n:].isnan().all())


def test_inverse_in_place_reads_only_the_lower_triangle_of_blocks(leaves):
    matrix = positive(130)
    disturbed = matrix + torch.ones_like(matrix).triu(triangular.LEAF_DIM) * 1e6
    triangular.invert_lower_(disturbed)
    torch.testing.assert_close(disturbed.tril(), torch.linalg.inv(matrix).tril(), rtol=1e-10, atol=1e-10)


def test_inverse_in_place_reports_indefinite_matrices(leaves):
    matrix = torch.eye(130, dtype=DOUBLE)
    matrix[129, 129] = -1.0
    assert triangular.invert_lower_(matrix)


def test_single_precision_is_no_worse_than_lapack():
    torch.manual_seed(0)
    rows = torch.randn(600, 400)
    factor = rows @ rows.T / 400  # rank 400 of 600
    factor.diagonal().add_(1e-3)
    exact = torch.linalg.inv(factor.double())
    lapack = torch.cholesky_inverse(torch.linalg.cholesky(factor))
    triangular.invert_lower_(factor)
    error = lambda found: float((found.double() - exact).tril().norm())  # noqa: E731
    assert error(factor) <= 2 * error(lapack)


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


@pytest.mark.parametrize("shift", [0.0, 0.05, 20.0], ids=["definite", "ten times the damping", "clamped"])
def test_the_ladder_in_place_climbs_as_the_other_one(shift, leaves):
    torch.manual_seed(0)
    n, damping = 40, torch.tensor(1e-2, dtype=DOUBLE)
    factor = positive(n)
    factor -= (1.0 + shift) * torch.linalg.eigvalsh(factor)[0] * torch.eye(n, dtype=DOUBLE)
    fills = []

    def fill_(target: torch.Tensor) -> None:
        fills.append(1)
        target.copy_(factor.tril())

    matrix = torch.empty(n, n, dtype=DOUBLE)
    linalg.damped_inverse_(matrix, fill_, damping)
    expected = linalg.damped_inverse(factor[None], damping[None])[0]
    torch.testing.assert_close(matrix.tril(), expected.tril(), rtol=1e-8, atol=1e-8)
    assert len(fills) == {0.0: 1, 0.05: 2, 20.0: 4}[shift]


def test_a_factor_that_is_not_finite_is_an_error_in_place():
    with pytest.raises(linalg.FactorizationError, match="double precision"):
        linalg.damped_inverse_(torch.empty(6, 6), lambda target: target.fill_(torch.nan), torch.tensor(0.1))


def test_memory_is_shared_inside_a_workspace_and_freed_after_it():
    with workspace.shared_workspace():
        first = workspace.square_buffer(40, torch.float32)
        second = workspace.square_buffer(30, torch.float32)
        assert first.data_ptr() == second.data_ptr()
        larger = workspace.square_buffer(50, torch.float32)
        assert larger.shape == (50, 50)
        assert workspace.square_buffer(8, DOUBLE).dtype == DOUBLE
    assert workspace._shared.buffer is None
    outside = [workspace.square_buffer(40, torch.float32) for _ in range(2)]
    assert outside[0].data_ptr() != outside[1].data_ptr()


def test_large_pages_hold_ordinary_numbers():
    numbers = workspace.empty_in_large_pages(2**20 + 1, torch.float32).fill_(0.5)
    part = numbers[5:]
    del numbers  # the memory lives as long as a view of it
    assert float(part.sum()) == 0.5 * (2**20 - 4)
