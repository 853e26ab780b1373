"""One training run of the study: what the search minimises and what the pictures show."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.optimizers import build_optimizer
from benchmarks.common.tasks import Task
from benchmarks.common.train import Loop
from benchmarks.damping.config import HistogramConfig, Setting, SweepConfig

Observer = Callable[[int, nn.Module, torch.optim.Optimizer], None]


@dataclass
class TrialResult:
    """What one run came to.

    Attributes:
        final_loss: training loss at the end; infinite when it broke off.
        initial_loss: training loss before the first step.
        diverged_step: the step at which it broke off, or the last one when it ended above where it started; None in a
            healthy run.
        curve: mini-batch loss before each step, averaged over ``read_interval`` steps.
        test_loss, test_error: at the end, None when it broke off.
        histograms: per step, per layer: ``[first bin, zeros, counts…]`` (:func:`squared_gradient_histogram`).
        seconds: of the whole trial; ``compute_seconds`` of forward, backward and step.
        message: what the optimizer said when it gave up.
    """

    final_loss: float = math.inf
    initial_loss: float = math.nan
    diverged_step: int | None = None
    curve: list[float] = field(default_factory=list)
    test_loss: float | None = None
    test_error: float | None = None
    histograms: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    seconds: float = 0.0
    compute_seconds: float = 0.0
    num_steps: int = 0
    message: str = ""

    @property
    def diverged(self) -> bool:
        """Broke off, or ended above the loss it started from."""
        return self.diverged_step is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain data of a few kilobytes for the storage: five digits, no value that JSON has no word for."""
        return {key: _short(value) for key, value in self.__dict__.items()}


def train_trial(
    config: SweepConfig,
    task: Task,
    setting: Setting,
    values: dict[str, float],
    seed: int,
    observe: Observer | None = None,
) -> TrialResult:
    """Trains once with ``lr``, ``lr_decay`` and ``momentum`` from ``values``; a divergence is a result.

    Args:
        observe: called after each step at which a histogram is taken; its time counts as evaluation.
    """
    start = time.perf_counter()
    model, result, losses = task.build_model(seed).train(), TrialResult(), []
    num_steps, decay = task.config.steps, values["lr_decay"] / task.config.steps
    chosen = {**config.optimizers[setting.optimizer].fixed, "lr": values["lr"], "momentum": values["momentum"]}
    chosen |= {} if setting.damping is None else {"damping": setting.damping}
    optimizer = build_optimizer(config.kind(setting.optimizer), model, chosen, task.config.likelihood, seed)
    result.initial_loss = task.evaluate(model, "train").loss
    loop = Loop(model, optimizer, task.batches(seed), task.loss, num_steps, lambda step: 1.0 - decay * step)
    for done, loss in loop:
        losses.append(loss)
        result.num_steps, result.diverged_step, result.message = done, loop.broken_step, loop.message
        if done % config.read_interval == 0 or done == num_steps:
            result.curve.append(float(torch.stack(losses).mean()))  # one read of the device for several steps
            losses.clear()
            if not result.curve[-1] <= config.divergence_factor * result.initial_loss:
                result.diverged_step = done
        if result.diverged:
            break
        if done % config.histogram.interval == 0:
            with loop.stopped():
                layers = layer_gradients(model).items()
                result.histograms[str(done)] = {name: squared_gradient_histogram(g, config.histogram) for name, g in layers}
                if observe is not None:
                    observe(done, model, optimizer)
    else:
        test = task.evaluate(model, "test")
        result.final_loss, result.test_loss, result.test_error = task.evaluate(model, "train").loss, test.loss, test.error
        if not result.final_loss <= result.initial_loss:
            result.diverged_step = num_steps
    getattr(optimizer, "detach", lambda: None)()
    result.compute_seconds, result.seconds = loop.seconds, time.perf_counter() - start
    return result


def layer_gradients(model: nn.Module) -> dict[str, list[Tensor]]:
    """Gradients of each layer's own parameters, by the layer's name."""
    found = {name: [p.grad for p in m.parameters(recurse=False) if p.grad is not None] for name, m in model.named_modules()}
    return {name: gradients for name, gradients in found.items() if gradients}


def squared_gradient_histogram(gradients: list[Tensor], config: HistogramConfig) -> list[int]:
    """``[first bin, zeros, counts…]``: entries by log10 of their square, in ``num_bins`` fixed bins.

    The square is never formed (it would underflow in single precision): ``log10 g² = 2 log10 |g|``. Exact zeros are
    counted apart; what lies outside goes to the outermost bins; ``counts`` runs from ``first bin`` to the last bin
    that is not empty. Entries that are not finite are left out.
    """
    flat = torch.cat([gradient.detach().flatten() for gradient in gradients]).abs_()
    zeros = int((flat == 0).sum())
    flat = flat[(flat > 0) & torch.isfinite(flat)]
    bins = ((2.0 * flat.log10_() - config.low) / config.width).floor_().clamp_(0, config.num_bins - 1).long()
    counts = torch.bincount(bins, minlength=config.num_bins)
    filled = counts.nonzero().flatten()
    if not len(filled):
        return [0, zeros]
    first, last = int(filled[0]), int(filled[-1])
    return [first, zeros, *counts[first : last + 1].tolist()]


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
