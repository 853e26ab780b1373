"""What all rules share: they write ``damping`` into the parameter groups and can be saved and resumed."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer


class DampingRule:
    """Changes the ``damping`` of an optimizer's parameter groups; ``step()`` comes after the optimizer's.

    The new damping is in force where the optimizer next uses it: at once for blocks that are inverted in their
    eigenbasis (``damping_style="exact"`` or ``"split"``, ``curvature="eigenbasis"``, diagonal and norm blocks), at the
    next refresh of the inverses for ``damping_style="factored"``.

    Args:
        optimizer: has a ``damping`` in each of its groups (KFAC, KFACVI). The values found there are the start.
        min_damping, max_damping: bounds of what the rule writes, in the optimizer's own ``damping_scale``.

    Attributes:
        initial_dampings: of each group, as found at construction.
        num_steps: calls of ``step()`` so far.
    """

    def __init__(self, optimizer: Optimizer, *, min_damping: float = 1e-8, max_damping: float = 1e6) -> None:
        owner = type(self).__name__
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{owner}: expected an optimizer, got {type(optimizer).__name__}. Pass KFAC(model, ...).")
        for number, group in enumerate(optimizer.param_groups):
            if "damping" not in group:
                raise ValueError(
                    f"{owner}: parameter group {number} of {type(optimizer).__name__} has no 'damping', found the keys "
                    f"{sorted(key for key in group if key != 'params')}. Use it with KFAC or KFACVI."
                )
        check_bounds(owner, min_damping, max_damping)
        self.optimizer = optimizer
        self.min_damping, self.max_damping = min_damping, max_damping
        self.initial_dampings = self.get_last_damping()
        self.num_steps = 0

    def get_last_damping(self) -> list[float]:
        """The damping of each group as it stands."""
        return [float(group["damping"]) for group in self.optimizer.param_groups]

    def _write(self, number: int, damping: float) -> None:
        """Sets the damping of one group, within the bounds."""
        bounded = min(self.max_damping, max(self.min_damping, damping))
        if math.isfinite(bounded):
            self.optimizer.param_groups[number]["damping"] = bounded

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs besides the optimizer's own state, in which the damping is."""
        return {"num_steps": self.num_steps, "initial_dampings": list(self.initial_dampings)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from ``state_dict()``; load the optimizer's state as well, in either order.

        Raises:
            ValueError: for the state of another rule or of another number of groups.
        """
        owner = type(self).__name__
        expected, found = set(self.state_dict()), set(state_dict)
        if expected != found:
            raise ValueError(
                f"{owner}: the state has the keys {sorted(found)}, expected {sorted(expected)}. Load what "
                f"{owner}.state_dict() returned."
            )
        groups = len(self.optimizer.param_groups)
        if len(state_dict["initial_dampings"]) != groups:
            raise ValueError(
                f"{owner}: the state is that of {len(state_dict['initial_dampings'])} parameter groups, the optimizer "
                f"has {groups}. Build the optimizer with the same groups."
            )
        self.num_steps = int(state_dict["num_steps"])
        self.initial_dampings = [float(value) for value in state_dict["initial_dampings"]]


def check_bounds(owner: str, min_damping: float, max_damping: float) -> None:
    """Raises ValueError unless ``0 < min_damping < max_damping``, both finite."""
    if not (0.0 < min_damping < max_damping < math.inf):
        raise ValueError(
            f"{owner}: need 0 < min_damping < max_damping < infinity, got min_damping={min_damping!r}, "
            f"max_damping={max_damping!r}"
        )


def check_positive(owner: str, **values: float) -> None:
    """Raises ValueError for a value that is not a finite number > 0."""
    for name, value in values.items():
        if not (isinstance(value, (int, float)) and 0.0 < value < math.inf):
            raise ValueError(f"{owner}: {name} must be > 0 and finite, got {value!r}")


def check_interval(owner: str, interval: int) -> None:
    """Raises ValueError unless ``interval`` is a whole number of steps, at least 1."""
    if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
        raise ValueError(f"{owner}: interval must be an integer >= 1, got {interval!r}")
