"""Linear layers: ``nn.Linear`` and the transposed ``Conv1D`` of the transformers library."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from kfac_opt.layers.adapter import LayerAdapter, WeightSharing, append_one, gram, register_layer
from kfac_opt.layers.layout import MatrixLayout


def _rows(features: Tensor) -> Tensor:
    """``[1, batch, shared, features]``: every dimension between the first and the last counts as positions."""
    if features.dim() == 1:
        return features.reshape(1, 1, 1, -1)
    return features.reshape(1, features.shape[0], math.prod(features.shape[1:-1]), features.shape[-1])


@register_layer(nn.Linear)
class LinearAdapter(LayerAdapter):
    """``y = W x + b`` on ``[batch, ..., in_features]``."""

    @staticmethod
    def make_layout(module: nn.Module, with_bias: bool) -> MatrixLayout:
        return MatrixLayout("matrix", tuple(cast(Tensor, module.weight).shape), with_bias)

    def input_rows(self, x: Tensor) -> Tensor:
        rows = _rows(x)
        return append_one(rows) if self.layout.has_bias else rows

    def input_moment(self, x: Tensor, keep: Tensor | None, sharing: WeightSharing, dtype: torch.dtype) -> Tensor:
        """As the plain version; the column of ones goes in with the one copy that puts features first."""
        if keep is not None or sharing == "reduce":
            return super().input_moment(x, keep, sharing, dtype)
        rows = x.to(dtype).reshape(-1, x.shape[-1])
        columns = rows.new_empty(self.layout.shape[2], rows.shape[0])
        columns[: rows.shape[1]].copy_(rows.mT)
        columns[rows.shape[1] :] = 1.0
        return gram(columns.unsqueeze(0))

    def output_rows(self, gradient: Tensor) -> Tensor:
        return _rows(gradient)


def _is_transposed_linear(module: nn.Module) -> bool:
    """``transformers.pytorch_utils.Conv1D``: ``y = x W + b`` with ``weight [in, nf]``."""
    weight, bias, nf = (getattr(module, name, None) for name in ("weight", "bias", "nf"))
    return (
        isinstance(weight, Tensor)
        and isinstance(bias, Tensor)
        and isinstance(nf, int)
        and weight.dim() == 2
        and weight.shape[1] == nf
        and tuple(bias.shape) == (nf,)
    )


@register_layer(matches=_is_transposed_linear)
class TransposedLinearAdapter(LinearAdapter):
    """``y = x W + b`` with the weight stored ``[in, out]``."""

    @staticmethod
    def make_layout(module: nn.Module, with_bias: bool) -> MatrixLayout:
        return MatrixLayout("transposed", tuple(cast(Tensor, module.weight).shape), with_bias)
