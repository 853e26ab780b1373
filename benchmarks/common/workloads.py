"""Shapes whose step time is measured: a model and random batches of the real size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common.models import build_model

NUM_BATCHES = 16
"""Enough that no optimizer learns them by heart within a measurement: a net without loss has no Fisher matrix."""


@dataclass(frozen=True)
class WorkloadConfig:
    """A model with its batch size; the labels are random.

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
    """Batches, made once, and the way to make a model and its loss."""

    def __init__(self, config: WorkloadConfig, device: str = "cpu", seed: int = 0) -> None:
        self.config, self.device, self.seed = config, torch.device(device), seed
        generator = torch.Generator().manual_seed(seed)
        self.batches = [self._make_batch(generator) for _ in range(NUM_BATCHES)]

    def _make_batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        config = self.config
        shape = (config.batch_size, *config.input_shape)
        if config.inputs == "tokens":
            inputs = torch.randint(config.num_classes, shape, generator=generator)
            targets = torch.randint(config.num_classes, shape, generator=generator)
        else:
            inputs = torch.randn(shape, generator=generator)
            targets = torch.randint(config.num_classes, (config.batch_size,), generator=generator)
        return inputs.to(self.device), targets.to(self.device)

    def build_model(self) -> nn.Module:
        """A fresh model in training mode."""
        return build_model(self.config.model, self.seed).to(self.device).train()

    def losses(self, model: nn.Module) -> Iterator[Tensor]:
        """Endless losses of one batch after the other: cross-entropy, averaged over examples and tokens."""
        for inputs, targets in itertools.cycle(self.batches):
            yield functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
