"""The factor average carries its weight: the first estimate counts whole, later ones as said."""

from __future__ import annotations

import pytest
import torch

from tests import reference
from tests.support import bare_kfac, close, data, estimate, mlp

BATCHES = [data(6, seed=s)[0] for s in (1, 2, 3)]


def test_the_first_estimate_is_used_whole():
    """Starting at the identity without correction is a known mistake."""
    model = mlp()
    a, g = reference.kronecker_factors(model, BATCHES[0], "0")
    optimizer = bare_kfac(model, factor_decay=0.95)
    estimate(optimizer, model, BATCHES[0])
    close(optimizer.curvature["0"].input_factor, a)
    close(optimizer.curvature["0"].output_factor, g)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_average_of_three_estimates_is_bias_corrected(decay):
    model = mlp()
    factors = [reference.kronecker_factors(model, x, "0") for x in BATCHES]
    optimizer = bare_kfac(model, factor_decay=decay)
    weights = torch.tensor([1.0], dtype=torch.float64)
    for count, x in enumerate(BATCHES, start=1):
        estimate(optimizer, model, x)
        weights = torch.tensor([decay ** (count - 1 - i) for i in range(count)], dtype=torch.float64)
        weights = weights / weights.sum()
        for side, view in ((0, optimizer.curvature["0"].input_factor), (1, optimizer.curvature["0"].output_factor)):
            close(view, sum(w * f[side] for w, f in zip(weights, factors)))


def test_average_counts_estimates_and_not_steps():
    model = mlp()
    factors = [reference.kronecker_factors(model, x, "0")[0] for x in BATCHES]
    optimizer = bare_kfac(model, factor_decay=0.8, factor_interval=3)
    for x in (BATCHES[0], BATCHES[2], BATCHES[2], BATCHES[1]):  # estimates at steps 0 and 3
        estimate(optimizer, model, x)
    close(optimizer.curvature["0"].input_factor, (0.8 * factors[0] + factors[1]) / 1.8)


def test_diagonal_average_is_bias_corrected():
    model, one = mlp(), [x[:1] for x in BATCHES[:2]]
    expected = [reference.parameter_fisher_diagonal(model, x, model[0].weight) for x in one]
    optimizer = bare_kfac(model, curvature="diagonal", factor_decay=0.9)
    for x in one:
        estimate(optimizer, model, x)
    close(optimizer.curvature["0.weight"].diagonal, (0.9 * expected[0] + expected[1]) / 1.9)


def test_decay_can_change_between_steps_and_differ_per_group():
    model = mlp()
    factors = {n: [reference.kronecker_factors(model, x, n)[0] for x in BATCHES] for n in ("0", "2")}
    optimizer = bare_kfac(
        model,
        [
            {"params": model[0].parameters(), "factor_decay": 0.5},
            {"params": model[2].parameters(), "factor_decay": 0.9},
        ],
    )
    estimate(optimizer, model, BATCHES[0])
    estimate(optimizer, model, BATCHES[1])
    for name, decay in (("0", 0.5), ("2", 0.9)):
        close(optimizer.curvature[name].input_factor, (decay * factors[name][0] + factors[name][1]) / (1 + decay))
    optimizer.param_groups[0]["factor_decay"] = 0.25
    estimate(optimizer, model, BATCHES[2])
    # sums: w = d w + (1 - d), X = d X + (1 - d) X_batch from zero
    weight = [0.25 * 0.5 * 0.5, 0.25 * 0.5, 0.75]
    expected = sum(w * f for w, f in zip(weight, factors["0"])) / sum(weight)
    close(optimizer.curvature["0"].input_factor, expected)
