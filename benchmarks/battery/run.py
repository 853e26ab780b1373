"""One run, and the search with an equal number of runs for everybody."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.battery.rivals import build
from benchmarks.battery.tasks import BatteryTask
from benchmarks.common.data import Dataset

SEARCH_SEED = 1000
STEP = 10**0.5


@dataclass(frozen=True)
class Contestant:
    """How one optimizer takes part.

    Attributes:
        optimizer: a name that ``rivals.build`` knows.
        fixed: settings of every run.
        rates: learning rates that are tried first; none means that nothing is searched.
        alternatives: settings tried, each for itself, at the best learning rate.
        length: share of the task's steps that a run has, warm-up and decay within it.
        tag: changes when the program behind the name changes: runs of another tag are not used again.
    """

    optimizer: str
    label: str
    fixed: dict[str, Any] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    alternatives: list[dict[str, Any]] = field(default_factory=list)
    length: float = 1.0
    tag: str = ""

    def num_steps(self, task: BatteryTask) -> int:
        """Steps of a run at the best settings."""
        return round(self.length * task.steps)


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then decay to 0, the same for everybody: ``linear``, ``constant``, ``cosine`` or ``wsd`` (last fifth)."""

    name: str = "linear"
    warmup_steps: int = 10

    def factor(self, step: int, num_steps: int) -> float:
        """The factor of the learning rate in step ``step`` (from 0)."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        left = 1.0 - (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        shapes: dict[str, float] = {
            "constant": 1.0,
            "linear": left,
            "cosine": 0.5 * (1.0 - math.cos(math.pi * left)),
            "wsd": min(1.0, 5.0 * left),
        }
        return shapes[self.name]


def train(
    task: BatteryTask, dataset: Dataset, factory: Callable[[nn.Module], torch.optim.Optimizer], seed: int, schedule: Schedule
) -> dict[str, Any]:
    """Trains once: loss of every mini-batch before its step, test loss and error at the end, seconds of processor time.

    A run whose loss or weights are not finite ends there; it has a ``diverged_step``.
    """
    model = task.build_model(seed)
    optimizer = factory(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    batches = task.batches(dataset, seed)
    losses: list[float] = []
    seconds, message = 0.0, ""
    while len(losses) < task.steps:
        inputs, targets = next(batches)
        start = time.process_time()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule.factor(len(losses), task.steps)
        optimizer.zero_grad()
        loss = task.loss(model(inputs), targets)
        loss.backward()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        try:
            optimizer.step()
        except Exception as error:
            # An optimizer that gives up on broken numbers has diverged; any other error is a fault and goes on.
            if all(bool(torch.isfinite(p).all()) for p in model.parameters()) and _gradients_are_finite(model):
                raise
            message = f"{type(error).__name__}: {error}"[:200]
            break
        seconds += time.process_time() - start
    whole = len(losses) == task.steps and math.isfinite(losses[-1])
    test_loss, test_error = evaluate(task, dataset, model) if whole else (math.nan, math.nan)
    getattr(optimizer, "detach", lambda: None)()
    return {
        "losses": [float(f"{value:.5g}") for value in losses],
        "final_loss": final_loss(losses, task.steps),
        "test_loss": test_loss,
        "test_error": test_error,
        "seconds": seconds,
        "diverged_step": None if whole else len(losses) - 1,
        "message": message,
    }


def _gradients_are_finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def evaluate(task: BatteryTask, dataset: Dataset, model: nn.Module) -> tuple[float, float]:
    """Mean loss and error over the test set, in evaluation mode."""
    model.eval()
    loss = error = 0.0
    for inputs, targets in task.test_batches(dataset):
        outputs = model(inputs)
        loss += float(task.loss(outputs, targets)) * len(inputs)
        error += float(task.error(outputs, targets)) * len(inputs)
    number = len(dataset.test_inputs)
    return loss / number, error / number


def window(num_steps: int) -> int:
    """How many neighbouring mini-batch losses are averaged: a tenth of the run."""
    return max(1, num_steps // 10)


def final_loss(losses: list[float], num_steps: int) -> float:
    """Mean of the last tenth of the mini-batch losses; infinite for a run that broke."""
    width = window(num_steps)
    whole = len(losses) == num_steps and all(map(math.isfinite, losses[-width:]))
    return sum(losses[-width:]) / width if whole else math.inf


def steps_to(losses: list[float], num_steps: int, target: float) -> float | None:
    """The middle of the first tenth of a run whose mean loss is at most ``target``."""
    width = window(num_steps)
    for start in range(len(losses) - width + 1):
        if sum(losses[start : start + width]) / width <= target:
            return start + width / 2
    return None


def search(contestant: Contestant, scale: float, measure: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
    """The best settings of ``trials``; ``measure`` gives the final training loss of settings."""
    best, best_loss = {**contestant.fixed}, math.inf
    for settings in trials(contestant, scale, loss_of := {}):
        loss_of[_key(settings)] = loss = measure(settings)
        if loss < best_loss or best_loss == math.inf:
            best, best_loss = settings, min(loss, best_loss)
    return best


def trials(contestant: Contestant, scale: float, loss_of: Mapping[Any, float]) -> Iterator[dict[str, Any]]:
    """The runs of a search, one after the other; the caller notes the loss of each before it asks for the next.

    First the learning rates of the grid, then two more: further out while the best one is at the edge, else between the best
    one and its better neighbour; then the alternatives, each at the best rate.
    """
    tried: dict[float, float] = {}

    def rate(value: float) -> dict[str, Any]:
        return {**contestant.fixed, "lr": float(f"{value:.4g}")}

    for value in contestant.rates:
        yield rate(value * scale)
        tried[value] = loss_of[_key(rate(value * scale))]
    for _ in range(2 if contestant.rates else 0):
        value = next_rate(tried)
        yield rate(value * scale)
        tried[value] = loss_of[_key(rate(value * scale))]
    if contestant.rates:
        best = rate(min(tried, key=lambda key: tried[key]) * scale)
        for alternative in contestant.alternatives:
            yield {**best, **alternative}


def next_rate(tried: dict[float, float]) -> float:
    """Beyond the edge where the best rate is the first or the last one, else between it and its better neighbour."""
    rates = sorted(tried)
    place = rates.index(min(rates, key=lambda value: tried[value]))
    if place == 0:
        return rates[0] / STEP
    if place == len(rates) - 1:
        return rates[-1] * STEP
    neighbour = min(rates[place - 1], rates[place + 1], key=lambda value: tried[value])
    return (rates[place] * neighbour) ** 0.5


def _key(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted((key, str(value)) for key, value in settings.items()))


def make_factory(contestant: Contestant, task: BatteryTask, settings: dict[str, Any], seed: int) -> Callable[..., Any]:
    """Builds the optimizer of a run."""
    return lambda model: build(contestant.optimizer, model, settings, task.likelihood, seed)
