"""Matrices from really sampled labels, held against the closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.fisher.variance.study import VarianceConfig
from kfac_opt.fisher import EstimatorVariance, FisherMatrix


@dataclass(frozen=True)
class Check:
    """Predicted and seen relative error of matrices from sampled labels, at one ``m`` or one ``factor_decay``.

    Attributes:
        low, high: the seen mean ± three standard errors.
    """

    x: float
    predicted: float
    seen: float
    low: float
    high: float


def check_labels(config: VarianceConfig, errors: SampledErrors, found: EstimatorVariance) -> list[Check]:
    """Squared error of sampled matrices against the predicted ``total_variance / m``."""
    checks = []
    for labels in config.labels:
        squares = errors.of_averages([1.0], labels, config.num_draws, config.seed + labels)
        checks.append(_check(labels, found.relative_error(labels), squares, found.fisher_norm))
    return checks


def check_averages(config: VarianceConfig, errors: SampledErrors, found: EstimatorVariance) -> list[Check]:
    """Squared error of running averages of sampled matrices against the effective number of labels."""
    checks = []
    for decay in config.decays:
        # Until what was left out weighs a millionth: the average has then forgotten its start.
        length = 1 if decay == 0.0 else math.ceil(math.log(1e-6) / math.log(decay))
        weights = [(1.0 - decay) * decay**age for age in range(length)]
        squares = errors.of_averages(weights, config.label_samples, config.num_draws, config.seed + 100)
        checks.append(_check(decay, found.relative_error(config.label_samples, decay), squares, found.fisher_norm))
    return checks


def _check(x: float, predicted: float, squares: Sequence[float], norm: float) -> Check:
    values = np.asarray(squares)
    mean, error = values.mean(), values.std(ddof=1) / math.sqrt(len(values))
    return Check(x, predicted, *(math.sqrt(max(value, 0.0)) / norm for value in (mean, mean - 3 * error, mean + 3 * error)))


class SampledErrors:
    """``‖F_sampled − F‖_F²`` for many draws of labels.

    A sampled matrix is a weighted sum of the outer products of the scores of all labels, so that the squared error is
    a quadratic form of the drawn counts in the squared inner products of the scores.
    """

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        with torch.no_grad():
            self.probabilities = model(inputs).double().softmax(-1)
        count, classes = self.probabilities.shape
        every = torch.arange(classes, device=inputs.device).expand(count, classes)
        matrix = FisherMatrix(model, inputs, kind="mc", label_samples=classes, labels=every, route="gram")
        parts: dict[str, list[Tensor]] = {}
        for name, store in matrix.rows_by_block():
            parts.setdefault(name, []).append(store.rows())
        scores = torch.cat([torch.cat(found) for found in parts.values()], dim=1).double() * math.sqrt(classes)
        self.squares = (scores @ scores.mT).square() / count**2

    def of_averages(self, weights: Sequence[float], labels: int, draws: int, seed: int) -> list[float]:
        """Squared errors of weighted averages of matrices from ``labels`` new labels per input each."""
        generator = torch.Generator(self.probabilities.device).manual_seed(seed)
        count, classes = self.probabilities.shape
        found = []
        for _ in range(draws):
            mixed = torch.zeros_like(self.probabilities)
            for weight in weights:
                drawn = torch.multinomial(self.probabilities, labels, replacement=True, generator=generator)
                mixed.scatter_add_(1, drawn, torch.full_like(drawn, weight / labels, dtype=mixed.dtype))
            difference = (mixed / sum(weights) - self.probabilities).reshape(count * classes)
            found.append(float(difference @ self.squares @ difference))
        return found
