"""The fifteen tasks of the battery: data, net, loss, and how long to train.

They are cut so that one run takes seconds on one thread of a processor; ``LARGE`` has two that take a minute. ``KEPT_ASIDE``
names the three that must not be looked at while defaults are chosen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.battery.nets import CharLSTM, Denoiser, FieldNet, VisionTransformer
from benchmarks.common.data import DataConfig, Dataset, load_data
from benchmarks.common.models import GPT, autoencoder, deep_linear, hdeep, lenet5, mlp, resnet18
from benchmarks.common.tasks import LOSSES

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class BatteryTask:
    """One task.

    Attributes:
        title: what stands in the table.
        model: makes the net; its weights depend on the seed given to ``build_model`` alone.
        data: reads the examples below a folder.
        likelihood: output distribution; the loss is its negative log-likelihood, summed over outputs, averaged over
            examples (tokens).
        steps, batch_size: of one run.
        sgd_scale: SGD's learning rates are searched around so many times the usual ones: the loss is not divided by
            the number of outputs.
        noise: makes inputs and targets out of clean examples, anew for each batch (diffusion).
    """

    title: str
    model: Callable[[], nn.Module]
    data: Callable[[Path], Dataset]
    likelihood: Literal["categorical", "bernoulli", "gaussian"] = "categorical"
    steps: int = 200
    batch_size: int = 128
    sgd_scale: float = 1.0
    noise: Callable[[Batch, torch.Generator], Batch] | None = None

    def build_model(self, seed: int) -> nn.Module:
        """A fresh net; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.model()

    def batches(self, dataset: Dataset, seed: int) -> Iterator[Batch]:
        """Endless training batches; order and noise depend on ``seed`` alone."""
        generator = torch.Generator().manual_seed(seed)
        for batch in dataset.batches(self.batch_size, seed):
            yield batch if self.noise is None else self.noise(batch, generator)

    def test_batches(self, dataset: Dataset, chunk: int = 250) -> Iterator[Batch]:
        """The test set in pieces, the same noise every time."""
        generator = torch.Generator().manual_seed(0)
        for batch in zip(dataset.test_inputs.split(chunk), dataset.test_targets.split(chunk), strict=True):
            yield batch if self.noise is None else self.noise(batch, generator)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean negative log-likelihood per example (token), without constants."""
        return LOSSES[self.likelihood](outputs, targets)

    def error(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Share of wrong classes or labels; squared error per example where the targets are numbers."""
        if self.likelihood == "categorical":
            return (outputs.argmax(dim=-1) != targets).double().mean()
        if self.likelihood == "bernoulli" and bool(((targets == 0) | (targets == 1)).all()):
            return ((outputs > 0) != (targets > 0.5)).double().mean()
        predicted = torch.sigmoid(outputs) if self.likelihood == "bernoulli" else outputs
        return (predicted - targets).square().sum(dim=-1).double().mean()


def _read(config: DataConfig) -> Callable[[Path], Dataset]:
    return lambda root: load_data(config, root)


@functools.lru_cache(maxsize=1)
def _small_digits(root: Path, target: Literal["labels", "inputs"]) -> Dataset:
    """MNIST at 14 × 14: 20,000 examples to train, 2,000 to test, ``[examples, 196]``."""
    return _pooled(load_data(DataConfig("mnist", 20000, 2000, target), root))


def _pooled(dataset: Dataset) -> Dataset:
    train, test = (functional.avg_pool2d(x, 2) for x in (dataset.train_inputs, dataset.test_inputs))
    return Dataset(dataset.name, train, dataset.train_targets, test, dataset.test_targets, dataset.num_classes)


def _small_cifar(root: Path) -> Dataset:
    return _pooled(load_data(DataConfig("cifar10", 20000, 2000), root))


def _two_digits(root: Path) -> Dataset:
    """Two digits on top of each other; which ones are there is the target, ``[examples, 10]`` of zeros and ones."""

    def pair(images: Tensor, labels: Tensor) -> Batch:
        half = len(images) // 2
        present = functional.one_hot(labels, 10)
        targets = (present[:half] + present[half : 2 * half]).clamp(max=1).float()
        return torch.maximum(images[:half], images[half : 2 * half]).flatten(1), targets

    dataset = _small_digits(root, "labels")
    train = pair(dataset.train_inputs, dataset.train_targets)
    return Dataset("two_digits", *train, *pair(dataset.test_inputs, dataset.test_targets), 10)


def _clean_digits(root: Path) -> Dataset:
    """Pixels in [-1, 1]; the targets are made with the noise."""
    dataset = _small_digits(root, "inputs")
    train, test = (2 * x.flatten(1) - 1 for x in (dataset.train_inputs, dataset.test_inputs))
    return Dataset("diffusion", train, train, test, test, train.shape[1])


def _add_noise(batch: Batch, generator: torch.Generator) -> Batch:
    """``cos(πt/2) x + sin(πt/2) ε`` with the time t as last column; the target is ε."""
    clean, _ = batch
    noise = torch.randn(clean.shape, generator=generator)
    time = torch.rand(len(clean), 1, generator=generator)
    noisy = (torch.pi / 2 * time).cos() * clean + (torch.pi / 2 * time).sin() * noise
    return torch.cat([noisy, time], dim=1), noise


def _fields(root: Path, num_fields: int = 6, num_ids: int = 2048) -> Dataset:
    """The next character from the last 1, 2, … characters, each such group hashed into one id of a common table."""
    text = load_data(DataConfig("shakespeare", context=num_fields + 2), root)

    def hashed(tokens: Tensor) -> Tensor:
        groups, value = [], torch.zeros(len(tokens), dtype=torch.long)
        for length in range(1, num_fields + 1):
            value = (value * 131 + tokens[:, -length] + 1) % 1000003
            groups.append((value * 31 + 7919 * length) % num_ids)
        return torch.stack(groups, dim=1)

    train, test = (hashed(x[:, :-1]) for x in (text.train_inputs, text.test_inputs))
    return Dataset("fields", train[:50000], text.train_inputs[:50000, -1], test[:5000], text.test_inputs[:5000, -1], 65)


def _diabetes(_root: Path) -> Dataset:
    """scikit-learn's 442 patients: ten measurements, one progression score; both standardised."""
    from sklearn.datasets import load_diabetes

    features, scores = (torch.as_tensor(part).float() for part in load_diabetes(return_X_y=True))
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    features = (features[order] - features.mean(dim=0)) / features.std(dim=0)
    scores = ((scores[order] - scores.mean()) / scores.std()).unsqueeze(1)
    return Dataset("diabetes", features[:353], scores[:353], features[353:], scores[353:], 1)


DIGITS = _read(DataConfig("digits"))
SHAKESPEARE = _read(DataConfig("shakespeare", num_test=250, context=64))
TASKS: dict[str, BatteryTask] = {
    "digits_mlp": BatteryTask("digits, MLP 64-128-128-10", mlp, DIGITS),
    "digits_linear": BatteryTask("digits, six linear layers", deep_linear, DIGITS),
    "digits_narrow": BatteryTask("digits, eight narrow layers, batch 32", hdeep, DIGITS, batch_size=32),
    "diabetes": BatteryTask("diabetes, MLP, regression", lambda: mlp((10, 64, 64, 1)), _diabetes, "gaussian", batch_size=64),
    "two_digits": BatteryTask(
        "two digits at once, MLP, ten labels", lambda: mlp((196, 256, 256, 10)), _two_digits, "bernoulli", sgd_scale=0.3
    ),
    "mnist_mlp": BatteryTask(
        "MNIST, MLP 784-512×3-10",
        lambda: mlp((784, 512, 512, 512, 10)),
        _read(DataConfig("mnist", 20000, 2000, flatten=True)),
        steps=100,
    ),
    "lenet5": BatteryTask("CIFAR-10, LeNet5", lenet5, _read(DataConfig("cifar10", 10000, 2000)), steps=200),
    "resnet18": BatteryTask(
        "CIFAR-10 at 16 × 16, ResNet18 of width 16", lambda: resnet18(width=16), _small_cifar, steps=60, batch_size=64
    ),
    "vit": BatteryTask(
        "CIFAR-10, ViT 4 × 96", VisionTransformer, _read(DataConfig("cifar10", 20000, 2000)), steps=100, batch_size=64
    ),
    "gpt_small_batch": BatteryTask(
        "Tiny Shakespeare, GPT 4 × 128, batch 4", lambda: GPT(context=64, width=128), SHAKESPEARE, steps=120, batch_size=4
    ),
    "autoencoder": BatteryTask(
        "MNIST, autoencoder 784-500-250-30 (nats)",
        lambda: autoencoder((784, 500, 250, 30)),
        _read(DataConfig("mnist", 20000, 2000, "inputs", flatten=True)),
        "bernoulli",
        steps=100,
        sgd_scale=0.01,
    ),
    "gpt": BatteryTask(
        "Tiny Shakespeare, GPT 4 × 128, batch 16", lambda: GPT(context=64, width=128), SHAKESPEARE, steps=100, batch_size=16
    ),
    "char_lstm": BatteryTask(
        "Tiny Shakespeare, LSTM of 128", CharLSTM, _read(DataConfig("shakespeare", num_test=500, context=32)), batch_size=32
    ),
    "fields": BatteryTask("Tiny Shakespeare, hashed n-grams, MLP", FieldNet, _fields),
    "diffusion": BatteryTask(
        "MNIST at 14 × 14, diffusion", Denoiser, _clean_digits, "gaussian", sgd_scale=0.03, noise=_add_noise
    ),
}
# Too long for a search: known good settings of others beside K-FAC with its defaults (configs/battery/large.yaml).
LARGE: dict[str, BatteryTask] = {
    "deep_autoencoder": BatteryTask(
        "MNIST, deep autoencoder 784-1000-500-250-30 (nats)",
        autoencoder,
        _read(DataConfig("mnist", 20000, 2000, "inputs", flatten=True)),
        "bernoulli",
        steps=150,
        batch_size=256,
        sgd_scale=0.01,
    ),
    "gpt_256": BatteryTask("Tiny Shakespeare, GPT 4 × 256, batch 16", lambda: GPT(context=64), SHAKESPEARE, batch_size=16),
}
ALL_TASKS = {**TASKS, **LARGE}
KEPT_ASIDE = ("char_lstm", "fields", "diffusion")
