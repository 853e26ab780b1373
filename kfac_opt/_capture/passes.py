"""What one forward pass leaves behind until its statistics are taken, and how late gradients find it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from torch.autograd.graph import GradientEdge

from kfac_opt._capture.random_state import RandomState
from kfac_opt._capture.repeatable import RepeatableGraph
from kfac_opt._capture.taps import Taps
from kfac_opt._curvature.block import Call, Statistics
from kfac_opt._curvature.edges import ViewOfBase
from kfac_opt.layers.parts import Replayed

Missed = Literal["paused", "transformed", "no gradients", "evaluation", "detached", "masked", "dropped", "no backward"]
"""Why a forward of the model gave no estimate."""


@dataclass(frozen=True)
class Seen:
    """An input as a layer saw it; the model may write over it later."""

    x: Tensor
    version: int | None

    @staticmethod
    def of(x: Tensor) -> Seen:
        return Seen(x.detach(), None if x.is_inference() else x._version)

    @property
    def unchanged(self) -> bool:
        return self.version is None or self.x._version == self.version


@dataclass(frozen=True)
class Replay:
    """One call of a module with several matrices.

    Attributes:
        replayed: outputs and rows.
        wanted: numbers of the outputs that gradients can reach.
        views: how each of them lies in the tensor at its edge.
        agrees: 0-dim bool, whether the outputs are those of the module; None where that is known.
    """

    replayed: Replayed
    wanted: list[int]
    views: list[ViewOfBase | None]
    agrees: Tensor | None


@dataclass
class Pass:
    """One forward pass of the model."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    edges: dict[str, list[GradientEdge]] = field(default_factory=dict)
    statistics: dict[str, Statistics] = field(default_factory=dict)
    gradients: dict[str, list[Tensor | None]] = field(default_factory=dict)  # empirical: as they arrive
    inputs: dict[str, list[Seen]] = field(default_factory=dict)  # of layers that have to be proven
    held: set[str] = field(default_factory=set)  # those with a forward of their own: nothing is taken before the proof
    replays: dict[str, list[Replay]] = field(default_factory=dict)  # calls of modules with several matrices
    random: dict[str, RandomState] = field(default_factory=dict)  # as the next call of such a module finds it
    taps: Taps | None = None  # empirical: the gradients of their weights
    logits: Tensor | None = None
    logits_gradient: Tensor | None = None
    num_terms: int = 0
    num_inputs: int | None = None  # leading dimension of the model's input
    masked: bool = False  # rows without a gradient may be padding
    graph: RepeatableGraph | None = None  # while the capture reads it
    scale: float | None = None  # empirical: factor of the user's output gradients, if it can be read off

    def forget(self, name: str) -> None:
        """Leaves out a layer that is not what its block was made for."""
        for part in (self.calls, self.edges, self.gradients, self.statistics, self.inputs):
            part.pop(name, None)  # type: ignore[attr-defined]


@dataclass
class Pending:
    """What the passes since the last step add up to."""

    statistics: dict[str, Statistics] = field(default_factory=dict)
    num_terms: int = 0
    open: list[Pass] = field(default_factory=list)  # empirical: backward may still come
    missed: set[Missed] = field(default_factory=set)  # why passes of this step do not count
    settled: list[Pass] = field(default_factory=list)  # empirical: sums taken, scale of the step not yet known

    def keep(self, current: Pass) -> None:
        """Adds the sums of a pass, of the layers that gradients reached."""
        for name, statistics in current.statistics.items():
            if any(key != "input" for key in statistics.sums) or statistics.examples:
                self.statistics.setdefault(name, Statistics()).merge(statistics)

    def merge(self, other: Pending) -> None:
        self.num_terms += other.num_terms
        self.open += other.open
        self.settled += other.settled
        for name, statistics in other.statistics.items():
            self.statistics.setdefault(name, Statistics()).merge(statistics)


@dataclass
class Tally:
    """Passes that give no estimate.

    Attributes:
        dropped: how many were not finite, ever.
        missed: why passes since the last step do not count.
    """

    dropped: int = 0
    missed: set[Missed] = field(default_factory=set)

    def drop(self) -> None:
        """Counts a pass whose outputs or sums are not finite."""
        self.dropped += 1
        self.missed.add("dropped")


class Arrival:
    """Stores the gradient of one call of one layer during the user's backward."""

    def __init__(self, current: Pass, name: str, index: int) -> None:
        self.gradients, self.name, self.index = current.gradients, name, index

    def __call__(self, gradient: Tensor) -> None:
        calls = self.gradients.get(self.name)
        if calls is not None:
            before = calls[self.index]
            calls[self.index] = gradient.detach() if before is None else before + gradient.detach()


class LogitsArrival:
    def __init__(self, current: Pass) -> None:
        self.current = weakref.ref(current)

    def __call__(self, gradient: Tensor) -> None:
        current = self.current()
        if current is not None:
            before = current.logits_gradient
            current.logits_gradient = gradient.detach() if before is None else before + gradient.detach()


def on_gradient(edge: GradientEdge, arrival: Callable[[Tensor], None]) -> None:
    """Calls ``arrival`` with the gradient that reaches this edge, whatever in-place operation follows it."""

    number = edge.output_nr  # the edge itself in the closure would be a cycle that keeps the graph alive

    def before(gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[number]
        if gradient is not None:
            arrival(gradient)

    edge.node.register_prehook(before)
