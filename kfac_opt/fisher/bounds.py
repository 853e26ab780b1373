r"""Bound of a layer's Jacobian by the weights above it, for chains of layers (Soen & Sun 2021).

:math:`\|\partial h_L / \partial W_l\|_{2\sigma} \le \prod_{i > l} s_{\max}(W_i^-)\, \|\bar h_l\|` for activations of
slope at most one: ``W⁻`` without the bias column, of a convolution the norm of the linear map (not of the reshaped
kernel), :math:`\bar h_l` the layer's input with its 1; for several positions the largest singular value of the input
rows.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt._capture.calls import recorded
from kfac_opt.fisher.krylov import TopEigenpairs
from kfac_opt.fisher.lanczos import drive
from kfac_opt.fisher.source import FisherSource

CONTRACTIONS = (
    nn.ReLU, nn.ReLU6, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Hardtanh, nn.Hardsigmoid,
    nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout,
)  # fmt: skip
CONVOLUTIONS: dict[type[nn.Module], Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def spectral_bounds(source: FisherSource) -> dict[str, float]:
    """The bound of every layer, the largest over the inputs; empty when the model is no such chain."""
    chain = _chain(source.model.module)
    if chain is None or any(block.adapter is None for block in source.blocks):
        return {}
    layers = {name: part for name, part in chain if isinstance(part, (nn.Linear, *CONVOLUTIONS))}
    names = list(layers)
    trainable = {block.name: block for block in source.blocks}
    largest = dict.fromkeys(trainable, 0.0)
    gains: dict[str, float] = {}
    for chunk, _ in source.chunks():
        with torch.no_grad(), recorded(layers, lambda _, x, out: x.detach()) as calls:
            source.model.forward(chunk)
        inputs = {name: calls[name][0] for name in names}
        if not gains:
            gains = {name: _gain(source, name, inputs[name]) for name in names}
        for name, block in trainable.items():
            above = 1.0
            for later in names[names.index(name) + 1 :]:
                above *= gains[later]
            assert block.adapter is not None
            rows = block.adapter.input_rows(inputs[name]).to(source.model.row_dtype)
            norms = torch.linalg.matrix_norm(rows, ord=2)  # [groups, examples]
            largest[name] = max(largest[name], above * float(norms.max()))
    return largest


def _chain(model: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """The parts of nested Sequentials in order, if every one of them is a layer or a contraction."""
    if not isinstance(model, nn.Sequential):
        return [("", model)] if _allowed(model) else None
    if len(list(model.children())) != len(model):
        return None  # a layer that runs twice
    parts: list[tuple[str, nn.Module]] = []
    for name, part in model.named_children():
        inner = _chain(part)
        if inner is None:
            return None
        parts += [(f"{name}.{deeper}" if deeper else name, found) for deeper, found in inner]
    return parts


def _allowed(part: nn.Module) -> bool:
    if type(part) in (nn.Linear, *CONVOLUTIONS, *CONTRACTIONS):
        return getattr(part, "padding_mode", "zeros") == "zeros"
    if isinstance(part, (nn.LeakyReLU, nn.ELU)):
        return abs(part.negative_slope if isinstance(part, nn.LeakyReLU) else part.alpha) <= 1.0
    if isinstance(part, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)):
        kernel, stride = part.kernel_size, part.stride if part.stride is not None else part.kernel_size
        kernels = kernel if isinstance(kernel, tuple) else (kernel,)
        strides = stride if isinstance(stride, tuple) else (stride,)
        return all(step >= size for step, size in zip(strides, kernels))  # windows that do not overlap
    return False


def _gain(source: FisherSource, name: str, inputs: Tensor) -> float:
    """``s_max`` of the layer's linear map without its bias."""
    prefix = f"{name}." if name else ""
    weight = source.model.parameters[f"{prefix}weight"].detach().to(source.model.row_dtype)
    layer = source.model.module.get_submodule(name)
    if isinstance(layer, nn.Linear):
        return float(torch.linalg.matrix_norm(weight, ord=2))
    return _Convolution(layer, weight, inputs[0:1]).norm()


class _Convolution:
    """``Cᵀ C`` of a convolution ``C`` on inputs of one size, as an operator for :func:`drive`."""

    def __init__(self, layer: nn.Module, weight: Tensor, like: Tensor) -> None:
        self.layer, self.weight, self.like = layer, weight, like
        self.shape = (like.numel(), like.numel())

    def _apply(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        function: Any = CONVOLUTIONS[type(self.layer)]
        return cast(Tensor, function(x, self.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups))

    def __matmul__(self, vectors: Tensor) -> Tensor:
        x = vectors.mT.reshape(-1, *self.like.shape[1:]).requires_grad_()
        with torch.enable_grad():
            y = self._apply(x)
            (back,) = torch.autograd.grad(y, x, y.detach())
        return back.reshape(vectors.shape[1], -1).mT

    def norm(self) -> float:
        size = self.shape[0]
        start = torch.randn(size, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(self.weight)
        search = TopEigenpairs(start, 1, tolerance=1e-5, max_columns=min(size, 40))
        drive({"": search}, {"": slice(0, size)}, self)
        # The residual bounds how far the nearest eigenvalue may lie above the Ritz value.
        return float(search.values[0] * (1.0 + search.tolerance)) ** 0.5
