"""Who computes what over several processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kfac_opt._capture.distributed import active_group, assign_owners, rank, send_from_owners_, sum_over_ranks_
from kfac_opt._curvature.block import State
from kfac_opt._step.tracking import TrackedBlock

COUNTERS = ("refreshes", "failures", "refreshed_estimates", "refreshed_power")


class Replicated:
    """Every process holds every factor and inverse; refreshes are divided, and their results go round.

    Args:
        process_group: None means the default group when torch.distributed runs.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self.process_group = process_group

    @property
    def group(self) -> dist.ProcessGroup | None:
        """None for a process on its own."""
        return active_group(self.process_group)

    @property
    def size(self) -> int:
        """Number of processes."""
        group = self.group
        return 1 if group is None else dist.get_world_size(group)

    @property
    def rank(self) -> int:
        """Of this process, 0 on its own."""
        return rank(self.group)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Adds the tensors of all processes, in place."""
        sum_over_ranks_(list(tensors), self.group)

    def added(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        """The sums of these numbers over the processes."""
        if self.group is None:
            return list(numbers)
        together = torch.tensor(numbers, dtype=torch.float64, device=device)
        self.sum_([together])
        return [float(number) for number in together.tolist()]

    def owners(self, costs: Sequence[float]) -> list[int]:
        """The process that refreshes each layer."""
        return assign_owners(list(costs), self.size)

    def share(self, layers: Sequence[tuple[TrackedBlock, State]], owners: Sequence[int]) -> None:
        """Everybody gets what the owners computed, with the counts that say whether it is usable."""
        group = self.group
        if group is None or not layers:
            return
        owned: list[tuple[int, list[Tensor]]] = []
        counters: list[tuple[Tensor, Tensor]] = []
        for (entry, state), owner in zip(layers, owners):
            tensors = entry.block.refreshed_tensors(state)
            for key in COUNTERS:
                if key in state:
                    carrier = state[key].to(tensors[0].device)  # NCCL moves no CPU tensors
                    counters.append((state[key], carrier))
                    tensors = [*tensors, carrier]
            owned.append((owner, tensors))
        send_from_owners_(owned, group)
        for counter, carrier in counters:
            counter.copy_(carrier)
