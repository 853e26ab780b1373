"""Data sets as whole tensors in memory, with a fast seeded stream of batches.

For the small nets of the experiments a ``DataLoader`` would cost more than the training step itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks.common.config import ConfigError

DatasetName = Literal["digits", "mnist", "cifar10", "fashion_mnist", "shakespeare"]


@dataclass(frozen=True)
class DataConfig:
    """Which data, and how much of it.

    Attributes:
        name: ``digits`` comes with scikit-learn; ``mnist``, ``fashion_mnist``, ``cifar10`` are read by torchvision
            below the data root and downloaded when missing; ``shakespeare`` is a text file.
        num_train, num_test: the first so many examples after a fixed shuffle; ``None`` means all.
        target: ``labels``, or ``inputs`` for an autoencoder (pixels in [0, 1]).
        flatten: images as vectors.
        context: tokens per example of ``shakespeare``.
    """

    name: DatasetName
    num_train: int | None = None
    num_test: int | None = None
    target: Literal["labels", "inputs"] = "labels"
    flatten: bool = False
    context: int = 128


@dataclass(frozen=True)
class Dataset:
    """Training and test examples.

    ``inputs`` are ``[examples, ...]``; ``targets`` are class numbers ``[examples]``, tokens ``[examples, context]``,
    or pixels ``[examples, pixels]`` of an autoencoder.
    """

    name: str
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    num_classes: int

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on ``device``."""
        return Dataset(
            self.name,
            self.train_inputs.to(device),
            self.train_targets.to(device),
            self.test_inputs.to(device),
            self.test_targets.to(device),
            self.num_classes,
        )

    def batches(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless training batches; each epoch is a new permutation, an incomplete last batch is left out."""
        return batch_stream(self.train_inputs, self.train_targets, batch_size, seed)


def batch_stream(inputs: Tensor, targets: Tensor, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches ``(inputs[rows], targets[rows])`` of ``batch_size`` rows, from a private generator."""
    if not 1 <= batch_size <= len(inputs):
        raise ValueError(f"batch_size must be between 1 and the number of examples {len(inputs)}, got {batch_size}")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
        for start in range(0, len(inputs) - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            yield inputs[rows], targets[rows]


def load_data(config: DataConfig, data_root: str | Path) -> Dataset:
    """The data set of ``config``, on the CPU; the same examples for every seed of the training."""
    if config.name == "shakespeare":
        dataset = _load_shakespeare(config, Path(data_root))
    elif config.name == "digits":
        dataset = _load_digits(config)
    else:
        dataset = _load_torchvision(config, Path(data_root))
    return dataset


def _load_digits(config: DataConfig) -> Dataset:
    """scikit-learn's 1797 digits of 8 × 8 pixels, 1437 to train and 360 to test (stratified, fixed)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=0)
    train_pixels, test_pixels, train_labels, test_labels = (torch.as_tensor(part) for part in split)
    return _image_dataset(
        config,
        (train_pixels.float() / 16).reshape(-1, 1, 8, 8),
        train_labels.long(),
        (test_pixels.float() / 16).reshape(-1, 1, 8, 8),
        test_labels.long(),
    )


def _load_torchvision(config: DataConfig, root: Path) -> Dataset:
    from torchvision import datasets

    source = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[config.name]
    parts: list[Tensor] = []
    for train in (True, False):
        try:
            # The second call checks the files that are there and fetches them only when they are not.
            examples = source(str(root), train=train, download=not _is_complete(source, root, train))
        except Exception as error:  # torchvision raises URLError, RuntimeError, OSError for the same trouble
            raise ConfigError(
                f"data set '{config.name}' is not below '{root}' and could not be downloaded ({error}). "
                "Give the folder that holds it with --data-root, or run once with network access."
            ) from error
        pixels = torch.as_tensor(examples.data).float() / 255
        parts.append(pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous())
        parts.append(torch.as_tensor(examples.targets).long())
    return _image_dataset(config, *parts)


def _is_complete(source: type, root: Path, train: bool) -> bool:
    try:
        source(str(root), train=train, download=False)
    except RuntimeError:
        return False
    return True


def _image_dataset(
    config: DataConfig, train_pixels: Tensor, train_labels: Tensor, test_pixels: Tensor, test_labels: Tensor
) -> Dataset:
    """Standardised images (mean 0 and variance 1 per channel of the training set) with labels or pixels as targets."""
    train_pixels, train_labels = _first(train_pixels, train_labels, config.num_train)
    test_pixels, test_labels = _first(test_pixels, test_labels, config.num_test)
    num_classes = int(train_labels.max()) + 1
    train_targets, test_targets = train_labels, test_labels
    if config.target == "inputs":  # an autoencoder sees the pixels that it reproduces
        train_targets, test_targets = train_pixels.flatten(1), test_pixels.flatten(1)
        num_classes = train_targets.shape[1]
    else:
        mean = train_pixels.mean(dim=(0, 2, 3), keepdim=True)
        deviation = train_pixels.std(dim=(0, 2, 3), keepdim=True)
        train_pixels, test_pixels = (train_pixels - mean) / deviation, (test_pixels - mean) / deviation
    if config.flatten:
        train_pixels, test_pixels = train_pixels.flatten(1), test_pixels.flatten(1)
    return Dataset(config.name, train_pixels, train_targets, test_pixels, test_targets, num_classes)


def _first(inputs: Tensor, targets: Tensor, number: int | None) -> tuple[Tensor, Tensor]:
    if number is None or number >= len(inputs):
        return inputs, targets
    rows = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))[:number]
    return inputs[rows], targets[rows]


def _load_shakespeare(config: DataConfig, root: Path) -> Dataset:
    """Characters of one text, cut into windows of ``context`` that start at every ``context / 2``; 90 % to train."""
    candidates = [root, root / "input.txt", root / "tinyshakespeare" / "input.txt", root / "tinyshakespeare.txt"]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise ConfigError(
            "Tiny Shakespeare was not found: no file "
            + ", ".join(f"'{candidate}'" for candidate in candidates[1:])
            + ". Give the text file, or the folder that holds it, with --data-root "
            "(the text is char-rnn's tinyshakespeare/input.txt by A. Karpathy)."
        )
    text = path.read_text(encoding="utf-8")
    vocabulary = sorted(set(text))
    index = {character: number for number, character in enumerate(vocabulary)}
    tokens = torch.tensor([index[character] for character in text])
    cut = int(0.9 * len(tokens))
    train_inputs, train_targets = _windows(tokens[:cut], config.context, config.context // 2)
    test_inputs, test_targets = _windows(tokens[cut:], config.context, config.context)
    train_inputs, train_targets = _first(train_inputs, train_targets, config.num_train)
    test_inputs, test_targets = _first(test_inputs, test_targets, config.num_test)
    return Dataset(config.name, train_inputs, train_targets, test_inputs, test_targets, len(vocabulary))


def _windows(tokens: Tensor, context: int, stride: int) -> tuple[Tensor, Tensor]:
    """Inputs and next tokens, both ``[windows, context]``."""
    if len(tokens) < context + 1:
        raise ConfigError(f"key 'data.context' must be below the number of tokens {len(tokens)}, got {context}.")
    windows = tokens.unfold(0, context + 1, max(stride, 1))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
