"""Small models and a K-FAC without its safety nets, shared by the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt import KFAC

EXACT = 1e-10
"""Relative tolerance in float64: eps (2e-16) times sizes below 1e2 and condition numbers below 1e4."""


def bare_kfac(model: nn.Module, params: Any = None, **options: Any) -> KFAC:
    """KFAC in float64, ``lr`` times the direction: no momentum, decay, clip, bound, ramp; curvature at each step; ``lr=0``."""
    plain: dict[str, Any] = {
        "update_scale": "natural",
        "lr": 0.0,
        "momentum": 0.0,
        "damping": 1e-2,
        "damping_scale": "absolute",
        "fisher": "exact",
        "factor_interval": 1,
        "inverse_interval": 1,
        "ramp_steps": 0,
        "kl_clip": None,
        "max_relative_update": None,
        "factor_dtype": torch.float64,
    }
    return KFAC(model, params, **{**plain, **options})


def estimate(optimizer: KFAC, model: nn.Module, *inputs: Tensor) -> None:
    """One curvature estimate from one forward, without a gradient."""
    optimizer.zero_grad()
    model(*inputs)
    optimizer.step()


def train_step(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> float:
    """The ordinary loop's body."""
    optimizer.zero_grad()
    value = loss(model(x), y)
    value.backward()
    optimizer.step()
    return float(value.detach())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all ``.grad``."""
    return {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Bitwise equality of nested dicts, lists and tensors, dtypes included."""
    assert type(left) is type(right), (where, type(left), type(right))
    if isinstance(left, dict):
        assert left.keys() == right.keys(), (where, left.keys() ^ right.keys())
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for i, (a, b) in enumerate(zip(left, right)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(left, Tensor):
        assert left.dtype == right.dtype, (where, left.dtype, right.dtype)
        assert torch.equal(left, right) or (left.isnan() & right.isnan() | (left == right)).all(), where
    else:
        assert left == right, (where, left, right)


def close(actual: Tensor, expected: Tensor, rtol: float = EXACT) -> None:
    """Relative to the largest entry of ``expected``: rounding of a sum is relative to its terms."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * max(scale, 1e-300))


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def pool(x: Tensor) -> Tensor:
    """Sum over all positions of ``[batch, channels, ...]``."""
    return x.flatten(2).mean(2)


def mlp(dtype: torch.dtype = torch.float64, activation: Callable[[], nn.Module] = nn.Tanh, classes: int = 3) -> nn.Sequential:
    """Two linear layers ``"0"`` and ``"2"`` on 4 features."""
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, classes)).to(dtype)


def data(
    batch: int = 8, features: int = 4, classes: int = 3, dtype: torch.dtype = torch.float64, seed: int = 5
) -> tuple[Tensor, Tensor]:
    """Standard normal inputs and uniform labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, features, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(classes, (batch,), generator=generator)


class Sequence(nn.Module):
    """``[batch, time, features]`` to one class per example (mean over time) or per token."""

    def __init__(self, features: int = 3, hidden: int = 4, classes: int = 3, per_token: bool = False) -> None:
        super().__init__()
        self.inner = nn.Linear(features, hidden)
        self.outer = nn.Linear(hidden, classes)
        self.per_token = per_token

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        return self.outer(hidden if self.per_token else hidden.mean(1))


class Twice(nn.Module):
    """One linear layer called twice, with different inputs and different gradients."""

    def __init__(self, features: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.shared = nn.Linear(features, features)
        self.head = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))
