"""Transposed convolutions: ordinary convolutions, with stride 1, of an input that has zeros between its places.

Output place ``p`` sums ``W[i, o, k] · x̃[i, p + padding − dilation · k]``, ``x̃`` the input with ``stride − 1`` zeros after each
place: rows are patches of ``x̃`` (Grosse & Martens 2016, arXiv:1602.01407), and the bias is a column as everywhere.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt.layers.adapter import register_layer
from kfac_opt.layers.conv import ConvAdapter
from kfac_opt.layers.layout import MatrixLayout


@register_layer(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class TransposedConvAdapter(ConvAdapter):
    """Transposed convolution of any dimension, stride, padding, output padding, dilation and groups."""

    @staticmethod
    def make_layout(module: nn.Module, with_bias: bool) -> MatrixLayout:
        return MatrixLayout("transposed", tuple(cast(Tensor, module.weight).shape), with_bias, cast(int, module.groups))

    def by_displacements(self) -> bool:
        return False

    def windows(self, x: Tensor) -> Tensor:
        """View of the spread input, ``[batch, groups, channels / groups, *locations, *kernel]``, taps as in the weight."""
        module, dims = self.module, len(self.module.kernel_size)
        x = self.padded(x)
        for dim in range(dims):
            span = (module.kernel_size[dim] - 1) * module.dilation[dim] + 1
            x = x.unfold(2 + dim, span, 1)[..., :: module.dilation[dim]]
        return x.flip(list(range(-dims, 0))).unflatten(1, (module.groups, -1))

    def padded(self, x: Tensor) -> Tensor:
        """The batched input with zeros between its places and around it."""
        module, dims = self.module, len(self.module.kernel_size)
        x = self.batched(x)
        spread = x.new_zeros(*x.shape[:2], *((size - 1) * step + 1 for size, step in zip(x.shape[2:], module.stride)))
        places = [slice(None), slice(None), *(slice(None, None, step) for step in module.stride)]
        spread[tuple(places)] = x
        borders: list[int] = []
        for dim in reversed(range(dims)):
            reach = module.dilation[dim] * (module.kernel_size[dim] - 1) - cast(tuple[int, ...], module.padding)[dim]
            borders += [reach, reach + module.output_padding[dim]]
        return F.pad(spread, borders)
