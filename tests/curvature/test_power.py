"""``power``: directions are a power of the damped curvature, against dense matrix powers, for every block and style."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_opt import KFAC
from kfac_opt._curvature import sides
from kfac_opt._curvature.linalg import damped_root, split_damped
from tests.contracts.zoo import build, loss
from tests.reference import unvec, vec
from tests.support import assert_same, bare_kfac, close, data, mlp, train_step, weights

DOUBLE = torch.float64
POWERS = [1.0, 0.75, 0.5, 0.25]
STYLES = [(c, s) for c in ("kronecker", "eigenbasis") for s in ("factored", "exact", "split")] + [("diagonal", "factored")]
NETWORKS = {  # with the options that give each kind of block
    "mlp": ("mlp, in-place relu", {}),
    "grouped convolution": ("convolution, grouped", {}),
    "embedding": ("embedding", {}),
    "norms": ("convolution, norm", {}),
    "bare parameters": ("tied weights", {}),
    "diagonal sides": ("mlp, in-place relu", {"max_factor_dim": 5}),
    "block-diagonal sides": ("convolution", {"max_block_dim": 3}),
}


def power_of(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**-power) @ vectors.mT


def damped_blocks(view, style: str) -> list[Tensor]:
    """The damped matrices ``[in·out, in·out]`` of a layer's groups, column-stacking, from the dense factors or scales."""
    gamma = torch.tensor(view.damping, dtype=DOUBLE)
    if hasattr(view.block, "scales"):
        form = view.spectral_form()
        scales = split_damped(form.eigenvalues, gamma) if style == "split" else form.eigenvalues + gamma
        return list(type(form)(form.output_basis, form.input_basis, scales).dense())
    if not hasattr(view.block, "style") or style == "exact":
        dense = view.to_dense()
        return [dense + gamma * torch.eye(len(dense), dtype=DOUBLE)]
    grouped = view.block.groups > 1
    a, g = (part if grouped else part.unsqueeze(0) for part in (view.input_factor, view.output_factor))
    a, g = (torch.diag_embed(part) if part.dim() == 2 else part for part in (a, g))
    blocks = []
    for one, other in zip(a, g):
        pi = (one.diagonal().mean() / other.diagonal().mean()).sqrt()
        left = one + pi * gamma.sqrt() * torch.eye(len(one), dtype=DOUBLE)
        blocks.append(torch.kron(left, other + gamma.sqrt() / pi * torch.eye(len(other), dtype=DOUBLE)))
    return blocks


def expected_direction(view, style: str, power: float, matrix: Tensor) -> Tensor:
    blocks = damped_blocks(view, style)
    if view.block.layout.kind in ("flat",):
        return (power_of(blocks[0], power) @ matrix.flatten()).reshape(matrix.shape)
    parts = matrix.chunk(len(blocks))
    return torch.cat([unvec(power_of(block, power) @ vec(part), len(part)) for block, part in zip(blocks, parts)])


@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize(("curvature", "style"), STYLES)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.filterwarnings("ignore:KFAC")
def test_directions_are_the_dense_matrix_power(network, curvature, style, power):
    name, options = NETWORKS[network]
    model, x, y = build(name)
    scale = "relative" if style == "factored" else "absolute"
    optimizer = bare_kfac(
        model, curvature=curvature, damping_style=style, damping=0.02, damping_scale=scale, power=power, **options
    )
    for _ in range(2):
        train_step(optimizer, model, x, y, loss)
    for view in optimizer.curvature.values():
        flat = view.block.layout.kind == "flat"
        v = torch.randn(view.block.layout.weight_shape if flat else view.block.layout.whole_shape, dtype=DOUBLE)
        close(view.precondition(v), expected_direction(view, style, power, v))


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
def test_a_step_takes_the_powers_of_its_groups(curvature):
    def step(**options):
        model, (x, y) = mlp(), data()
        groups = [{"params": model[0].parameters(), "power": 0.5}, {"params": model[2].parameters()}]
        train_step(bare_kfac(model, groups, lr=1.0, curvature=curvature, **options), model, x, y)
        return weights(model)

    whole = {}
    for power in (0.5, 0.25):
        model, (x, y) = mlp(), data()
        train_step(bare_kfac(model, lr=1.0, curvature=curvature, power=power), model, x, y)
        whole[power] = weights(model)
    for name, found in step(power=0.25).items():
        assert torch.equal(found, whole[0.5 if name.startswith("0") else 0.25][name])


@pytest.mark.parametrize(("curvature", "style"), STYLES)
def test_a_power_that_is_written_into_a_group_is_in_force_at_the_next_step(curvature, style):
    model, (x, y) = mlp(), data()
    optimizer = bare_kfac(model, curvature=curvature, damping_style=style, inverse_interval=100, factor_interval=100)
    train_step(optimizer, model, x, y)
    optimizer.param_groups[0]["power"] = 0.5
    train_step(optimizer, model, x, y)
    for view in optimizer.curvature.values():
        v = torch.randn(view.block.layout.whole_shape, dtype=DOUBLE)
        if view.block.layout.kind == "flat":
            v = v.reshape(view.block.layout.weight_shape)
        close(view.precondition(v), expected_direction(view, style, 0.5, v))


def test_roots_saved_with_another_power_are_made_anew():
    model, (x, y) = mlp(), data()
    saved = bare_kfac(model, power=0.25, inverse_interval=100, factor_interval=100)
    train_step(saved, model, x, y)
    state = saved.state_dict()
    state["param_groups"][0]["power"] = 0.5
    saved.detach()
    optimizer = bare_kfac(model, inverse_interval=100, factor_interval=100)
    optimizer.load_state_dict(state)
    train_step(optimizer, model, x, y)
    for view in optimizer.curvature.values():
        v = torch.randn(view.block.layout.whole_shape, dtype=DOUBLE)
        close(view.precondition(v), expected_direction(view, "factored", 0.5, v))


def test_a_state_without_a_power_is_refused():
    model, (x, y) = mlp(), data()
    optimizer = KFAC(model)
    train_step(optimizer, model, x, y)
    state = optimizer.state_dict()
    del state["param_groups"][0]["power"]
    with pytest.raises(ValueError, match=r"group 0 .*'power'"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("panel_dim", [1, 10**9])
@pytest.mark.parametrize("limit", [None, 3])
def test_large_sides_keep_the_same_roots_in_panels(panel_dim, limit, monkeypatch):
    monkeypatch.setattr(sides, "PANEL_DIM", panel_dim)
    model, (x, y) = mlp(), data()
    optimizer = bare_kfac(model, power=0.5, max_block_dim=limit)
    train_step(optimizer, model, x, y)
    for view in optimizer.curvature.values():
        v = torch.randn(view.block.layout.whole_shape, dtype=DOUBLE)
        close(view.precondition(v), expected_direction(view, "factored", 0.5, v))


def test_power_one_is_the_default_and_the_natural_gradient():
    def run(**options):
        model, (x, y) = mlp(), data()
        optimizer = bare_kfac(model, lr=0.1, **options)
        for _ in range(3):
            train_step(optimizer, model, x, y)
        return weights(model)

    assert_same(run(), run(power=1.0))


def test_single_precision_roots_of_a_singular_factor_are_finite_and_near():
    """Eigenvalues below the rounding of the largest are damped by that rounding, whatever the damping asks for."""
    torch.manual_seed(0)
    rows = torch.randn(3, 20, dtype=DOUBLE)
    factor, damping = rows.mT @ rows, torch.tensor([1e-12], dtype=DOUBLE)
    found = damped_root(factor.float().unsqueeze(0), damping.float(), 0.5)[0].double()
    floor = 4 * torch.finfo(torch.float32).eps * torch.linalg.eigvalsh(factor)[-1]
    assert torch.isfinite(found).all()
    v = rows.mT @ torch.randn(3, dtype=DOUBLE)  # in the range of the factor
    close(found @ v, power_of(factor + floor * torch.eye(20, dtype=DOUBLE), 0.5) @ v, rtol=1e-3)


@pytest.mark.parametrize("power", [0.0, -0.5, 1.5, float("nan"), "half"])
def test_a_power_out_of_range_is_refused(power):
    with pytest.raises(ValueError, match=r"KFAC: power must be in \(0, 1\], got"):
        KFAC(mlp(), power=power)


@pytest.mark.parametrize("power", [0.75, 0.5])
def test_the_loss_falls(power):
    model, (x, y) = mlp(torch.float32), data(32, dtype=torch.float32)
    optimizer = KFAC(model, power=power, damping=1e-4)
    losses = [train_step(optimizer, model, x, y, F.cross_entropy) for _ in range(100)]
    assert losses[-1] < 0.7 * losses[0]
