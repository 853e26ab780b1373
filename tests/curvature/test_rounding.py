"""A gradient that is nothing but rounding gives no curvature; one that is small and right does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kfac_opt import KFAC
from kfac_opt._capture.rounding import Rounding


class Standardized(nn.Module):
    """The mean over the image of an instance norm does not depend on what is in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


class Shifted(nn.Module):
    """A bias in front of a batch norm, and a branch behind a small factor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.branch = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(h + 1e-9 * self.branch(h).tanh())


def saturated() -> nn.Module:
    layers = [layer for _ in range(10) for layer in (nn.Linear(8, 8), nn.Sigmoid())]
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3, 8), *layers, nn.Linear(8, 5))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(16, 3, 8, 8), torch.randint(5, (16,))


def train(model: nn.Module, steps: int, **options: object) -> KFAC:
    optimizer = KFAC(model, factor_interval=1, **options)
    x, y = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer


def curved(optimizer: KFAC) -> set[str]:
    return {name for name, view in optimizer.curvature.items() if float(view.to_dense().diagonal().sum()) > 0.0}


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
def test_a_layer_without_a_true_gradient_is_left_where_it_is(curvature):
    """After 60 steps it had moved by 108 % of its norm (SGD: 5e-8)."""
    torch.manual_seed(0)
    model = Standardized()
    before = model.conv.weight.detach().clone()
    optimizer = train(model, 20, curvature=curvature)
    assert float((model.conv.weight.detach() - before).norm() / before.norm()) <= 1e-6
    # The scale of a norm layer in front of a mean over all places has no true gradient either.
    others = {name for name in optimizer.curvature if not name.startswith("conv") and name != "norm.weight"}
    assert others == curved(optimizer) - {"norm.weight"}


def test_a_bias_in_front_of_a_batch_norm_has_no_curvature_and_what_is_small_and_right_has():
    torch.manual_seed(0)
    optimizer = train(Shifted(), 3, lr=0.0, curvature="diagonal")
    assert curved(optimizer) == {name for name in optimizer.curvature if name != "conv.bias"}


@pytest.mark.parametrize("curvature", ["kronecker", "diagonal"])
def test_vanishing_gradients_of_saturated_units_are_no_rounding(curvature):
    """Those of the first layers are 1e-10 of those of the last."""
    torch.manual_seed(0)
    optimizer = train(saturated(), 2, lr=0.0, curvature=curvature)
    assert curved(optimizer) == set(optimizer.curvature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_looking_for_rounding_changes_nothing_in_a_net_without_it(dtype, monkeypatch):
    states = []
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr(Rounding, "due", lambda self, names: False)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Tanh(), nn.Linear(6, 5)).to(dtype)
        optimizer = KFAC(model, factor_interval=1, factor_dtype=dtype)
        x, y = batch()
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(dtype)), y).backward()
            optimizer.step()
        states.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def linear_pull(gradients: list[torch.Tensor], noise: torch.Tensor | None = None):
    """Backward passes of a linear map, but for what rounding leaves of the last gradient."""

    def pull(column, receive):
        for number, gradient in enumerate(gradients):
            receive(number, gradient * column)
        if noise is not None:
            receive(len(gradients), 1e-7 * torch.randn_like(noise))

    return pull


def test_a_layer_that_gets_a_gradient_later_has_curvature_from_then_on():
    torch.manual_seed(0)
    rounding, one = Rounding(), torch.ones(())
    healthy, noise = torch.randn(100), torch.randn(100)
    assert rounding.due(["a", "b"])
    rounding.look(linear_pull([healthy], noise), one, ["a", "b"])
    assert rounding.noise == {"b"}
    assert rounding.due(["a", "b"])
    rounding.look(linear_pull([healthy, 1e-7 * noise]), one, ["a", "b"])
    assert rounding.noise == set()
    assert not any(rounding.due(["a", "b"]) for _ in range(20))


def test_names_without_a_gradient_are_looked_for_ever_more_rarely():
    rounding = Rounding()
    looked = []
    for number in range(1, 20):
        if rounding.due(["a", "silent"]):
            looked.append(number)
            rounding.look(linear_pull([torch.ones(3)]), torch.ones(()), ["a"])
    assert looked == [1, 2, 4, 8, 16]


def test_large_gradients_are_kept_whatever_a_backward_of_its_own_does_to_their_scale():
    """A clipped gradient is not linear, and not rounding either."""
    rounding = Rounding()

    def pull(column, receive):
        receive(0, torch.ones(10) * column)
        receive(1, (0.1 * torch.ones(10) * column).clamp_max(0.01))

    rounding.look(pull, torch.ones(()), ["a", "clipped"])
    assert rounding.noise == set()
