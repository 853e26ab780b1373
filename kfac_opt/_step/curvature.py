"""The curvature of a model: averages that take estimates, and inverses or bases that follow them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from kfac_opt._capture.passes import Pending
from kfac_opt._curvature.block import Damping, State, Statistics
from kfac_opt._curvature.eigenbasis import EigenbasisBlock
from kfac_opt._curvature.kronecker import KroneckerBlock
from kfac_opt._curvature.linalg import FactorizationError
from kfac_opt._curvature.stacked import refresh_stacked, stacks
from kfac_opt._kernels.products import keep_freed_memory
from kfac_opt._kernels.workspace import shared_workspace
from kfac_opt._step.placement import Replicated
from kfac_opt._step.tracking import TrackedBlock


@dataclass(frozen=True)
class Unscaled:
    """What an estimate leaves for after the refresh.

    Attributes:
        due: blocks that took it.
        waiting: names of those whose examples wait for the new basis.
    """

    due: dict[str, TrackedBlock]
    waiting: list[str]
    pending: Pending
    num_terms: int


class BlockSet(Protocol):
    """Blocks, their groups, state and damping: those of a model under an optimizer, or of a fit."""

    @property
    def tracked(self) -> dict[str, TrackedBlock]: ...
    @property
    def groups(self) -> list[dict[str, Any]]: ...
    def states(self) -> dict[str, State]: ...
    def state_of(self, entry: TrackedBlock, /) -> State | None: ...
    def damping_of(self, entry: TrackedBlock, /) -> Damping: ...


class Timing(Protocol):
    """Which blocks take an estimate, and which are refreshed, at a step."""

    def set_blocks(self, blocks: Mapping[str, TrackedBlock], costs: Mapping[str, float]) -> None: ...
    def estimates(self, step: int) -> set[int]: ...
    def refreshes(self, name: str, step: int) -> bool: ...


class Curvature:
    """What happens to the state of all blocks at a step. Holds nothing between steps.

    Args:
        blocks: and their state.
        schedule: when.
        placement: where.
        shared_gradients: the squares of parameters outside layers are of the mean gradient that every process holds.
    """

    def __init__(
        self, blocks: BlockSet, schedule: Timing, placement: Replicated, *, shared_gradients: bool = False
    ) -> None:
        self.blocks, self.schedule, self.placement = blocks, schedule, placement
        self.shared_gradients = shared_gradients
        self._unscaled: Unscaled | None = None
        self.follow_blocks()

    def follow_blocks(self) -> None:
        """The blocks were made anew."""
        tracked = self.blocks.tracked
        if any(entry.weight.device.type == "cpu" for entry in tracked.values()):
            keep_freed_memory()
        self.schedule.set_blocks(tracked, {name: entry.block.refresh_cost() for name, entry in tracked.items()})

    def due(self, step: int) -> dict[str, TrackedBlock]:
        """Blocks that take an estimate at this step: by the schedule, or because there is no estimate at all yet."""
        tracked = self.blocks.tracked
        states = (self.blocks.state_of(entry) for entry in tracked.values())
        if all(float(state["weight"]) == 0.0 for state in states if state is not None):
            return dict(tracked)
        groups = self.schedule.estimates(step)
        return {name: entry for name, entry in tracked.items() if entry.group in groups} if groups else {}

    def bases(self, step: int) -> dict[str, State | None]:
        """For blocks that are due: their state, or None where the examples of this step wait for a new basis."""
        found: dict[str, State | None] = {}
        for name, entry in self.due(step).items():
            state = self.blocks.state_of(entry)
            stays = state is not None and entry.block.ready(state) and not self.schedule.refreshes(name, step)
            found[name] = state if stays else None
        return found

    def update(self, pending: Pending | None, step: int) -> None:
        """Averages take the estimate of this step, if there is one. :meth:`refresh` has to follow."""
        self._unscaled = None
        if pending is None:
            return
        due, states = self.due(step), self.blocks.states()
        waiting = [name for name, entry in due.items() if self._waits(entry, states[name], step)]
        num_terms = self._sum(due, waiting, pending)
        if num_terms == 0:
            return
        for name, entry in due.items():
            statistics = pending.statistics.get(name)
            if statistics is not None:
                entry.block.update(states[name], statistics, num_terms, self._decay(entry))
        self._unscaled = Unscaled(due, waiting, pending, num_terms)

    def refresh(self, step: int) -> None:
        """Inverses and bases that are due follow the averages, then the scales of eigenbases."""
        states, unscaled = self.blocks.states(), self._unscaled
        self._unscaled = None
        self._refresh(states, step)
        if unscaled is not None:
            self._rescale(unscaled, states)

    def _waits(self, entry: TrackedBlock, state: State, step: int) -> bool:
        """EKFAC's scales belong to the basis in force after this step's refresh."""
        refreshed = not entry.block.ready(state) or self.schedule.refreshes(entry.name, step)
        return isinstance(entry.block, EigenbasisBlock) and refreshed

    def _decay(self, entry: TrackedBlock) -> float:
        return float(self.blocks.groups[entry.group]["factor_decay"])

    def _sum(self, due: dict[str, TrackedBlock], waiting: list[str], pending: Pending) -> int:
        """Adds sums and counts over the processes; one without a pass joins with zeros."""
        if self.placement.group is None or not due:
            return pending.num_terms
        counts: list[float] = [pending.num_terms, pending.num_terms**2]
        tensors: list[Tensor] = []
        for name, entry in due.items():
            statistics = pending.statistics.setdefault(name, Statistics())
            statistics.settle()
            counts.append(statistics.num_rows)
            for key, shape in entry.block.sum_shapes().items():
                if key == "squares" and name in waiting:
                    continue
                tensors.append(_sum_or_zeros(statistics, key, shape, entry))
        numbers = torch.tensor(counts, dtype=torch.float64, device=tensors[0].device)
        self.placement.sum_([numbers, *tensors])
        total = [round(number) for number in numbers.tolist()]
        if self.shared_gradients and total[1]:
            self._share_squares(due, pending, total[0] ** 2 / (self.placement.size * total[1]))
        for name, rows in zip(due, total[2:]):
            pending.statistics[name].num_rows = rows
            if due[name].module is not None and rows == 0:
                del pending.statistics[name]  # no process saw this layer
        return total[0]

    def _share_squares(self, due: dict[str, TrackedBlock], pending: Pending, share: float) -> None:
        """Every process's ``(√R N_r)²`` add up to ``R Σ N_r²``, which is ``N²`` where the batches are of one size."""
        for name, entry in due.items():
            if entry.module is None and share != 1.0:
                pending.statistics[name].sums["square"].mul_(share)

    def _rescale(self, unscaled: Unscaled, states: dict[str, State]) -> None:
        """Scales of eigenbases take this step's examples in the basis in force."""
        tensors: list[Tensor] = []
        found, due = unscaled.pending.statistics, unscaled.due
        for name in unscaled.waiting:
            block = due[name].block
            if name in found and block.ready(states[name]):
                cast(EigenbasisBlock, block).resolve_examples(states[name], found[name])
                if self.placement.group is not None:
                    tensors.append(_sum_or_zeros(found[name], "squares", block.layout.shape, due[name]))
        self.placement.sum_(tensors)
        for name, entry in due.items():
            if name in found:
                entry.block.update_after_refresh(states[name], found[name], unscaled.num_terms, self._decay(entry))

    # -- inverses and bases -------------------------------------------------------------------------------------

    def _to_refresh(self, states: dict[str, State], step: int) -> list[TrackedBlock]:
        groups = self.blocks.groups
        return [
            entry
            for name, entry in self.blocks.tracked.items()
            if entry.block.refreshable
            and (
                self.schedule.refreshes(name, step)
                or entry.block.needs_refresh(states[name], float(groups[entry.group].get("power", 1.0)))
            )
        ]

    def _refresh(self, states: dict[str, State], step: int) -> None:
        chosen = self._to_refresh(states, step)
        owners = self.placement.owners([entry.block.refresh_cost() for entry in chosen])
        mine = [entry for entry, owner in zip(chosen, owners) if owner == self.placement.rank]
        error = self._refresh_here(mine, states)
        if self.placement.group is not None:
            self.placement.share([(entry, states[entry.name]) for entry in chosen], owners)
            error = error or self._given_up(chosen, owners, states)
        if error is not None:
            raise error

    def _refresh_here(self, entries: list[TrackedBlock], states: dict[str, State]) -> FactorizationError | None:
        """The last failure, after all have had their turn."""
        damping, error = self.blocks.damping_of, None
        together = [entry for entry in entries if stacks(entry.block, states[entry.name])]
        layers = [(cast(KroneckerBlock, entry.block), states[entry.name], damping(entry)) for entry in together]
        for entry, reason in zip(together, refresh_stacked(layers)):
            if reason is not None:
                error = _named(entry.name, reason)
        done = {entry.name for entry in together}
        with shared_workspace():
            for entry in entries:
                if entry.name in done:
                    continue
                try:
                    entry.block.refresh(states[entry.name], damping(entry))
                except FactorizationError as reason:
                    error = _named(entry.name, reason)
        return error

    def _given_up(
        self, chosen: list[TrackedBlock], owners: list[int], states: dict[str, State]
    ) -> FactorizationError | None:
        """What another process raises just now: nobody is left waiting for it."""
        for entry, owner in zip(chosen, owners):
            block = entry.block
            if owner != self.placement.rank and isinstance(block, KroneckerBlock) and block.gives_up(states[entry.name]):
                return _named(entry.name, FactorizationError(f"rank {owner} says why"))
        return None


def _named(name: str, reason: FactorizationError) -> FactorizationError:
    error = FactorizationError(
        f"'{name}': the factors could not be inverted: {reason}. Raise damping, lower lr, or set factor_dtype=torch.float64."
    )
    error.__cause__ = reason
    return error


def _sum_or_zeros(statistics: Statistics, key: str, shape: tuple[int, ...], entry: TrackedBlock) -> Tensor:
    if key not in statistics.sums:
        statistics.sums[key] = entry.weight.new_zeros(shape, dtype=entry.block.dtype)
    statistics.sums[key] = statistics.sums[key].contiguous()
    return statistics.sums[key]
