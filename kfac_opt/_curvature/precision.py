"""The precision in which factors are computed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Factor arithmetic happens outside the user's autocast."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()  # a context costs as much as the update of a small layer
    return torch.autocast(device.type, enabled=False)
