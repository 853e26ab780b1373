"""One module seen as a linear map on rows ``[groups, batch, shared, features]``, and the register of such views.

A new layer type is one subclass of :class:`LayerAdapter` with ``@register_layer(ModuleType)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from kfac_opt._kernels.products import outer_gram
from kfac_opt.layers.layout import MatrixLayout

WeightSharing = Literal["expand", "reduce"]
Ranges = Sequence[tuple[int, int]]  # first and last (exclusive) of neighbouring features


@dataclass(frozen=True)
class MomentRows:
    """A symmetric matrix that is written slice by slice.

    Attributes:
        unit: slices start and end at multiples of this.
        write_: ``write_(target [groups, end - start, columns], start, end)``: the first columns of these rows;
            ``columns`` is a multiple of ``unit``.
    """

    unit: int
    write_: Callable[[Tensor, int, int], None]


class LayerAdapter(ABC):
    """Inputs, output gradients and weight matrix of one module.

    Args:
        module: the layer.
        with_bias: whether the bias is a column of the weight matrix (it is trainable and optimized together
            with the weight).

    ``batch`` counts examples, ``shared`` the positions that share the weight (time steps, image locations).
    """

    structure: ClassVar[Literal["kronecker", "norm"]] = "kronecker"
    diagonal_input: ClassVar[bool] = False
    features_per_channel: int = 1  # that stay together where a factor is cut into diagonal blocks

    def __init__(self, module: nn.Module, with_bias: bool) -> None:
        self.module = module
        self.layout = self.make_layout(module, with_bias)

    @property
    def provable(self) -> bool:
        """Whether autograd's gradient of the weight is to be :meth:`weight_gradient` of what this process alone sees."""
        return True

    @staticmethod
    @abstractmethod
    def make_layout(module: nn.Module, with_bias: bool) -> MatrixLayout:
        """How this module's weight and bias form a matrix."""

    @abstractmethod
    def input_rows(self, x: Tensor) -> Tensor:
        """``[groups, batch, shared, in_dim]`` from the module's input; the last feature is 1 with a bias column."""

    @abstractmethod
    def output_rows(self, gradient: Tensor) -> Tensor:
        """``[groups, batch, shared, out_dim]`` from a gradient in the module's output."""

    def weight_gradient(self, x: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        r"""Sum over rows of :math:`g a^\top`, ``[groups, out_dim, in_dim]``: the gradient of the weight matrix."""
        inputs, outputs = self.input_rows(x.to(dtype)), self.output_rows(gradient.to(dtype))
        if inputs.shape[:3] != outputs.shape[:3]:
            raise ValueError(f"rows of inputs and outputs do not pair up: {list(inputs.shape)}, {list(outputs.shape)}")
        return outputs.flatten(1, 2).mT @ inputs.flatten(1, 2)

    def gradient_spread(self, x: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        r"""Sum over rows of :math:`|g|^2 |a|^2`, 0-dim: what rounding in :meth:`weight_gradient` grows with."""
        inputs, outputs = self.input_rows(x.to(dtype)), self.output_rows(gradient.to(dtype))
        return (outputs.square().sum(-1) * inputs.square().sum(-1)).sum()

    def input_moment(self, x: Tensor, keep: Tensor | None, sharing: WeightSharing, dtype: torch.dtype) -> Tensor:
        r"""Sum over rows of :math:`a a^\top`, ``[groups, in_dim, in_dim]``.

        Args:
            keep: bool ``[batch, shared]`` or ``[groups, batch, shared]``, rows to count, or None for all.
            sharing: ``"reduce"`` averages the positions of an example first.
            dtype: arithmetic and result.
        """
        return second_moment(self.input_rows(x.to(dtype)), keep, "mean" if sharing == "reduce" else None)

    def output_moment(self, gradient: Tensor, keep: Tensor | None, sharing: WeightSharing, dtype: torch.dtype) -> Tensor:
        r"""Sum over rows of :math:`g g^\top`, ``[groups, out_dim, out_dim]``; ``"reduce"`` sums positions first."""
        return second_moment(self.output_rows(gradient.to(dtype)), keep, "sum" if sharing == "reduce" else None)

    def input_moment_rows(self, x: Tensor, keep: Tensor | None, sharing: WeightSharing, dtype: torch.dtype) -> MomentRows | None:
        """:meth:`input_moment` by slices of its rows, where that spares writing it as a whole; else None."""
        return None

    def input_block_moments(
        self, x: Tensor, keep: Tensor | None, sharing: WeightSharing, dtype: torch.dtype, ranges: Ranges
    ) -> list[Tensor]:
        """Diagonal blocks of :meth:`input_moment` over these ranges of features, without the rest of it."""
        rows = pooled_rows(self.input_rows(x.to(dtype)), keep, "mean" if sharing == "reduce" else None)
        return [gram(rows[..., start:end].mT) for start, end in ranges]

    def output_block_moments(
        self, gradient: Tensor, keep: Tensor | None, sharing: WeightSharing, dtype: torch.dtype, ranges: Ranges
    ) -> list[Tensor]:
        """Diagonal blocks of :meth:`output_moment` over these ranges of features."""
        rows = pooled_rows(self.output_rows(gradient.to(dtype)), keep, "sum" if sharing == "reduce" else None)
        return [gram(rows[..., start:end].mT) for start, end in ranges]

    def input_square(self, x: Tensor, keep: Tensor | None, sharing: WeightSharing, dtype: torch.dtype) -> Tensor:
        """Diagonal of :meth:`input_moment`, ``[groups, in_dim]``, without the matrix."""
        return second_moment_diagonal(self.input_rows(x.to(dtype)), keep, "mean" if sharing == "reduce" else None)

    def output_square(self, gradient: Tensor, keep: Tensor | None, sharing: WeightSharing, dtype: torch.dtype) -> Tensor:
        """Diagonal of :meth:`output_moment`, ``[groups, out_dim]``, without the matrix."""
        return second_moment_diagonal(self.output_rows(gradient.to(dtype)), keep, "sum" if sharing == "reduce" else None)


def second_moment(rows: Tensor, keep: Tensor | None = None, pool: Literal["mean", "sum"] | None = None) -> Tensor:
    """Sum of outer products of the rows ``[groups, batch, shared, features]``: ``[groups, features, features]``.

    ``keep`` (bool ``[batch, shared]`` or with groups in front) picks rows; ``pool`` joins the positions of an example first.
    """
    return gram(pooled_rows(rows, keep, pool).mT)


def gram(columns: Tensor) -> Tensor:
    """``C Cᵀ`` of ``[groups, features, rows]``: symmetric ``[groups, features, features]``."""
    if columns.shape[0] == 1:
        return outer_gram(columns[0].contiguous()).unsqueeze(0)
    return columns @ columns.mT


def second_moment_diagonal(rows: Tensor, keep: Tensor | None = None, pool: Literal["mean", "sum"] | None = None) -> Tensor:
    """Diagonal of :func:`second_moment`: ``[groups, features]``."""
    return pooled_rows(rows, keep, pool).square().sum(-2)


def pooled_rows(rows: Tensor, keep: Tensor | None, pool: Literal["mean", "sum"] | None) -> Tensor:
    """``[groups, number of rows, features]``: kept rows, or one row per example when positions are pooled."""
    if keep is not None:
        rows = rows * keep.unsqueeze(-1).to(rows.dtype)
    if pool is None:
        return rows.flatten(1, 2)
    summed = rows.sum(2)
    if pool == "sum":
        return summed
    if keep is None:
        return summed / rows.shape[2]
    return summed / keep.sum(-1).clamp_min(1).unsqueeze(-1)


_ADAPTERS: dict[type[nn.Module], type[LayerAdapter]] = {}
_MATCHERS: list[tuple[Callable[[nn.Module], bool], type[LayerAdapter]]] = []
Adapter = TypeVar("Adapter", bound=type[LayerAdapter])


def register_layer(
    *module_types: type[nn.Module], matches: Callable[[nn.Module], bool] | None = None
) -> Callable[[Adapter], Adapter]:
    """Class decorator: use this adapter for these module types and their subclasses.

    Args:
        module_types: found along the module's ``__mro__``, the nearest first, so that a subclass or a class
            renamed by a wrapper finds the adapter of its base.
        matches: instead of types, a predicate on the module, asked when no type matched: for layers of
            libraries that must not be imported here.

    >>> from kfac_opt.layers.linear import LinearAdapter
    >>> class Gain(nn.Linear): ...
    >>> @register_layer(Gain)
    ... class GainAdapter(LinearAdapter): ...
    >>> find_adapter(Gain(2, 3)).__name__
    'GainAdapter'
    """

    def decorate(adapter: Adapter) -> Adapter:
        for module_type in module_types:
            _ADAPTERS[module_type] = adapter
        if matches is not None:
            _MATCHERS.append((matches, adapter))
        return adapter

    return decorate


def find_adapter(module: nn.Module) -> type[LayerAdapter] | None:
    """The adapter class for this module, or None."""
    for base in type(module).__mro__:
        if base in _ADAPTERS:
            return _ADAPTERS[base]
    for matches, adapter in _MATCHERS:
        if matches(module):
            return adapter
    return None


def has_own_forward(module: nn.Module) -> bool:
    """Whether the module's forward is another one than that of the class whose adapter it uses."""
    for base in type(module).__mro__:
        if base in _ADAPTERS:
            return type(module).forward is not base.forward or "forward" in vars(module)
    return False


def append_one(rows: Tensor) -> Tensor:
    """Homogeneous coordinate: a last feature that is 1."""
    return torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], dim=-1)
