"""``max_block_dim``: factors without the covariances between blocks, and everything else as with whole factors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt import KFAC
from kfac_opt._curvature import sides
from kfac_opt._curvature.sides import block_ranges
from tests.support import assert_same, bare_kfac, close, gradients, train_step

DOUBLE = torch.float64
CURVATURES = [("kronecker", "factored"), ("kronecker", "exact"), ("eigenbasis", "factored")]


def mixed_model(groups: int = 1, bias: bool = True) -> nn.Sequential:
    """Input sides of 3 · 3 · 4 / groups (+ 1), 2 · 2 · 6 (+ 1), 24 (+ 1); output sides of 6, 6 and 3."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=groups, bias=bias),
        nn.ReLU(),
        nn.Conv2d(6, 6, 2, stride=2, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 3, bias=bias),
    ).to(DOUBLE)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(7, 4, 4, 4, dtype=DOUBLE, generator=generator), torch.randint(3, (7,), generator=generator)


def without_cross_terms(factor: Tensor, ranges: list[tuple[int, int]]) -> Tensor:
    cut = torch.zeros_like(factor)
    for start, end in ranges:
        cut[..., start:end, start:end] = factor[..., start:end, start:end]
    return cut


def expected_ranges(model: nn.Sequential, name: str, side: str, limit: int) -> list[tuple[int, int]]:
    layer = model.get_submodule(name)
    taps = layer.weight[0, 0].numel() if isinstance(layer, nn.Conv2d) and side == "input" else 1
    size = layer.weight[0].numel() + (layer.bias is not None) if side == "input" else layer.weight.shape[0]
    if side == "output" and isinstance(layer, nn.Conv2d):
        size //= layer.groups
    return block_ranges(size, limit, taps)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_factors_are_the_diagonal_blocks_of_whole_factors(groups, bias):
    limit = 9
    whole, cut = mixed_model(groups, bias), mixed_model(groups, bias)
    first, second = bare_kfac(whole, factor_decay=0.5), bare_kfac(cut, factor_decay=0.5, max_block_dim=limit)
    for seed in range(2):
        for optimizer, model in ((first, whole), (second, cut)):
            optimizer.zero_grad()
            x, y = batch(seed)
            F.cross_entropy(model(x), y).backward()
            optimizer.precondition_gradients_()
    some_cut = 0
    for name in ("0", "2", "5"):
        for side in ("input", "output"):
            ranges = expected_ranges(whole, name, side, limit)
            some_cut += len(ranges) > 1
            full = getattr(first.curvature[name], f"{side}_factor")
            close(getattr(second.curvature[name], f"{side}_factor"), without_cross_terms(full, ranges))
    assert some_cut >= 3


@pytest.mark.parametrize("panel_dim", [1, 10**9])
@pytest.mark.parametrize("limit", [2, 9])
@pytest.mark.parametrize(("curvature", "style"), CURVATURES)
def test_directions_are_those_of_the_dense_block_diagonal_matrix(curvature, style, limit, panel_dim, monkeypatch):
    """The direction solves with the Kronecker product of the cut factors (``to_dense`` builds it densely), damped."""
    monkeypatch.setattr(sides, "PANEL_DIM", panel_dim)
    model = mixed_model()
    optimizer = bare_kfac(
        model, curvature=curvature, damping_style=style, max_block_dim=limit, damping=0.1, damping_scale="absolute"
    )
    for seed in range(2):
        optimizer.zero_grad()
        x, y = batch(seed)
        F.cross_entropy(model(x), y).backward()
        raw = gradients(model)
        optimizer.precondition_gradients_()
    found = gradients(model)
    for name in ("0", "2", "5"):
        view, weight = optimizer.curvature[name], raw[f"{name}.weight"]
        matrix = torch.cat([weight.flatten(1), raw[f"{name}.bias"].unsqueeze(-1)], -1)
        direction = torch.cat([found[f"{name}.weight"].flatten(1), found[f"{name}.bias"].unsqueeze(-1)], -1)
        if style == "factored" and curvature == "kronecker":
            a, g = view.input_factor, view.output_factor
            pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
            left = torch.linalg.solve(g + 0.1**0.5 / pi * torch.eye(len(g), dtype=DOUBLE), matrix)
            expected = torch.linalg.solve(a + pi * 0.1**0.5 * torch.eye(len(a), dtype=DOUBLE), left.mT).mT
        else:
            dense = view.to_dense()
            if curvature == "kronecker":
                close(dense, torch.kron(view.input_factor, view.output_factor))
            damped = dense + 0.1 * torch.eye(len(dense), dtype=DOUBLE)
            expected = torch.linalg.solve(damped, matrix.mT.reshape(-1)).reshape(matrix.mT.shape).mT
        close(direction, expected, rtol=1e-9)
        close(view.precondition(matrix), expected, rtol=1e-9)


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
def test_a_limit_that_nothing_exceeds_changes_no_bit(curvature):
    results = []
    for limit in (None, 1000):
        model = mixed_model()
        optimizer = KFAC(model, curvature=curvature, max_block_dim=limit)
        for seed in range(3):
            train_step(optimizer, model, *batch(seed))
        results.append(dict(model.state_dict()))
    assert_same(*results)


def test_blocks_of_eigenbasis_scales_follow_the_basis():
    """With the same data at every step scales that were turned along equal scales taken in the new basis."""
    model = mixed_model()
    optimizer = bare_kfac(model, lr=0.0, curvature="eigenbasis", fisher="exact", max_block_dim=9, factor_decay=0.5)
    x, y = batch()
    for _ in range(3):
        train_step(optimizer, model, x, y)
    twin = mixed_model()
    fresh = bare_kfac(twin, lr=0.0, curvature="eigenbasis", fisher="exact", max_block_dim=9, factor_decay=0.5)
    train_step(fresh, twin, x, y)
    for name in ("0", "2", "5"):
        close(optimizer.curvature[name].to_dense(), fresh.curvature[name].to_dense(), rtol=1e-6)


def test_state_is_smaller_and_resumes_bit_for_bit():
    model, other = mixed_model(), mixed_model()
    options = {"lr": 0.1, "max_block_dim": 9}
    optimizer, resumed = bare_kfac(model, **options), bare_kfac(other, **options)
    train_step(optimizer, model, *batch())
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    train_step(optimizer, model, *batch(1))
    train_step(resumed, other, *batch(1))
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    state = optimizer.state[model[0].weight]["curvature"]
    assert state["input_inverse"].shape == (1, 9 * 9 * 3 + 10 * 10)
    whole = bare_kfac(mixed_model(), lr=0.1)
    with pytest.raises(ValueError, match="max_block_dim"):
        whole.load_state_dict(optimizer.state_dict())


def test_half_precision_inverses_of_blocks():
    x, y = batch()
    directions = []
    for dtype in (None, torch.bfloat16):
        model = mixed_model().float()
        optimizer = bare_kfac(model, max_block_dim=9, factor_dtype=torch.float32, inverse_dtype=dtype, damping=0.1)
        F.cross_entropy(model(x.float()), y).backward()
        optimizer.precondition_gradients_()
        directions.append(torch.cat([g.flatten() for g in gradients(model).values()]))
    assert 0.0 < float((directions[0] - directions[1]).norm() / directions[0].norm()) < 24 * 2.0**-9


@pytest.mark.parametrize("limit", [0, 2.5, True])
def test_a_limit_that_is_no_count_is_refused(limit):
    with pytest.raises(ValueError, match="max_block_dim must be an integer >= 1"):
        KFAC(mixed_model(), max_block_dim=limit)


def test_smaller_blocks_converge_more_slowly_but_converge():
    """What the docstring of KFAC says of digits, with one seed and fewer steps."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    losses = []
    for limit in (None, 64, 16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        optimizer = KFAC(model, update_scale="natural", max_block_dim=limit)
        generator = torch.Generator().manual_seed(0)
        for _ in range(120):
            chosen = torch.randint(len(x), (128,), generator=generator)
            train_step(optimizer, model, x[chosen], y[chosen])
        with torch.no_grad():
            losses.append(float(F.cross_entropy(model(x), y)))
    assert losses[0] < losses[1] < losses[2] < 0.1
