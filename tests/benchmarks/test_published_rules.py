"""The published rules of KFAC-VI around the package's own step."""

import torch
from torch import nn

from benchmarks.vi.published import follow_published_rules_
from kfac_opt import KFACVI
from tests.support import close, data


def test_decay_passes_through_the_momentum_which_follows_the_rate():
    """Eqs. 6-14: ``v ← d + (w / α) μ + m v``, ``m = momentum · α / α_base``, ``μ ← μ − α v``."""
    model = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    free = {"nesterov": False, "kl_clip": None, "max_relative_update": None, "damping_scale": "absolute"}
    always = {"factor_interval": 1, "inverse_interval": 1, "factor_dtype": torch.float64, "fisher": "exact"}
    shared = {"curvature": "diagonal", "damping": 0.1, "momentum": 0.9, **free, **always}
    optimizer = KFACVI(model, lr=0.5, num_data=5, prior_precision=1.0, **shared)
    follow_published_rules_(optimizer, 0.02)
    weight, buffer = model.weight.detach().clone(), torch.zeros(3, 4, dtype=torch.float64)
    x, y = data()
    for step, lr in enumerate((0.05, 0.3, 0.5)):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        gradient = model.weight.grad + 0.2 * weight  # the prior's
        optimizer.step()
        direction = gradient / (optimizer.curvature["weight"].diagonal + 0.1 + 0.2)
        buffer = direction + (0.02 / lr * weight if step else 0.0) + 0.9 * lr / 0.5 * buffer
        weight = weight - lr * buffer
        close(model.weight.detach(), weight)
