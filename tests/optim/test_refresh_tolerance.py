"""A layer whose factors have hardly moved skips its refresh."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kfac_opt import KFAC
from kfac_opt.curvature import sides
from kfac_opt.curvature.movement import movement, signs, sketches
from kfac_opt.curvature.sides import Side

DOUBLE = torch.float64


def make(tolerance, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    plain = {"lr": 0.05, "factor_interval": 1, "inverse_interval": 2, "ramp_steps": 0, "fisher": "exact", "factor_decay": 0.9}
    return model, KFAC(model, refresh_tolerance=tolerance, **{**plain, **options})


def train(model, optimizer, steps, first=0, *, same_batch=False):
    for number in range(first, first + steps):
        generator = torch.Generator().manual_seed(0 if same_batch else number)
        x, y = torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"max_block_dim": 5}, {"max_factor_dim": 5}, {"panels": 4}], ids=str)
def test_sketches_are_the_factors_times_fixed_signs(options, monkeypatch):
    options = dict(options)
    monkeypatch.setattr(sides, "PANEL_DIM", options.pop("panels", 1100))
    model, optimizer = make(1e-9, factor_dtype=DOUBLE, **options)
    train(model, optimizer, 3)
    tracked = optimizer._tracked["0"]
    state = optimizer._block_state(tracked)
    found = sketches(state, tracked.block.sides, torch.zeros((), dtype=DOUBLE))
    for name, n in (("input", 7), ("output", 8)):
        factor = getattr(optimizer.curvature["0"], f"{name}_factor")
        factor = torch.diag(factor) if factor.dim() == 1 else factor
        expected = factor @ signs(n, factor.device).to(DOUBLE)
        torch.testing.assert_close(found[f"{name}_sketch"][0], expected, rtol=1e-12, atol=1e-12)
    assert set(signs(64, torch.device("cpu")).tolist()) == {-1, 1}


def test_movement_of_a_factor_that_grows_by_a_tenth_is_a_tenth():
    """In closed form: every sketch scales with its factor, and the damping with it."""
    side = {"input": Side(5, 2, dense=True), "output": Side(3, 2, dense=False)}
    torch.manual_seed(0)
    state = {"weight": torch.tensor(0.5, dtype=DOUBLE)}
    for name, one in side.items():
        state[f"{name}_factor"] = torch.rand(one.factor_shape, dtype=DOUBLE)
    before = sketches(state, side, torch.tensor(0.3, dtype=DOUBLE))
    assert float(movement(before, before)) == 0.0
    state["input_factor"][1] *= 1.1  # one group of one side
    now = sketches(state, side, torch.tensor(0.3, dtype=DOUBLE))
    assert float(movement(before, now)) == pytest.approx(0.1, rel=1e-12)
    now = sketches(state, side, torch.tensor(0.6, dtype=DOUBLE))
    assert float(movement(before, now)) == pytest.approx(1.0, rel=1e-12)
    zero = {name: torch.zeros_like(value) for name, value in before.items()}
    assert float(movement(zero, zero)) == 0.0
    assert float(movement(zero, now)) == float("inf")


@pytest.mark.parametrize("options", [{}, {"curvature": "eigenbasis"}, {"damping_style": "exact"}], ids=str)
def test_a_tolerance_nobody_stays_under_changes_nothing(options):
    exact, never = make(0.0, **options), make(1e-12, **options)
    assert all(torch.equal(a, b) for a, b in zip(train(*exact, 9), train(*never, 9)))
    assert never[1].skipped_refreshes == exact[1].skipped_refreshes == 0
    assert not any("sketch" in key for key in exact[1]._block_state(exact[1]._tracked["0"]))


def test_refreshes_within_the_tolerance_are_skipped_and_counted():
    model, optimizer = make(1e6)
    train(model, optimizer, 1)
    inverses = [optimizer._block_state(entry)["input_inverse"].clone() for entry in optimizer._tracked.values()]
    train(model, optimizer, 8, first=1)  # turns at steps 2, 4, 6, 8, of two layers
    assert optimizer.skipped_refreshes == 8
    for entry, inverse in zip(optimizer._tracked.values(), inverses):
        assert torch.equal(optimizer._block_state(entry)["input_inverse"], inverse)
        assert int(optimizer._block_state(entry)["refreshes"]) == 1


def test_a_change_of_the_damping_alone_ends_the_skipping():
    model, optimizer = make(0.5, lr=0.0, damping_scale="absolute")
    train(model, optimizer, 5, same_batch=True)
    assert optimizer.skipped_refreshes == 4
    for group in optimizer.param_groups:
        group["damping"] *= 1.4
    train(model, optimizer, 2, first=5, same_batch=True)
    assert optimizer.skipped_refreshes == 6
    for group in optimizer.param_groups:  # 1.4 · 1.4 times that of the last refresh
        group["damping"] *= 1.4
    train(model, optimizer, 2, first=7, same_batch=True)
    assert optimizer.skipped_refreshes == 6


@pytest.mark.parametrize("options", [{}, {"curvature": "eigenbasis"}], ids=str)
def test_resuming_is_bit_for_bit(options):
    tolerance = 0.15
    straight, optimizer = make(tolerance, **options)
    train(straight, optimizer, 6)
    weights, saved = copy.deepcopy(straight.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = train(straight, optimizer, 12, first=6)
    model, resumed = make(tolerance, **options)
    model.load_state_dict(weights)
    resumed.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(train(model, resumed, 12, first=6), expected))
    assert resumed.skipped_refreshes == optimizer.skipped_refreshes > 0
    assert int(resumed._block_state(resumed._tracked["0"])["refreshes"]) > 1  # some are skipped, not all


def test_a_state_without_sketches_is_refused():
    model, optimizer = make(0.0)
    train(model, optimizer, 2)
    other = make(0.1)[1]
    with pytest.raises(ValueError, match=r"refresh_tolerance"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "0.1"])
def test_tolerances_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match="refresh_tolerance must be >= 0 and finite"):
        make(value)
