"""Norm layers on inputs that do not vary: what they normalize to is rounding, and tells nothing about their weight."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from tests.support import Lambda, bare_kfac, pool, train_step

LAYERS = {
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "batch": lambda: nn.BatchNorm2d(4),
    "group": lambda: nn.GroupNorm(2, 4),
    "layer": lambda: nn.LayerNorm([4, 3, 3]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_norm_layer_on_a_constant_input_keeps_its_block(name, fisher, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), LAYERS[name](), nn.Tanh(), Lambda(pool), nn.Linear(4, 3)).to(dtype)
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[0].bias, 0.3)
    optimizer = bare_kfac(model, fisher=fisher)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            x = torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(step)).to(dtype)
            train_step(optimizer, model, x, torch.arange(6) % 3)
    assert list(optimizer.curvature) == ["0", "1", "4"]
