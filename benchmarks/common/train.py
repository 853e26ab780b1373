"""A plain training loop that measures itself: loss against steps and against seconds."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.tasks import Task

OptimizerFactory = Callable[[nn.Module, int], torch.optim.Optimizer]


class Loop:
    """Steps of training, one after the other: iterating gives the number of finished steps and the mini-batch loss before each.

    An optimizer that gives up on broken numbers ends the loop; any other error is a bug and goes on.

    Args:
        factor: of the learning rates at a step.
        backward: in place of one backward pass of ``loss``; returns the loss.

    Attributes:
        seconds: of all steps, without what the caller did inside :meth:`stopped`.
        broken_step, message: where and how the optimizer gave up; None in a healthy loop.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterator[tuple[Tensor, Tensor]],
        loss: Callable[[Tensor, Tensor], Tensor],
        num_steps: int,
        factor: Callable[[int], float] = lambda step: 1.0,
        backward: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.optimizer, self.batches, self.loss = model, optimizer, batches, loss
        self.num_steps, self.factor, self.backward = num_steps, factor, backward or self._backward
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.seconds, self.broken_step, self.message = 0.0, None, ""
        self.batch: tuple[Tensor, Tensor] | None = None
        self._started = 0.0

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        self._started = self._now()
        try:
            for step in range(self.num_steps):
                yield step + 1, self._step(step)
                if self.broken_step is not None:
                    break
        finally:
            self.seconds += self._now() - self._started

    def _step(self, step: int) -> Tensor:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.factor(step)
        self.batch = inputs, targets = next(self.batches)
        self.optimizer.zero_grad()
        loss = self.backward(inputs, targets)
        try:
            self.optimizer.step()
        except RuntimeError as error:
            if self._is_finite(loss):
                raise
            self.broken_step, self.message = step, str(error)[:200]
        return loss.detach()

    def _backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        loss = self.loss(self.model(inputs), targets)
        loss.backward()
        return loss

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The clock stands still."""
        self.seconds += self._now() - self._started
        yield
        self._started = self._now()

    def _now(self) -> float:
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def _is_finite(self, loss: Tensor) -> bool:
        found = [loss, *self.model.parameters(), *(p.grad for p in self.model.parameters() if p.grad is not None)]
        return all(bool(torch.isfinite(tensor).all()) for tensor in found)


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
        found = zip(self.steps, self.seconds, self.train_loss, strict=True)
        return next(((step, seconds) for step, seconds, loss in found if loss <= target), None)

    def num_spikes(self, factor: float = 2.0) -> int:
        """How many mini-batch losses lie above ``factor`` times the first one."""
        return sum(1 for loss in self.batch_loss if loss > factor * self.batch_loss[0])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> History:
        """The run that ``to_dict`` described (numbers that were not finite come back as nan)."""
        series = {key: [math.nan if v is None else v for v in value] for key, value in content.items() if isinstance(value, list)}
        return cls(**{**content, **series})


def train(task: Task, factory: OptimizerFactory, seed: int, *, steps: int | None = None, with_test: bool = True) -> History:
    """Trains a fresh model of ``task`` and returns what happened; a divergence is a result, not an error.

    Args:
        factory: makes the optimizer for a model and a seed.
        seed: of the weights and of the order of the batches.
        steps: in place of the task's number.
        with_test: also evaluate the test set.
    """
    num_steps = task.config.steps if steps is None else steps
    model = task.build_model(seed).train()
    optimizer, history, losses = factory(model, seed), History(), []
    schedule = task.config.schedule
    loop = Loop(model, optimizer, task.batches(seed), task.loss, num_steps, lambda step: schedule.factor(step, num_steps))
    _evaluate(task, model, history, 0, 0.0, with_test)
    for done, loss in loop:
        losses.append(loss)
        if done % task.config.eval_interval and done < num_steps and loop.broken_step is None:
            continue
        with loop.stopped():
            values = torch.stack(losses).tolist()  # one read of the device for many steps
            broken = next((done - len(values) + i for i, value in enumerate(values) if not math.isfinite(value)), None)
            history.batch_loss.extend(values)
            losses.clear()
            history.diverged_step = loop.broken_step if loop.broken_step is not None else broken
            history.message = loop.message
            _evaluate(task, model, history, done, loop.seconds, with_test)
        if history.diverged_step is not None:
            break
    getattr(optimizer, "detach", lambda: None)()
    return history


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
