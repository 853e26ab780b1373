"""When factors are estimated and when inverses are refreshed: functions of the step count alone.

Resuming at any step therefore needs no further state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

INTERVALS = ("factor_interval", "inverse_interval")
STAGGER_FROM = 16  # steps in a round from which its refreshes are spread
EVEN_FROM = 5e10  # cost of all refreshes together (cubes of sizes; a second and more of one core) from which every round is


def factors_due(step: int, interval: int, ramp_steps: int) -> bool:
    """Whether step ``step`` (from 0) takes an estimate: every early step, then every ``interval`` steps."""
    return step < ramp_steps or step % interval == 0


def refresh_round(step: int, interval: int, ramp_steps: int, *, even: bool = False) -> tuple[int, int]:
    """Start and length of the refresh round that ``step`` lies in.

    With a ramp the rounds start at 0, 1, 2, 4, 8, … (the next one after ``max(1, step)`` steps) up to the first
    power of two that is at least ``interval``, then every ``interval`` steps; without one at its multiples. ``even``
    joins the rounds of steps 1 to 3, which are too short to be spread.
    """
    if ramp_steps == 0:
        return step - step % interval, interval
    ramp_end = 1
    while ramp_end < interval:
        ramp_end *= 2
    if step >= ramp_end:
        return step - (step - ramp_end) % interval, interval
    if even and 1 <= step < 4 <= ramp_end:
        return 1, 3
    start = 0 if step == 0 else 1 << (step.bit_length() - 1)
    return start, max(1, start)


def refresh_due(step: int, interval: int, ramp_steps: int, phase: float, *, even: bool = False) -> bool:
    """Whether a layer with this phase in [0, 1) is refreshed at this step: at its share of every round.

    Short rounds are not spread: early in training (the ramp) fresh inverses matter more than even steps, and an
    interval of a few steps says the same. With ``even`` all are, where refreshing everything at once stalls the loop.
    """
    start, length = refresh_round(step, interval, ramp_steps, even=even)
    return step == start + (int(phase * length) if even or length >= STAGGER_FROM else 0)


def refresh_phases(costs: Sequence[float], *, staggered: bool) -> list[float]:
    """Phase of each layer: the share of the total cost that comes before it, so that every step does its part.

    An expensive layer is followed by a gap of its own size. Together means phase 0 for all.
    """
    total = sum(costs)
    if not staggered or total <= 0:
        return [0.0] * len(costs)
    phases, before = [], 0.0
    for cost in costs:
        phases.append(before / total if cost > 0 else 0.0)
        before += cost
    return phases


class Scheduled(Protocol):
    """What the schedule needs to know of a block: its parameter group."""

    @property
    def group(self) -> int: ...


class Schedule:
    """The schedule of the blocks of a model.

    The intervals are those in force when the hooks were set for a step (:meth:`read`): one that is changed afterwards counts
    from the next step.

    Args:
        staggered: spread the refreshes of a round over its steps; of every round, where all together cost ``EVEN_FROM``.
        ramp_steps: early steps that all take an estimate; 0 switches the ramp of the inverses off as well.
    """

    def __init__(self, *, staggered: bool, ramp_steps: int) -> None:
        self.staggered, self.ramp_steps = staggered, ramp_steps
        self._intervals: list[dict[str, int]] = []
        self._phases: dict[str, float] = {}
        self._groups: dict[str, int] = {}
        self._even = False

    def set_blocks(self, blocks: Mapping[str, Scheduled], costs: Mapping[str, float]) -> None:
        """The blocks, and what a refresh of each costs."""
        self._groups = {name: entry.group for name, entry in blocks.items()}
        phases = refresh_phases([costs[name] for name in blocks], staggered=self.staggered)
        self._phases = dict(zip(blocks, phases))
        self._even = self.staggered and sum(costs.values()) >= EVEN_FROM

    def read(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Takes the intervals that stand in the groups now."""
        self._intervals = [{name: int(group[name]) for name in INTERVALS} for group in groups]

    def estimates(self, step: int) -> set[int]:
        """Numbers of the groups whose blocks take an estimate at this step."""
        intervals = enumerate(group["factor_interval"] for group in self._intervals)
        return {number for number, interval in intervals if factors_due(step, interval, self.ramp_steps)}

    def refreshes(self, name: str, step: int) -> bool:
        """Whether this block is refreshed at this step."""
        interval = self._intervals[self._groups[name]]["inverse_interval"]
        return refresh_due(step, interval, self.ramp_steps, self._phases[name], even=self._even)
