"""How the parameters of one block become matrices ``[groups, out_dim, in_dim]`` and back."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["matrix", "transposed", "norm", "flat"]


@dataclass(frozen=True)
class MatrixLayout:
    """Shape of a block's weight matrix and the way its weight and bias are laid into it.

    ==============  ==================================  ===========================================
    kind            weight                              matrix
    ==============  ==================================  ===========================================
    ``matrix``      ``[out, in, ...]``, with groups     ``[groups, out / groups, in·... (+ 1)]``
    ``transposed``  ``[in, out / groups, ...]``         ``[groups, out / groups, in / groups·... (+ 1)]``
    ``norm``        ``[channels, ...]``                 ``[channels, 1, 1 or 2]`` (scale, shift)
    ``flat``        any                                 ``[1, 1, numel]``
    ==============  ==================================  ===========================================

    The bias is the last column.
    """

    kind: Kind
    weight_shape: tuple[int, ...]
    has_bias: bool = False
    groups: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"MatrixLayout: kind must be one of {list(get_args(Kind))}, got {self.kind!r}")

    @property
    def numel(self) -> int:
        """Number of parameters of the block, bias included."""
        return math.prod(self.shape)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """``(groups, out_dim, in_dim)``."""
        size = math.prod(self.weight_shape)
        if self.kind == "matrix":
            out_dim = self.weight_shape[0]
            return self.groups, out_dim // self.groups, size // out_dim + self.has_bias
        if self.kind == "transposed":
            return self.groups, self.weight_shape[1], size // (self.weight_shape[1] * self.groups) + self.has_bias
        if self.kind == "norm":
            return size, 1, 1 + self.has_bias
        return 1, 1, size

    @property
    def whole_shape(self) -> tuple[int, int]:
        """``(out_dim, in_dim)`` of the layer's matrix with the groups stacked over each other."""
        groups, out_dim, in_dim = self.shape
        return groups * out_dim, in_dim

    def to_matrix(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[groups, out_dim, in_dim]`` from a weight and bias (or their gradients)."""
        if self.kind == "norm":
            columns = weight.reshape(-1, 1, 1)
            return columns if bias is None else torch.cat([columns, bias.reshape(-1, 1, 1)], dim=-1)
        if self.kind == "flat":
            return weight.reshape(1, 1, -1)
        if self.kind == "transposed":
            out_dim = self.groups * self.weight_shape[1]
            matrix = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).reshape(out_dim, -1)
        else:
            matrix = weight.reshape(weight.shape[0], -1)
        if bias is not None:
            matrix = torch.cat([matrix, bias.unsqueeze(-1)], dim=-1)
        return matrix.reshape(self.shape)

    def from_matrix(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight and bias laid into ``matrix``, shape ``[groups, out_dim, in_dim]`` or ``[out_dim, in_dim]``."""
        groups, out_dim, in_dim = self.shape
        matrix = matrix.reshape(groups * out_dim, in_dim)
        bias = matrix[:, -1] if self.has_bias else None
        weight = matrix[:, :-1] if self.has_bias else matrix
        if self.kind == "transposed":
            taps = self.weight_shape[2:]
            by_output = weight.reshape(groups, out_dim, self.weight_shape[0] // groups, *taps)
            return by_output.transpose(1, 2).flatten(0, 1), bias
        if self.kind == "norm" and bias is not None:
            bias = bias.reshape(self.weight_shape)
        return weight.reshape(self.weight_shape), bias

    def describe(self) -> dict[str, object]:
        """Plain values; ``MatrixLayout(**described)`` builds it again."""
        return asdict(self)
