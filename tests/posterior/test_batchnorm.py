"""``update_bn``: running statistics of the weights that predict."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_opt.bayes.batchnorm import update_bn
from kfac_opt.bayes.posterior import Posterior, Width
from tests.support import assert_same, close, data, weights


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).double()


def averages(model: nn.Module, batches: list[Tensor], draws: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean over batches of batch mean and unbiased variance of the first layer's outputs."""
    outputs = [x @ draw["0.weight"].T + draw["0.bias"] for x, draw in zip(batches, draws)]
    return torch.stack([o.mean(0) for o in outputs]).mean(0), torch.stack([o.var(0) for o in outputs]).mean(0)


def test_statistics_at_the_mean_are_plain_averages_over_the_loader():
    model = net()
    batches = [data(seed=seed)[0] for seed in range(3)]
    before, momentum = weights(model), model[1].momentum
    model.train()
    model[2].eval()
    update_bn(model, [(x, None) for x in batches])
    mean, variance = averages(model, batches, 3 * [before])
    close(model[1].running_mean, mean)
    close(model[1].running_var, variance)
    assert_same(weights(model), before)
    assert model[1].momentum == momentum
    assert [m.training for m in model] == [True, True, False, True]


def test_statistics_at_the_posterior_mean_and_at_its_draws():
    model = net()
    posterior = Posterior.from_model(model, [], width=Width(10.0, 50.0))
    with torch.no_grad():
        model[0].weight.add_(1.0)
    before = weights(model)
    batches = [data(seed=seed)[0] for seed in range(4)]
    update_bn(model, batches, at="mean", posterior=posterior)
    close(model[1].running_mean, averages(model, batches, 4 * [posterior.mean])[0])
    source = torch.Generator().manual_seed(1)
    draws = [posterior.sample(source) for _ in batches]
    update_bn(model, batches, at="sample", posterior=posterior, generator=torch.Generator().manual_seed(1))
    mean, variance = averages(model, batches, draws)
    close(model[1].running_mean, mean)
    close(model[1].running_var, variance)
    assert_same(weights(model), before)


def test_a_model_without_batch_norm_is_left_alone():
    model = nn.Linear(4, 3)
    before = weights(model)
    update_bn(model, [])
    assert_same(weights(model), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at": "sample"}, "at='sample' needs posterior="),
        ({"at": "mode"}, "at must be 'mean' or 'sample', got 'mode'"),
        ({}, "the loader has no batches"),
    ],
)
def test_bad_arguments_are_explained_and_statistics_survive(arguments: dict[str, Any], message: str):
    model = net()
    model(data()[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        update_bn(model, [], **arguments)
    assert_same(dict(model.state_dict()), before)


class WithAuxiliaryHead(nn.Module):
    """The head runs in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(x)
        return out + self.head(x) if self.training else out


def test_layers_that_do_not_run_keep_their_statistics():
    torch.manual_seed(0)
    model, x = WithAuxiliaryHead().double(), 3 + torch.randn(8, 3).double()
    model(x)
    before = {name: buffer.clone() for name, buffer in model.head.named_buffers()}
    update_bn(model, [x])
    assert_same(dict(model.head.named_buffers()), before)
    close(model.norm.running_mean, x.mean(0))
