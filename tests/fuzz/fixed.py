"""Likelihoods whose labels and signs are known: the package's random estimates can then be compared number by number.

Both are functions of a term's place in the outputs alone, so that the reference can ask for those of one example.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_opt.likelihoods import Bernoulli, Categorical, Gaussian


def numbers(shape: tuple[int, ...] | list[int], salt: int) -> Tensor:
    """Fixed integers below 1000 for every place of this shape."""
    places = torch.arange(torch.Size(shape).numel())
    return ((places + 7 * salt + 3) * 7919 % 1009 * 31 % 1000).reshape(torch.Size(shape))


def class_dimension(logits: Tensor) -> int:
    """Last for vectors and sequences, 1 for images."""
    return logits.dim() - 1 if logits.dim() <= 3 else 1


def term_shape(kind: str, logits: Tensor) -> list[int]:
    """Shape of the terms: examples, or for classes everything but the classes."""
    if kind != "categorical":
        return [logits.shape[0]]
    dim = class_dimension(logits)
    return [*logits.shape[:dim], *logits.shape[dim + 1 :]]


def labels(kind: str, logits: Tensor, salt: int) -> Tensor:
    """Labels of every term; of a Gaussian the noise in units of its standard deviation."""
    if kind == "categorical":
        return numbers(term_shape(kind, logits), salt) % logits.shape[class_dimension(logits)]
    if kind == "bernoulli":
        return (numbers(list(logits.shape), salt) % 2).to(logits.dtype)
    return numbers(list(logits.shape), salt).to(logits.dtype) / 500 - 1


def signs(kind: str, logits: Tensor, column: int) -> Tensor:
    """±1 for every term."""
    return (numbers(term_shape(kind, logits), 50 + column) % 2 * 2 - 1).to(logits.dtype)


SAMPLED, OBSERVED = 1, 2
"""Salts: labels that the Fisher samples, and those of the data."""


class _Fixed:
    """Draws the fixed labels and signs instead of random ones."""

    kind: str

    def sample_gradients(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        found = labels(self.kind, outputs, SAMPLED)
        if self.kind == "gaussian":
            return -found / self.variance**0.5
        if self.kind == "bernoulli":
            return outputs.detach().sigmoid() - found
        dim = class_dimension(outputs)
        one_hot = F.one_hot(found, outputs.shape[dim]).to(outputs.dtype).movedim(-1, dim)
        return outputs.detach().softmax(dim) - one_hot

    def root_column(self, outputs: Tensor, column: int) -> Tensor:
        self._column = column  # the signs of this column are asked for next
        return super().root_column(outputs, column)

    def term_signs(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        found = signs(self.kind, outputs, self._column)
        if self.kind == "categorical":
            return found.unsqueeze(class_dimension(outputs))
        return found.reshape(-1, *[1] * (outputs.dim() - 1))


class FixedCategorical(_Fixed, Categorical):
    kind = "categorical"


class FixedBernoulli(_Fixed, Bernoulli):
    kind = "bernoulli"


class FixedGaussian(_Fixed, Gaussian):
    kind = "gaussian"


def fixed_likelihood(kind: str, variance: float) -> Categorical | Bernoulli | Gaussian:
    """The likelihood of this kind with known labels and signs."""
    if kind == "gaussian":
        return FixedGaussian(variance)
    return FixedCategorical() if kind == "categorical" else FixedBernoulli()
