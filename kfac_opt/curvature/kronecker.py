r"""Kronecker-factored blocks, :math:`F \approx A \otimes G` (Martens & Grosse 2015, arXiv:1503.05671)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from kfac_opt.curvature.block import Call, CurvatureBlock, Damping, State, Statistics, average_into, average_weight
from kfac_opt.curvature.spectral import SpectralForm
from kfac_opt.layers import LayerAdapter, WeightSharing
from kfac_opt.linalg import (
    FactorizationError,
    damped_inverse,
    eigenbasis,
    mean_diagonal,
    pack_triangle,
    pi_correction,
    stacked,
    triangle_size,
    unpack_triangle,
)
from kfac_opt.panels import (
    FACTOR_PANELS,
    PANEL_DIM,
    pack_panels_,
    panel_diagonal,
    panel_size,
    times_panels,
    unpack_panels,
)
from kfac_opt.products import times_transposed

DampingStyle = Literal["factored", "exact"]
SIDES = ("input", "output")
MAX_FAILURES = 3


class KroneckerBlock(CurvatureBlock):
    r"""``A ⊗ G`` with ``A = (1/N) Σ a aᵀ`` (positions summed) and ``G = (1/R) Σ g gᵀ`` (rows averaged).

    ``style="factored"`` preconditions with :math:`(G + \sqrt\gamma/\pi)^{-1} V (A + \pi\sqrt\gamma)^{-1}`, ``"exact"``
    with :math:`(A \otimes G + \gamma I)^{-1}` in the eigenbases. ``basis`` keeps eigenbases beside the inverses of
    the factored style (posterior samples need them, and two products with inverses cost half of four with bases).

    A side larger than ``max_factor_dim``, or the input of an embedding, keeps only its diagonal. ``inverse_dtype`` is
    that of the stored inverses and of the products with them (``dtype`` if None).
    """

    needs_input = False
    refreshable = True

    def __init__(
        self,
        adapter: LayerAdapter,
        dtype: torch.dtype,
        sharing: WeightSharing,
        *,
        style: DampingStyle,
        max_factor_dim: int,
        basis: bool = False,
        inverse_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(adapter.layout, adapter, dtype, sharing)
        self.layer = adapter
        self.style = style
        self.inverse_dtype = dtype if inverse_dtype is None else inverse_dtype
        self.in_basis = style == "exact"  # where the gradient is preconditioned
        self.keeps_basis = basis or self.in_basis
        groups, out_dim, in_dim = self.layout.shape
        self.groups = groups
        self.dims = {"input": in_dim, "output": out_dim}
        self.dense_sides = {
            "input": in_dim <= max_factor_dim and not adapter.diagonal_input,
            "output": out_dim <= max_factor_dim,
        }

    # -- collecting ---------------------------------------------------------------------------------------------

    def add_input(self, statistics: Statistics, call: Call) -> None:
        moment = self.layer.input_moment if self.dense_sides["input"] else self.layer.input_square
        statistics.add("input", self._packed("input", moment(call.x, call.keep, self.sharing, self.dtype)))

    def add_output(
        self, statistics: Statistics, calls: list[Call], gradients: list[Tensor], state: State | None
    ) -> None:
        moment = self.layer.output_moment if self.dense_sides["output"] else self.layer.output_square
        for call, gradient in zip(calls, gradients):
            statistics.add("output", self._packed("output", moment(gradient, call.keep, self.sharing, self.dtype)))

    def _packed(self, side: str, moment: Tensor) -> Tensor:
        """Large moments as panels at once: the sums of all layers wait side by side for the step."""
        if not self._in_panels(side):
            return moment
        packed = moment.new_empty(self.groups, panel_size(self.dims[side], FACTOR_PANELS))
        pack_panels_(packed, moment, FACTOR_PANELS)
        return packed

    def sum_shapes(self) -> dict[str, tuple[int, ...]]:
        sizes = {side: (self.groups, panel_size(self.dims[side], FACTOR_PANELS)) for side in SIDES}
        return {side: sizes[side] if self._in_panels(side) else self._shape(side) for side in SIDES}

    def _in_panels(self, side: str) -> bool:
        """Whether factor and inverse of this side are kept as panels of one triangle."""
        return self.dense_sides[side] and self.dims[side] >= PANEL_DIM

    def _shape(self, side: str) -> tuple[int, ...]:
        n = self.dims[side]
        return (self.groups, n, n) if self.dense_sides[side] else (self.groups, n)

    # -- state --------------------------------------------------------------------------------------------------

    def init_state(self, device: torch.device) -> State:
        state = super().init_state(device)
        state["refreshes"] = torch.zeros((), dtype=torch.int64)
        state["failures"] = torch.zeros((), dtype=torch.int64)
        state["refreshed_estimates"] = torch.zeros((), dtype=torch.int64)
        for side in SIDES:
            n = self.dims[side]
            size = n
            if self.dense_sides[side]:
                size = panel_size(n, FACTOR_PANELS) if self._in_panels(side) else triangle_size(n)
            state[f"{side}_factor"] = torch.zeros(self.groups, size, dtype=self.dtype, device=device)
            if not self.in_basis:
                shape = (self.groups, panel_size(n)) if self._in_panels(side) else self._shape(side)
                state[f"{side}_inverse"] = torch.zeros(shape, dtype=self.inverse_dtype, device=device)
            if not self.keeps_basis:
                continue
            state[f"{side}_values"] = torch.zeros(self.groups, n, dtype=self.dtype, device=device)
            if self.dense_sides[side]:
                state[f"{side}_basis"] = torch.zeros(self._shape(side), dtype=self.dtype, device=device)
        return state

    def update(self, state: State, statistics: Statistics, num_terms: int, decay: float) -> None:
        if not statistics.num_rows or "output" not in statistics.sums:
            return
        for side, count in (("input", num_terms), ("output", statistics.num_rows)):
            total, factor = statistics.sums[side], state[f"{side}_factor"]
            in_triangle = self.dense_sides[side] and not self._in_panels(side)
            average_into(factor, pack_triangle(total) if in_triangle else total, decay, count)
        average_weight(state, decay)
        self._track_scale(state)

    def _track_scale(self, state: State) -> None:
        """τ = (tr A / dim A)(tr G / dim G) √(dim A · dim G), groups averaged, and the largest so far."""
        means = [self._diagonal(state, side).mean(-1) for side in SIDES]
        size = self.dims["input"] * self.dims["output"]
        state["scale"].copy_((means[0] * means[1]).mean() * size**0.5)
        torch.maximum(state["scale_max"], state["scale"], out=state["scale_max"])

    def _diagonal(self, state: State, side: str) -> Tensor:
        factor, n = state[f"{side}_factor"], self.dims[side]
        if self._in_panels(side):
            factor = panel_diagonal(factor, n)
        elif self.dense_sides[side]:
            rows = torch.arange(n, device=factor.device)
            factor = factor[:, rows * n - rows * (rows - 1) // 2]  # where each row of the triangle starts
        return factor / float(state["weight"])

    def factor(self, state: State, side: str) -> Tensor:
        """The averaged factor ``[groups, n, n]``, or its diagonal ``[groups, n]``."""
        factor = state[f"{side}_factor"]
        if self._in_panels(side):
            factor = unpack_panels(factor, self.dims[side], FACTOR_PANELS)
        elif self.dense_sides[side]:
            factor = unpack_triangle(factor, self.dims[side])
        else:
            factor = factor.clone()
        return factor.div_(float(state["weight"]))

    # -- refresh ------------------------------------------------------------------------------------------------

    def refresh(self, state: State, damping: Damping) -> None:
        """Inverses or eigenbases from the current factors.

        A factorisation that fails on every rung of the ladder leaves the old inverse in force and is counted.

        Raises:
            FactorizationError: when it failed ``MAX_FAILURES`` times in a row, or there is no old inverse.
        """
        work = self.refresh_work(state, damping)
        if work is not None:
            self.finish_refresh(state, work, int(state["estimates"]), damping)

    def refresh_work(self, state: State, damping: Damping, *, detached: bool = False) -> Callable[[], State] | None:
        """What computes the new inverses or bases; None where there is nothing to do.

        ``detached``: from copies of the factors as they are now, so that it can run while they go on.
        """
        if not super().ready(state):
            return None
        moved = not torch.equal(state["refreshed_estimates"], state["estimates"])
        if self.in_basis and not moved:
            return None  # bases do not depend on the damping
        names = [*(f"{side}_factor" for side in SIDES), "weight"]
        given = {name: state[name].clone() if detached else state[name] for name in names}
        gamma = damping.of(state)

        def work() -> State:
            factors = {side: self.factor(given, side) for side in SIDES}
            new = {} if self.in_basis else self._inverses(factors, gamma)
            if self.keeps_basis and moved:
                new.update(self._bases(factors))
            return new

        return work

    def finish_refresh(self, state: State, work: Callable[[], State], estimates: int, damping: Damping) -> None:
        """Puts the result of ``work`` in force; ``estimates`` is their number in the factors that it used."""
        try:
            new = work()
        except FactorizationError as error:
            state["failures"] += 1
            if int(state["failures"]) >= MAX_FAILURES or not self.ready(state):
                raise FactorizationError(
                    f"{error} ({int(state['failures'])} times in a row; damping {float(damping.of(state)):.3g}, factors "
                    f"of size {self.dims['input']} and {self.dims['output']})"
                ) from error
            return
        self._install(state, new)
        state["failures"].zero_()
        state["refreshed_estimates"].fill_(estimates)
        state["refreshes"] += 1

    def _install(self, state: State, new: State) -> None:
        for name, value in new.items():
            if state[name].shape != value.shape:
                pack_panels_(state[name], value)
            else:
                state[name].copy_(value)

    def _splits(self, means: dict[str, Tensor], gamma: Tensor) -> dict[str, Tensor]:
        """Damping of each side, ``[groups]``: ``π√γ`` for the input, ``√γ/π`` for the output."""
        pi = pi_correction(means["input"], means["output"])
        return {"input": pi * gamma.sqrt(), "output": gamma.sqrt() / pi}

    def _inverses(self, factors: State, gamma: Tensor) -> State:
        means = {side: mean_diagonal(f) if self.dense_sides[side] else f.mean(-1) for side, f in factors.items()}
        splits = self._splits(means, gamma)
        inverses: State = {}
        # A side without any curvature makes the whole block zero: the direction is V / γ, and the other side's
        # factor must not shrink it (a saturated softmax has G = 0 and a gradient).
        curved = (means["input"] > 0) & (means["output"] > 0)
        all_curved = bool(curved.all())
        for side, factor in factors.items():
            if not all_curved:
                factor = torch.where(curved.reshape(-1, *[1] * (factor.dim() - 1)), factor, 0.0)
            if self.dense_sides[side]:
                inverses[f"{side}_inverse"] = damped_inverse(factor, splits[side])
            else:
                inverses[f"{side}_inverse"] = 1.0 / (factor + splits[side].unsqueeze(-1))
        return inverses

    def _bases(self, factors: State) -> State:
        new: State = {}
        for side, factor in factors.items():
            if self.dense_sides[side]:
                new[f"{side}_values"], new[f"{side}_basis"] = eigenbasis(factor)
            else:
                new[f"{side}_values"] = factor
        return new

    def refreshed_tensors(self, state: State) -> list[Tensor]:
        kinds = ("inverse", "values", "basis")
        names = [f"{side}_{kind}" for side in SIDES for kind in kinds]
        return [state[name] for name in names if name in state]

    def refresh_cost(self) -> float:
        return float(self.groups * sum(n**3 for side, n in self.dims.items() if self.dense_sides[side]))

    def ready(self, state: State) -> bool:
        return int(state["refreshes"]) > 0

    def needs_first_refresh(self, state: State) -> bool:
        return int(state["refreshes"]) == 0 and super().ready(state)

    # -- use ----------------------------------------------------------------------------------------------------

    def precondition(self, state: State, matrix: Tensor, damping: Damping) -> Tensor:
        if not self.in_basis:
            right = self._times_inverse(state, "input", matrix.to(self.inverse_dtype))
            # The output side from the left is the same from the right on the transpose: both inverses are symmetric.
            return self._times_inverse(state, "output", right.mT, left=True).to(self.dtype)
        form = self.spectral_form(state, current=False)
        return form.rotate_back(form.rotate(matrix) / self.denominators(state, damping))

    def _times_inverse(self, state: State, side: str, matrix: Tensor, *, left: bool = False) -> Tensor:
        """``M X⁻¹`` of matrices ``[groups, m, n]``, transposed (``X⁻¹ Mᵀ``) with ``left``."""
        inverse = state[f"{side}_inverse"]
        if not self.dense_sides[side]:
            product = matrix * inverse.unsqueeze(-2)
        elif self._in_panels(side):
            product = stacked([times_panels(one, packed) for one, packed in zip(matrix, inverse)])
        elif matrix.shape[0] > 1:
            return inverse @ matrix.mT if left else matrix @ inverse
        elif left:
            return times_transposed(inverse[0], matrix[0]).unsqueeze(0)
        else:
            return times_transposed(matrix[0], inverse[0]).unsqueeze(0)
        return product.mT if left else product

    def denominators(self, state: State, damping: Damping) -> Tensor:
        """What the gradient is divided by in the eigenbasis, ``[groups, out_dim, in_dim]``."""
        return self.spectral_form(state, current=False).eigenvalues + damping.of(state)

    def spectral_form(self, state: State, *, current: bool = True) -> SpectralForm:
        parts = self._bases({side: self.factor(state, side) for side in SIDES}) if current else state
        eigenvalues = parts["output_values"].unsqueeze(-1) * parts["input_values"].unsqueeze(-2)
        return SpectralForm(parts.get("output_basis"), parts.get("input_basis"), eigenvalues)
