"""A plain training loop that measures itself: loss against steps and against seconds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.tasks import Task

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass
class History:
    """One training run.

    Attributes:
        steps: steps done at each evaluation, from 0.
        seconds: time of training until each evaluation, evaluations excluded.
        train_loss, test_loss, test_error: evaluated at those moments; ``nan`` after a divergence.
        batch_loss: mini-batch loss before each step.
        diverged_step: the step whose loss or weights were not finite; None in a healthy run.
        message: what the optimizer said when it gave up, else empty.
    """

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_error: list[float] = field(default_factory=list)
    batch_loss: list[float] = field(default_factory=list)
    diverged_step: int | None = None
    message: str = ""

    @property
    def diverged(self) -> bool:
        """Non-finite, or ended above the loss it started from."""
        return self.diverged_step is not None or not self.train_loss[-1] <= self.train_loss[0]

    @property
    def final_loss(self) -> float:
        """Training loss at the end; infinite when the run broke."""
        return self.train_loss[-1] if self.diverged_step is None else math.inf

    def reach(self, target: float) -> tuple[int, float] | None:
        """Steps and seconds at the first evaluation with a training loss of at most ``target``."""
        for step, seconds, loss in zip(self.steps, self.seconds, self.train_loss, strict=True):
            if loss <= target:
                return step, seconds
        return None

    def num_spikes(self, factor: float = 2.0) -> int:
        """How many mini-batch losses lie above ``factor`` times the first one."""
        return sum(1 for loss in self.batch_loss if loss > factor * self.batch_loss[0])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> History:
        """The run that ``to_dict`` described (numbers that were not finite come back as nan)."""
        content = dict(content)
        for key in ("train_loss", "test_loss", "test_error", "batch_loss"):
            content[key] = [math.nan if value is None else value for value in content[key]]
        return cls(**content)


def train(
    task: Task,
    factory: OptimizerFactory,
    seed: int,
    *,
    steps: int | None = None,
    with_test: bool = True,
    on_evaluation: Callable[[nn.Module, torch.optim.Optimizer, History], None] | None = None,
) -> History:
    """Trains a fresh model of ``task`` and returns what happened; a divergence is a result, not an error.

    Args:
        task: data, model and loss.
        factory: makes the optimizer for a model.
        seed: of the weights and of the order of the batches.
        steps: in place of the task's number.
        with_test: also evaluate the test set.
        on_evaluation: called after each evaluation, its time is not counted.
    """
    num_steps = task.config.steps if steps is None else steps
    model = task.build_model(seed)
    model.train()
    optimizer = factory(model)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    batches = task.batches(seed)
    history = History()
    _evaluate(task, model, history, 0, 0.0, with_test)
    seconds, done = 0.0, 0
    while done < num_steps and history.diverged_step is None:
        segment = range(done, min(done + task.config.eval_interval, num_steps))
        _synchronize(task.device)
        start = time.perf_counter()
        losses = _train_segment(task, model, optimizer, batches, base_rates, segment, num_steps, history)
        _synchronize(task.device)
        seconds += time.perf_counter() - start
        done = segment.stop
        _note_losses(history, segment, losses)
        _evaluate(task, model, history, done, seconds, with_test)
        if on_evaluation is not None:
            on_evaluation(model, optimizer, history)
    detach = getattr(optimizer, "detach", None)
    if detach is not None:
        detach()
    return history


def _train_segment(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    base_rates: list[float],
    segment: range,
    num_steps: int,
    history: History,
) -> list[Tensor]:
    losses: list[Tensor] = []
    for step in segment:
        factor = task.config.schedule.factor(step, num_steps)
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * factor
        inputs, targets = next(batches)
        optimizer.zero_grad()
        loss = task.loss(model(inputs), targets)
        loss.backward()
        losses.append(loss.detach())
        try:
            optimizer.step()
        except RuntimeError as error:
            # An optimizer that gives up on broken numbers has diverged; any other error is a bug and goes on.
            if _is_finite(model, losses):
                raise
            history.diverged_step, history.message = step, str(error)
            break
    return losses


def _is_finite(model: nn.Module, losses: list[Tensor]) -> bool:
    tensors = [p.detach() for p in model.parameters()] + [p.grad for p in model.parameters() if p.grad is not None]
    return all(bool(torch.isfinite(tensor).all()) for tensor in [*tensors, *losses])


def _note_losses(history: History, segment: range, losses: list[Tensor]) -> None:
    values = torch.stack(losses).tolist()  # one read of the device per segment
    history.batch_loss.extend(values)
    if history.diverged_step is None:
        broken = (step for step, value in zip(segment, values, strict=False) if not math.isfinite(value))
        history.diverged_step = next(broken, None)


def _evaluate(task: Task, model: nn.Module, history: History, step: int, seconds: float, with_test: bool) -> None:
    train_set = task.evaluate(model, "train")
    history.steps.append(step)
    history.seconds.append(seconds)
    history.train_loss.append(train_set.loss)
    if with_test:
        test_set = task.evaluate(model, "test")
        history.test_loss.append(test_set.loss)
        history.test_error.append(test_set.error)
    if history.diverged_step is None and not math.isfinite(train_set.loss):
        history.diverged_step = step


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
