"""Regression with known noise."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_opt.likelihoods.base import PerExample, widened
from kfac_opt.likelihoods.reading import softmax_like


class Gaussian(PerExample):
    """Outputs with independent Gaussian noise of known ``variance`` (a positive number): regression."""

    name = "gaussian"

    def __init__(self, variance: float = 1.0) -> None:
        if not variance > 0.0:
            raise ValueError(f"Gaussian: variance must be > 0, got {variance}")
        self.variance = float(variance)

    def describe(self) -> dict[str, object]:
        return {"name": self.name, "variance": self.variance}

    def _deviation(self, outputs: Tensor) -> Tensor:
        return torch.full_like(outputs, self.variance**-0.5)

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        wide = widened(outputs.detach())
        noise = torch.randn(wide.shape, generator=generator, dtype=wide.dtype, device=wide.device)
        return (wide + self.variance**0.5 * noise).to(outputs.dtype)

    def sample_gradients(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        wide = widened(outputs.detach())
        noise = torch.randn(wide.shape, generator=generator, dtype=wide.dtype, device=wide.device)
        return (-(self.variance**-0.5) * noise).to(outputs.dtype)  # (f - y) / variance without cancellation

    def label_gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets) / self.variance

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.shape != targets.shape:
            raise ValueError(
                f"gaussian likelihood: the outputs are {list(outputs.shape)} and the targets {list(targets.shape)}, expected one "
                "shape: subtracting them would pair every output with every target. Give targets.view_as(outputs)."
            )
        return 0.5 * (outputs - targets).square().sum() / (self.variance * outputs.shape[0])

    def predictive(self, outputs: Tensor) -> Tensor:
        return outputs

    def contradiction(self, outputs: Tensor, gradients: Tensor) -> str | None:
        return softmax_like(outputs, gradients)
