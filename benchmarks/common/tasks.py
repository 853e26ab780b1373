"""A task: data, a model, the loss that belongs to its output distribution, and how long to train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common.config import ConfigError
from benchmarks.common.data import DataConfig, Dataset, load_data
from benchmarks.common.models import build_model, check_model

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the training, as a factor of the given one; the same for every optimizer.

    Attributes:
        name: ``constant``; ``linear`` or ``cosine`` from 1 down to ``final``.
        warmup_steps: the factor rises linearly from 0 over so many first steps.
    """

    name: Literal["constant", "linear", "cosine"] = "constant"
    final: float = 0.0
    warmup_steps: int = 0

    def factor(self, step: int, num_steps: int) -> float:
        """The factor in force for step ``step`` (from 0) of ``num_steps``."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        if self.name == "constant":
            return 1.0
        if self.name == "linear":
            return 1.0 - (1.0 - self.final) * progress
        return self.final + (1.0 - self.final) * 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * progress))))


@dataclass(frozen=True)
class TaskConfig:
    """What is trained, and for how long.

    Attributes:
        model: ``name`` and the arguments of the function in ``models.py``.
        likelihood: output distribution; the loss is its negative log-likelihood, summed over outputs, averaged over
            examples (tokens for a language model).
        steps: training steps of one run.
        eval_interval: steps between evaluations; their time is not counted.
        num_eval: at most so many training examples (and test examples) per evaluation; ``None`` means all.
    """

    data: DataConfig
    model: dict[str, Any]
    likelihood: Literal["categorical", "bernoulli", "gaussian"] = "categorical"
    steps: int = 200
    batch_size: int = 128
    eval_interval: int = 10
    num_eval: int | None = None
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "eval_interval"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be >= 1, got {getattr(self, key)}")
        check_model(self.model)


@dataclass(frozen=True)
class Evaluation:
    """Loss and error over a set: share of wrong classes, or the squared reconstruction error of an autoencoder."""

    loss: float
    error: float


class Task:
    """A task with its data on the device, ready to train.

    Args:
        config: what is trained.
        data_root: folder of the data sets.
        device: where data and models live.
    """

    def __init__(self, config: TaskConfig, data_root: str | Path = "data", device: str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self.dataset: Dataset = load_data(config.data, data_root).to(self.device)
        if config.batch_size > len(self.dataset.train_inputs):
            raise ConfigError(
                f"key 'task.batch_size' must be at most the number of training examples {len(self.dataset.train_inputs)}, "
                f"got {config.batch_size}."
            )

    @property
    def error_name(self) -> str:
        """What ``Evaluation.error`` is."""
        return "error" if self.config.likelihood == "categorical" else "squared error"

    def build_model(self, seed: int) -> nn.Module:
        """A fresh model; its weights depend on ``seed`` alone."""
        return build_model(self.config.model, seed).to(self.device)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless training batches in an order that depends on ``seed`` alone."""
        return self.dataset.batches(self.config.batch_size, seed)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean negative log-likelihood (without constants) per example, or per token."""
        return LOSSES[self.config.likelihood](outputs, targets)

    def evaluate(self, model: nn.Module, split: Literal["train", "test"]) -> Evaluation:
        """Loss and error in evaluation mode; the model's mode is put back."""
        inputs = self.dataset.train_inputs if split == "train" else self.dataset.test_inputs
        targets = self.dataset.train_targets if split == "train" else self.dataset.test_targets
        if self.config.num_eval is not None and self.config.num_eval < len(inputs):
            # Evenly spread over the set: neighbours of a text are alike.
            rows = torch.linspace(0, len(inputs) - 1, self.config.num_eval, device=self.device).long()
            inputs, targets = inputs[rows], targets[rows]
        return evaluate(model, inputs, targets, self.config.likelihood, 64 if self.config.data.name == "shakespeare" else 500)


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor, targets: Tensor, likelihood: str = "categorical", chunk: int = 500) -> Evaluation:
    """Loss and error over a set in evaluation mode; the model's mode is put back."""
    was_training = model.training
    model.eval()
    loss, error = torch.zeros(2, dtype=torch.float64, device=inputs.device)
    try:
        for x, y in zip(inputs.split(chunk), targets.split(chunk), strict=True):
            outputs = model(x)
            loss += LOSSES[likelihood](outputs, y).double() * len(x)
            error += _error(likelihood, outputs, y).double() * len(x)
    finally:
        model.train(was_training)
    return Evaluation(float(loss) / len(inputs), float(error) / len(inputs))


def _error(likelihood: str, outputs: Tensor, targets: Tensor) -> Tensor:
    if likelihood == "categorical":
        return (outputs.argmax(dim=-1) != targets).double().mean()
    reconstruction = torch.sigmoid(outputs) if likelihood == "bernoulli" else outputs
    return (reconstruction - targets).square().sum(dim=-1).mean()


def _categorical_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def _bernoulli_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / len(outputs)


def _gaussian_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum() / len(outputs)


LOSSES: dict[str, LossFunction] = {
    "categorical": _categorical_loss,
    "bernoulli": _bernoulli_loss,
    "gaussian": _gaussian_loss,
}
