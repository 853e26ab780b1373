"""Embeddings: a linear map on one-hot rows whose input factor is the diagonal of token counts."""

from __future__ import annotations

from collections import Counter
from typing import cast

import torch
from torch import Tensor, nn

from kfac_opt.layers.adapter import LayerAdapter, WeightSharing, register_layer
from kfac_opt.layers.layout import MatrixLayout


@register_layer(nn.Embedding)
class EmbeddingAdapter(LayerAdapter):
    """Table lookup; the matrix is ``[embedding, vocabulary]``, never a dense ``vocabulary × vocabulary`` factor."""

    diagonal_input = True
    module: nn.Embedding

    @staticmethod
    def make_layout(module: nn.Module, with_bias: bool) -> MatrixLayout:
        return MatrixLayout("transposed", tuple(cast(Tensor, module.weight).shape))

    @property
    def provable(self) -> bool:
        return not self.module.scale_grad_by_freq  # torch then gives another gradient than the loss's

    def tokens(self, x: Tensor) -> Tensor:
        """Token indices as ``[batch, shared]``."""
        return x.reshape(1, 1) if x.dim() == 0 else x.reshape(x.shape[0], -1)

    def counted(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """Bool ``[batch, shared]``: rows that reach the weight. The padding token has no gradient."""
        tokens = self.tokens(x)
        counted = torch.ones_like(tokens, dtype=torch.bool) if keep is None else keep
        return counted if self.module.padding_idx is None else counted & (tokens != self.module.padding_idx)

    def input_rows(self, x: Tensor) -> Tensor:
        """One-hot rows ``[1, batch, shared, vocabulary]``: for references on small vocabularies."""
        rows = torch.nn.functional.one_hot(self.tokens(x), self.module.num_embeddings)
        return (rows * self.counted(x, None).unsqueeze(-1)).unsqueeze(0).to(self.module.weight.dtype)

    def weight_gradient(self, x: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """As for any layer, without the one-hot rows."""
        rows = self.output_rows(gradient.to(dtype))[0] * self.counted(x, None).unsqueeze(-1)
        table = rows.new_zeros(self.module.num_embeddings, rows.shape[-1])
        return table.index_add_(0, self.tokens(x).flatten(), rows.flatten(0, 1)).mT.unsqueeze(0)

    def gradient_spread(self, x: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """As for any layer, without the one-hot rows."""
        return (self.output_rows(gradient.to(dtype))[0].square().sum(-1) * self.counted(x, None)).sum()

    def input_square(self, x: Tensor, keep: Tensor | None, sharing: WeightSharing, dtype: torch.dtype) -> Tensor:
        """Token counts ``[1, vocabulary]``; with ``"reduce"`` the squared token frequencies of the examples."""
        tokens, counted = self.tokens(x), self.counted(x, keep)
        size = self.module.num_embeddings
        if sharing == "expand":
            counts = torch.zeros(size, dtype=dtype, device=x.device)
            return counts.index_add_(0, tokens.flatten(), counted.flatten().to(dtype)).unsqueeze(0)
        positions = torch.full((tokens.shape[0],), tokens.shape[1], device=x.device) if keep is None else keep.sum(1)
        pairs = tokens + size * torch.arange(tokens.shape[0], device=x.device).unsqueeze(1)
        unique, index = pairs.flatten().unique(return_inverse=True)
        share = counted.to(dtype) / positions.clamp_min(1).unsqueeze(1)
        frequency = torch.zeros(unique.shape[0], dtype=dtype, device=x.device).index_add_(0, index, share.flatten())
        squares = torch.zeros(size, dtype=dtype, device=x.device)
        return squares.index_add_(0, unique % size, frequency.square()).unsqueeze(0)

    def output_rows(self, gradient: Tensor) -> Tensor:
        if gradient.dim() == 1:
            return gradient.reshape(1, 1, 1, -1)
        return gradient.reshape(1, gradient.shape[0], -1, gradient.shape[-1])

    def example_squares(self, x: Tensor, rows: Tensor) -> Tensor:
        """Sum over examples of the squared per-example gradient, ``[1, out_dim, vocabulary]``.

        Args:
            x: token indices.
            rows: output gradients ``[batch, shared, out_dim]``, in whatever basis.
        """
        tokens, size = self.tokens(x), self.module.num_embeddings
        rows = rows * self.counted(x, None).unsqueeze(-1)
        pairs = tokens + size * torch.arange(tokens.shape[0], device=x.device).unsqueeze(1)
        unique, index = pairs.flatten().unique(return_inverse=True)
        summed = rows.new_zeros(unique.shape[0], rows.shape[-1]).index_add_(0, index, rows.flatten(0, 1))
        squares = rows.new_zeros(size, rows.shape[-1]).index_add_(0, unique % size, summed.square())
        return squares.mT.unsqueeze(0)


def padding_rows(model: nn.Module) -> dict[int, int]:
    """Rows of embedding tables that are no parameters (``padding_idx``: torch never trains them), by the id of the weight.

    A weight that another module uses as well is trained there.
    """
    modules = list(model.modules())
    users = Counter(id(parameter) for module in modules for parameter in module._parameters.values())
    tables = [m for m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.padding_idx is not None]
    rows = {id(table._parameters.get("weight")): cast(int, table.padding_idx) for table in tables}
    return {weight: row for weight, row in rows.items() if users[weight] == 1}
