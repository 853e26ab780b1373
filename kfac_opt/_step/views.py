"""``optimizer.curvature``: what the optimizer knows about each layer, to read and to apply."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from kfac_opt._curvature.block import CurvatureBlock, Damping, State
from kfac_opt._curvature.diagonal import DiagonalBlock
from kfac_opt._curvature.kronecker import KroneckerBlock
from kfac_opt._curvature.precision import full_precision
from kfac_opt._curvature.spectral import SpectralForm


class CurvatureView:
    """One block as it stands now: bias corrected, detached, on the block's device.

    Every property raises RuntimeError before the first estimate.
    """

    def __init__(
        self,
        name: str,
        block: CurvatureBlock,
        state: Callable[[], State | None],
        damping: Callable[[], Damping],
    ) -> None:
        self.name, self.block, self._get_state, self._get_damping = name, block, state, damping

    def _state(self) -> State:
        state = self._get_state()
        if state is None or float(state["weight"]) == 0.0:
            raise RuntimeError(
                f"curvature['{self.name}'] has no estimate yet. Run a forward pass in training mode, backward and "
                "optimizer.step() first."
            )
        return state

    def _factor(self, side: str) -> Tensor:
        if not isinstance(self.block, KroneckerBlock):
            raise AttributeError(f"curvature['{self.name}'] has no {side}_factor: it is not a Kronecker block. Read to_dense().")
        factor = self.block.factor(self._state(), side)
        return factor.squeeze(0) if self.block.groups == 1 else factor

    @property
    def input_factor(self) -> Tensor:
        """``A [in_dim, in_dim]`` (bias last), a vector for a diagonal side; groups lead when there are several."""
        return self._factor("input")

    @property
    def output_factor(self) -> Tensor:
        """``G [out_dim, out_dim]``, a vector for a diagonal side; groups lead when there are several."""
        return self._factor("output")

    @property
    def diagonal(self) -> Tensor:
        """Diagonal of the block: the parameter's shape for a diagonal block, else ``[out_dim, in_dim]``."""
        state = self._state()
        if isinstance(self.block, DiagonalBlock):
            return self.block.diagonal(state)
        dense = self.block.to_dense(state).diagonal()
        out_dim, in_dim = self.block.layout.whole_shape
        return dense.reshape(in_dim, out_dim).mT.contiguous()

    @property
    def damping(self) -> float:
        """γ in force for this block."""
        return float(self.block.gamma(self._state(), self._get_damping()))

    def to_dense(self) -> Tensor:
        """The whole Fisher block ``[out·in, out·in]``, column-stacking vec of the ``[out_dim, in_dim]`` matrix."""
        state = self._state()
        with full_precision(state["scale"].device):
            return self.block.to_dense(state)

    def spectral_form(self) -> SpectralForm:
        """Eigenbases and eigenvalues of the block."""
        return self.block.spectral_form(self._state())

    @torch.no_grad()
    def precondition(self, matrix: Tensor) -> Tensor:
        """The damped block to the power ``-power`` in force, applied to a gradient matrix ``[out_dim, in_dim]``.

        Raises:
            ValueError: for another shape.
        """
        state = self._state()
        if not self.block.ready(state):
            raise RuntimeError(f"curvature['{self.name}'] has not been refreshed yet: run optimizer.step() once more.")
        shape = self.block.layout.whole_shape
        if isinstance(self.block, DiagonalBlock) and matrix.shape == self.block.layout.weight_shape:
            shape = tuple(matrix.shape)  # type: ignore[assignment]
        if tuple(matrix.shape) != shape:
            raise ValueError(
                f"curvature['{self.name}'].precondition: got a matrix of shape {list(matrix.shape)}, expected "
                f"[out_dim, in_dim] = {list(shape)} (bias as the last column)."
            )
        grouped = matrix.to(self.block.dtype).reshape(self.block.layout.shape)
        with full_precision(matrix.device):
            return self.block.precondition(state, grouped, self._get_damping()).reshape(matrix.shape)

    def __repr__(self) -> str:
        return f"CurvatureView({self.name!r}, {type(self.block).__name__}, {list(self.block.layout.whole_shape)})"


class CurvatureMapping(Mapping[str, CurvatureView]):
    """Views by layer or parameter name, in the order of ``named_parameters``."""

    def __init__(self, views: dict[str, CurvatureView]) -> None:
        self._views = views

    def __getitem__(self, name: str) -> CurvatureView:
        if name not in self._views:
            raise KeyError(f"no curvature is tracked under {name!r}; known names: {list(self._views)}")
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __repr__(self) -> str:
        return f"CurvatureMapping({list(self._views.values())})"
