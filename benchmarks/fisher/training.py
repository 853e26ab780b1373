"""Plain SGD for the nets that are looked at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common.data import Dataset


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
    model: nn.Module,
    dataset: Dataset,
    config: SGDConfig,
    seed: int,
    *,
    on_step: Callable[[int], None] = lambda step: None,
) -> float:
    """Trains ``model`` on cross-entropy and returns the mean loss of the last twenty batches.

    Args:
        on_step: called with the number of finished steps: 0 before the first.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum)
    batches = dataset.batches(config.batch_size, seed)
    losses: list[Tensor] = []
    on_step(0)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (1.0 - (1.0 - config.decay) * step / config.steps)
        inputs, targets = next(batches)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        on_step(step + 1)
    return float(torch.stack(losses[-20:]).mean()) if losses else math.nan


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, targets: Tensor, chunk: int = 500) -> tuple[float, float]:
    """Mean cross-entropy and share of wrong classes, in evaluation mode; the mode is put back."""
    was_training = model.training
    model.eval()
    loss, wrong = 0.0, 0
    for start in range(0, len(inputs), chunk):
        logits = model(inputs[start : start + chunk])
        labels = targets[start : start + chunk]
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        wrong += int((logits.argmax(-1) != labels).sum())
    model.train(was_training)
    return loss / len(inputs), wrong / len(inputs)
