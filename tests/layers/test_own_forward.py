"""Classes derived from torch's layers: what their forward really does with the weight decides, not their base class."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt import KFAC
from tests.support import Lambda, assert_same, bare_kfac, data, gradients, pool, train_step

DOUBLE = torch.float64


class SameLinear(nn.Linear):
    """What libraries write for casts: the same map."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class LowRankLinear(nn.Linear):
    """A low-rank branch beside the layer: the layer's own part stays what it was."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.down, self.up = nn.Linear(in_features, 2, bias=False), nn.Linear(2, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


class StandardizedConv(nn.Conv2d):
    """Convolves with a standardized copy of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.flatten(1)
        weight = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
        return F.conv2d(x, weight.reshape(self.weight.shape), self.bias, self.stride, self.padding)


class SelfPaddingConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class ChannelsFirstNorm(nn.LayerNorm):
    """LayerNorm over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ActivatedNorm(nn.BatchNorm2d):
    """A norm layer with its activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


class ScaledEmbedding(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return 4.0 * super().forward(x)


def image_net(layer: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 3, 3), layer, nn.Tanh(), Lambda(pool), nn.Linear(3, 3)).double()


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 2, 6, 6, dtype=DOUBLE), torch.arange(6) % 3


FOREIGN = {
    "standardized": lambda: StandardizedConv(3, 3, 2),
    "self-padding": lambda: SelfPaddingConv(3, 3, 2),
    "channels first": lambda: ChannelsFirstNorm(3),
    "activated": lambda: ActivatedNorm(3),
}


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("name", FOREIGN)
def test_another_map_gets_diagonal_curvature_and_is_named(name, fisher):
    model = image_net(FOREIGN[name]())
    optimizer = KFAC(model, fisher=fisher)
    assert "1" in optimizer.curvature
    with pytest.warns(UserWarning, match=r"'1' has a forward of its own.*diagonal"):
        train_step(optimizer, model, *images())
    assert "1" not in optimizer.curvature
    assert "1.weight" in optimizer.curvature
    for _ in range(3):
        train_step(optimizer, model, *images())
    assert float(optimizer.curvature["1.weight"].diagonal.sum()) > 0
    assert float(optimizer.curvature["0"].to_dense().diagonal().sum()) > 0


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis"])
def test_the_same_map_keeps_its_block_and_its_numbers(fisher, curvature):
    states = []
    for layer in (nn.Linear, SameLinear):
        torch.manual_seed(1)
        model = nn.Sequential(layer(4, 5), nn.Tanh(), layer(5, 3)).double()
        optimizer = KFAC(model, fisher=fisher, curvature=curvature, factor_interval=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(3):
                train_step(optimizer, model, *data(seed=step))
        states.append(optimizer.state_dict()["state"])
    assert_same(*states)


def test_a_branch_beside_the_layer_keeps_its_block():
    model = nn.Sequential(LowRankLinear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = bare_kfac(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_step(optimizer, model, *data())
    assert list(optimizer.curvature) == ["0", "0.down", "0.up", "2"]


def test_a_scaled_embedding_is_another_map():
    model = nn.Sequential(ScaledEmbedding(7, 4), nn.Flatten(), nn.Linear(12, 3))
    optimizer = KFAC(model)
    with pytest.warns(UserWarning, match=r"'0' has a forward of its own"):
        train_step(optimizer, model, torch.randint(7, (5, 3)), torch.arange(5) % 3)
    assert list(optimizer.curvature) == ["0.weight", "2"]


def test_a_layer_derived_without_a_gradient_yet_is_judged_later():
    """Behind a factor that starts at zero nothing arrives; the layer stays as it is until something does."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer, self.gate = SameLinear(4, 4), nn.Linear(4, 3), nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(x + self.gate * self.inner(x))

    model = Gated()
    optimizer = KFAC(model)
    for _ in range(5):
        train_step(optimizer, model, *data(dtype=torch.float32))
    assert "inner" in optimizer.curvature
    assert optimizer._workings.capture.proven == {"inner", "outer"}


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_the_users_gradients_do_not_notice_the_proof(fisher):
    found = []
    for attach in (False, True):
        torch.manual_seed(2)
        model = nn.Sequential(SameLinear(4, 5), nn.Dropout(0.5), nn.ReLU(), SameLinear(5, 3))
        optimizer = KFAC(model, fisher=fisher) if attach else None
        torch.manual_seed(4)
        x, y = data(dtype=torch.float32)
        F.cross_entropy(model(x), y).backward()
        found.append(gradients(model))
        del optimizer
    assert_same(*found)
