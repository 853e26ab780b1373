"""EKFAC: scales are second moments of per-example gradients in the basis in force, carried over when it changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_opt import KFAC
from tests import reference
from tests.support import Lambda, Sequence, Twice, bare_kfac, close, data, estimate, gradients, mlp, pool

DOUBLE = torch.float64
# Eigenvectors move by rounding over the gap of their eigenvalues: eps (2e-16) * 1e5.
BASIS = 1e-9


def convolution(**options) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 2, **options), nn.Tanh(), Lambda(pool), nn.Linear(3, 3)).to(DOUBLE)


CASES = {
    "mlp": (mlp, lambda: data(30)[0], "0"),
    "last layer": (mlp, lambda: data(30)[0], "2"),
    "sequence": (lambda: Sequence().to(DOUBLE), lambda: torch.randn(9, 4, 3, dtype=DOUBLE), "inner"),
    "called twice": (lambda: Twice().to(DOUBLE), lambda: data(20)[0], "shared"),
    "convolution": (convolution, lambda: torch.randn(6, 2, 4, 4, dtype=DOUBLE), "0"),
    "strided": (lambda: convolution(stride=2, padding=1), lambda: torch.randn(6, 2, 4, 4, dtype=DOUBLE), "0"),
    "dilated": (lambda: convolution(dilation=2, padding=1), lambda: torch.randn(6, 2, 4, 4, dtype=DOUBLE), "0"),
}


def bases(model: nn.Module, x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    a, g = reference.kronecker_factors(model, x, name)
    return torch.linalg.eigh(a)[1], torch.linalg.eigh(g)[1]


@pytest.mark.parametrize("case", CASES)
def test_block_equals_brute_force_per_example_jacobians(case):
    """Also catches a layer called twice that pairs the last input with the first gradient, and a lost transpose."""
    make, inputs, name = CASES[case]
    model, x = make(), inputs()
    qa, qg = bases(model, x, name)
    per_example, terms = reference.per_example_fisher(model, x, name)
    expected = reference.dense_eigenbasis(reference.eigenbasis_scales(per_example, terms, qa, qg), qa, qg)
    optimizer = bare_kfac(model, curvature="eigenbasis")
    estimate(optimizer, model, x)
    close(optimizer.curvature[name].to_dense(), expected, rtol=BASIS)


@pytest.mark.parametrize("case", CASES)
def test_direction_equals_a_dense_solve(case):
    make, inputs, name = CASES[case]
    model, x = make(), inputs()
    qa, qg = bases(model, x, name)
    per_example, terms = reference.per_example_fisher(model, x, name)
    block = reference.dense_eigenbasis(reference.eigenbasis_scales(per_example, terms, qa, qg), qa, qg)
    y, module = torch.randint(3, (len(x),)), model.get_submodule(name)
    optimizer = bare_kfac(model, curvature="eigenbasis", damping=0.01)
    F.cross_entropy(model(x), y).backward()
    v = reference.module_matrix(module, lambda p: p.grad.clone())
    optimizer.precondition_gradients_()
    expected = reference.dense_solve(block, 0.01, v)
    close(reference.module_matrix(module, lambda p: p.grad), expected, rtol=BASIS)
    close(optimizer.curvature[name].precondition(v), expected, rtol=BASIS)


@pytest.mark.parametrize("case", CASES)
def test_split_damping_adds_the_cross_terms_of_the_factored_one(case):
    """``(λ^G + √γ/π)(λ^A + π√γ)`` with ``λ^G_i`` and ``λ^A_j`` read off the marginal means of the scales."""
    make, inputs, name = CASES[case]
    model, x = make(), inputs()
    qa, qg = bases(model, x, name)
    per_example, terms = reference.per_example_fisher(model, x, name)
    scales = reference.eigenbasis_scales(per_example, terms, qa, qg)
    optimizer = bare_kfac(model, curvature="eigenbasis", damping=0.01, damping_style="split")
    estimate(optimizer, model, x)
    rows, columns = scales.mean(1), scales.mean(0)
    damped = scales + 0.01 + (0.01 / scales.mean()) ** 0.5 * (rows[:, None] + columns[None, :])
    v = torch.randn_like(scales)
    expected = reference.dense_solve(reference.dense_eigenbasis(damped, qa, qg), 0.0, v)
    close(optimizer.curvature[name].precondition(v), expected, rtol=BASIS)


def test_split_damping_of_a_product_of_factors_is_the_factored_one():
    """One example: the scales are exactly ``λ^G_i λ^A_j``, and EKFAC with split damping is factored K-FAC."""
    directions = []
    for options in ({"curvature": "eigenbasis", "damping_style": "split"}, {"damping_style": "factored"}):
        model, x = nn.Sequential(nn.Linear(4, 2)).to(DOUBLE), data(1)[0]
        optimizer = bare_kfac(model, likelihood="gaussian", damping=0.03, **options)
        estimate(optimizer, model, x)
        directions.append(optimizer.curvature["0"].precondition(torch.ones(2, 5, dtype=DOUBLE)))
    close(*directions, rtol=BASIS)


def test_grouped_convolution_has_one_basis_pair_per_group():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), Lambda(pool), nn.Linear(6, 3)).to(DOUBLE)
    x = torch.randn(8, 4, 3, 3, dtype=DOUBLE)
    a, g = reference.kronecker_factors(model, x, "0")
    per_example, terms = reference.per_example_fisher(model, x, "0")
    index = torch.arange(6 * a.shape[-1]).reshape(a.shape[-1], 2, 3)
    expected = torch.zeros(6 * a.shape[-1], 6 * a.shape[-1], dtype=DOUBLE)
    for k in range(2):
        where = index[:, k].reshape(-1)
        qa, qg = torch.linalg.eigh(a[k])[1], torch.linalg.eigh(g[k])[1]
        block = per_example[:, where[:, None], where[None, :]]
        expected[where[:, None], where[None, :]] = reference.dense_eigenbasis(
            reference.eigenbasis_scales(block, terms, qa, qg), qa, qg
        )
    optimizer = bare_kfac(model, curvature="eigenbasis")
    estimate(optimizer, model, x)
    close(optimizer.curvature["0"].to_dense(), expected, rtol=BASIS)


def test_trace_is_that_of_the_exact_fisher_block():
    """A rotation keeps the trace: the scales sum to the trace of F, which A ⊗ G does not."""
    model, x = Sequence().to(DOUBLE), torch.randn(9, 4, 3, dtype=DOUBLE)
    expected = reference.fisher_block(model, x, "inner").trace()
    optimizer = bare_kfac(model, curvature="eigenbasis")
    estimate(optimizer, model, x)
    close(optimizer.curvature["inner"].to_dense().trace(), expected)


def test_scales_are_frobenius_optimal_in_their_basis():
    model, (x, _) = mlp(), data(30)
    f = reference.fisher_block(model, x, "0")
    a, g = reference.kronecker_factors(model, x, "0")
    optimizer = bare_kfac(model, curvature="eigenbasis")
    estimate(optimizer, model, x)
    assert (optimizer.curvature["0"].to_dense() - f).norm() < (torch.kron(a, g) - f).norm()


def test_scales_follow_the_data_between_basis_refreshes():
    model = mlp()
    x1, x2 = data(30, seed=1)[0], 1.5 * data(30, seed=2)[0]
    qa, qg = bases(model, x1, "0")
    scales = [reference.eigenbasis_scales(*reference.per_example_fisher(model, x, "0"), qa, qg) for x in (x1, x2)]
    optimizer = bare_kfac(model, curvature="eigenbasis", inverse_interval=100, factor_decay=0.8)
    for x in (x1, x2):
        estimate(optimizer, model, x)
    expected = reference.dense_eigenbasis((0.8 * scales[0] + scales[1]) / 1.8, qa, qg)
    close(optimizer.curvature["0"].to_dense(), expected, rtol=BASIS)


def test_scales_are_carried_over_when_the_basis_changes():
    model = mlp()
    x1, x2 = data(30, seed=1)[0], 1.5 * data(30, seed=2)[0]
    d = 0.8
    (a1, g1), (a2, g2) = (reference.kronecker_factors(model, x, "0") for x in (x1, x2))
    qa1, qg1 = torch.linalg.eigh(a1)[1], torch.linalg.eigh(g1)[1]
    qa2, qg2 = (torch.linalg.eigh((d * old + new) / (1 + d))[1] for old, new in ((a1, a2), (g1, g2)))
    s1 = reference.eigenbasis_scales(*reference.per_example_fisher(model, x1, "0"), qa1, qg1)
    s2 = reference.eigenbasis_scales(*reference.per_example_fisher(model, x2, "0"), qa2, qg2)
    carried = (qg2.T @ qg1) ** 2 @ s1 @ ((qa2.T @ qa1) ** 2).T
    optimizer = bare_kfac(model, curvature="eigenbasis", factor_decay=d)
    for x in (x1, x2):
        estimate(optimizer, model, x)
    expected = reference.dense_eigenbasis((d * carried + s2) / (1 + d), qa2, qg2)
    close(optimizer.curvature["0"].to_dense(), expected, rtol=BASIS)


def test_carrying_scales_over_keeps_the_trace():
    model, (x, _) = mlp(), data(30)
    optimizer = bare_kfac(model, curvature="eigenbasis", factor_decay=0.5)
    estimate(optimizer, model, x)
    other = data(30, seed=9)[0]
    traces = [reference.fisher_block(mlp(), z, "0").trace() for z in (x, other)]
    estimate(optimizer, model, other)
    close(optimizer.curvature["0"].to_dense().trace(), (0.5 * traces[0] + traces[1]) / 1.5)


def test_sampled_scales_are_unbiased():
    """In a basis that stays, the mean of the sampled blocks is the exact Fisher's diagonal in it."""
    model, x = Sequence().to(DOUBLE), torch.randn(6, 3, 3, dtype=DOUBLE)
    f = reference.fisher_block(model, x, "inner")
    optimizer = bare_kfac(model, curvature="eigenbasis", fisher="mc", factor_decay=0.0, inverse_interval=10**6)
    blocks = []
    for _ in range(300):
        estimate(optimizer, model, x)
        blocks.append(optimizer.curvature["inner"].to_dense().clone())
    basis = torch.linalg.eigh(sum(blocks) / len(blocks))[1]  # all blocks are diagonal in the same basis
    scales = torch.stack([(basis.T @ block @ basis).diagonal() for block in blocks])
    expected = (basis.T @ f @ basis).diagonal()
    assert ((scales.mean(0) - expected).abs() <= 4 * scales.std(0) / len(blocks) ** 0.5 + 1e-12).all()


def test_one_example_gives_the_exact_fisher_block_like_the_kronecker_product():
    model, (x, _) = mlp(), data(1)
    f = reference.fisher_block(model, x, "2")
    optimizer = bare_kfac(model, curvature="eigenbasis")
    estimate(optimizer, model, x)
    close(optimizer.curvature["2"].to_dense(), f, rtol=BASIS)


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
def test_a_side_above_max_factor_dim_is_diagonal(curvature):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).to(DOUBLE)
    x, _ = data(20, features=6)
    a, g = reference.kronecker_factors(model, x, "0")
    per_example, terms = reference.per_example_fisher(model, x, "0")
    optimizer = bare_kfac(model, max_factor_dim=5, curvature=curvature)
    estimate(optimizer, model, x)
    view = optimizer.curvature["0"]
    assert view.input_factor.shape == (7,)
    assert view.output_factor.shape == (4, 4)
    close(view.input_factor, a.diagonal())
    close(view.output_factor, g)
    if curvature == "kronecker":
        expected = torch.kron(a.diagonal().diag(), g)
    else:
        identity, qg = torch.eye(7, dtype=DOUBLE), torch.linalg.eigh(g)[1]
        expected = reference.dense_eigenbasis(reference.eigenbasis_scales(per_example, terms, identity, qg), identity, qg)
    close(view.to_dense(), expected, rtol=BASIS)
    v = torch.randn(4, 7, dtype=DOUBLE)
    if curvature == "eigenbasis":
        close(view.precondition(v), reference.dense_solve(expected, 1e-2, v), rtol=BASIS)
    else:
        close(view.precondition(v), reference.factored_solve(a.diagonal().diag(), g, 1e-2, v))


def test_both_sides_above_max_factor_dim_are_diagonal():
    model, (x, _) = mlp(), data()
    a, g = reference.kronecker_factors(model, x, "0")
    optimizer = bare_kfac(model, max_factor_dim=1)
    estimate(optimizer, model, x)
    close(optimizer.curvature["0"].to_dense(), torch.kron(a.diagonal(), g.diagonal()).diag())


def test_max_factor_dim_is_finite_by_default():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(25089, 2))
    optimizer = KFAC(model)
    estimate(optimizer, model, torch.randn(1, 25089))
    assert optimizer.curvature["0"].input_factor.shape == (25090,)


def test_gradients_of_other_layers_are_untouched_by_a_views_precondition():
    model, (x, y) = mlp(), data()
    optimizer = bare_kfac(model, curvature="eigenbasis")
    F.cross_entropy(model(x), y).backward()
    before = gradients(model)
    optimizer.step()
    v = torch.ones(5, 5, dtype=DOUBLE)
    optimizer.curvature["0"].precondition(v)
    assert torch.equal(v, torch.ones(5, 5, dtype=DOUBLE))
    assert all(torch.equal(before[n], g) for n, g in gradients(model).items())


@pytest.mark.parametrize("case", ["sequence", "convolution", "strided", "dilated"])
def test_reduced_positions_change_the_basis_and_not_the_per_example_gradients(case):
    """With ``weight_sharing="reduce"`` the bases are those of the joined positions; block and direction by brute force."""
    make, inputs, name = CASES[case]
    # More examples than inputs of the layer: the eigenvectors of a kernel are arbitrary, and gradients reach into it here.
    model, x = make(), torch.cat([inputs() for _ in range(4)])
    a, g = reference.kronecker_factors(model, x, name, sharing="reduce")
    qa, qg = torch.linalg.eigh(a)[1], torch.linalg.eigh(g)[1]
    per_example, terms = reference.per_example_fisher(model, x, name)
    expected = reference.dense_eigenbasis(reference.eigenbasis_scales(per_example, terms, qa, qg), qa, qg)
    optimizer = bare_kfac(model, curvature="eigenbasis", weight_sharing="reduce", damping=0.05)
    estimate(optimizer, model, x)
    view = optimizer.curvature[name]
    close(view.to_dense(), expected, rtol=BASIS)
    v = torch.randn(len(g), len(a), dtype=DOUBLE)
    close(view.precondition(v), reference.dense_solve(expected, 0.05, v), rtol=BASIS)
