"""Spectral densities against all eigenvalues."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kfac_opt.fisher import FisherMatrix, SpectralDensity, spectral_density
from tests.fisher.brute import symmetric
from tests.fisher.models import make
from tests.support import bare_kfac, close, data, estimate, mlp


def decaying(n: int = 200) -> torch.Tensor:
    return torch.logspace(-9, 1, n, dtype=torch.float64)


def fisher_of(name: str = "lenet", **options) -> FisherMatrix:
    model, x = make(name)
    return FisherMatrix(model, x, **options)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_exact_density_has_every_eigenvalue_with_the_same_weight():
    fisher = fisher_of()
    density = spectral_density(fisher, "exact")
    close(density.nodes, torch.linalg.eigvalsh(fisher.to_dense()).clamp_min(0))
    close(density.weights, torch.full_like(density.nodes, 1 / fisher.shape[0]))
    assert density.size == fisher.shape[0]
    assert density.trace == pytest.approx(float(fisher.trace()), rel=1e-12)


@pytest.mark.parametrize("blocks", ["full", "layer_wise"])
def test_unit_vector_probes_reproduce_the_exact_measure(blocks):
    fisher = fisher_of(blocks=blocks)
    size = fisher.shape[0]
    if blocks == "full":
        probes = torch.eye(size)
    else:  # every block has its own unit vectors; the weights of a block are the mean over them
        repeats = math.lcm(*(where.stop - where.start for where in fisher.block_slices.values()))
        columns = []
        for where in fisher.block_slices.values():
            n = where.stop - where.start
            columns.append(torch.eye(n).repeat(1, repeats // n))
        probes = torch.cat(columns)
    density = spectral_density(fisher, probes=probes, num_steps=size)
    exact = spectral_density(fisher, "exact")
    assert density.wasserstein(exact) <= 1e-10 * exact.largest
    for order in (1, 2, 3):
        assert density.moment(order) == pytest.approx(exact.moment(order), rel=1e-10)


def test_moments_are_the_quadratic_forms_of_the_probes():
    fisher = fisher_of()
    probes = torch.randn(fisher.shape[0], 2, generator=generator(0), dtype=torch.float64)
    density = spectral_density(fisher, probes=probes, num_steps=4)
    units = probes / probes.norm(dim=0)
    power = units
    for order in range(8):
        assert density.moment(order) == pytest.approx(float((units * power).sum(0).mean()), rel=1e-10)
        power = fisher @ power


@pytest.mark.parametrize("method", ["slq", "block_lanczos"])
@pytest.mark.parametrize("blocks", ["full", "layer_wise"])
def test_same_seed_is_bit_equal_and_the_global_state_is_left_alone(method, blocks):
    fisher = fisher_of(blocks=blocks)
    before = torch.random.get_rng_state()
    first = spectral_density(fisher, method, generator(3), num_steps=6)
    again = spectral_density(fisher, method, generator(3), num_steps=6)
    other = spectral_density(fisher, method, generator(4), num_steps=6)
    default = spectral_density(fisher, method, num_steps=6)
    zero = spectral_density(fisher, method, generator(0), num_steps=6)
    assert torch.equal(first.nodes, again.nodes)
    assert torch.equal(first.weights, again.weights)
    assert not torch.equal(first.nodes, other.nodes)
    assert torch.equal(default.nodes, zero.nodes)
    assert torch.equal(before, torch.random.get_rng_state())


def test_probes_differ_from_each_other():
    matrix = symmetric(decaying(50))
    alone = [spectral_density(matrix, generator=generator(0), num_probes=n, num_steps=5) for n in (1, 2)]
    assert len(alone[1].nodes) == 10
    assert len(alone[1].nodes.unique()) == 10


def test_snapped_block_lanczos_is_far_more_accurate_than_quadrature():
    # two hundred products on a spectrum that decays over ten decades, as a trained net's does
    matrix = symmetric(decaying(600))
    exact = spectral_density(matrix, "exact")
    plain = spectral_density(matrix, num_probes=4).errors(exact)
    block = spectral_density(matrix, "block_lanczos").errors(exact)
    assert block.wasserstein < 0.01 < 0.05 < plain.wasserstein
    assert block.trace < 1e-9
    assert block.top < 1e-10
    assert block.squares < 1e-4
    snapped = spectral_density(matrix, num_probes=4, node_weights="snapped").errors(exact)
    assert snapped.wasserstein < plain.wasserstein
    assert snapped.trace < 1e-9 < plain.trace


def test_layer_wise_density_is_that_of_the_blocks_weighted_by_size():
    fisher = fisher_of(blocks="layer_wise")
    exact = spectral_density(fisher, "exact")
    estimate_ = spectral_density(fisher, "block_lanczos")
    assert estimate_.errors(exact).wasserstein < 1e-4  # only weights near zero are left to chance
    dense = fisher.to_dense()
    parts = torch.cat([torch.linalg.eigvalsh(dense[where, where]) for where in fisher.block_slices.values()])
    close(exact.nodes, parts.sort().values.clamp_min(0))


def test_gram_and_dense_eigenvalues_agree():
    model, x = make("lenet")
    few = FisherMatrix(model, x[:3], route="factored")
    assert few.num_rows < few.shape[0]
    close(few.eigenvalues(), torch.linalg.eigvalsh(few.to_dense()).clamp_min(0))
    blocks = FisherMatrix(model, x[:3], route="factored", blocks="layer_wise")
    close(blocks.eigenvalues(), torch.linalg.eigvalsh(blocks.to_dense()).clamp_min(0))
    assert (few.eigenvalues()[: few.shape[0] - few.num_rows] == 0).all()


def test_single_precision_estimates_are_close_to_double():
    model, x = make("residual")
    exact = spectral_density(FisherMatrix(model, x), "exact")
    single = FisherMatrix(model.float(), x.float())
    assert spectral_density(single, "block_lanczos").errors(exact).wasserstein < 1e-4
    assert spectral_density(single, "exact").errors(exact).wasserstein < 1e-5


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
def test_spectrum_of_a_running_optimizer_is_that_of_its_dense_blocks(curvature):
    model = mlp()
    x, _ = data()
    optimizer = bare_kfac(model, curvature=curvature)
    estimate(optimizer, model, x)
    density = spectral_density(optimizer.curvature)
    dense = [torch.linalg.eigvalsh(view.to_dense()) for view in optimizer.curvature.values()]
    close(density.nodes, torch.cat(dense).sort().values)
    assert density.size == sum(p.numel() for p in model.parameters())


def test_a_matrix_made_beside_a_running_optimizer_does_not_change_its_step():
    results = []
    for look in (False, True):
        model = mlp()
        x, y = data()
        optimizer = bare_kfac(model, lr=0.1, fisher="mc")
        for _ in range(3):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            if look:
                spectral_density(FisherMatrix(model, x, route="func"), "block_lanczos")
                FisherMatrix(model, (x, y), kind="empirical").eigenvalues()
            loss.backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(results[0], results[1])


def test_wasserstein_of_shifted_and_scaled_measures():
    nodes = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    density = SpectralDensity(nodes, weights, 4, "test")
    shifted = SpectralDensity(nodes + 0.3, weights, 4, "test")
    zero = SpectralDensity(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), 4, "test")
    assert density.wasserstein(shifted) == pytest.approx(0.3)
    assert shifted.wasserstein(density) == pytest.approx(0.3)
    assert density.wasserstein(density) == 0.0
    assert zero.errors(density).wasserstein == pytest.approx(1.0)
    assert zero.errors(density).trace == pytest.approx(1.0)


def test_broadened_densities_integrate_to_their_mass():
    density = spectral_density(symmetric(decaying(100)), "exact")
    grid = density.grid(4000)
    assert float(grid.min()) < 0
    assert float(torch.trapezoid(density.density(grid), grid)) == pytest.approx(1.0, abs=1e-4)  # four kernel widths
    floor = 1e-4
    logs = torch.logspace(-5, 3, 4000, dtype=torch.float64)
    mass = torch.trapezoid(density.log_density(logs, floor), logs.log10())
    assert float(mass) == pytest.approx(1 - density.fraction_below(floor), abs=1e-3)
    assert density.fraction_below(floor) == pytest.approx(0.5)


def test_plot_works_without_a_display_on_both_axes(tmp_path):
    density = spectral_density(symmetric(decaying(60)), "exact")
    for axis in ("linear", "log"):
        ax = density.plot(axis=axis, label="exact")
        spectral_density(symmetric(decaying(60))).plot(ax, axis=axis)
        ax.figure.savefig(tmp_path / f"{axis}.png")
        assert (tmp_path / f"{axis}.png").stat().st_size > 5000
        assert len(ax.lines) == 2
    assert "below" in ax.get_legend().get_texts()[0].get_text()


def test_bad_arguments_are_named():
    fisher = fisher_of("twice")
    size = fisher.shape[0]
    cases = [
        (dict(method="lanczos"), "method must be 'slq', 'block_lanczos' or 'exact', got 'lanczos'"),
        (dict(node_weights="best"), "node_weights must be 'quadrature' or 'snapped', got 'best'"),
        (dict(num_probes=0), "num_probes must be a whole number >= 1, got 0"),
        (dict(num_steps=0), "num_steps must be a whole number >= 1, got 0"),
        (dict(method="block_lanczos", block_size=0), "block_size must be a whole number >= 1, got 0"),
        (dict(probes=torch.ones(3, 1)), rf"probes have shape \[3, 1\], expected \[{size}, num_probes\]"),
        (dict(probes=torch.zeros(size, 1)), "a probe is zero on block ''"),
        (dict(probes=torch.ones(size, 1), method="block_lanczos"), "probes belong to method='slq'"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            spectral_density(fisher, **arguments)
    density = spectral_density(fisher, "exact")
    for bad in (mlp(), bare_kfac(mlp()), "exact"):
        with pytest.raises(TypeError, match=r"expected a FisherMatrix, a symmetric tensor, or the curvature of an optimizer"):
            spectral_density(bad)
    with pytest.raises(ValueError, match=r"no curvature blocks \(a KFAC with curvature='identity' has none\)"):
        spectral_density(bare_kfac(mlp(), curvature="identity").curvature)
    for tensor in (torch.eye(3, dtype=torch.long), torch.full((3, 3), float("nan"))):
        with pytest.raises(ValueError, match="must hold finite floating point numbers"):
            spectral_density(tensor)
    zero = spectral_density(torch.zeros(3, 3), "exact")
    with pytest.raises(ValueError, match=r"mean eigenvalue to compare with is 0.*Use wasserstein\(\)"):
        density.errors(zero)
    with pytest.raises(ValueError, match=r"axis='log' needs a floor > 0, got 0. Use axis='linear'"):
        zero.plot()
    with pytest.raises(ValueError, match="not symmetric"):
        spectral_density(torch.triu(torch.ones(3, 3)))
    with pytest.raises(ValueError, match=r"symmetric matrix \[P, P\], got shape \[3\]"):
        spectral_density(torch.ones(3))
    with pytest.raises(ValueError, match="sigma must be > 0"):
        density.density(density.grid(), 0.0)
    with pytest.raises(ValueError, match="axis must be 'linear' or 'log'"):
        density.plot(axis="loglog")
    with pytest.raises(ValueError, match="needs floor > 0"):
        density.log_density(torch.ones(2), floor=0.0)


def test_a_basis_that_exceeds_the_memory_limit_is_refused():
    wide = nn.Sequential(nn.Linear(30, 100), nn.ReLU(), nn.Linear(100, 5))
    fisher = FisherMatrix(wide, torch.randn(4, 30), memory_limit=600_000)
    with pytest.raises(ValueError, match=r"50 vectors of one probe.*memory_limit is 585.9 KiB.*lower num_steps"):
        spectral_density(fisher)
    with pytest.raises(ValueError, match=r"10 × 20 vectors.*Raise memory_limit"):
        spectral_density(fisher, "block_lanczos")
    few = spectral_density(fisher, num_steps=10, num_probes=3)  # one probe at a time
    assert few.num_products == 30
