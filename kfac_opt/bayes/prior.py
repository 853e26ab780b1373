"""What the prior adds to a step: ``δ`` to the damping, ``δ μ`` to the gradient (Zhang, Sun, Duvenaud & Grosse 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def delta(group: Mapping[str, Any]) -> float:
    """``δ = prior_precision · temperature / num_data``."""
    return float(group["prior_precision"]) * float(group["temperature"]) / float(group["num_data"])


def with_prior(group: Mapping[str, Any], mean: Tensor, gradient: Tensor, noise: Tensor | None) -> Tensor:
    """``ḡ + δ μ``; with the mean noise of the step's draws ``ḡ + δ`` times the mean of the drawn weights."""
    factor = delta(group)
    gradient = gradient.add(mean, alpha=factor)
    return gradient if noise is None else gradient.add(noise, alpha=factor)
