"""Plain SGD for the nets that are looked at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from benchmarks.common.data import Dataset
from benchmarks.common.train import Loop


@dataclass(frozen=True)
class SGDConfig:
    """How the net is trained. ``decay``: the learning rate falls linearly to this share of ``lr``."""

    steps: int = 2000
    batch_size: int = 64
    lr: float = 0.02
    momentum: float = 0.9
    decay: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1 or not self.lr > 0 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"training needs steps >= 0, batch_size >= 1, lr > 0, 0 <= momentum < 1, got {self.steps}, "
                f"{self.batch_size}, {self.lr}, {self.momentum}"
            )


def train_sgd(
    model: nn.Module, dataset: Dataset, config: SGDConfig, seed: int, on_step: Callable[[int], None] = lambda step: None
) -> float:
    """Trains ``model`` on cross-entropy and returns the mean loss of the last twenty batches.

    Args:
        on_step: called with the number of finished steps: 0 before the first.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum)
    batches, last = dataset.batches(config.batch_size, seed), []
    on_step(0)
    decay = (1.0 - config.decay) / max(1, config.steps)
    for done, loss in Loop(model, optimizer, batches, functional.cross_entropy, config.steps, lambda step: 1.0 - decay * step):
        last = [*last[-19:], loss]
        on_step(done)
    return float(torch.stack(last).mean()) if last else math.nan
