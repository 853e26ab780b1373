"""Lanczos recurrences against dense eigendecompositions."""

from __future__ import annotations

import pytest
import torch

from kfac_opt.fisher.krylov import TopEigenpairs
from kfac_opt.fisher.lanczos import BlockLanczos, ProbeLanczos, Quadrature, drive
from tests.fisher.brute import symmetric
from tests.support import close


def run(recurrence, matrix):
    drive({"": recurrence}, {"": slice(0, len(matrix))}, matrix)
    return recurrence


def spread(n: int = 40) -> torch.Tensor:
    return torch.linspace(-5, 2, n, dtype=torch.float64).exp()


def noise(n: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_quadrature_reproduces_moments_up_to_twice_the_steps(steps):
    matrix, start = symmetric(spread()), noise(40, 3)
    measures = run(ProbeLanczos(start, steps), matrix).quadratures()
    for column, measure in enumerate(measures):
        v = start[:, column] / start[:, column].norm()
        power = v
        for order in range(2 * steps):
            close(measure.weights @ measure.nodes**order, v @ power)
            power = matrix @ power


def test_all_steps_give_all_eigenvalues_without_copies():
    matrix = symmetric(spread())
    for measure in run(ProbeLanczos(noise(40, 2), 100), matrix).quadratures():
        close(measure.nodes, spread())
    close(run(BlockLanczos(noise(40, 3), 100), matrix).quadrature().nodes, spread())


def test_breakdown_on_a_projection_is_clean():
    matrix = torch.diag(torch.cat([torch.ones(7), torch.zeros(13)]).double())
    start = noise(20, 4)
    probes = run(ProbeLanczos(start, 10), matrix)
    assert probes.step <= 3
    for column, measure in enumerate(probes.quadratures()):
        assert len(measure.nodes) == 2
        close(measure.nodes, torch.tensor([0.0, 1.0], dtype=torch.float64))
        v = start[:, column] / start[:, column].norm()
        close(measure.weights[1], v[:7].square().sum())
    block = run(BlockLanczos(start, 10), matrix)
    assert block.size == 8
    measure = block.quadrature()
    assert int((measure.nodes > 0.5).sum()) == 4
    first, _ = torch.linalg.qr(start)
    close(measure.weights[measure.nodes > 0.5].sum(), first[:7].square().sum() / 4)


def test_block_moments_are_the_mean_over_the_orthonormal_starts():
    matrix = symmetric(spread())
    first, _ = torch.linalg.qr(noise(40, 3))
    measure = run(BlockLanczos(noise(40, 3), 4), matrix).quadrature()
    power = first
    for order in range(8):
        close(measure.weights @ measure.nodes**order, (first * power).sum() / 3)
        power = matrix @ power


def test_dependent_start_columns_do_no_harm():
    start = noise(20, 2)
    block = run(BlockLanczos(torch.cat([start, start[:, :1]], dim=1), 30), symmetric(spread(20)))
    close(block.quadrature().nodes, spread(20))


def test_residuals_are_those_of_the_ritz_vectors():
    matrix = symmetric(spread())
    block = run(BlockLanczos(noise(40, 2), 6), matrix)
    nodes, vectors = torch.linalg.eigh(block.projected[: block.size, : block.size])
    ritz = block.basis[:, : block.size] @ vectors
    expected = (matrix @ ritz - ritz * nodes).norm(dim=0)
    close(block.quadrature().residuals, expected)
    probe = ProbeLanczos(noise(40, 1), 6)
    measure = run(probe, matrix).quadratures()[0]
    basis = probe.basis[0].T
    nodes, vectors = torch.linalg.eigh(basis.T @ matrix @ basis)
    close(measure.residuals, (matrix @ (basis @ vectors) - basis @ vectors * nodes).norm(dim=0))


def test_converged_values_get_the_weight_of_one_eigenvalue():
    eigenvalues = torch.cat(
        [torch.linspace(0, 1e-3, 36, dtype=torch.float64), torch.tensor([1.0, 2.0, 5.0, 9.0], dtype=torch.float64)]
    )
    measure = run(BlockLanczos(noise(40, 4), 5), symmetric(eigenvalues)).quadrature()
    snapped = measure.snapped(40)
    assert torch.allclose(snapped.nodes[-4:], eigenvalues[-4:])
    assert not torch.allclose(measure.weights[-4:], torch.full((4,), 1 / 40, dtype=torch.float64), rtol=0.05)
    close(snapped.weights[-4:], torch.full((4,), 1 / 40, dtype=torch.float64))
    close(snapped.weights.sum(), torch.ones((), dtype=torch.float64))


def test_the_exact_mean_can_be_given():
    eigenvalues = torch.logspace(-8, 1, 80, dtype=torch.float64)
    measure = run(BlockLanczos(noise(80, 3), 8), symmetric(eigenvalues)).quadrature()
    plain, with_mean = measure.snapped(80), measure.snapped(80, float(eigenvalues.mean()))
    close(with_mean.weights @ with_mean.nodes, eigenvalues.mean())
    close(with_mean.weights.sum(), torch.ones((), dtype=torch.float64))
    assert abs(float(plain.weights @ plain.nodes - eigenvalues.mean())) > 1e-6
    kept = (plain.weights - 1 / 80).abs() < 1e-12
    assert int(kept.sum()) >= 5
    close(with_mean.weights[kept], plain.weights[kept])


def test_values_near_zero_and_multiple_eigenvalues_are_not_snapped():
    nodes = torch.tensor([1e-6, 0.5, 1.0], dtype=torch.float64)
    measure = Quadrature(nodes, torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), torch.zeros(3).double(), 10)
    snapped = measure.snapped(100)
    close(snapped.weights, measure.weights)  # 0.5 and 0.3 are far above 1 / 100
    measure = Quadrature(nodes, torch.tensor([0.97, 0.02, 0.01], dtype=torch.float64), torch.zeros(3).double(), 10)
    close(measure.snapped(100).weights, torch.tensor([0.98, 0.01, 0.01], dtype=torch.float64))


def test_top_eigenpairs_converge_with_restarts_and_multiple_eigenvalues():
    eigenvalues = torch.cat([spread(60), torch.tensor([9.0, 9.0, 9.0], dtype=torch.float64)])
    matrix = symmetric(eigenvalues)
    search = run(TopEigenpairs(noise(63, 2), 5, tolerance=1e-12, max_columns=14), matrix)
    assert search.products > 14  # at least one restart
    close(search.values, eigenvalues.sort(descending=True).values[:5])
    close(matrix @ search.pairs, search.pairs * search.values)
    close(search.pairs.T @ search.pairs, torch.eye(5, dtype=torch.float64))


def test_top_eigenpairs_of_a_low_rank_matrix_and_of_zero():
    matrix = symmetric(torch.cat([torch.zeros(18), torch.tensor([1.0, 2.0])]).double())
    search = run(TopEigenpairs(noise(20, 3), 4, tolerance=1e-12, max_columns=20), matrix)
    close(search.values, torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    zero = run(TopEigenpairs(noise(6, 2), 2, tolerance=1e-12, max_columns=6), torch.zeros(6, 6, dtype=torch.float64))
    assert torch.equal(zero.values, torch.zeros(2, dtype=torch.float64))


def test_top_eigenpairs_that_do_not_converge_say_what_to_do():
    matrix = symmetric(torch.linspace(1, 1.01, 200, dtype=torch.float64))
    search = TopEigenpairs(noise(200, 1), 3, tolerance=1e-14, max_columns=8, max_products=20)
    with pytest.raises(RuntimeError, match=r"3 pairs have a residual above 1e-14.*after 2\d products.*Raise tolerance"):
        run(search, matrix)


def test_one_product_serves_all_blocks():
    blocks = {"a": symmetric(spread(12)), "b": symmetric(spread(5), seed=1)}
    matrix = torch.block_diag(*blocks.values())
    slices = {"a": slice(0, 12), "b": slice(12, 17)}
    runs = {name: BlockLanczos(noise(len(block), 2), 30) for name, block in blocks.items()}
    assert drive(runs, slices, matrix) == 12  # six steps of two vectors for the larger block
    for name, block in runs.items():
        close(block.quadrature().nodes, torch.linalg.eigvalsh(blocks[name]))
