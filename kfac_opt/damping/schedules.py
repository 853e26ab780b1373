"""Damping as a function of the step alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

from torch.optim import Optimizer

from kfac_opt.damping.rule import DampingRule, check_interval, check_positive


class _Schedule(DampingRule, ABC):
    """A factor on each group's initial damping that depends on the number of steps."""

    @abstractmethod
    def factor(self, num_steps: int) -> float:
        """The factor after ``num_steps`` steps."""

    def step(self) -> None:
        """To be called after the optimizer's step."""
        self.num_steps += 1
        self._apply()

    def _apply(self) -> None:
        for number, initial in enumerate(self.initial_dampings):
            self._write(number, initial * self.factor(self.num_steps))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._apply()


class ExponentialDamping(_Schedule):
    """Multiplies the damping of every group by ``decay`` at each step.

    >>> model = torch.nn.Linear(4, 3)
    >>> optimizer = KFAC(model, update_scale="natural", damping=1.0)
    >>> damping = ExponentialDamping(optimizer, decay=0.5, min_damping=0.2)
    >>> dampings = []
    >>> for _ in range(3):
    ...     loss = torch.nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.zeros(8, dtype=torch.int64))
    ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
    ...     damping.step()
    ...     dampings += damping.get_last_damping()
    >>> dampings
    [0.5, 0.25, 0.2]

    Args:
        optimizer: KFAC or KFACVI.
        decay: factor per step, > 0; below 1 the damping falls.
        min_damping, max_damping: where it stops.
    """

    def __init__(self, optimizer: Optimizer, decay: float, *, min_damping: float = 1e-8, max_damping: float = 1e6) -> None:
        super().__init__(optimizer, min_damping=min_damping, max_damping=max_damping)
        check_positive(type(self).__name__, decay=decay)
        self.decay = decay

    def factor(self, num_steps: int) -> float:
        exponent = num_steps * math.log(self.decay)
        return math.exp(min(exponent, 700.0))  # exp overflows at 709; the bounds are far below


class LinearDamping(_Schedule):
    """Leads the damping of every group linearly to ``final_factor`` times its initial value.

    Args:
        optimizer: KFAC or KFACVI.
        final_factor: > 0.
        total_steps: steps until then; afterwards the damping stays.
        min_damping, max_damping: bounds.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        final_factor: float,
        total_steps: int,
        *,
        min_damping: float = 1e-8,
        max_damping: float = 1e6,
    ) -> None:
        super().__init__(optimizer, min_damping=min_damping, max_damping=max_damping)
        check_positive(type(self).__name__, final_factor=final_factor)
        check_interval(type(self).__name__, total_steps)
        self.final_factor, self.total_steps = final_factor, total_steps

    def factor(self, num_steps: int) -> float:
        progress = min(1.0, num_steps / self.total_steps)
        return 1.0 + (self.final_factor - 1.0) * progress
