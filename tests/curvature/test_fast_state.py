"""Factors and inverses kept as panels, and inverses in other precisions, change nothing but rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_opt._curvature import sides
from tests.support import assert_same, bare_kfac, close, gradients, mlp, train_step

DOUBLE = torch.float64


def conv_model(groups: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=groups), nn.Flatten(), nn.Linear(6 * 16, 3)).to(DOUBLE)


@pytest.mark.parametrize("style", ["factored", "exact"])
@pytest.mark.parametrize("groups", [1, 2])
def test_panels_give_the_same_factors_and_directions(groups, style, monkeypatch):
    x, y = torch.randn(5, 4, 4, 4, dtype=DOUBLE), torch.tensor([0, 1, 2, 0, 1])
    found = []
    for panel_dim in (1, 10**9):
        monkeypatch.setattr(sides, "PANEL_DIM", panel_dim)
        model = conv_model(groups)
        optimizer = bare_kfac(model, damping_style=style, factor_decay=0.5)
        for scale in (1.0, 2.0):
            optimizer.zero_grad()
            F.cross_entropy(model(scale * x), y).backward()
            optimizer.precondition_gradients_()
        factors = [getattr(optimizer.curvature[n], f"{side}_factor") for n in ("0", "2") for side in ("input", "output")]
        found.append((gradients(model), factors, [float(optimizer.state[model[0].weight]["curvature"]["scale"])]))
    (panel_directions, panel_factors, panel_scale), (directions, factors, scale) = found
    for name in directions:
        close(panel_directions[name], directions[name])
    for left, right in zip(panel_factors, factors):
        close(left, right)
    assert panel_scale == pytest.approx(scale, rel=1e-12)


def test_panels_resume_bit_for_bit(monkeypatch):
    monkeypatch.setattr(sides, "PANEL_DIM", 1)
    x, y = torch.randn(5, 4, 4, 4, dtype=DOUBLE), torch.tensor([0, 1, 2, 0, 1])
    model, other = conv_model(), conv_model()
    optimizer, resumed = bare_kfac(model, lr=0.1), bare_kfac(other, lr=0.1)
    train_step(optimizer, model, x, y)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    train_step(optimizer, model, x, y)
    train_step(resumed, other, x, y)
    assert_same(dict(model.state_dict()), dict(other.state_dict()))


def test_bfloat16_inverses_halve_the_state_and_round_the_direction():
    torch.manual_seed(0)
    x, y = torch.randn(64, 4), torch.randint(3, (64,))
    directions, sizes = [], []
    for dtype in (None, torch.bfloat16):
        model = mlp().float()
        optimizer = bare_kfac(model, factor_dtype=torch.float32, inverse_dtype=dtype)
        F.cross_entropy(model(x), y).backward()
        optimizer.precondition_gradients_()
        state = optimizer.state[model[0].weight]["curvature"]
        assert state["input_inverse"].dtype == (dtype or torch.float32)
        sizes.append(state["input_inverse"].untyped_storage().nbytes())
        directions.append(torch.cat([g.flatten() for g in gradients(model).values()]))
    assert sizes[0] == 2 * sizes[1]
    exact, rounded = directions
    assert not torch.equal(exact, rounded)
    # two roundings of 2⁻⁹ in each of gradient, inverses and products, relative to the largest eigenvalue of the inverse
    assert float((exact - rounded).norm() / exact.norm()) < 6 * 2.0**-9 * 4


def test_half_precision_inverses_are_refused():
    with pytest.raises(ValueError, match="inverse_dtype must be None"):
        bare_kfac(mlp(), inverse_dtype=torch.float16)


@pytest.mark.parametrize("channels", [32, 24])
def test_a_factor_written_by_slices_of_rows_is_that_of_the_whole_moment(channels, monkeypatch):
    """32 channels: panels end between channels; 24: they do not, and the moment is written as a whole."""
    monkeypatch.setattr(sides, "PANEL_DIM", 1)
    model = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(36, 3)).to(DOUBLE)
    x, y = torch.randn(5, channels, 3, 3, dtype=DOUBLE), torch.tensor([0, 1, 2, 0, 1])
    optimizer = bare_kfac(model)
    train_step(optimizer, model, x, y)
    rows = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    close(optimizer.curvature["0"].input_factor, rows.mT @ rows / 5)
