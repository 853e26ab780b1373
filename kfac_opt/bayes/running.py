"""Mean, spread and mean entropy of predictions that arrive one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from kfac_opt.likelihoods import Categorical, Gaussian, Likelihood

TOGETHER, TOGETHER_NUMBERS = 8, 2**20


class RunningPrediction:
    """What is known of an ensemble's predictions without keeping them.

    Several of them are taken in at a time where they are small, for a dozen small calls cost more than their numbers:
    means and squared deviations of two sets are joined as in Chan, Golub & LeVeque ("Updating formulae and a pairwise
    algorithm for computing sample variances", 1979).

    Attributes:
        mean: of the predictions, in the shape of the model's outputs.
        squares: sum of squared deviations from it.
        expected_entropy: sum of the entropies of the single predictions.
        kept: the predictions ``[number, ...]`` if they are to be kept.
    """

    def __init__(self, likelihood: Likelihood, *, keep: bool) -> None:
        self.likelihood, self.keep = likelihood, keep
        self.mean = self.squares = self.expected_entropy = torch.zeros(())
        self.kept: list[Tensor] = []
        self.count = 0

    def add(self, stream: Iterable[Tensor]) -> None:
        """Takes in the model's outputs for one draw after the other."""
        for outputs in _joined(stream, self.likelihood):
            number = len(outputs)
            flat = self.likelihood.predictive(outputs.flatten(0, 1))  # as one batch: likelihoods count dimensions
            predictions = flat.view(outputs.shape)
            self._join(predictions, entropy(self.likelihood, flat, None).unflatten(0, (number, -1)).sum(0), number)
            if self.keep:
                self.kept.append(predictions.clone())

    def _join(self, predictions: Tensor, entropies: Tensor, number: int) -> None:
        mean = predictions.mean(0)
        squares = (predictions - mean).square_().sum(0)
        before, self.count = self.count, self.count + number
        if not before:
            self.mean, self.squares, self.expected_entropy = mean, squares, entropies
            return
        difference = mean - self.mean
        self.mean.add_(difference, alpha=number / self.count)
        self.squares.add_(squares).addcmul_(difference, difference, value=before * number / self.count)
        self.expected_entropy.add_(entropies)


def _joined(stream: Iterable[Tensor], likelihood: Likelihood) -> Iterator[Tensor]:
    """``[number, batch, ...]`` in single precision or better, copied at once: a model may use its output again."""
    buffer, filled = torch.zeros(()), 0
    for outputs in stream:
        if not filled:
            classes_first = isinstance(likelihood, Categorical) and likelihood.dimension(outputs) == 0
            number = 1 if classes_first else max(1, min(TOGETHER, TOGETHER_NUMBERS // max(1, outputs.numel())))
            dtype = torch.promote_types(outputs.dtype, torch.float32)
            buffer = outputs.new_empty((number, *outputs.shape), dtype=dtype)
        buffer[filled].copy_(outputs)
        filled += 1
        if filled == len(buffer):
            yield buffer
            filled = 0
    if filled:
        yield buffer[:filled]


def entropy(likelihood: Likelihood, p: Tensor, variance: Tensor | None) -> Tensor:
    """Entropy in nats of the predictive ``p``; ``variance`` of a Gaussian's mean over samples, None for one sample."""
    if isinstance(likelihood, Categorical):
        return torch.special.entr(p).sum(likelihood.dimension(p))
    if isinstance(likelihood, Gaussian):
        total = torch.full_like(p, likelihood.variance) if variance is None else variance + likelihood.variance
        return 0.5 * (2 * torch.pi * torch.e * total).log()
    return torch.special.entr(p) + torch.special.entr(1 - p)
