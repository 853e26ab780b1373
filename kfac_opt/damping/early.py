r"""The first steps: the trust region tells from any start where the damping belongs."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

GAIN = 2.0  # the clip's scale grows about as the square root of the damping


class EarlySteps:
    r""":math:`\gamma \leftarrow \gamma\, (s_{min} / s)^2` while the KL clip leaves more than :math:`s_{min}` of a step.

    Taken after every step that refreshed the inverses, since only those say something about the damping as it stands:
    the 1st, 2nd, 3rd, 5th and 9th with the optimizer's ramp. A damping that is too small is left alone; raising it is
    up to the rule.

    Args:
        optimizer: with ``trust_region_scales``; a group without a clip has no early steps.
        num_steps: so many steps are early ones; 0 for none.
        min_scale: ``s_min``.

    Raises:
        ValueError: for a ``num_steps`` that is no integer >= 0.
    """

    def __init__(self, owner: str, optimizer: Optimizer, num_steps: int, min_scale: float) -> None:
        if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 0:
            raise ValueError(f"{owner}: early_steps must be an integer >= 0, got {num_steps!r}")
        if any(group.get("update_scale") == "rms" for group in optimizer.param_groups):
            raise ValueError(
                f"{owner}: with update_scale='rms' the length of a step does not depend on the damping, so that there is "
                "nothing to adapt. Leave the rule out, or build the optimizer with update_scale='natural'."
            )
        self.optimizer, self.num_steps, self.min_scale = optimizer, num_steps, min_scale
        self.refreshes = [0.0] * len(optimizer.param_groups)

    def scale(self, number: int, step: int) -> Tensor | None:
        """The clip's scale for this group after step ``step`` (from 1) if its damping follows it, else None."""
        if step > self.num_steps or self.min_scale <= 0.0:
            return None
        scales: dict[int, Tensor] = getattr(self.optimizer, "trust_region_scales", {})
        return scales.get(number)

    def change(self, number: int, scale: Tensor) -> float:
        """Change of ``log γ``; 0 while the inverses do not hold the last one yet."""
        count = _num_refreshes(self.optimizer, number)
        stale = count is not None and count == self.refreshes[number]
        self.refreshes[number] = count or 0.0
        if stale:
            return 0.0
        value = float(scale)
        return -GAIN * max(0.0, math.log(value / self.min_scale)) if value > 0.0 else 0.0


def _num_refreshes(optimizer: Any, number: int) -> float | None:
    """How often blocks of this group were refreshed so far; None where nothing is counted."""
    blocks = [tracked for tracked in getattr(optimizer, "blocks", {}).values() if tracked.group == number]
    states = [optimizer.state[tracked.weight].get("curvature", {}) for tracked in blocks]
    counts = [float(state["refreshes"]) for state in states if "refreshes" in state]
    return sum(counts) if counts else None
