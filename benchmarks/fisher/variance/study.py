"""Variance of the Fisher estimators of fully connected nets, in closed form."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common.config import LOCAL
from benchmarks.common.data import DataConfig, Dataset
from benchmarks.common.models import build_model
from benchmarks.fisher.training import SGDConfig
from kfac_opt.fisher import EstimatorVariance, estimator_variance


@dataclass(frozen=True)
class VarianceConfig:
    """The experiment.

    Attributes:
        hidden: widths of the hidden layers of the net that is looked at closely (an MLP on the flattened images).
        activation: of all nets.
        num_inputs: inputs that the variance is that of, as one mini-batch.
        labels: values of ``m``.
        num_draws: matrices from sampled labels per ``m`` and per decay, for the check.
        factor_decay, label_samples: of an optimizer, for the numbers of the table.
        decays: values of ``factor_decay`` whose running average of sampled matrices is checked.
        widths: of two hidden layers, at initialisation; I1 over ``num_width_seeds`` initialisations.
        norms: factors on all weights of the trained net.
        snapshots: numbers of training steps at which the trained net is looked at.
        num_probes: random vectors per layer for the second estimator of large nets.
    """

    name: str
    data: DataConfig
    hidden: list[int]
    activation: str = "relu"
    training: SGDConfig = field(default_factory=SGDConfig)
    num_inputs: int = 32
    labels: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    num_draws: int = 2000
    factor_decay: float = 0.95
    label_samples: int = 1
    decays: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.8, 0.95])
    widths: list[int] = field(default_factory=lambda: [8, 16, 32, 64, 128])
    num_width_seeds: int = 5
    norms: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0, 2.0, 4.0])
    snapshots: list[int] = field(default_factory=lambda: [0, 10, 30, 100, 300, 1000])
    num_probes: int = 20
    threads: int = 1
    device: str = "cpu"
    seed: int = 0
    data_root: Path = field(default=Path("data"), metadata=LOCAL)
    out: Path = field(default=Path("out/estimator_variance"), metadata=LOCAL)
    keep: Path | None = field(default=None, metadata=LOCAL)

    def __post_init__(self) -> None:
        for key in ("labels", "widths", "norms", "snapshots", "decays"):
            if not getattr(self, key):
                raise ValueError(f"{key} must not be empty")
        if self.num_inputs < 1 or self.num_draws < 2:
            raise ValueError(f"num_inputs must be >= 1 and num_draws >= 2, got {self.num_inputs} and {self.num_draws}")


@dataclass(frozen=True)
class Point:
    """The network's numbers at one place of a sweep."""

    x: float
    total: float
    covariance: float
    bound: float
    fisher_norm: float
    second_total: float
    second_covariance: float
    second_bound: float

    @classmethod
    def of(cls, x: float, found: EstimatorVariance) -> Point:
        """From a result."""
        second = found.second
        assert second is not None
        return cls(
            x, found.total_variance, found.covariance_norm, found.bound, found.fisher_norm,
            second.total_variance, second.covariance_norm, second.bound,
        )  # fmt: skip


def mlp(config: VarianceConfig, dataset: Dataset, hidden: Sequence[int], seed: int) -> nn.Module:
    sizes = [dataset.train_inputs[0].numel(), *hidden, dataset.num_classes]
    model = build_model({"name": "mlp", "sizes": sizes, "activation": config.activation}, seed)
    # without the leading Flatten the net is a plain chain of layers
    return nn.Sequential(*list(model.children())[1:]).to(config.device)


def fresh_nets(config: VarianceConfig, dataset: Dataset, inputs: Tensor, width: int) -> Point:
    """Two hidden layers at initialisation: I1 as the geometric mean over the seeds, I2 of the first."""
    first = Point.of(width, variance_of(config, mlp(config, dataset, [width, width], config.seed), inputs))
    points = [first]
    for seed in range(config.seed + 1, config.seed + config.num_width_seeds):
        found = estimator_variance(mlp(config, dataset, [width, width], seed), inputs, second="skip")
        numbers = {"total": found.total_variance, "covariance": found.covariance_norm, "bound": found.bound}
        points.append(dataclasses.replace(first, **numbers, fisher_norm=found.fisher_norm))
    means = {
        key: float(np.exp(np.mean([math.log(getattr(point, key)) for point in points])))
        for key in ("total", "covariance", "bound", "fisher_norm")
    }
    return dataclasses.replace(first, **means)


def flat(dataset: Dataset) -> Dataset:
    return Dataset(
        dataset.name,
        dataset.train_inputs.flatten(1),
        dataset.train_targets,
        dataset.test_inputs.flatten(1),
        dataset.test_targets,
        dataset.num_classes,
    )


def scaled(model: nn.Module, factor: float) -> nn.Module:
    """A copy with all weights multiplied; biases stay."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(factor)
    return model


def variance_of(config: VarianceConfig, model: nn.Module, inputs: Tensor) -> EstimatorVariance:
    return estimator_variance(model, inputs, second="probes", num_probes=config.num_probes)
