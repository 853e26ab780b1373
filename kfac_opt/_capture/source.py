"""Where the gradients of the layers' outputs come from."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.autograd.graph import GradientEdge

from kfac_opt._capture.passes import Pass, Pending


class GradientSource(Protocol):
    """Turns passes into sums: at once with gradients of its own, or when those of the user have come."""

    def on_call(self, current: Pass, name: str, edge: GradientEdge) -> None:
        """A layer was called; the gradient of its output passes ``edge``."""

    def collect(self, current: Pass, logits: Tensor, mask: Tensor | None, pending: Pending) -> None:
        """A pass is over."""

    def settle(self, pending: Pending) -> None:
        """Turns passes into sums that had to wait for their backward."""

    def complete(self, pending: Pending, sample_ranks: int) -> None:
        """Brings sums to their scale that is known when the step has all its passes.

        Args:
            sample_ranks: ranks among which the passes of a step are divided.
        """

    def end_step(self) -> None:
        """What gradients say of layers that no hook has seen, before the sums of a step are taken."""

    def start_step(self) -> None:
        """Forgets the passes since the last step."""
