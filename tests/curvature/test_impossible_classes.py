"""Logits of -inf are probability zero: actions that are not allowed, padded vocabularies, pointers into the padding."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt import KFAC
from kfac_opt.fisher import FisherMatrix
from tests.support import bare_kfac, close, data, estimate, mlp, train_step

DOUBLE = torch.float64


class Allowed(nn.Module):
    """Forbids classes: others in every example, one of them everywhere."""

    def __init__(self, value: float, how: str = "fill") -> None:
        super().__init__()
        self.net, self.value, self.how = mlp(classes=4), value, how

    def forbidden(self, x: Tensor) -> Tensor:
        forbidden = torch.zeros(len(x), 4, dtype=torch.bool)
        forbidden[:, 3] = True
        forbidden[torch.arange(len(x)), torch.arange(len(x)) % 3] = True
        return forbidden

    def forward(self, x: Tensor) -> Tensor:
        logits, forbidden = self.net(x), self.forbidden(x)
        if self.how == "fill":
            return logits.masked_fill(forbidden, self.value)
        return logits + torch.where(forbidden, self.value, 0.0)


@pytest.mark.parametrize("curvature", ["kronecker", "eigenbasis", "diagonal"])
@pytest.mark.parametrize("fisher", ["mc", "exact"])
@pytest.mark.parametrize("how", ["fill", "add"])
def test_curvature_is_that_of_a_probability_of_zero(how, fisher, curvature):
    """exp(-1e9) is zero in double precision."""
    found = []
    for value in (-1e9, -float("inf")):
        model = Allowed(value, how)
        optimizer = bare_kfac(model, fisher=fisher, curvature=curvature)
        for seed in range(2):
            estimate(optimizer, model, data(seed=seed)[0])
        assert optimizer.dropped_estimates == 0
        found.append([view.to_dense() for view in optimizer.curvature.values()])
    assert float(found[0][0].diagonal().sum()) > 0
    for finite, infinite in zip(*found):
        close(infinite, finite)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_it_trains_and_says_nothing(fisher):
    x = data()[0]
    y = (torch.arange(len(x)) + 1) % 3
    losses = []
    for value in (-1e9, -float("inf")):
        model = Allowed(value)
        optimizer = KFAC(model, fisher=fisher, factor_interval=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            losses.append([train_step(optimizer, model, x, y) for _ in range(10)])
        assert optimizer.dropped_estimates == 0
    assert losses[1] == pytest.approx(losses[0])
    assert losses[1][-1] < losses[1][0]


def test_a_masked_term_may_have_no_class_left():
    mask = torch.tensor([True, False, True, True, True, True, False, True])
    found = []
    for outputs in (None, lambda z: (z.masked_fill(~mask[:, None], -float("inf")), mask)):
        model = mlp()
        optimizer = bare_kfac(model, outputs=outputs)
        with optimizer.masked(mask):
            estimate(optimizer, model, data()[0])
        assert optimizer.dropped_estimates == 0
        found.append(optimizer.curvature["2"].to_dense())
    close(found[1], found[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_other_values_that_are_not_finite_drop_the_pass(value):
    model = Allowed(value)
    optimizer = bare_kfac(model)
    estimate(optimizer, model, data()[0])
    assert optimizer.dropped_estimates == 1


def test_a_term_without_any_class_drops_the_pass():
    model = nn.Sequential(mlp(), nn.Threshold(1e9, -float("inf")))
    optimizer = bare_kfac(model)
    estimate(optimizer, model, data()[0])
    assert optimizer.dropped_estimates == 1


def test_binary_logits_may_be_impossible_too():
    found = []
    for value in (-1e9, -float("inf")):
        model = Allowed(value)
        optimizer = bare_kfac(model, likelihood="bernoulli")
        estimate(optimizer, model, data()[0])
        found.append(optimizer.curvature["net.2"].to_dense())
    close(found[1], found[0])


@pytest.mark.parametrize("kind", ["exact", "mc"])
def test_the_fisher_matrix_is_that_of_a_probability_of_zero(kind):
    finite, infinite = (FisherMatrix(Allowed(value), data()[0], kind=kind).to_dense() for value in (-1e9, -float("inf")))
    close(infinite, finite)


def test_the_loss_of_the_test_is_finite():
    assert torch.isfinite(F.cross_entropy(Allowed(-float("inf"))(data()[0]), (torch.arange(8) + 1) % 3))
