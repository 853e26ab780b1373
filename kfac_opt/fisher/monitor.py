"""Gradient data at moments of a training run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kfac_opt.fisher.gradients import GradientStatistics, gradient_statistics
from kfac_opt.likelihoods import Likelihood, LikelihoodName


class GradientMonitor:
    """Takes :func:`gradient_statistics` during a training run: called in the loop, or attached to the optimizer.

    >>> model = nn.Linear(4, 3); optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> monitor = GradientMonitor(model, (torch.randn(30, 4), torch.randint(3, (30,))), interval=10)
    >>> handle = monitor.attach(optimizer)      # or: monitor(step) in the loop

    Args:
        model, data, likelihood, options: as for :func:`gradient_statistics`. The model is put into evaluation mode
            for the measurement and back afterwards.
        interval: optimizer steps between measurements; the first is before the first step when called with 0.
        record: called with ``(step, statistics)``; None keeps the statistics in ``records``. Eigenvectors and
            projections of every moment are large: a long run keeps ``statistics.summary()`` instead.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        likelihood: LikelihoodName | Likelihood = "categorical",
        *,
        interval: int,
        record: Callable[[int, GradientStatistics], None] | None = None,
        num_eigenpairs: int = 1,
        tolerance: float | None = None,
        memory_limit: int = 2 * 1024**3,
        outputs: Callable[[Any], Any] | None = None,
    ) -> None:
        if interval < 1:
            raise ValueError(f"GradientMonitor: interval must be >= 1 optimizer steps, got {interval}")
        self.model, self.data, self.likelihood, self.interval = model, data, likelihood, interval
        self.records: list[tuple[int, GradientStatistics]] = []
        self._record = record
        self._options: dict[str, Any] = {
            "num_eigenpairs": num_eigenpairs,
            "tolerance": tolerance,
            "memory_limit": memory_limit,
            "outputs": outputs,
        }
        self._steps = 0

    def __call__(self, step: int) -> GradientStatistics | None:
        """Measures when ``step`` is a multiple of the interval; else returns None."""
        if step % self.interval:
            return None
        modes = [(part, part.training) for part in self.model.modules()]
        self.model.eval()
        try:
            found = gradient_statistics(self.model, self.data, self.likelihood, **self._options)
        finally:
            for part, training in modes:
                part.training = training
        if self._record is None:
            self.records.append((step, found))
        else:
            self._record(step, found)
        return found

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle:
        """Measures after every ``interval``-th step of this optimizer; ``handle.remove()`` ends it."""
        return optimizer.register_step_post_hook(lambda *_: self._after_step())

    def _after_step(self) -> None:
        self._steps += 1
        self(self._steps)
