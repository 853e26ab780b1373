"""Shapes whose step time is measured: a model and one random batch of the real size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common.models import build_model


@dataclass(frozen=True)
class WorkloadConfig:
    """A model with its batch; the numbers in the batch do not change the time of a step.

    Attributes:
        input_shape: of one example; for ``tokens`` the length of the text.
        cycles: how many periods of K-FAC's longest interval are measured.
    """

    model: dict[str, Any]
    batch_size: int
    input_shape: list[int]
    num_classes: int = 10
    inputs: Literal["normal", "tokens"] = "normal"
    cycles: int = 1


class Workload:
    """One batch and the way to make a model and its loss."""

    def __init__(self, config: WorkloadConfig, device: str = "cpu", seed: int = 0) -> None:
        self.config, self.device, self.seed = config, torch.device(device), seed
        generator = torch.Generator().manual_seed(seed)
        shape = (config.batch_size, *config.input_shape)
        if config.inputs == "tokens":
            self.inputs = torch.randint(config.num_classes, shape, generator=generator).to(self.device)
            target_shape: tuple[int, ...] = shape
        else:
            self.inputs = torch.randn(shape, generator=generator).to(self.device)
            target_shape = (config.batch_size,)
        self.targets = torch.randint(config.num_classes, target_shape, generator=generator).to(self.device)

    def build_model(self) -> nn.Module:
        """A fresh model in training mode."""
        return build_model(self.config.model, self.seed).to(self.device).train()

    def loss(self, model: nn.Module) -> Tensor:
        """Cross-entropy of the batch, averaged over examples and tokens."""
        return functional.cross_entropy(model(self.inputs).flatten(0, -2), self.targets.flatten())
