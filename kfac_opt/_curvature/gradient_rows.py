r"""The gradient of a layer as the product it came from, ``V = Σ_n g_n a_nᵀ``, where that has few rows.

A batch of ``R`` rows gives a layer of ``out × in`` weights a gradient of rank ``R``. For ``R`` below the layer's sizes the two
products with the inverses cost less before the outer product than after it:
:math:`G^{-1} V A^{-1} = \sum_n (G^{-1} g_n)(A^{-1} a_n)^\top`, ``R (out² + in² + out·in)`` instead of
``out·in (out + in)`` multiplications.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, nn

from kfac_opt._kernels.products import times_transposed
from kfac_opt.layers import LayerAdapter

MIN_MULTIPLICATIONS = 2**26  # of two products of the matrix: below, comparing costs what the rows save
ROUNDING = 8.0  # multiples of eps by which the gradient may differ from the product of its rows


@dataclass
class _Call:
    """Input of one forward, and the gradient of its output once the backward has passed."""

    x: Tensor
    gradient: Tensor | None = None


@dataclass
class _Layer:
    """One layer that is watched.

    Attributes:
        limit: most rows that are worth it; beyond them nothing is kept until the next :meth:`GradientRows.clear`.
    """

    limit: int
    calls: list[_Call] = field(default_factory=list)
    num_rows: int = 0


class GradientRows:
    """Hooks on layers that keep inputs and output gradients of the user's passes until the step."""

    def __init__(self) -> None:
        self._layers: dict[str, _Layer] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self, layers: Mapping[str, tuple[nn.Module, int]]) -> None:
        """Watches ``{name: (module, limit)}`` and nothing else."""
        self.detach()
        for name, (module, limit) in layers.items():
            self._layers[name] = layer = _Layer(limit)
            self._handles.append(module.register_forward_hook(_Recorder(layer)))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._layers = [], {}

    def clear(self) -> None:
        """Forgets the passes seen so far."""
        for layer in self._layers.values():
            layer.calls, layer.num_rows = [], 0

    def take(self, name: str, adapter: LayerAdapter, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Rows ``[R, in]`` (with the column of the bias) and ``[R, out]`` of the passes since the last step.

        None where there are none, or too many, or a pass in another dtype, on a device or without a backward.
        """
        layer = self._layers.get(name)
        if layer is None or not layer.calls or layer.num_rows > layer.limit:
            return None
        pairs = [(call.x, call.gradient) for call in layer.calls if call.gradient is not None]
        if not pairs or any(t.dtype != dtype or t.device.type != "cpu" for pair in pairs for t in pair if t is not None):
            return None
        inputs = torch.cat([adapter.input_rows(x).flatten(0, 2) for x, _ in pairs])
        outputs = torch.cat([adapter.output_rows(g).flatten(0, 2) for _, g in pairs if g is not None])
        return inputs, outputs


class _Recorder:
    """The forward hook of one layer; traced away by a compiler, whose passes are then not seen."""

    def __init__(self, layer: _Layer) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, arguments: tuple[object, ...], output: object) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        x = arguments[0] if arguments else None
        if not isinstance(x, Tensor) or not isinstance(output, Tensor) or not output.requires_grad:
            return
        layer = self.layer
        layer.num_rows += x[..., 0].numel()
        if layer.num_rows > layer.limit:
            layer.calls = []
            return
        call = _Call(x.detach())
        layer.calls.append(call)

        def keep(gradient: Tensor) -> None:
            call.gradient = gradient.detach()

        output.register_hook(keep)


def rows_that_pay(out_cost: int, in_cost: int, out_dim: int, in_dim: int) -> int:
    """0 for small layers, else most rows for which the products of rows cost at most 0.7 of two products of the matrix.

    Args:
        out_cost, in_cost: multiplications of one row with the inverse of each side.
    """
    if out_dim * in_cost + in_dim * out_cost < MIN_MULTIPLICATIONS:
        return 0
    return int(0.7 * (out_dim * in_cost + in_dim * out_cost) / (out_cost + in_cost + out_dim * in_dim))


def match_rows(matrix: Tensor, inputs: Tensor, outputs: Tensor) -> float | None:
    """``s`` with ``matrix = s · outputsᵀ inputs``, None if there is none.

    A gradient that was accumulated over other passes, averaged over processes, masked or clipped by entries is no multiple of
    the product; one that was scaled (a loss scaler, clipping by the norm, ``maximize``) is. Both sides are multiplied by one
    vector and compared row by row against the rounding of the sums: a change of a single entry by more than
    about 1e-4 of the length of its row is noticed.

    Args:
        matrix: ``[out, in]``.
        inputs, outputs: ``[R, in]``, ``[R, out]``.
    """
    probe = _probe(matrix.shape[1], matrix.dtype)
    found, along = matrix @ probe, inputs @ probe
    expected = outputs.mT @ along
    size = float(expected @ expected)
    if not 0.0 < size < float("inf"):
        return None
    scale = float(found @ expected) / size
    if not math.isfinite(scale):
        return None
    largest = outputs.abs().mT @ (inputs.abs() @ probe.abs())
    allowed = ROUNDING * torch.finfo(matrix.dtype).eps * abs(scale) * largest
    return scale if bool(((found - scale * expected).abs() <= allowed).all()) else None


@lru_cache(maxsize=64)
def _probe(size: int, dtype: torch.dtype) -> Tensor:
    """Fixed numbers between 1/2 and 3/2 of random sign: no two of them cancel by construction."""
    source = torch.Generator().manual_seed(size)
    signs = torch.randint(2, (size,), generator=source).mul_(2).sub_(1)
    return (torch.rand(size, generator=source, dtype=torch.float64).add_(0.5) * signs).to(dtype)


def outer(left: Tensor, right: Tensor) -> Tensor:
    """``Σ_n left_n right_nᵀ`` of rows ``[R, m]`` and ``[R, n]``: ``[m, n]``."""
    return times_transposed(left.mT.contiguous(), right.mT)
