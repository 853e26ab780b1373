"""Convolutions as linear maps on patches (Grosse & Martens 2016)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt.layers.adapter import LayerAdapter, MomentRows, Ranges, WeightSharing, append_one, gram, register_layer
from kfac_opt.layers.displacement import PatchBlocks, patch_moment
from kfac_opt.layers.layout import MatrixLayout

CHUNK_ENTRIES = 2**22  # of patches held at a time: 16 MB in single precision
FEW_CHANNELS = 16  # below, patches are small and their moment is cheaper than the displacements'


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

    def weight_gradient(self, x: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """As the plain version, in chunks of examples."""
        total: Tensor | None = None
        for part, own in self._chunks(x, gradient):
            outputs = own.to(dtype).transpose(0, 1).reshape(self.module.groups, self.layout.shape[1], -1)
            product = outputs @ self.patch_columns(part.to(dtype)).mT
            total = product if total is None else total.add_(product)
        assert total is not None
        return total

    def gradient_spread(self, x: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """As the plain version; the squared norm of a patch is a patch of the squares summed over channels."""
        groups, dims = self.module.groups, len(self.module.kernel_size)
        inputs, outputs = (self.batched(t.to(dtype)).square().unflatten(1, (groups, -1)).sum(2) for t in (x, gradient))
        norms = self.windows(inputs).flatten(3 + dims).sum(-1)[:, :, 0]
        return ((norms + float(self.layout.has_bias)) * outputs).sum()

    def _chunks(self, x: Tensor, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Examples of which at most ``CHUNK_ENTRIES`` of patches are held at a time, with their output gradients."""
        x, gradient = self.batched(x), self.batched(gradient)
        entries = gradient[0, 0].numel() * x.shape[1] * math.prod(self.module.kernel_size)
        size = max(1, CHUNK_ENTRIES // max(entries, 1))
        return zip(x.split(size), gradient.split(size), strict=True)

    def input_moment(self, x: Tensor, keep: Tensor | None, sharing: WeightSharing, dtype: torch.dtype) -> Tensor:
        """As the plain version, without holding all patches: by displacements where that can be, else in chunks."""
        if keep is not None or sharing == "reduce":
            return super().input_moment(x, keep, sharing, dtype)
        x = self.batched(x.to(dtype))
        module = self.module
        channels = x.shape[1] // module.groups
        if self.by_displacements() and (channels >= FEW_CHANNELS or module.groups > 1):
            return self._displacement_moment(x, with_one=self.layout.has_bias)
        moment: Tensor | None = None
        entries = x[0].numel() * math.prod(module.kernel_size)
        for part in x.split(max(1, CHUNK_ENTRIES // max(entries, 1))):
            rows = self.patch_columns(part)
            moment = gram(rows) if moment is None else moment.add_(gram(rows))
        assert moment is not None
        return moment

    def input_block_moments(
        self, x: Tensor, keep: Tensor | None, sharing: WeightSharing, dtype: torch.dtype, ranges: Ranges
    ) -> list[Tensor]:
        """Blocks of whole channels: each is the moment of a convolution of those channels alone."""
        if keep is not None or sharing == "reduce" or not self.by_displacements():
            return super().input_block_moments(x, keep, sharing, dtype, ranges)
        x = self.batched(x.to(dtype)).unflatten(1, (self.module.groups, -1))
        taps, size = self.features_per_channel, self.layout.shape[2]
        found = []
        for start, end in ranges:
            channels = x[:, :, start // taps : end // taps].flatten(1, 2)
            found.append(self._displacement_moment(channels, with_one=end == size and self.layout.has_bias))
        return found

    def input_moment_rows(self, x: Tensor, keep: Tensor | None, sharing: WeightSharing, dtype: torch.dtype) -> MomentRows | None:
        channels = x.shape[-len(self.module.kernel_size) - 1] // self.module.groups
        if keep is not None or sharing == "reduce" or self.layout.has_bias or channels < FEW_CHANNELS:
            return None
        if not self.by_displacements():
            return None
        blocks = PatchBlocks(*self._as_image(self.batched(x.to(dtype))), self.module.groups)

        def write_(target: Tensor, start: int, end: int) -> None:
            blocks.write_rows_(target, start // blocks.taps, end // blocks.taps)

        return MomentRows(blocks.taps, write_)

    def _displacement_moment(self, x: Tensor, *, with_one: bool) -> Tensor:
        return patch_moment(*self._as_image(x), self.module.groups, with_one=with_one)

    def _as_image(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
        """Two-dimensional input, kernel and dilation."""
        kernel, dilation = (
            (1, part[0]) if len(part) == 1 else (part[0], part[1])
            for part in cast(list[tuple[int, ...]], [self.module.kernel_size, self.module.dilation])
        )
        return x if x.dim() == 4 else x.unsqueeze(2), kernel, dilation

    @property
    def features_per_channel(self) -> int:  # type: ignore[override]
        return math.prod(self.module.kernel_size)

    def by_displacements(self) -> bool:
        """Stride 1, zeros around the image so that the output is as large as the input, taps 1 or 3."""
        module = self.module
        reach = [step * (size // 2) for step, size in zip(module.dilation, module.kernel_size)]
        return (
            len(module.kernel_size) <= 2
            and module.padding_mode == "zeros"
            and all(stride == 1 for stride in module.stride)
            and all(size in (1, 3) for size in module.kernel_size)
            and list(module._reversed_padding_repeated_twice) == [pad for pad in reversed(reach) for _ in range(2)]
        )

    def patch_columns(self, x: Tensor) -> Tensor:
        """``[groups, features, rows]``: :meth:`input_rows` with features first and all rows in one dimension."""
        dims = len(self.module.kernel_size)
        windows = self.windows(x)
        locations, kernel = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
        by_feature = windows.permute(1, 2, *kernel, 0, *locations)
        groups, shape = by_feature.shape[0], by_feature.shape[1:]
        features, rows = math.prod(shape[: 1 + dims]), math.prod(shape[1 + dims :])
        columns = x.new_empty(groups, features + self.layout.has_bias, rows)
        target = columns[:, :features].unflatten(2, shape[1 + dims :]).unflatten(1, shape[: 1 + dims])
        target.copy_(by_feature)  # one copy along the rows of the image: 8 times as fast as F.unfold
        if self.layout.has_bias:
            columns[:, -1] = 1.0
        return columns

    def output_moment(self, gradient: Tensor, keep: Tensor | None, sharing: WeightSharing, dtype: torch.dtype) -> Tensor:
        if keep is not None or sharing == "reduce":
            return super().output_moment(gradient, keep, sharing, dtype)
        channels_first = self.batched(gradient.to(dtype)).transpose(0, 1)
        return gram(channels_first.reshape(self.module.groups, self.layout.shape[1], -1))

    def batched(self, x: Tensor) -> Tensor:
        """With a batch dimension in front, if it has none."""
        return x.unsqueeze(0) if x.dim() == len(self.module.kernel_size) + 1 else x

    def patches(self, x: Tensor) -> Tensor:
        """im2col: ``[groups, batch, locations, channels / groups · kernel]``, features in the order of the weight."""
        dims = len(self.module.kernel_size)
        locations, kernel = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
        patches = self.windows(x).permute(1, 0, *locations, 2, *kernel)
        return patches.flatten(2, 1 + dims).flatten(3)

    def windows(self, x: Tensor) -> Tensor:
        """View of the padded input, ``[batch, groups, channels / groups, *locations, *kernel]``."""
        module = self.module
        x = self.padded(x)
        for dim in range(len(module.kernel_size)):
            span = (module.kernel_size[dim] - 1) * module.dilation[dim] + 1
            x = x.unfold(2 + dim, span, module.stride[dim])[..., :: module.dilation[dim]]
        return x.unflatten(1, (module.groups, -1))

    def padded(self, x: Tensor) -> Tensor:
        """The batched input ``[batch, channels, ...]`` with the convolution's padding around it."""
        module = self.module
        x = self.batched(x)
        padding = module._reversed_padding_repeated_twice
        if not any(padding):
            return x
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return F.pad(x, padding, mode=mode)

    def output_rows(self, gradient: Tensor) -> Tensor:
        gradient = self.batched(gradient)
        groups = self.module.groups
        batch, channels = gradient.shape[:2]
        rows = gradient.reshape(batch, groups, channels // groups, -1)
        return rows.permute(1, 0, 3, 2)
