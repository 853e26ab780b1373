"""The global random numbers as a module's forward saw them, drawn once more without touching the generators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """State of the default generators of the CPU and of one GPU."""

    cpu: Tensor
    device: torch.device
    gpu: Tensor | None

    @staticmethod
    def now(device: torch.device) -> RandomState:
        """As the generators are."""
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return RandomState(torch.get_rng_state(), device, gpu)

    @contextmanager
    def again(self) -> Iterator[None]:
        """In the body the generators start from here; afterwards they are as before."""
        with torch.random.fork_rng(devices=[] if self.gpu is None else [self.device]):
            torch.set_rng_state(self.cpu)
            if self.gpu is not None:
                torch.cuda.set_rng_state(self.gpu, self.device)
            yield
