"""The trainable parameters of a model, module by module, and the layers that are linear maps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kfac_opt.layers import LayerAdapter, find_adapter


@dataclass(frozen=True)
class ParameterBlock:
    """The trainable parameters that one module owns: a block of the ``layer_wise`` matrix.

    Attributes:
        name: of the module, as in ``model.named_modules()``.
        parameters: their names, in the order of ``model.named_parameters()``.
        shapes: of these parameters.
        start: index of the first entry in a vector of all parameters.
        adapter: the layer as a linear map, or None.
    """

    name: str
    parameters: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    start: int
    adapter: LayerAdapter | None

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(shape.numel() for shape in self.shapes)

    @property
    def slice(self) -> slice:
        """Where the block lies in a vector of all parameters."""
        return slice(self.start, self.start + self.size)

    def to_matrix(self, vectors: Tensor) -> Tensor:
        """``[rows, size]`` as the layer's matrices ``[rows, groups, out_dim, in_dim]``."""
        assert self.adapter is not None
        layout = self.adapter.layout
        parts = self._split(vectors)
        values = [parts["weight"], parts["bias"]] if "bias" in parts else [parts["weight"]]
        if len(vectors) == 1:  # the frequent case, without the overhead of vmap
            return layout.to_matrix(*(value[0] for value in values)).unsqueeze(0)
        return torch.vmap(layout.to_matrix)(*values)

    def to_vectors(self, matrices: Tensor) -> Tensor:
        """``[rows, groups, out_dim, in_dim]`` as vectors ``[rows, size]``; inverse of :meth:`to_matrix`."""
        assert self.adapter is not None
        layout, rows = self.adapter.layout, matrices.shape[0]
        if not layout.has_bias:
            weight = torch.vmap(lambda m: layout.from_matrix(m)[0])(matrices) if rows > 1 else layout.from_matrix(matrices[0])[0]
            return weight.reshape(rows, -1)
        weight, bias = torch.vmap(layout.from_matrix)(matrices) if rows > 1 else layout.from_matrix(matrices[0])
        assert bias is not None
        parts = {"weight": weight.reshape(rows, -1), "bias": bias.reshape(rows, -1)}
        return torch.cat([parts[name.rpartition(".")[2]] for name in self.parameters], dim=1)

    def _split(self, vectors: Tensor) -> dict[str, Tensor]:
        pieces = vectors.split([shape.numel() for shape in self.shapes], dim=1)
        return {
            name.rpartition(".")[2]: piece.reshape(-1, *shape) for name, shape, piece in zip(self.parameters, self.shapes, pieces)
        }


def parameter_blocks(module: nn.Module, trainable: Mapping[str, nn.Parameter]) -> tuple[ParameterBlock, ...]:
    """One block per module that owns trainable parameters; shared ones belong to the first owner."""
    blocks: list[ParameterBlock] = []
    start = 0
    for prefix, part in module.named_modules():
        names = [name for name, _ in part.named_parameters(prefix, recurse=False) if name in trainable]
        if not names:
            continue
        shapes = tuple(trainable[name].shape for name in names)
        block = ParameterBlock(prefix, tuple(names), shapes, start, _adapter(part, names))
        blocks.append(block)
        start += block.size
    assert start == sum(math.prod(p.shape) for p in trainable.values())
    return tuple(blocks)


def _adapter(module: nn.Module, names: list[str]) -> LayerAdapter | None:
    """The module as a linear map, if its trainable parameters are a weight and perhaps a bias."""
    adapter = find_adapter(module)
    own = [name.rpartition(".")[2] for name in names]
    if adapter is None or "weight" not in own or not set(own) <= {"weight", "bias"}:
        return None
    return adapter(module, with_bias="bias" in own)
