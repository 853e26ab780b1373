r"""Kronecker-factored blocks, :math:`F \approx A \otimes G` (Martens & Grosse 2015, arXiv:1503.05671)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from kfac_opt._curvature.block import Damping, State
from kfac_opt._curvature.factors import SIDES, FactorBlock
from kfac_opt._curvature.linalg import FactorizationError, negligible, pi_correction, split_damped
from kfac_opt._curvature.spectral import SpectralForm, divided
from kfac_opt.layers import LayerAdapter, WeightSharing

DampingStyle = Literal["factored", "exact", "split"]
MAX_FAILURES = 3
Refreshed = dict[str, list[Tensor]]  # new tensors by the name of the state they go to: of inverses one for each block
Work = Callable[..., Refreshed]  # of nothing, or of what another solved already


class KroneckerBlock(FactorBlock):
    r"""``A ⊗ G`` of the averaged factors (``factors``): its inverse, and the products with it.

    ``style="factored"`` preconditions with :math:`(G + \sqrt\gamma/\pi)^{-p} V (A + \pi\sqrt\gamma)^{-p}`, ``"exact"``
    with :math:`(A \otimes G + \gamma I)^{-p}` in the eigenbases, ``"split"`` as the factored style, but there. ``basis``
    keeps eigenbases beside the inverses of the factored style (posterior samples need them, and two products with
    inverses cost half of four with bases).

    ``inverse_dtype`` is that of the stored inverses and of the products with them (``dtype`` if None).
    """

    refreshable = True

    def __init__(
        self,
        adapter: LayerAdapter,
        dtype: torch.dtype,
        sharing: WeightSharing,
        *,
        style: DampingStyle,
        max_factor_dim: int,
        max_block_dim: int | None = None,
        basis: bool = False,
        inverse_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(adapter, dtype, sharing, max_factor_dim=max_factor_dim, max_block_dim=max_block_dim)
        self.style = style
        self.inverse_dtype = dtype if inverse_dtype is None else inverse_dtype
        self.in_basis = style != "factored"  # where the gradient is preconditioned
        self.keeps_basis = basis or self.in_basis

    # -- state --------------------------------------------------------------------------------------------------

    def init_state(self, device: torch.device) -> State:
        state = super().init_state(device)
        state["refreshes"] = torch.zeros((), dtype=torch.int64)
        state["failures"] = torch.zeros((), dtype=torch.int64)
        state["refreshed_estimates"] = torch.zeros((), dtype=torch.int64)
        for name, side in self.sides.items():
            state[f"{name}_factor"] = torch.zeros(side.factor_shape, dtype=self.dtype, device=device)
            if not self.in_basis:
                state["refreshed_power"] = torch.zeros((), dtype=torch.float64)
                state[f"{name}_inverse"] = torch.zeros(side.inverse_shape, dtype=self.inverse_dtype, device=device)
            if not self.keeps_basis:
                continue
            state[f"{name}_values"] = torch.zeros(self.groups, side.dim, dtype=self.dtype, device=device)
            if side.dense:
                state[f"{name}_basis"] = torch.zeros(side.basis_shape, dtype=self.dtype, device=device)
        return state

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

    def refresh_work(self, state: State, damping: Damping) -> Work | None:
        """What computes the new inverses or bases; None where there is nothing to do."""
        if not super().ready(state):
            return None
        moved = not torch.equal(state["refreshed_estimates"], state["estimates"])
        if self.in_basis and not moved:
            return None  # bases do not depend on the damping
        gamma = self.gamma(state, damping)

        def work(solved: Refreshed | None = None) -> Refreshed:
            new = {} if self.in_basis else {"refreshed_power": [torch.tensor(damping.power, dtype=torch.float64)]}
            if solved is not None:
                return {**new, **solved}
            if self.keeps_basis and moved:
                new |= self._bases(state)
            return new if self.in_basis else {**new, **self._inverses(state, gamma, damping.power)}

        return work

    def problems(self, state: State, damping: Damping) -> dict[str, tuple[Tensor, Tensor | None]]:
        """What a refresh of whole dense sides solves, by name of state: ``(X + γ)^(-power)``; with γ None the eigenbasis."""
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        if self.keeps_basis and not torch.equal(state["refreshed_estimates"], state["estimates"]):
            found |= {f"{name}_basis": (self._factor_blocks(state, name)[0], None) for name in SIDES}
        if not self.in_basis:
            weights, splits = self._weights_and_splits(state, self.gamma(state, damping))
            for name, side in self.sides.items():
                matrix = side.unpacked(state[f"{name}_factor"])[0].div_(weights.reshape(-1, 1, 1))
                found[f"{name}_inverse"] = matrix, splits[name]
        return found

    def finish_refresh(self, state: State, work: Work, estimates: int, damping: Damping) -> None:
        """Puts the result of ``work`` in force; ``estimates`` is their number in the factors that it used."""
        try:
            new = work()
        except FactorizationError as error:
            state["failures"] += 1
            if self.gives_up(state):
                raise FactorizationError(
                    f"{error} ({int(state['failures'])} times in a row; damping {float(self.gamma(state, damping)):.3g}, factors "
                    f"of size {self.dims['input']} and {self.dims['output']})"
                ) from error
            return
        except BaseException:
            if not self.in_basis:
                state["refreshed_power"].zero_()  # an inverse may be half written: the next step makes it anew
            raise
        self._install(state, new)
        state["failures"].zero_()
        state["refreshed_estimates"].fill_(estimates)
        state["refreshes"] += 1

    def gives_up(self, state: State) -> bool:
        """Whether the last refresh failed so that there is nothing to go on with."""
        failures = int(state["failures"])
        return failures >= MAX_FAILURES or (failures > 0 and not self.ready(state))

    def _install(self, state: State, new: Refreshed) -> None:
        """Copies what was computed; all of it, for bases and what lies in them belong together."""
        try:
            self._put(state, new)
        except BaseException:  # an interrupt: from the start again
            self._put(state, new)
            raise

    def _put(self, state: State, new: Refreshed) -> None:
        for name, found in new.items():
            side, _, kind = name.partition("_")
            if not found:
                continue  # written already
            if kind == "inverse":
                self.sides[side].put_inverses_(state[name], found)
            else:
                state[name].copy_(found[0])

    def _splits(self, means: dict[str, Tensor], gamma: Tensor) -> dict[str, Tensor]:
        """Damping of each side, ``[groups]``: ``π√γ`` for the input, ``√γ/π`` for the output."""
        pi = pi_correction(means["input"], means["output"])
        return {"input": pi * gamma.sqrt(), "output": gamma.sqrt() / pi}

    def _inverses(self, state: State, gamma: Tensor, power: float) -> Refreshed:
        """Inverse roots of both sides; the larger one comes last and may go straight into the state."""
        weights, splits = self._weights_and_splits(state, gamma)
        inverses: Refreshed = {}
        for name in sorted(SIDES, key=lambda name: self.sides[name].cost()):
            key, side = f"{name}_inverse", self.sides[name]
            target = state[key] if name == max(SIDES, key=lambda n: self.sides[n].cost()) else None
            factor, split = state[f"{name}_factor"], splits[name]
            inverses[key] = side.inverses(factor, weights, split, self.inverse_dtype, target, power=power)
        return inverses

    def _weights_and_splits(self, given: State, gamma: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """By what the averages are divided, ``[groups]``, and the damping of each side."""
        weight = float(given["weight"])
        means = {name: side.diagonal(given[f"{name}_factor"]).mean(-1) / weight for name, side in self.sides.items()}
        splits = self._splits(means, gamma)
        # A side without any curvature makes the whole block zero: the direction is V / γ, and the other side's
        # factor must not shrink it (a saturated softmax has G = 0 and a gradient).
        least = negligible(self.dtype)
        curved = (means["input"] > least) & (means["output"] > least)
        return torch.full_like(gamma, weight).where(curved, torch.inf), splits

    def _bases(self, given: State) -> Refreshed:
        new: Refreshed = {}
        for name, side in self.sides.items():
            blocks = self._factor_blocks(given, name)
            if side.dense:
                values, vectors = side.eigen(blocks)
                new[f"{name}_values"], new[f"{name}_basis"] = [values], [vectors]
            else:
                new[f"{name}_values"] = blocks
        return new

    def refreshed_tensors(self, state: State) -> list[Tensor]:
        names = [f"{side}_{kind}" for side in SIDES for kind in ("inverse", "values", "basis")]
        return [state[name] for name in names if name in state]

    def refresh_cost(self) -> float:
        return sum(side.cost() for side in self.sides.values())

    def ready(self, state: State) -> bool:
        return int(state["refreshes"]) > 0

    def needs_refresh(self, state: State, power: float) -> bool:
        behind = int(state["refreshes"]) == 0 if self.in_basis else float(state["refreshed_power"]) != power
        return behind and super().ready(state)

    # -- use ----------------------------------------------------------------------------------------------------

    def gamma(self, state: State, damping: Damping) -> Tensor:
        return damping.of(state, self.dims["input"] * self.dims["output"], split=self.style != "exact")

    def precondition(self, state: State, matrix: Tensor, damping: Damping) -> Tensor:
        if self.in_basis:
            turned = divided(self._turn(state, matrix), self.denominators(state, damping), damping.power)
            return self._turn(state, turned, back=True)
        right = self.sides["input"].times_inverse(matrix, state["input_inverse"])
        return self.sides["output"].inverse_times(state["output_inverse"], right).to(self.dtype)

    def _turn(self, state: State, matrix: Tensor, *, back: bool = False) -> Tensor:
        """Into the eigenbasis in force, ``Q_Gᵀ M Q_A``, or ``back``."""
        if not any(side.blocked for side in self.sides.values()):
            form = SpectralForm(state.get("output_basis"), state.get("input_basis"), matrix)
            return form.rotate_back(matrix) if back else form.rotate(matrix)
        if self.dense_sides["input"]:
            matrix = self.sides["input"].times_basis(matrix, state["input_basis"], back=back)
        if self.dense_sides["output"]:
            matrix = self.sides["output"].times_basis(matrix.mT, state["output_basis"], back=back).mT
        return matrix

    def denominators(self, state: State, damping: Damping) -> Tensor:
        """To the power, what the gradient is divided by in the eigenbasis, ``[groups, out_dim, in_dim]``."""
        return self._damped(_outer(state["output_values"], state["input_values"]), self.gamma(state, damping))

    def _damped(self, eigenvalues: Tensor, gamma: Tensor) -> Tensor:
        return split_damped(eigenvalues, gamma) if self.style == "split" else eigenvalues + gamma

    def spectral_form(self, state: State, *, current: bool = True) -> SpectralForm:
        if current:
            found = self._bases(state)
            parts = {name: tensors[0] for name, tensors in found.items()}
        else:
            parts = state
        return self._form(parts, _outer(parts["output_values"], parts["input_values"]))

    def _form(self, parts: State, eigenvalues: Tensor) -> SpectralForm:
        """With whole bases, also of sides that keep them in blocks."""
        bases = []
        for name in ("output_basis", "input_basis"):
            basis, side = parts.get(name), self.sides[name.partition("_")[0]]
            bases.append(None if basis is None else side.whole(side.basis_blocks(basis)))
        return SpectralForm(bases[0], bases[1], eigenvalues)


def _outer(output_values: Tensor, input_values: Tensor) -> Tensor:
    return output_values.unsqueeze(-1) * input_values.unsqueeze(-2)
