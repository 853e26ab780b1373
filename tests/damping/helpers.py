"""A tiny regression problem whose quadratic model is exact, and a classifier to train."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt import KFAC


def classifier(**options: Any) -> tuple[nn.Module, KFAC, Tensor, Tensor]:
    """A two-layer net on sixteen examples with its optimizer."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(16, 5), torch.randint(3, (16,))
    settings: dict[str, Any] = {"update_scale": "natural", "lr": 0.05, "momentum": 0.5, "damping": 0.1}
    settings["damping_scale"] = "absolute"
    return model, KFAC(model, **{**settings, **options}), x, y


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """One step of the ordinary loop; returns the loss before it."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()
