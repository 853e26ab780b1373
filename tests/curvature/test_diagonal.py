"""The Gauss-Newton-Bartlett diagonal: one of the enumerated values, with their probabilities; unbiased."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import reference
from tests.support import bare_kfac, close, data, estimate, mlp

DOUBLE = torch.float64


class Scaled(nn.Module):
    """A bare parameter that multiplies the hidden layer, and one that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 3), nn.Linear(3, 2)
        self.gain, self.shift = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(x)) * self.gain + self.shift)


def scaled() -> Scaled:
    torch.manual_seed(2)
    return Scaled().to(DOUBLE)


def test_enumerating_the_labels_gives_the_diagonal_of_the_fisher():
    """The mathematics behind the estimator, and a check of the two references against each other."""
    model, (x, _) = scaled(), data(3, classes=2)
    values, probabilities = reference.label_enumeration(model, x, model.gain)
    mean = (probabilities[:, None] * values).sum(0)
    torch.testing.assert_close(mean, reference.parameter_fisher_diagonal(model, x, model.gain), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["gain", "shift"])
def test_every_estimate_is_one_of_the_enumerated_values_with_its_probability(name):
    model, (x, _) = scaled(), data(2, classes=2)
    labelled, label_probabilities = reference.label_enumeration(model, x, getattr(model, name))
    # some labellings give the same value: the shift only sees how many labels are 1
    values, probabilities = labelled[:0], label_probabilities[:0]
    for value, probability in zip(labelled, label_probabilities):
        same = (values - value).abs().sum(1) < 1e-12
        if same.any():
            probabilities[same] += probability
        else:
            values, probabilities = torch.cat([values, value[None]]), torch.cat([probabilities, probability[None]])
    optimizer = bare_kfac(model, fisher="mc", factor_decay=0.0, inverse_interval=10**6)
    draws = 400
    counts = torch.zeros(len(values))
    for _ in range(draws):
        estimate(optimizer, model, x)
        distance = (values - optimizer.curvature[name].diagonal).abs().amax(1)
        assert distance.min() <= 1e-12 * values.max()
        counts[distance.argmin()] += 1
    frequency = counts.double() / draws
    four_errors = 4 * (probabilities * (1 - probabilities) / draws).sqrt()
    assert ((frequency - probabilities).abs() <= four_errors).all()


@pytest.mark.parametrize("fisher", ["mc", "exact"])
@pytest.mark.parametrize("labels", [1, 3])
def test_diagonal_is_unbiased(fisher, labels):
    model, (x, _) = scaled(), data(5, classes=2)
    names = ["gain", "shift"]
    expected = {n: reference.parameter_fisher_diagonal(model, x, getattr(model, n)) for n in names}
    optimizer = bare_kfac(model, fisher=fisher, label_samples=labels, factor_decay=0.0, inverse_interval=10**6)
    samples: dict[str, list[torch.Tensor]] = {n: [] for n in names}
    for _ in range(400):
        estimate(optimizer, model, x)
        for n in names:
            samples[n].append(optimizer.curvature[n].diagonal.clone())
    for n in names:
        stack = torch.stack(samples[n])
        assert ((stack.mean(0) - expected[n]).abs() <= 4 * stack.std(0) / len(stack) ** 0.5 + 1e-12).all()


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_exact_diagonal_of_one_example_is_the_fisher_diagonal(likelihood):
    model, (x, _) = scaled(), data(1)
    expected = {n: reference.parameter_fisher_diagonal(model, x, p, likelihood) for n, p in model.named_parameters()}
    optimizer = bare_kfac(model, curvature="diagonal", likelihood=likelihood)
    estimate(optimizer, model, x)
    assert list(optimizer.curvature) == list(expected)
    for name, diagonal in expected.items():
        close(optimizer.curvature[name].diagonal, diagonal)


def test_to_dense_of_a_diagonal_block_is_its_diagonal_matrix():
    model, (x, _) = scaled(), data(3)
    optimizer = bare_kfac(model)
    estimate(optimizer, model, x)
    view = optimizer.curvature["gain"]
    assert torch.equal(view.to_dense(), view.diagonal.diag())


def test_sampled_diagonal_scales_as_a_mean_over_examples():
    """Of the order of the Fisher's diagonal at every batch size: not its batch-th part, not batch times it."""
    model = mlp()
    x, _ = data(4)
    expected = reference.parameter_fisher_diagonal(model, x, model[0].weight).sum()
    for copies in (1, 4, 16):
        optimizer = bare_kfac(model, curvature="diagonal", fisher="mc", factor_decay=0.0)
        sums = []
        for _ in range(100):
            estimate(optimizer, model, x.repeat(copies, 1))
            sums.append(optimizer.curvature["0.weight"].diagonal.sum().clone())
        optimizer.detach()
        sums = torch.stack(sums)
        assert (sums.mean() - expected).abs() <= 4 * sums.std() / 10


def test_bare_parameters_are_keyed_by_name_after_the_layers_order():
    model = scaled()
    optimizer = bare_kfac(model)
    assert sorted(optimizer.curvature) == ["gain", "inner", "outer", "shift"]
    assert list(bare_kfac(scaled(), curvature="diagonal").curvature) == [n for n, _ in model.named_parameters()]
    assert len(bare_kfac(scaled(), curvature="identity").curvature) == 0
