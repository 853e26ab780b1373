"""What every curvature block offers, and what a pass through the network collects for it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from kfac_opt._curvature.edges import ViewOfBase
from kfac_opt._curvature.linalg import negligible
from kfac_opt._curvature.precision import full_precision
from kfac_opt._curvature.spectral import SpectralForm, dense_of_groups
from kfac_opt.layers import LayerAdapter, MatrixLayout, WeightSharing

State = dict[str, Tensor]


@dataclass
class Call:
    """One call of a layer.

    Attributes:
        x: its input.
        positions: ``(batch, shared)`` of its rows.
        view: where its output lies.
        keep: bool ``[batch, shared]``, rows that there are, of a masked pass those that a gradient reached; None for all.
            ``[groups, batch, shared]`` where each group has rows of its own.
        examples: how many examples the rows belong to, once the outputs of the model are known.
        taken: whether the sums of the inputs have it.
        laid_out: the rows are those of a replay: the leading dimension is the batch, and each group has rows of its own.
    """

    x: Tensor
    positions: tuple[int, int]
    view: ViewOfBase | None = None
    keep: Tensor | None = None
    examples: int | None = None
    taken: bool = False
    laid_out: bool = False

    @property
    def flat_batch(self) -> int:
        """Neighbouring entries of the leading dimension that belong to one example."""
        return 1 if self.examples is None else self.positions[0] // self.examples

    def reach(self, rows: Tensor) -> None:
        """Marks the rows ``[groups, batch, shared, features]`` of an output gradient that are not zero."""
        reached = (rows != 0).any(-1)
        if not self.laid_out or len(reached) == 1:
            reached = reached.any(0)
        self.keep = reached if self.keep is None else self.keep | reached

    def num_rows(self) -> int:
        """How many rows count, of the group that has most."""
        return math.prod(self.positions) if self.keep is None else int(self.keep.sum((-1, -2)).max())

    def group_scale(self, dtype: torch.dtype) -> Tensor | None:
        """``[groups]``: by what to multiply sums over the rows of a group that are to be divided by :meth:`num_rows`."""
        if self.keep is None or self.keep.dim() == 2:
            return None
        counts = self.keep.sum((-1, -2)).to(dtype)
        return counts.max() / counts.clamp_min(1)

    def num_examples(self) -> int:
        """How many examples have rows that count."""
        examples = self.positions[0] // self.flat_batch
        if self.keep is None:
            return examples
        keep = self.keep if self.keep.dim() == 2 else self.keep.any(0)
        return int(keep.reshape(examples, -1).any(1).sum())

    def output_gradient(self, arrived: Tensor) -> Tensor:
        """The gradient of the output from what came at its edge (:func:`kfac_opt._curvature.edges.output_edge`)."""
        return arrived if self.view is None else self.view.take(arrived)


@dataclass(frozen=True)
class LateSum:
    """One call's part of the sum of the inputs, to be formed later.

    Attributes:
        call: with a copy of the input, which the model may overwrite.
        form: gives the part, ``sum_bytes`` large.
    """

    call: Call
    form: Callable[[Call], Tensor]
    sum_bytes: int


@dataclass
class Statistics:
    """Sums of one layer over the passes since the last step; counts come beside sums, never means.

    Attributes:
        sums: tensors that add over passes and ranks.
        late: parts of the sum of the inputs that are not formed yet, because they would take more memory than what
            they are formed of.
        num_rows: ``R``, rows that the layer saw in all its calls.
        examples: calls and output gradients that wait for the eigenbasis of this step (EKFAC), with the factor
            their gradients still have to be multiplied by.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    num_rows: int = 0
    examples: list[tuple[list[Call], list[Tensor], float]] = field(default_factory=list)
    late: list[LateSum] = field(default_factory=list)

    def add(self, name: str, value: Tensor) -> None:
        """Adds ``value`` to the sum of this name."""
        self.sums[name] = self.sums[name].add_(value) if name in self.sums else value

    def merge(self, other: Statistics) -> None:
        """Adds another pass."""
        for name, value in other.sums.items():
            self.add(name, value)
        self.num_rows += other.num_rows
        self.examples += other.examples
        self.put_off(*other.late)

    def put_off(self, *parts: LateSum) -> None:
        """Leaves these for :meth:`settle`, unless with those that wait already they would outgrow the sum."""
        self.late += parts
        if self.late and sum(part.call.x.nbytes for part in self.late) > self.late[0].sum_bytes:
            self.settle()

    def settle(self) -> None:
        """Forms what is left of the sum of the inputs."""
        late, self.late = self.late, []
        for part in late:
            with torch.no_grad(), full_precision(part.call.x.device):
                self.add("input", part.form(part.call))


DampingScale = Literal["relative", "mean", "absolute"]


@dataclass(frozen=True)
class Damping:
    """Damping in force, on top of ``extra``, and the power of the damped curvature: directions are ``(F + γ)^(-power) V``.

    ``"absolute"``: γ is ``value``. ``"relative"``: ``value · max(τ, 0.1 max τ)``, τ the mean eigenvalue times the square
    root of the block's size (MATH: damping scale). ``"mean"``: ``value`` times the mean of the eigenvalues it is added to,
    those of each factor where the damping is split, else those of the block.
    """

    value: float
    scale: DampingScale
    extra: float = 0.0
    power: float = 1.0

    def of(self, state: State, size: int, *, split: bool = False) -> Tensor:
        """0-dim γ of a block of ``size`` eigenvalues. A scale that was zero so far gives 1: the gradient stays as it is.

        ``split``: the damping is split between two factors, to each of which ``"mean"`` refers: their product is γ.
        """
        scale, largest = state["scale"], state["scale_max"]
        if self.scale == "absolute":
            return torch.full_like(scale, self.value + self.extra)
        value = self.value
        if self.scale == "mean":
            value = (value * value if split else value) / math.sqrt(size)
        gamma = value * torch.maximum(scale, 0.1 * largest)
        return torch.where(largest > 0, gamma, 1.0) + self.extra


class CurvatureBlock(ABC):
    """One approximation of one layer's Fisher block. Pure: all state is passed in.

    Args:
        layout: how the parameters form a matrix ``[groups, out_dim, in_dim]``.
        adapter: the layer, or None for a parameter of its own.
        dtype: of all factors and their arithmetic.
        sharing: weight-sharing setting.
    """

    needs_input = True  # whether calls must keep their input until the output gradients arrive
    refreshable = False  # whether refresh() does anything
    per_example = False  # whether the gradient of an example is summed over its rows before it is squared

    def __init__(
        self, layout: MatrixLayout, adapter: LayerAdapter | None, dtype: torch.dtype, sharing: WeightSharing = "expand"
    ) -> None:
        self.layout, self.adapter, self.dtype, self.sharing = layout, adapter, dtype, sharing

    # -- collecting ---------------------------------------------------------------------------------------------

    def add_input(self, statistics: Statistics, call: Call) -> None:
        """Adds what the input of one call contributes: of its rows those in ``call.keep``."""
        return

    @abstractmethod
    def add_output(self, statistics: Statistics, calls: list[Call], gradients: list[Tensor], state: State | None) -> None:
        """Adds what one column of output gradients (one tensor per call) contributes.

        ``state`` is given where per-example products can be taken in the basis in force, None where they have
        to wait for a new one.
        """

    def scale_outputs(self, statistics: Statistics, scale: float) -> None:
        """Multiplies all output gradients collected so far by ``scale``: their second moments by its square."""
        for name in statistics.sums:
            if name != "input":
                statistics.sums[name].mul_(scale * scale)
        statistics.examples = [(calls, grads, factor * scale) for calls, grads, factor in statistics.examples]

    @abstractmethod
    def sum_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the sums: what a rank without a pass contributes as zeros."""

    # -- state --------------------------------------------------------------------------------------------------

    def init_state(self, device: torch.device) -> State:
        """All state, zeros. ``weight`` (of the factor average) and counts live on the CPU: reading them is free."""
        return {
            "weight": torch.zeros((), dtype=torch.float64),
            "estimates": torch.zeros((), dtype=torch.int64),
            "scale": torch.zeros((), dtype=self.dtype, device=device),
            "scale_max": torch.zeros((), dtype=self.dtype, device=device),
        }

    @abstractmethod
    def update(self, state: State, statistics: Statistics, num_terms: int, decay: float) -> None:
        """Takes the step's estimate into the average: ``X̂ ← d X̂ + (1 − d) X``, ``w ← d w + (1 − d)``."""

    def update_after_refresh(self, state: State, statistics: Statistics, num_terms: int, decay: float) -> None:
        """Takes what had to wait for the basis in force."""
        return

    def refresh(self, state: State, damping: Damping) -> None:
        """Recomputes what :meth:`precondition` needs and is not cheap to have at every step."""
        return

    def refreshed_tensors(self, state: State) -> list[Tensor]:
        """What :meth:`refresh` wrote: an owner rank sends it to the others."""
        return []

    def refresh_cost(self) -> float:
        """Relative cost of a refresh: cubes of the sizes of the matrices."""
        return 0.0

    def ready(self, state: State) -> bool:
        """Whether there is curvature to precondition with."""
        return float(state["weight"]) > 0.0

    def needs_refresh(self, state: State, power: float) -> bool:
        """Whether an estimate is there that no refresh for this power has seen yet."""
        return False

    # -- use ----------------------------------------------------------------------------------------------------

    def gamma(self, state: State, damping: Damping) -> Tensor:
        """0-dim γ in force."""
        return damping.of(state, self.layout.numel)

    @abstractmethod
    def precondition(self, state: State, matrix: Tensor, damping: Damping) -> Tensor:
        """``(F + γ)^(-power)`` applied to a gradient ``[groups, out_dim, in_dim]`` in ``dtype``."""

    @abstractmethod
    def spectral_form(self, state: State, *, current: bool = True) -> SpectralForm:
        """Eigenbases and eigenvalues: of the current factors, or as of the last refresh."""

    def to_dense(self, state: State) -> Tensor:
        """The whole block ``[out·in, out·in]``, column-stacking over the matrix ``[groups · out_dim, in_dim]``."""
        form = self.spectral_form(state)
        return dense_of_groups(form.dense(), form.eigenvalues.shape[1])


def average_into(average: Tensor, total: Tensor, decay: float, count: int = 1) -> None:
    """``X̂ ← d X̂ + (1 − d) total / count``; dividing by the weight, averaged alike, makes it unbiased."""
    average.mul_(decay).add_(total, alpha=(1.0 - decay) / count)


def average_weight(state: State, decay: float, name: str = "weight") -> None:
    """``w ← d w + (1 − d)``: the weight of an average that started from zero."""
    state[name].mul_(decay).add_(1.0 - decay)
    if name == "weight":
        state["estimates"] += 1


def track_scale(state: State, scale: Tensor) -> None:
    """``τ`` of the block and the largest so far; a scale whose inverse the dtype cannot hold is zero, as without curvature."""
    state["scale"].copy_(torch.where(scale > negligible(scale.dtype), scale, 0.0))
    torch.maximum(state["scale_max"], state["scale"], out=state["scale_max"])
