"""Training, test and validation sets of an experiment, and inputs that the nets have not seen the like of."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.common.config import ConfigError
from benchmarks.common.data import Dataset, load_data
from benchmarks.vi.config import VIConfig


def load_sets(config: VIConfig) -> Dataset:
    """Training and test set of the experiment."""
    return load_data(config.data, config.data_root).to(config.device)


def load_for_search(config: VIConfig) -> Dataset:
    """The same training set, with training examples beyond it in place of the test set."""
    wanted = dataclasses.replace(config.data, num_train=None)
    everything = load_data(wanted, config.data_root)
    number = config.data.num_train if config.data.num_train is not None else len(everything.train_inputs)
    if config.data.num_train is None:  # nothing lies beyond: the validation examples are taken away
        number -= config.num_validation
    end = number + config.num_validation
    together = load_data(dataclasses.replace(config.data, num_train=end), config.data_root)
    if len(together.train_inputs) < end or number < 1:
        raise ConfigError(
            f"key 'num_validation': {config.num_validation} beside {number} training examples is more than the data set has."
        )
    inputs, targets = together.train_inputs, together.train_targets
    return Dataset(together.name, inputs[:number], targets[:number], inputs[number:], targets[number:], together.num_classes).to(
        config.device
    )


def load_unfamiliar(config: VIConfig) -> Tensor | None:
    """Inputs of the other data set, standardised by its own statistics; None without one."""
    if config.unfamiliar is None:
        return None
    return load_data(config.unfamiliar, config.data_root).test_inputs.to(config.device)


def rotated(images: Tensor, degrees: float) -> Tensor:
    """``[batch, channels, height, width]`` turned around the middle; corners repeat the border."""
    if degrees == 0:
        return images
    angle = math.radians(degrees)
    rows = [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]]
    matrix = torch.tensor(rows, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def shuffled(images: Tensor, seed: int = 0) -> Tensor:
    """The same images with their pixels in another order, one order for all."""
    order = torch.randperm(images.shape[2] * images.shape[3], generator=torch.Generator().manual_seed(seed))
    return images.flatten(2)[..., order.to(images.device)].reshape(images.shape)
