"""Convolutions as linear maps on patches (Grosse & Martens 2016)."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt.layers.adapter import LayerAdapter, append_one, register_layer
from kfac_opt.layers.layout import MatrixLayout


@register_layer(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvAdapter(LayerAdapter):
    """Convolution of any dimension, stride, padding (``'same'`` and the modes included), dilation and groups."""

    module: nn.Conv1d | nn.Conv2d | nn.Conv3d

    @staticmethod
    def make_layout(module: nn.Module, with_bias: bool) -> MatrixLayout:
        return MatrixLayout("matrix", tuple(cast(Tensor, module.weight).shape), with_bias, cast(int, module.groups))

    def input_rows(self, x: Tensor) -> Tensor:
        rows = self.patches(x)
        return append_one(rows) if self.layout.has_bias else rows

    def patches(self, x: Tensor) -> Tensor:
        """im2col: ``[groups, batch, locations, channels / groups · kernel]``, features in the order of the weight."""
        module = self.module
        dims = len(module.kernel_size)
        x = self.padded(x)
        for dim in range(dims):
            span = (module.kernel_size[dim] - 1) * module.dilation[dim] + 1
            x = x.unfold(2 + dim, span, module.stride[dim])[..., :: module.dilation[dim]]
        batch, channels = x.shape[:2]
        x = x.reshape(batch, module.groups, channels // module.groups, *x.shape[2:])
        locations, kernel = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
        x = x.permute(1, 0, *locations, 2, *kernel)
        return x.flatten(2, 1 + dims).flatten(3)

    def padded(self, x: Tensor) -> Tensor:
        """The batched input ``[batch, channels, ...]`` with the convolution's padding around it."""
        module = self.module
        if x.dim() == len(module.kernel_size) + 1:
            x = x.unsqueeze(0)
        padding = module._reversed_padding_repeated_twice
        if not any(padding):
            return x
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return F.pad(x, padding, mode=mode)

    def output_rows(self, gradient: Tensor) -> Tensor:
        if gradient.dim() == len(self.module.kernel_size) + 1:
            gradient = gradient.unsqueeze(0)
        groups = self.module.groups
        batch, channels = gradient.shape[:2]
        rows = gradient.reshape(batch, groups, channels // groups, -1)
        return rows.permute(1, 0, 3, 2)
