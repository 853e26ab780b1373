"""Normalization layers: scale and shift of every channel as one ``2 × 2`` block."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_opt.layers.adapter import LayerAdapter, append_one, register_layer
from kfac_opt.layers.layout import MatrixLayout


class NormAdapter(LayerAdapter):
    """``y_c = scale_c · x̂_c + shift_c``: a layer with one group per channel, input ``(x̂, 1)``, output of size 1."""

    structure = "norm"

    @staticmethod
    def make_layout(module: nn.Module, with_bias: bool) -> MatrixLayout:
        return MatrixLayout("norm", tuple(cast(Tensor, module.weight).shape), with_bias)

    def normalized(self, x: Tensor) -> Tensor:
        """``x̂``: what the layer multiplies by its scale."""
        raise AssertionError("every norm adapter normalizes in its own way")

    def channels_last(self, x: Tensor) -> Tensor:
        """``[batch, shared, channels]``; channels at dimension 1 by default."""
        return x.reshape(x.shape[0], x.shape[1], -1).mT

    def input_rows(self, x: Tensor) -> Tensor:
        rows = self.channels_last(self.normalized(x)).permute(2, 0, 1).unsqueeze(-1)
        return append_one(rows) if self.layout.has_bias else rows

    def gradient_spread(self, x: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        r"""With the rounding of ``x̂ = (x − μ) / σ`` itself, which grows with ``|x| / σ``: all there is where ``x`` is constant.

        ``1/σ²`` is ``(1 − mean x̂²) / eps``, for the mean of ``x̂²`` is the variance over the variance plus ``eps``.
        """
        rows, outputs = self.input_rows(x.to(dtype)), self.output_rows(gradient.to(dtype))
        eps = max(getattr(self.module, "eps", None) or 0.0, torch.finfo(dtype).eps)
        precision = (1.0 - rows[..., 0].square().mean()).clamp_min(0.0) / eps
        squares = rows.square().sum(-1) + precision * self.output_rows(x.to(dtype)).square().squeeze(-1)
        return (outputs.square().squeeze(-1) * squares).sum()

    def example_sums(self, x: Tensor, gradient: Tensor, keep: Tensor | None) -> Tensor:
        """Per-example gradients ``(Σ_t g x̂, Σ_t g)`` of scale and shift: ``[channels, batch, 1 or 2]``."""
        normalized = self.normalized(x)
        if keep is not None:
            gradient = gradient * self.kept(keep, gradient)
        sums = [self.position_sum(normalized * gradient)]
        if self.layout.has_bias:
            sums.append(self.position_sum(gradient))
        return torch.stack(sums, dim=-1).transpose(0, 1)

    def position_sum(self, values: Tensor) -> Tensor:
        """Sum over the positions of each example, ``[batch, channels]``."""
        return values.flatten(2).sum(-1) if values.dim() > 2 else values

    def kept(self, keep: Tensor, gradient: Tensor) -> Tensor:
        """``keep [batch, shared]`` in a shape that multiplies ``gradient``."""
        return keep.reshape(gradient.shape[0], 1, *gradient.shape[2:]).to(gradient.dtype)

    def output_rows(self, gradient: Tensor) -> Tensor:
        return self.channels_last(gradient).permute(2, 0, 1).unsqueeze(-1)


@register_layer(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
class BatchNormAdapter(NormAdapter):
    """Batch statistics in training mode, running statistics in evaluation mode, as the layer itself."""

    module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

    @property
    def provable(self) -> bool:
        return not isinstance(self.module, nn.SyncBatchNorm)  # whose statistics are those of all ranks

    def normalized(self, x: Tensor) -> Tensor:
        module = self.module
        batch_statistics = module.training or module.running_mean is None
        if batch_statistics:
            return F.batch_norm(x, None, None, training=True, eps=module.eps)
        mean, var = (cast(Tensor, part).to(x.dtype) for part in (module.running_mean, module.running_var))
        return F.batch_norm(x, mean, var, training=False, eps=module.eps)


@register_layer(nn.GroupNorm)
class GroupNormAdapter(NormAdapter):
    module: nn.GroupNorm

    def normalized(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.module.num_groups, eps=self.module.eps)


@register_layer(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
class InstanceNormAdapter(NormAdapter):
    """Takes one example without a batch dimension as well, as the layer does."""

    module: nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d

    def batched(self, x: Tensor) -> Tensor:
        """``[batch, channels, ...]``."""
        single = {nn.InstanceNorm1d: 2, nn.InstanceNorm2d: 3, nn.InstanceNorm3d: 4}
        dims = next(dims for kind, dims in single.items() if isinstance(self.module, kind))
        return x.unsqueeze(0) if x.dim() == dims else x

    def input_rows(self, x: Tensor) -> Tensor:
        return super().input_rows(self.batched(x))

    def output_rows(self, gradient: Tensor) -> Tensor:
        return super().output_rows(self.batched(gradient))

    def example_sums(self, x: Tensor, gradient: Tensor, keep: Tensor | None) -> Tensor:
        return super().example_sums(self.batched(x), self.batched(gradient), keep)

    def normalized(self, x: Tensor) -> Tensor:
        module = self.module
        if module.training or module.running_mean is None:
            return F.instance_norm(x, eps=module.eps)
        mean, var = (cast(Tensor, part).to(x.dtype) for part in (module.running_mean, module.running_var))
        return F.instance_norm(x, mean, var, use_input_stats=False, eps=module.eps)


class _LastDimensionsNorm(NormAdapter):
    """Channels are the last dimensions, those of the weight."""

    def position_sum(self, values: Tensor) -> Tensor:
        return self.channels_last(values).sum(1)

    def kept(self, keep: Tensor, gradient: Tensor) -> Tensor:
        lead = gradient.dim() - len(self.layout.weight_shape)
        return keep.reshape(gradient.shape[:lead] + (1,) * len(self.layout.weight_shape)).to(gradient.dtype)

    def channels_last(self, x: Tensor) -> Tensor:
        channels = self.layout.shape[0]
        lead = x.shape[: x.dim() - len(self.layout.weight_shape)]
        return x.reshape(lead[0] if lead else 1, -1, channels)


@register_layer(nn.LayerNorm)
class LayerNormAdapter(_LastDimensionsNorm):
    module: nn.LayerNorm

    def normalized(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.module.normalized_shape, eps=self.module.eps)


@register_layer(nn.RMSNorm)
class RMSNormAdapter(_LastDimensionsNorm):
    module: nn.RMSNorm

    def normalized(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, list(self.module.normalized_shape), eps=self.module.eps)
