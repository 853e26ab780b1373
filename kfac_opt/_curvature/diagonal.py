"""Blocks that need no factorisation: the Gauss-Newton-Bartlett diagonal and the 2×2 blocks of norm layers."""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_opt._curvature.block import Call, CurvatureBlock, Damping, State, Statistics, average_into, average_weight, track_scale
from kfac_opt._curvature.grouping import join_calls
from kfac_opt._curvature.spectral import SpectralForm, damped_two_by_two_solve, divided, two_by_two
from kfac_opt.layers.norm import NormAdapter


class DiagonalBlock(CurvatureBlock):
    r"""Diagonal of the Fisher matrix of any one parameter, shape of the parameter.

    With sampled labels the per-example scores are independent with mean zero, so the elementwise square of the
    gradient of the sampled *sum* loss, divided by N, is unbiased for the diagonal (Gauss-Newton-Bartlett, Liu et
    al. 2023, arXiv:2305.14342, Algorithm 2). No per-example gradient is needed.
    """

    needs_input = False

    def add_output(self, statistics: Statistics, calls: list[Call], gradients: list[Tensor], state: State | None) -> None:
        statistics.add("square", gradients[0].detach().to(self.dtype).square())

    def sum_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"square": self.layout.weight_shape}

    def init_state(self, device: torch.device) -> State:
        state = super().init_state(device)
        state["diagonal"] = torch.zeros(self.layout.weight_shape, dtype=self.dtype, device=device)
        return state

    def update(self, state: State, statistics: Statistics, num_terms: int, decay: float) -> None:
        if "square" not in statistics.sums:
            return
        average_into(state["diagonal"], statistics.sums["square"], decay, num_terms)
        average_weight(state, decay)
        track_scale(state, self.diagonal(state).mean() * self.layout.numel**0.5)

    def diagonal(self, state: State) -> Tensor:
        """The averaged diagonal, in the shape of the parameter."""
        return state["diagonal"] / float(state["weight"])

    def precondition(self, state: State, matrix: Tensor, damping: Damping) -> Tensor:
        return divided(matrix, self.diagonal(state).reshape(matrix.shape) + self.gamma(state, damping), damping.power)

    def spectral_form(self, state: State, *, current: bool = True) -> SpectralForm:
        return SpectralForm(None, None, self.diagonal(state).reshape(self.layout.shape))


class NormBlock(CurvatureBlock):
    """Scale and shift of a norm layer: per channel the ``2 × 2`` moment of the per-example sums ``(Σ g x̂, Σ g)``."""

    per_example = True

    def add_output(self, statistics: Statistics, calls: list[Call], gradients: list[Tensor], state: State | None) -> None:
        assert isinstance(self.adapter, NormAdapter)
        sums = [
            self._example_sums(self.adapter, call, gradient).unflatten(1, (-1, call.flat_batch)).sum(2)
            for call, gradient in zip(calls, gradients)
        ]
        total = join_calls([part.unsqueeze(2) for part in sums], examples=1, positions=2).sum(2)  # of each example
        statistics.add("moment", total.mT @ total)

    def _example_sums(self, adapter: NormAdapter, call: Call, gradient: Tensor) -> Tensor:
        return adapter.example_sums(call.x.to(self.dtype), gradient.to(self.dtype), None)  # rows that do not count are zero

    def sum_shapes(self) -> dict[str, tuple[int, ...]]:
        channels, _, columns = self.layout.shape
        return {"moment": (channels, columns, columns)}

    def init_state(self, device: torch.device) -> State:
        state = super().init_state(device)
        state["moment"] = torch.zeros(self.sum_shapes()["moment"], dtype=self.dtype, device=device)
        return state

    def update(self, state: State, statistics: Statistics, num_terms: int, decay: float) -> None:
        if "moment" not in statistics.sums:
            return
        average_into(state["moment"], statistics.sums["moment"], decay, num_terms)
        average_weight(state, decay)
        track_scale(state, self.moment(state).diagonal(dim1=-2, dim2=-1).mean() * self.layout.numel**0.5)

    def moment(self, state: State) -> Tensor:
        """The averaged blocks ``[channels, columns, columns]``."""
        return state["moment"] / float(state["weight"])

    def precondition(self, state: State, matrix: Tensor, damping: Damping) -> Tensor:
        block, gamma = self.moment(state), self.gamma(state, damping)
        if block.shape[-1] == 1:
            return divided(matrix, block + gamma, damping.power)
        if damping.power != 1.0:
            return self.spectral_form(state).solve(matrix, gamma, damping.power)
        return damped_two_by_two_solve(block, gamma, matrix.squeeze(1)).unsqueeze(1)

    def spectral_form(self, state: State, *, current: bool = True) -> SpectralForm:
        block = self.moment(state)
        if block.shape[-1] == 1:
            return SpectralForm(None, None, block)
        values, basis = two_by_two(block)
        return SpectralForm(None, basis, values.unsqueeze(1))
