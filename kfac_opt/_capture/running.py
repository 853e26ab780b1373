"""Which pass is under way: the model may call itself, raise, be interrupted, or run in several threads."""

from __future__ import annotations

import threading

from torch import nn

from kfac_opt._capture.hooks import active_calls
from kfac_opt._capture.passes import Pass


class Running(threading.local):
    """The pass under way in this thread: another one may validate the model at the same time.

    Attributes:
        current: None outside a pass, and in one that does not count.
        depth: calls of the model that are under way.
    """

    def __init__(self) -> None:
        self.current: Pass | None = None
        self.depth = 0

    def enter(self, module: nn.Module) -> bool:
        """A forward of the model begins; False inside one that is under way."""
        self.depth += 1
        if self.depth > 1:
            self.depth = min(self.depth, max(1, active_calls(module)))  # an interrupt may have left the call before
        if self.depth > 1 and self.current is not None:
            return False
        self.depth = 1
        return True

    def leave(self) -> Pass | None:
        """A forward of the model is over; the pass that is over with it. Layers that are recomputed must not count twice."""
        self.depth -= 1
        if self.depth > 0:
            return None
        current, self.current = self.current, None
        return current
