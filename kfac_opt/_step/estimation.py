"""Estimates enter the averages, inverses are refreshed when they are due, over one process or many."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from kfac_opt._capture.distributed import active_group, assign_owners, rank, send_from_owners_, sum_over_ranks_
from kfac_opt._capture.passes import Pending
from kfac_opt._curvature.block import Damping, State, Statistics
from kfac_opt._curvature.eigenbasis import EigenbasisBlock
from kfac_opt._curvature.kronecker import KroneckerBlock
from kfac_opt._curvature.linalg import FactorizationError
from kfac_opt._curvature.stacked import refresh_stacked, stacks
from kfac_opt._kernels.products import keep_freed_memory
from kfac_opt._kernels.workspace import shared_workspace
from kfac_opt._step.schedule import EVEN_FROM, factors_due, refresh_due, refresh_phases
from kfac_opt._step.tracking import TrackedBlock

Groups = list[dict[str, Any]]


class Estimation:
    """The schedule of a set of blocks and what happens to their state at each step. Holds no state of its own.

    Args:
        tracked: blocks by name.
        staggered: spread the refreshes of a round over its steps; of every round, where all together cost ``EVEN_FROM``.
        ramp_steps: early steps that all take an estimate; 0 switches the ramp of the inverses off as well.
        process_group: over which statistics are summed.
        shared_gradients: the squares of parameters outside layers are of the mean gradient that every rank holds.
    """

    def __init__(
        self,
        tracked: dict[str, TrackedBlock],
        staggered: bool,
        ramp_steps: int,
        process_group: dist.ProcessGroup | None,
        *,
        shared_gradients: bool = False,
    ) -> None:
        self.shared_gradients = shared_gradients
        self.tracked, self.ramp_steps, self.process_group = tracked, ramp_steps, process_group
        if any(entry.weight.device.type == "cpu" for entry in tracked.values()):
            keep_freed_memory()
        costs = [entry.block.refresh_cost() for entry in tracked.values()]
        self.even = staggered and sum(costs) >= EVEN_FROM
        self.phases = dict(zip(tracked, refresh_phases(costs, staggered=staggered)))

    def due(self, step: int, groups: Groups, states: Mapping[str, State]) -> dict[str, TrackedBlock]:
        """Blocks that take an estimate at this step: by the schedule, or because there is no estimate at all yet."""
        first = all(float(state["weight"]) == 0.0 for state in states.values())
        return {
            name: entry
            for name, entry in self.tracked.items()
            if first or factors_due(step, int(groups[entry.group]["factor_interval"]), self.ramp_steps)
        }

    def refreshes(self, name: str, step: int, groups: Groups) -> bool:
        """Whether this block is refreshed at this step."""
        interval = int(groups[self.tracked[name].group]["inverse_interval"])
        return refresh_due(step, interval, self.ramp_steps, self.phases[name], even=self.even)

    def advance(
        self,
        states: dict[str, State],
        pending: Pending | None,
        step: int,
        groups: Groups,
        damping: Callable[[TrackedBlock], Damping],
    ) -> None:
        """Sums over ranks, factors take the estimate, bases and inverses that are due follow, then the scales."""
        group = active_group(self.process_group)
        due = self.due(step, groups, states) if pending is not None else {}
        waiting = {n: e for n, e in due.items() if self._waits(n, states[n], step, groups)}
        num_terms = 0
        if pending is not None:
            num_terms = self._sum(due, waiting, pending, group)
        if num_terms:
            assert pending is not None
            for name, entry in due.items():
                statistics = pending.statistics.get(name)
                if statistics is not None:
                    decay = float(groups[entry.group]["factor_decay"])
                    entry.block.update(states[name], statistics, num_terms, decay)
        self._refresh(states, step, groups, damping, group)
        if num_terms:
            assert pending is not None
            self._update_scales(due, waiting, states, pending, num_terms, groups, group)

    def _waits(self, name: str, state: State, step: int, groups: Groups) -> bool:
        block = self.tracked[name].block
        return isinstance(block, EigenbasisBlock) and (not block.ready(state) or self.refreshes(name, step, groups))

    def _sum(
        self,
        due: dict[str, TrackedBlock],
        waiting: dict[str, TrackedBlock],
        pending: Pending,
        group: dist.ProcessGroup | None,
    ) -> int:
        """Adds sums and counts over the ranks; a rank without a pass joins with zeros. Returns ``N``."""
        if group is None:
            return pending.num_terms
        counts = [pending.num_terms, pending.num_terms**2]
        tensors: list[Tensor] = []
        for name, entry in due.items():
            statistics = pending.statistics.setdefault(name, Statistics())
            statistics.settle()
            counts.append(statistics.num_rows)
            for key, shape in entry.block.sum_shapes().items():
                if key == "squares" and name in waiting:
                    continue
                tensors.append(_sum_or_zeros(statistics, key, shape, entry))
        numbers = torch.tensor(counts, dtype=torch.float64, device=tensors[0].device if tensors else None)
        sum_over_ranks_([numbers, *tensors], group)
        total = [round(number) for number in numbers.tolist()]
        if self.shared_gradients and total[1]:
            # Every rank's (√R N_rank)² add up to R Σ N_rank², which is N² where the batches are of one size.
            share = total[0] ** 2 / (dist.get_world_size(group) * total[1])
            for name, entry in due.items():
                if entry.module is None and share != 1.0:
                    pending.statistics[name].sums["square"].mul_(share)
        for name, rows in zip(due, total[2:]):
            pending.statistics[name].num_rows = rows
            if due[name].module is not None and rows == 0:
                del pending.statistics[name]  # no rank saw this layer
        return total[0]

    def _refresh(
        self,
        states: dict[str, State],
        step: int,
        groups: Groups,
        damping: Callable[[TrackedBlock], Damping],
        group: dist.ProcessGroup | None,
    ) -> None:
        chosen = [
            name
            for name, entry in self.tracked.items()
            if entry.block.refreshable
            and (
                self.refreshes(name, step, groups)
                or entry.block.needs_refresh(states[name], float(groups[entry.group].get("power", 1.0)))
            )
        ]
        ranks = 1 if group is None else dist.get_world_size(group)
        owners = assign_owners([self.tracked[name].block.refresh_cost() for name in chosen], ranks)
        me = rank(group)
        error: FactorizationError | None = None
        mine = [name for name, owner in zip(chosen, owners) if owner == me]
        together = [name for name in mine if stacks(self.tracked[name].block, states[name])]
        layers = [(cast(KroneckerBlock, self.tracked[n].block), states[n], damping(self.tracked[n])) for n in together]
        for name, reason in zip(together, refresh_stacked(layers)):
            if reason is not None:
                error = _named(name, reason)
        with shared_workspace():
            for name in mine:
                if name in together:
                    continue
                try:
                    self.tracked[name].block.refresh(states[name], damping(self.tracked[name]))
                except FactorizationError as reason:
                    error = _named(name, reason)
        if group is not None and chosen:
            self._share(states, chosen, owners, group)
            error = error or self._given_up(states, chosen, owners, me)
        if error is not None:
            raise error

    def _given_up(self, states: dict[str, State], chosen: list[str], owners: list[int], me: int) -> FactorizationError | None:
        """What another rank raises just now: nobody is left waiting for it."""
        for name, owner in zip(chosen, owners):
            block = self.tracked[name].block
            if owner != me and isinstance(block, KroneckerBlock) and block.gives_up(states[name]):
                return _named(name, FactorizationError(f"rank {owner} says why"))
        return None

    def _share(self, states: dict[str, State], chosen: list[str], owners: list[int], group: dist.ProcessGroup) -> None:
        """Everybody gets what the owners computed, with the counts that say whether it is usable."""
        owned: list[tuple[int, list[Tensor]]] = []
        counters: list[tuple[Tensor, Tensor]] = []
        for name, owner in zip(chosen, owners):
            block, state = self.tracked[name].block, states[name]
            tensors = block.refreshed_tensors(state)
            for key in ("refreshes", "failures", "refreshed_estimates", "refreshed_power"):
                if key in state:
                    carrier = state[key].to(tensors[0].device)  # NCCL moves no CPU tensors
                    counters.append((state[key], carrier))
                    tensors = [*tensors, carrier]
            owned.append((owner, tensors))
        send_from_owners_(owned, group)
        for counter, carrier in counters:
            counter.copy_(carrier)

    def _update_scales(
        self,
        due: dict[str, TrackedBlock],
        waiting: dict[str, TrackedBlock],
        states: dict[str, State],
        pending: Pending,
        num_terms: int,
        groups: Groups,
        group: dist.ProcessGroup | None,
    ) -> None:
        tensors: list[Tensor] = []
        for name, entry in waiting.items():
            block, statistics = entry.block, pending.statistics.get(name)
            if statistics is None or not block.ready(states[name]):
                continue
            assert isinstance(block, EigenbasisBlock)
            block.resolve_examples(states[name], statistics)
            if group is not None:
                tensors.append(_sum_or_zeros(statistics, "squares", block.layout.shape, entry))
        sum_over_ranks_(tensors, group)
        for name, entry in due.items():
            statistics = pending.statistics.get(name)
            if statistics is not None:
                decay = float(groups[entry.group]["factor_decay"])
                entry.block.update_after_refresh(states[name], statistics, num_terms, decay)


def _named(name: str, reason: FactorizationError) -> FactorizationError:
    error = FactorizationError(
        f"'{name}': the factors could not be inverted: {reason}. Raise damping, lower lr, or set factor_dtype=torch.float64."
    )
    error.__cause__ = reason
    return error


def _sum_or_zeros(statistics: Statistics, key: str, shape: tuple[int, ...], entry: TrackedBlock) -> Tensor:
    if key not in statistics.sums:
        statistics.sums[key] = torch.zeros(shape, dtype=entry.block.dtype, device=entry.weight.device)
    statistics.sums[key] = statistics.sums[key].contiguous()
    return statistics.sums[key]
