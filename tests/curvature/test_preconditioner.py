"""Preconditioned gradients equal dense solves: factored, exact, diagonal and norm blocks; damping in its two scales."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import reference
from tests.support import Lambda, Sequence, bare_kfac, close, data, estimate, gradients, mlp, pool

DOUBLE = torch.float64
DAMPINGS = [1e-3, 1e-1, 10.0]


def convolution() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), Lambda(pool), nn.Linear(3, 3)).to(DOUBLE)


CASES = {
    "mlp": (mlp, lambda: data()[0], ["0", "2"]),
    "convolution": (convolution, lambda: torch.randn(3, 2, 4, 4, dtype=DOUBLE), ["0", "3"]),
    "sequence": (lambda: Sequence().to(DOUBLE), lambda: torch.randn(5, 4, 3, dtype=DOUBLE), ["inner", "outer"]),
}


def solved(style: str, a: torch.Tensor, g: torch.Tensor, damping: float, v: torch.Tensor) -> torch.Tensor:
    if style in ("factored", "split"):
        return reference.factored_solve(a, g, damping, v)
    return reference.dense_solve(reference.dense_kronecker(a, g), damping, v)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("style", ["factored", "exact", "split"])
@pytest.mark.parametrize("case", CASES)
def test_precondition_equals_a_dense_solve(case, style, damping):
    make, inputs, names = CASES[case]
    model, x = make(), inputs()
    factors = {n: reference.kronecker_factors(model, x, n) for n in names}
    optimizer = bare_kfac(model, damping=damping, damping_style=style)
    estimate(optimizer, model, x)
    for name, (a, g) in factors.items():
        v = torch.randn(len(g), len(a), dtype=DOUBLE)
        close(optimizer.curvature[name].precondition(v), solved(style, a, g, damping, v))


@pytest.mark.parametrize("style", ["factored", "exact", "split"])
@pytest.mark.parametrize("case", ["convolution", "sequence"])
def test_precondition_equals_a_dense_solve_with_reduced_positions(case, style):
    make, inputs, names = CASES[case]
    model, x = make(), inputs()
    factors = {n: reference.kronecker_factors(model, x, n, sharing="reduce") for n in names}
    optimizer = bare_kfac(model, damping=0.05, damping_style=style, weight_sharing="reduce")
    estimate(optimizer, model, x)
    for name, (a, g) in factors.items():
        v = torch.randn(len(g), len(a), dtype=DOUBLE)
        close(optimizer.curvature[name].precondition(v), solved(style, a, g, 0.05, v))


@pytest.mark.parametrize("style", ["factored", "exact", "split"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_replaced_by_the_solution(case, style):
    make, inputs, names = CASES[case]
    model, x = make(), inputs()
    y = torch.randint(3, (len(x),))
    factors = {n: reference.kronecker_factors(model, x, n) for n in names}
    optimizer = bare_kfac(model, damping=0.05, damping_style=style)
    F.cross_entropy(model(x), y).backward()
    raw = gradients(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.precondition_gradients_()
    for name, (a, g) in factors.items():
        module = model.get_submodule(name)
        v = reference.weight_matrix(module, raw[f"{name}.weight"], raw[f"{name}.bias"])
        close(reference.module_matrix(module, lambda p: p.grad), solved(style, a, g, 0.05, v))
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
@pytest.mark.parametrize("style", ["factored", "exact", "split"])
def test_a_plain_step_moves_by_minus_lr_times_the_direction(curvature, style):
    model, (x, y) = mlp(), data()
    twin = mlp()
    options = {"curvature": curvature, "damping": 0.05, "damping_style": style}
    optimizer, direction = bare_kfac(model, lr=0.3, **options), bare_kfac(twin, **options)
    for net in (model, twin):
        F.cross_entropy(net(x), y).backward()
    direction.precondition_gradients_()
    optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters()):
        close(p.detach(), (q - 0.3 * q.grad).detach())


def test_exact_damping_of_grouped_convolution_solves_the_whole_matrix():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 2, groups=2), nn.Tanh(), Lambda(pool), nn.Linear(6, 3)).to(DOUBLE)
    x = torch.randn(4, 4, 3, 3, dtype=DOUBLE)
    a, g = reference.kronecker_factors(model, x, "0")
    optimizer = bare_kfac(model, damping=0.02, damping_style="exact")
    estimate(optimizer, model, x)
    v = torch.randn(6, a.shape[-1], dtype=DOUBLE)
    close(optimizer.curvature["0"].precondition(v), solved("exact", a, g, 0.02, v))


def test_factored_damping_does_not_depend_on_which_factor_carries_the_scale():
    """π makes ``A ⊗ G`` alone matter: scaling inputs by c and output gradients by 1/c changes nothing."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=DOUBLE)
    blocks = []
    for c in (1.0, 16.0):
        model = nn.Sequential(Lambda(lambda h, c=c: c * h), nn.Linear(4, 4, bias=False), Lambda(lambda h, c=c: h / c)).to(DOUBLE)
        with torch.no_grad():
            model[1].weight.copy_(torch.eye(4))
        optimizer = bare_kfac(model, damping=0.1, damping_style="factored")
        estimate(optimizer, model, x)
        blocks.append(optimizer.curvature["1"].precondition(torch.ones(4, 4, dtype=DOUBLE)).clone())
    close(blocks[1], blocks[0])


@pytest.mark.parametrize("style", ["factored", "exact", "split"])
def test_damping_means_the_same_in_both_styles_when_it_dominates(style):
    """Both tend to V / γ: π-splitting errs by at most 2 sqrt(λ/γ) + λ/γ, λ the largest eigenvalue up to π's ratio."""
    model, (x, _) = mlp(), data()
    a, g = reference.kronecker_factors(model, x, "0")
    optimizer = bare_kfac(model, damping=1e12, damping_style=style)
    estimate(optimizer, model, x)
    v = torch.randn(5, 5, dtype=DOUBLE)
    worst = len(a) * len(g) * math.sqrt(reference.layer_scale(a, g) / 1e12) * 4
    torch.testing.assert_close(1e12 * optimizer.curvature["0"].precondition(v), v, rtol=worst, atol=0)


def test_relative_damping_is_the_given_number_times_the_scale_of_the_layer():
    model, (x, _) = mlp(), data()
    factors = {n: reference.kronecker_factors(model, x, n) for n in ("0", "2")}
    optimizer = bare_kfac(model, damping=0.03, damping_scale="relative", damping_style="exact")
    estimate(optimizer, model, x)
    for name, (a, g) in factors.items():
        v = torch.randn(len(g), len(a), dtype=DOUBLE)
        expected = solved("exact", a, g, 0.03 * reference.layer_scale(a, g), v)
        close(optimizer.curvature[name].precondition(v), expected)


@pytest.mark.parametrize("style", ["factored", "exact", "split"])
def test_relative_damping_scales_with_the_curvature(style):
    """Ten times larger inputs to a linear model: A is a hundred times larger, the direction a hundred times smaller."""
    torch.manual_seed(0)
    x, v = torch.randn(6, 4, dtype=DOUBLE), torch.randn(3, 4, dtype=DOUBLE)
    directions = []
    for scale in (1.0, 10.0):
        model = nn.Sequential(nn.Linear(4, 3, bias=False)).to(DOUBLE)
        optimizer = bare_kfac(model, likelihood="gaussian", damping=0.3, damping_scale="relative", damping_style=style)
        estimate(optimizer, model, scale * x)
        directions.append(optimizer.curvature["0"].precondition(v).clone())
    close(100 * directions[1], directions[0])


@pytest.mark.parametrize(("shrink", "floor_active"), [(0.5, False), (0.01, True)])
def test_relative_damping_never_falls_below_a_tenth_of_the_largest_scale_seen(shrink, floor_active):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).to(DOUBLE)
    x = torch.randn(6, 4, dtype=DOUBLE)
    small = math.sqrt(shrink) * x  # A, and so τ, shrinks by this factor
    a, g = reference.kronecker_factors(model, small, "0", "gaussian")
    tau = reference.layer_scale(a, g)
    gamma = 0.3 * max(tau, 0.1 * tau / shrink)
    assert floor_active == (gamma > 0.3 * tau)
    optimizer = bare_kfac(
        model, likelihood="gaussian", damping=0.3, damping_scale="relative", damping_style="exact", factor_decay=0.0
    )
    estimate(optimizer, model, x)
    estimate(optimizer, model, small)
    v = torch.randn(3, 4, dtype=DOUBLE)
    close(optimizer.curvature["0"].precondition(v), solved("exact", a, g, gamma, v))


def test_the_largest_scale_seen_survives_a_checkpoint():
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=DOUBLE)
    options = {
        "likelihood": "gaussian",
        "damping": 0.3,
        "damping_scale": "relative",
        "damping_style": "exact",
        "factor_decay": 0.0,
    }
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).to(DOUBLE)
    optimizer = bare_kfac(model, **options)
    estimate(optimizer, model, x)
    resumed = nn.Sequential(nn.Linear(4, 3, bias=False)).to(DOUBLE)
    again = bare_kfac(resumed, **options)
    again.load_state_dict(optimizer.state_dict())
    v = torch.randn(3, 4, dtype=DOUBLE)
    for net, kfac in ((model, optimizer), (resumed, again)):
        estimate(kfac, net, 0.01 * x)
    close(again.curvature["0"].precondition(v), optimizer.curvature["0"].precondition(v))
    fresh_model = nn.Sequential(nn.Linear(4, 3, bias=False)).to(DOUBLE)
    fresh = bare_kfac(fresh_model, **options)
    estimate(fresh, fresh_model, 0.01 * x)
    assert not torch.allclose(fresh.curvature["0"].precondition(v), again.curvature["0"].precondition(v), rtol=0.1)


@pytest.mark.parametrize("scale", ["absolute", "relative"])
def test_diagonal_block_divides_by_diagonal_plus_damping_without_a_root(scale):
    model, (x, y) = mlp(), data(1)
    diagonal = reference.parameter_fisher_diagonal(model, x, model[0].weight)
    gamma = 0.05
    if scale == "relative":
        gamma *= float(diagonal.mean()) * math.sqrt(diagonal.numel())
    optimizer = bare_kfac(model, curvature="diagonal", damping=0.05, damping_scale=scale)
    F.cross_entropy(model(x), y).backward()
    raw = gradients(model)
    optimizer.precondition_gradients_()
    close(optimizer.curvature["0.weight"].diagonal, diagonal)
    close(model[0].weight.grad, raw["0.weight"] / (diagonal + gamma))


@pytest.mark.parametrize("style", ["factored", "exact", "split"])
@pytest.mark.parametrize("scale", ["absolute", "relative"])
def test_norm_block_is_solved_channel_by_channel_in_every_damping_style(style, scale):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).to(DOUBLE)
    x, _ = data()
    block = reference.fisher_block(model, x, "1")
    channel = torch.arange(10) % 5  # vec stacks the columns (scale, shift)
    block = torch.where(channel[:, None] == channel[None, :], block, 0.0)
    gamma = 0.05
    if scale == "relative":
        gamma *= float(block.diagonal().mean()) * math.sqrt(10)
    optimizer = bare_kfac(model, damping=0.05, damping_scale=scale, damping_style=style)
    estimate(optimizer, model, x)
    close(optimizer.curvature["1"].to_dense(), block)
    v = torch.randn(5, 2, dtype=DOUBLE)
    close(optimizer.curvature["1"].precondition(v), reference.dense_solve(block, gamma, v))


def test_damping_can_differ_per_group_and_change_between_steps():
    model, (x, _) = mlp(), data()
    factors = {n: reference.kronecker_factors(model, x, n) for n in ("0", "2")}
    optimizer = bare_kfac(model, [{"params": model[0].parameters(), "damping": 0.5}, {"params": model[2].parameters()}])
    estimate(optimizer, model, x)
    for name, damping in (("0", 0.5), ("2", 1e-2)):
        a, g = factors[name]
        v = torch.randn(len(g), len(a), dtype=DOUBLE)
        close(optimizer.curvature[name].precondition(v), solved("factored", a, g, damping, v))
    optimizer.param_groups[1]["damping"] = 2.0
    estimate(optimizer, model, x)
    a, g = factors["2"]
    v = torch.randn(len(g), len(a), dtype=DOUBLE)
    close(optimizer.curvature["2"].precondition(v), solved("factored", a, g, 2.0, v))


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
@pytest.mark.parametrize("style", ["factored", "exact", "split"])
@pytest.mark.parametrize("damping", [1e-8, 1e-5, 1e-3])
def test_rank_deficient_factors_in_float32_give_a_finite_descent_direction(curvature, style, damping):
    """One example: every factor has rank one. An unchecked fp32 Cholesky returns garbage here without an error."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 10))
    x, y = torch.randn(1, 30), torch.tensor([3])
    optimizer = bare_kfac(
        model,
        damping=damping,
        damping_scale="relative",
        damping_style=style,
        curvature=curvature,
        factor_dtype=torch.float32,
    )
    F.cross_entropy(model(x), y).backward()
    raw = gradients(model)
    optimizer.precondition_gradients_()
    products = {n: float((g.double() * raw[n].double()).sum()) for n, g in gradients(model).items()}
    assert all(g.isfinite().all() for g in gradients(model).values())
    for layer in ("0", "2"):
        assert products[f"{layer}.weight"] + products[f"{layer}.bias"] > 0


@pytest.mark.parametrize("examples", [3, 50])
def test_float32_inverse_of_a_rank_deficient_factor_is_positive_at_negligible_damping(examples):
    """The floor of the ladder: without it Cholesky returns eigenvalues of either sign, or far too large ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 100, bias=False))
    x = torch.randn(examples, 200) * torch.linspace(0.1, 3.0, 200)
    optimizer = bare_kfac(model, likelihood="gaussian", damping=1e-14, damping_scale="relative", factor_dtype=torch.float32)
    estimate(optimizer, model, x)
    view = optimizer.curvature["0"]
    factor = view.input_factor.double()
    # an eigenvector of A in, the damped inverse of its eigenvalue out; G is the identity up to its own damping
    values, vectors = torch.linalg.eigh(factor)
    for index in (0, 50, 199):
        probe = torch.ones(100, 1, dtype=DOUBLE) @ vectors[:, index][None, :]
        gain = float((probe * view.precondition(probe.float()).double()).sum() / probe.square().sum())
        largest = 1 / (1e-4 * float(factor.diagonal().mean()))
        assert 0 < gain <= 1.5 * largest
        if values[index] > 0.01 * values[-1]:
            assert gain == pytest.approx(1 / float(values[index]), rel=0.02)


def test_preconditioner_is_linear_and_positive():
    model, (x, _) = mlp(), data(2)
    optimizer = bare_kfac(model, damping=1e-4)
    estimate(optimizer, model, x)
    view = optimizer.curvature["0"]
    u, v = torch.randn(2, 5, 5, dtype=DOUBLE)
    close(view.precondition(2 * u - v), 2 * view.precondition(u) - view.precondition(v), rtol=1e-9)
    assert (u * view.precondition(u)).sum() > 0
    torch.testing.assert_close((u * view.precondition(v)).sum(), (v * view.precondition(u)).sum(), rtol=1e-9, atol=1e-9)
