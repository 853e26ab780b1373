"""Independent binary outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_opt.likelihoods.base import PerExample, widened
from kfac_opt.likelihoods.reading import fitted_scale, softmax_like


class Bernoulli(PerExample):
    """Independent binary outputs given by logits ``[batch, ...]``; targets in [0, 1]."""

    name = "bernoulli"

    def describe(self) -> dict[str, object]:
        return {"name": self.name}

    def admits(self, outputs: Tensor, mask: Tensor | None = None) -> bool:
        """A logit of ``-inf`` is probability zero."""
        return super().admits(outputs) or bool((outputs.detach() < float("inf")).all())

    def _deviation(self, outputs: Tensor) -> Tensor:
        p = torch.sigmoid(widened(outputs.detach()))
        return (p * (1 - p)).sqrt().to(outputs.dtype)

    def sample(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        p = torch.sigmoid(widened(outputs.detach()))
        uniform = torch.rand(p.shape, generator=generator, dtype=p.dtype, device=p.device)
        return (uniform < p).to(outputs.dtype)

    def label_gradients(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (torch.sigmoid(widened(outputs)) - targets).to(outputs.dtype)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        total = F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="sum")
        return total / outputs.shape[0]

    def predictive(self, outputs: Tensor) -> Tensor:
        return torch.sigmoid(outputs)

    def gradient_scale(self, outputs: Tensor, gradients: Tensor) -> float | None:
        p = torch.sigmoid(widened(outputs.detach())).flatten()
        g = gradients.to(p.dtype).flatten()
        used = g != 0
        residual = torch.where(g < 0, p - 1, p)
        return fitted_scale(residual[used], g[used], gradients.dtype)

    def contradiction(self, outputs: Tensor, gradients: Tensor) -> str | None:
        f, g = widened(outputs.detach()).flatten(), gradients.to(torch.promote_types(gradients.dtype, torch.float32)).flatten()
        if bool(((f > 0) & (f < 1)).all()) and self.gradient_scale(outputs, gradients) is None:
            used = g != 0
            residual = torch.where(g < 0, -1 / f, 1 / (1 - f))  # of the loss in probabilities
            if fitted_scale(residual[used], g[used], gradients.dtype) is not None:
                return "the outputs are probabilities; return logits and use the loss with logits"
        return softmax_like(outputs, gradients)
