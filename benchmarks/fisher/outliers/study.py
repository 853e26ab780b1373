"""Per-example gradients at checkpoints of training runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks.common.config import LOCAL
from benchmarks.common.data import DataConfig, Dataset
from benchmarks.common.models import build_model
from benchmarks.fisher.training import SGDConfig, evaluate, train_sgd
from kfac_opt.fisher import GradientStatistics, gradient_statistics, symmetric_log_bins

NETWORK = "(network)"


@dataclass(frozen=True)
class Setting:
    """One training run. ``batch_size`` also sets the diffusion that is compared with the drift."""

    lr: float
    batch_size: int
    epochs: float

    @property
    def label(self) -> str:
        """For tables and files."""
        return f"lr {self.lr:g}, batch {self.batch_size}"


@dataclass(frozen=True)
class OutlierConfig:
    """The experiment.

    Attributes:
        settings: the runs.
        num_checkpoints: moments of a run that are looked at, from the start to the end, denser at the beginning.
        tolerance: of the eigenvectors.
        low, high: decades of the histogram of the projections.
        num_pictures: examples with the largest gradients that are shown.
    """

    name: str
    data: DataConfig
    model: dict[str, Any]
    settings: list[Setting]
    num_checkpoints: int = 12
    tolerance: float = 1e-3
    low: float = -4.0
    high: float = 3.0
    num_pictures: int = 10
    memory_gib: float = 2.0
    threads: int = 1
    device: str = "cpu"
    seed: int = 0
    data_root: Path = field(default=Path("data"), metadata=LOCAL)
    out: Path = field(default=Path("out/gradient_outliers"), metadata=LOCAL)
    keep: Path | None = field(default=None, metadata=LOCAL)

    def __post_init__(self) -> None:
        if not self.settings or self.num_checkpoints < 3:
            raise ValueError(
                f"settings must not be empty and num_checkpoints >= 3, got {len(self.settings)} settings and "
                f"{self.num_checkpoints} checkpoints"
            )


@dataclass(frozen=True)
class Moment:
    """A run at one checkpoint.

    Attributes:
        parts: numbers by layer and for the network, as ``GradientStatistics.summary``.
        histogram: counts of the network's projections in fixed bins.
        largest: indices of the examples with the largest gradients.
    """

    step: int
    epoch: float
    train_loss: float
    validation_loss: float
    validation_error: float
    parts: dict[str, dict[str, float]]
    histogram: list[int]
    largest: list[int]


@dataclass(frozen=True)
class Run:
    """One training run."""

    setting: Setting
    moments: list[Moment]

    @property
    def best(self) -> int:
        """Index of the checkpoint with the lowest validation loss."""
        return min(range(len(self.moments)), key=lambda i: self.moments[i].validation_loss)

    def curve(self, key: str, part: str = NETWORK) -> list[float]:
        """One number over the checkpoints."""
        return [moment.parts[part][key] for moment in self.moments]

    @property
    def epochs(self) -> list[float]:
        """Of the checkpoints."""
        return [moment.epoch for moment in self.moments]


def checkpoints(steps: int, number: int) -> list[int]:
    """``number`` steps from 0 to the end, the distances growing with the step."""
    grown = np.linspace(0.0, 1.0, number) ** 2
    return sorted({round(float(share) * steps) for share in grown})


def follow(config: OutlierConfig, dataset: Dataset, setting: Setting, on_moment: Any) -> Run:
    """Trains one net and looks at it at every checkpoint."""
    model = build_model(config.model, config.seed).to(config.device)
    per_epoch = len(dataset.train_inputs) // setting.batch_size
    steps = max(1, round(setting.epochs * per_epoch))
    moments: list[Moment] = []
    due = set(checkpoints(steps, config.num_checkpoints))

    def look(step: int) -> None:
        if step in due:
            moments.append(_look(config, model, dataset, setting, step, step / per_epoch))
            on_moment()

    train_sgd(model, dataset, SGDConfig(steps, setting.batch_size, setting.lr, 0.0), config.seed, on_step=look)
    return Run(setting, moments)


def _look(config: OutlierConfig, model: nn.Module, dataset: Dataset, setting: Setting, step: int, epoch: float) -> Moment:
    found: GradientStatistics = gradient_statistics(
        model,
        (dataset.train_inputs, dataset.train_targets),
        tolerance=config.tolerance,
        memory_limit=int(config.memory_gib * 2**30),
    )
    edges = symmetric_log_bins(config.low, config.high)
    train_loss, _ = evaluate(model, dataset.train_inputs, dataset.train_targets)
    validation_loss, validation_error = evaluate(model, dataset.test_inputs, dataset.test_targets)
    return Moment(
        step=step,
        epoch=epoch,
        train_loss=train_loss,
        validation_loss=validation_loss,
        validation_error=validation_error,
        parts=found.summary(setting.batch_size),
        histogram=found.network.histogram(edges).tolist(),
        largest=found.network.norms.topk(min(config.num_pictures, found.num_examples)).indices.tolist(),
    )
