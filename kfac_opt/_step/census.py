"""Which layers turn out not to be what their blocks were made for, whenever that shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from kfac_opt._capture.collector import Collector, Foreign
from kfac_opt._capture.distributed import sum_over_ranks_
from kfac_opt._capture.passes import Pending
from kfac_opt._curvature.block import State
from kfac_opt._step.tracking import TrackedBlock

REASONS: tuple[Foreign, ...] = ("forward", "uses", "tensors", "hidden", "replay")


@dataclass
class Findings:
    """Names of layers by what was found of them.

    Attributes:
        foreign: not the map of their adapter, by the reason.
        unused: their forward never ran although the weight has a gradient.
        apart: their gradient does not come through the logits; parameters of their own included.
    """

    foreign: dict[str, Foreign] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    apart: list[str] = field(default_factory=list)


class Census:
    """Looks over the layers of each estimate until every one is settled; each is named once."""

    def __init__(self) -> None:
        self.settled = False  # on all ranks: nothing is left to agree about
        self.said_uncounted = False  # that an estimate was due and no pass counted
        self._named: set[str] = set()

    def reopen(self) -> None:
        """There are other blocks, or other layers in them."""
        self.settled = False

    def forget_silent(self, states: Mapping[str, State]) -> None:
        """What has no curvature after the steps of a run that goes on has been named in it."""
        self._named.update(name for name, state in states.items() if float(state["weight"]) == 0.0)

    def look(
        self,
        due: Mapping[str, TrackedBlock],
        states: Mapping[str, State],
        pending: Pending,
        collector: Collector,
        group: dist.ProcessGroup | None,
    ) -> Findings:
        """What this step's passes show that no step before has shown."""
        found = Findings()
        layers = [name for name, entry in due.items() if entry.module is not None]
        used, found.foreign, terms = collector.fired, dict(collector.foreign), pending.num_terms
        if group is not None and not self.settled:
            used, found.foreign, terms = self._agree(layers, due, pending, collector, group)
        if terms == 0:
            return Findings()
        found.foreign = {name: found.foreign[name] for name in layers if name in found.foreign}
        if group is None or not self.settled:
            unused = [name for name in layers if name not in used and name not in found.foreign]
            found.unused = [name for name in unused if _has_gradient(due[name])]
        if pending.num_terms:
            gone = {*found.foreign, *found.unused}
            silent = [name for name in due if name not in pending.statistics and name not in gone and name not in self._named]
            silent = [name for name in silent if float(states[name]["weight"]) == 0.0]
            found.apart = [name for name in silent if _has_gradient(due[name])]
            self._named.update(found.apart)
        return found

    def _agree(
        self,
        layers: list[str],
        due: Mapping[str, TrackedBlock],
        pending: Pending,
        collector: Collector,
        group: dist.ProcessGroup,
    ) -> tuple[set[str], dict[str, Foreign], int]:
        """A layer that only another rank used is no layer without a forward; what one rank found holds for all."""
        ran, sure_of, others = collector.fired, collector.proven, collector.foreign
        proven = [name in sure_of and name in ran for name in layers]
        reasons = [[float(others.get(name) == reason) for name in layers] for reason in REASONS]
        rows = [[float(name in ran) for name in layers], [float(value) for value in proven], *reasons]
        flat = [float(pending.num_terms), *(value for row in rows for value in row)]  # a matrix of len(rows) rows
        device = next(iter(due.values())).weight.device
        numbers = torch.tensor(flat, dtype=torch.float64, device=device)
        sum_over_ranks_([numbers], group)
        terms = round(float(numbers[0]))
        fired, sure, *found = numbers[1:].reshape(len(rows), len(layers)).tolist()
        self.settled = all(value == dist.get_world_size(group) for value in sure)
        foreign = {name: reason for reason, row in zip(REASONS, found) for name, value in zip(layers, row) if value > 0}
        return {name for name, value in zip(layers, fired) if value > 0}, foreign, terms


def _has_gradient(entry: TrackedBlock) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in entry.parameters)
