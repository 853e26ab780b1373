"""The rules for decay and momentum with which KFAC-VI was published (Nakata, Osawa & Yokota, eqs. 6-14)."""

from __future__ import annotations

from typing import Any

import torch

SETTING = "published_decay"  # in a method's settings: the decay per step


def follow_published_rules_(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """``v ← d + (w / α) μ + m v``, ``m = momentum · α / α_base``: the momentum follows the learning rate, the decay per step
    ``w`` does not, and passes through the momentum.

    Args:
        decay: ``w``. The very first step, which has no momentum yet, goes without.
    """
    momenta = [float(group["momentum"]) for group in optimizer.param_groups]
    rates = [float(group["lr"]) for group in optimizer.param_groups]

    @torch.no_grad()
    def before_step(*_: Any) -> None:
        for group, momentum, base in zip(optimizer.param_groups, momenta, rates):
            group["momentum"] = momentum * min(1.0, float(group["lr"]) / base)
            for parameter in group["params"] if decay and group["momentum"] else ():
                buffer = optimizer.state[parameter].get("momentum_buffer")
                if buffer is not None:
                    buffer.add_(parameter, alpha=decay / float(group["lr"]) / group["momentum"])

    optimizer.register_step_pre_hook(before_step)
