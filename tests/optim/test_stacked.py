"""Refreshes of several layers in common calls give what one by one gives (here on the CPU, where they are forced)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kfac_opt import KFAC, KFACVI
from kfac_opt._curvature import stacked
from kfac_opt._curvature.linalg import FactorizationError


def train(optimizer_class=KFAC, steps=4, **options):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    common = {"factor_interval": 1, "inverse_interval": 2, "ramp_steps": 0, "factor_dtype": torch.float64}
    optimizer = optimizer_class(model, **{**common, **options})
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(12, 2, 3, 3, generator=generator), torch.randint(3, (12,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer, [parameter.detach().double() for parameter in model.parameters()]


KINDS = [
    {},
    {"curvature": "eigenbasis"},
    {"damping_style": "exact"},
    {"power": 0.5},
    {"max_factor_dim": 12},
    {"max_block_dim": 5},
    {"optimizer_class": KFACVI, "num_data": 100},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_stacked_refreshes_change_nothing(options, monkeypatch):
    _, expected = train(**options)
    sizes = []
    solve = stacked._solve
    monkeypatch.setattr(stacked, "_solve", lambda problems: (sizes.append(len(problems)), solve(problems))[1])
    monkeypatch.setattr(stacked, "STACKED_DEVICES", {"cpu"})
    optimizer, found = train(**options)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # the weights are in single precision
    assert max(sizes) > 1
    assert all(int(state["curvature"]["failures"]) == 0 for state in optimizer.state.values() if "curvature" in state)


def test_matrices_of_one_size_go_into_one_call(monkeypatch):
    monkeypatch.setattr(stacked, "STACKED_DEVICES", {"cpu"})
    calls = []
    inverse = stacked.damped_root
    monkeypatch.setattr(stacked, "damped_root", lambda x, *rest: (calls.append(tuple(x.shape)), inverse(x, *rest))[1])
    train(steps=1)
    # inputs 5 (two groups), 17, 9, 9, 9; outputs 2 (two groups), 8, 8, 8, 3
    assert sorted(calls) == [(1, 3, 3), (1, 17, 17), (2, 2, 2), (2, 5, 5), (3, 8, 8), (3, 9, 9)]


def test_a_batch_that_fails_is_done_again_layer_by_layer(monkeypatch):
    _, expected = train()
    monkeypatch.setattr(stacked, "STACKED_DEVICES", {"cpu"})

    def fail(*_):
        raise FactorizationError("the batch failed")

    monkeypatch.setattr(stacked, "damped_root", fail)
    _, found = train()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_the_layer_at_fault_is_named(monkeypatch):
    monkeypatch.setattr(stacked, "STACKED_DEVICES", {"cpu"})
    optimizer, _ = train(steps=2)
    optimizer.state[optimizer.blocks["6"].weight]["curvature"]["input_factor"].fill_(torch.nan)
    optimizer.state[optimizer.blocks["6"].weight]["curvature"]["failures"].fill_(2)
    states = optimizer._workings.blocks.states()
    with pytest.raises(FactorizationError, match="'6'"):
        optimizer._workings.curvature._refresh(states, 2)
    assert int(states["4"]["failures"]) == 0
    assert int(states["4"]["refreshes"]) == 2
