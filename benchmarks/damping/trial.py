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
from benchmarks.damping.config import HistogramConfig, Setting, SweepConfig
from kfac_opt._curvature.linalg import FactorizationError

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
        eval_steps, train_loss: evaluations on the fixed part of the training set.
        test_loss, test_error: at the end, None when it broke off.
        histograms: per step, per layer: ``[first bin, zeros, counts…]`` (:func:`squared_gradient_histogram`).
        seconds: of the whole trial; ``compute_seconds`` of forward, backward and step; ``evaluation_seconds``.
        message: what the optimizer said when it gave up.
    """

    final_loss: float = math.inf
    initial_loss: float = math.nan
    diverged_step: int | None = None
    curve: list[float] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    test_loss: float | None = None
    test_error: float | None = None
    histograms: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    seconds: float = 0.0
    compute_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    num_steps: int = 0
    message: str = ""

    @property
    def diverged(self) -> bool:
        """Broke off, or ended above the loss it started from."""
        return self.diverged_step is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain data of a few kilobytes for the storage: five digits, no value that JSON has no word for."""
        content = dict(self.__dict__)
        for key, value in content.items():
            if isinstance(value, float):
                content[key] = _short(value)
            elif isinstance(value, list):
                content[key] = [_short(item) if isinstance(item, float) else item for item in value]
        return content


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
    model = task.build_model(seed)
    model.train()
    fixed = config.optimizers[setting.optimizer].fixed
    chosen = {**fixed, "lr": values["lr"], "momentum": values["momentum"]}
    if setting.damping is not None:
        chosen["damping"] = setting.damping
    optimizer = build_optimizer(config.kind(setting.optimizer), model, chosen, task.config.likelihood, seed)
    run = _Run(config, task, model, optimizer, values, TrialResult(), observe)
    run.evaluate(0)
    run.result.initial_loss = run.result.train_loss[0]
    run.train(seed)
    run.finish()
    detach = getattr(optimizer, "detach", None)
    if detach is not None:
        detach()
    run.result.seconds = time.perf_counter() - start
    return run.result


class _Run:
    """The loop and its notes."""

    def __init__(
        self,
        config: SweepConfig,
        task: Task,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        values: dict[str, float],
        result: TrialResult,
        observe: Observer | None,
    ) -> None:
        self.config, self.task, self.model, self.optimizer = config, task, model, optimizer
        self.values, self.result, self.observe = values, result, observe
        self.losses: list[Tensor] = []

    def train(self, seed: int) -> None:
        """All steps, or as many as a broken run gets to."""
        config, num_steps = self.config, self.task.config.steps
        batches = self.task.batches(seed)
        for step in range(num_steps):
            inputs, targets = next(batches)
            started = time.perf_counter()
            self._set_rate(step, num_steps)
            try:
                self.optimizer.zero_grad()
                loss = self.task.loss(self.model(inputs), targets)
                loss.backward()
                self.losses.append(loss.detach())
                self.optimizer.step()
            except FactorizationError as error:
                self._break_off(step, str(error))
            except RuntimeError as error:
                # An optimizer that stumbles over broken numbers has diverged; any other error is a bug and goes on.
                if self._is_finite():
                    raise
                self._break_off(step, str(error))
            done = step + 1
            self.result.num_steps = done
            if done % config.read_interval == 0 or done == num_steps:
                self._read(done)
            self.result.compute_seconds += time.perf_counter() - started
            if self.result.diverged:
                return
            if done % config.histogram.interval == 0:
                self._note_gradients(done)
            if done % self.task.config.eval_interval == 0 and done < num_steps:
                self.evaluate(done)

    def _set_rate(self, step: int, num_steps: int) -> None:
        factor = 1.0 - self.values["lr_decay"] * step / num_steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.values["lr"] * factor

    def _read(self, done: int) -> None:
        """One read of the device for several steps."""
        mean = float(torch.stack(self.losses).mean())
        self.losses = []
        self.result.curve.append(mean)
        if not mean <= self.config.divergence_factor * self.result.initial_loss:
            self._break_off(done, "")

    def _break_off(self, step: int, message: str) -> None:
        self.result.diverged_step, self.result.message = step, message[:200]

    def _is_finite(self) -> bool:
        tensors = [p.detach() for p in self.model.parameters()]
        tensors += [p.grad for p in self.model.parameters() if p.grad is not None]
        return all(bool(torch.isfinite(tensor).all()) for tensor in [*tensors, *self.losses])

    def _note_gradients(self, done: int) -> None:
        started = time.perf_counter()
        self.result.histograms[str(done)] = {
            name: squared_gradient_histogram(gradients, self.config.histogram)
            for name, gradients in layer_gradients(self.model).items()
        }
        if self.observe is not None:
            self.observe(done, self.model, self.optimizer)
        self.result.evaluation_seconds += time.perf_counter() - started

    def evaluate(self, done: int) -> None:
        """Training loss on the fixed part of the training set."""
        started = time.perf_counter()
        self.result.eval_steps.append(done)
        self.result.train_loss.append(self.task.evaluate(self.model, "train").loss)
        self.result.evaluation_seconds += time.perf_counter() - started

    def finish(self) -> None:
        """The final losses of a run that got to the end."""
        result = self.result
        if result.diverged:
            return
        self.evaluate(result.num_steps)
        started = time.perf_counter()
        test = self.task.evaluate(self.model, "test")
        result.evaluation_seconds += time.perf_counter() - started
        result.final_loss = result.train_loss[-1]
        result.test_loss, result.test_error = test.loss, test.error
        if not result.final_loss <= result.initial_loss:
            result.diverged_step = result.num_steps


def layer_gradients(model: nn.Module) -> dict[str, list[Tensor]]:
    """Gradients of each layer's own parameters, by the layer's name."""
    found: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        gradients = [p.grad for p in module.parameters(recurse=False) if p.grad is not None]
        if gradients:
            found[name] = gradients
    return found


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


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
