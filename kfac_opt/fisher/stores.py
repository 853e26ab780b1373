r"""Rows of the Fisher matrix of one block and some examples, as rows or as factors.

With :math:`u_{nk} = J_n^\top r_{nk}` the Fisher matrix is :math:`F = \frac1N \sum_{nk} u_{nk} u_{nk}^\top`. For a
linear map on inputs ``a`` with output gradients ``g``, :math:`u_{nk} = \sum_s g_{nks} a_{ns}^\top`, and products with
``F`` need only ``a`` and ``g``: no pass through the network and no row ever written out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from kfac_opt.fisher.blocks import ParameterBlock


class Store(ABC):
    """``rows [examples · columns, size]`` of one block, in whatever form."""

    examples: int
    columns: int

    @abstractmethod
    def project(self, vectors: Tensor) -> Tensor:
        """``U V``: ``[size, q]`` to ``[examples, columns, q]``."""

    @abstractmethod
    def expand(self, coefficients: Tensor) -> Tensor:
        """``Uᵀ S``: ``[examples, columns, q]`` to ``[size, q]``."""

    @abstractmethod
    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of the examples ``start`` to ``stop``: ``[(stop - start) · columns, size]``."""

    @abstractmethod
    def squares(self) -> Tensor:
        """Squared norms of the rows, ``[examples, columns]``."""

    @abstractmethod
    def gram(self, other: Store) -> Tensor:
        """``U U'ᵀ``: ``[examples · columns, examples' · columns']``."""

    @abstractmethod
    def joined(self, others: list[Store]) -> Store:
        """One store for the examples of this and the others, in order."""

    @abstractmethod
    def fits(self, other: Store) -> bool:
        """Whether :meth:`joined` can take ``other``: same form, columns and positions."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory in use."""

    @property
    def example_work(self) -> int:
        """Bytes of intermediate values that a product with one vector needs per example."""
        return 0

    def row_slices(self, max_bytes: int) -> Iterator[Tensor]:
        """All rows, a few examples at a time."""
        first = self.rows(0, 1)
        step = max(1, max_bytes // max(1, first.numel() * first.element_size()))
        for start in range(0, self.examples, step):
            yield self.rows(start, min(start + step, self.examples))


class RowStore(Store):
    """The rows themselves, ``[examples, columns, size]``."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.examples, self.columns, self.size = values.shape

    def project(self, vectors: Tensor) -> Tensor:
        # With the rows on the right a product with ten vectors takes half (here) and a sixth (expand) of the time.
        return (vectors.mT.contiguous() @ self.values.flatten(0, 1).mT).mT.reshape(self.examples, self.columns, -1)

    def expand(self, coefficients: Tensor) -> Tensor:
        return (coefficients.flatten(0, 1).mT.contiguous() @ self.values.flatten(0, 1)).mT

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.values[start:stop].flatten(0, 1)

    def squares(self) -> Tensor:
        return self.values.square().sum(-1)

    def gram(self, other: Store) -> Tensor:
        return self.rows() @ other.rows().mT

    def fits(self, other: Store) -> bool:
        return isinstance(other, RowStore) and other.columns == self.columns

    def joined(self, others: list[Store]) -> Store:
        return RowStore(torch.cat([self.values, *(other.values for other in others if isinstance(other, RowStore))]))

    @property
    def nbytes(self) -> int:
        return self.values.numel() * self.values.element_size()


class FactorStore(Store):
    """Inputs and output gradients of a layer.

    Args:
        block: whose adapter lays vectors into matrices.
        inputs: ``[groups, examples, shared, in_dim]``.
        gradients: ``[groups, examples, columns, shared, out_dim]``.
        work_bytes: memory that one product may use for intermediate values.
    """

    def __init__(self, block: ParameterBlock, inputs: Tensor, gradients: Tensor, work_bytes: int) -> None:
        self.block, self.inputs, self.gradients, self.work_bytes = block, inputs, gradients, work_bytes
        _, self.examples, self.columns, self.shared, _ = gradients.shape

    def project(self, vectors: Tensor) -> Tensor:
        matrices = self.block.to_matrix(vectors.mT)  # [q, groups, out, in]
        pieces = [self._project(piece) for piece in matrices.split(self._width())]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def _project(self, matrices: Tensor) -> Tensor:
        if self.shared == 1:
            # [groups, examples, q, out], then the inner product with every column's gradient
            mapped = torch.einsum("gbi,qgoi->gbqo", self.inputs[:, :, 0], matrices)
            return (self.gradients[:, :, :, 0] @ mapped.mT).sum(0)
        mapped = torch.einsum("gbsi,qgoi->gbsoq", self.inputs, matrices)
        return (self.gradients.flatten(3) @ mapped.flatten(2, 3)).sum(0)

    def expand(self, coefficients: Tensor) -> Tensor:
        pieces = [self._expand(piece) for piece in coefficients.split(self._width(), dim=-1)]
        return torch.cat(pieces).mT

    def _expand(self, coefficients: Tensor) -> Tensor:
        weights = coefficients.mT.to(self.gradients.dtype)  # [examples, q, columns]
        mixed = weights @ self.gradients.flatten(3)  # [groups, examples, q, shared · out]
        mixed = mixed.reshape(*mixed.shape[:3], self.shared, self.gradients.shape[-1])
        matrices = torch.einsum("gbqso,gbsi->qgoi", mixed, self.inputs)
        return self.block.to_vectors(matrices)

    def _width(self) -> int:
        """Vectors per product so that the mapped inputs stay within the working memory."""
        return max(1, self.work_bytes // max(1, self.examples * self.example_work))

    @property
    def example_work(self) -> int:
        groups, _, _, shared, out_dim = self.gradients.shape
        return 2 * groups * shared * out_dim * self.gradients.element_size()

    def fits(self, other: Store) -> bool:
        return isinstance(other, FactorStore) and (other.columns, other.shared) == (self.columns, self.shared)

    def joined(self, others: list[Store]) -> Store:
        same = [self, *(other for other in others if isinstance(other, FactorStore))]
        inputs = torch.cat([store.inputs for store in same], dim=1)
        return FactorStore(self.block, inputs, torch.cat([store.gradients for store in same], dim=1), self.work_bytes)

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        a, g = self.inputs[:, start:stop], self.gradients[:, start:stop]
        matrices = torch.einsum("gbkso,gbsi->bkgoi", g, a)
        return self.block.to_vectors(matrices.flatten(0, 1))

    def squares(self) -> Tensor:
        if self.shared == 1:
            norms = self.inputs[:, :, 0].square().sum(-1).unsqueeze(-1) * self.gradients[:, :, :, 0].square().sum(-1)
            return norms.sum(0)
        parts = [rows.square().sum(-1) for rows in self.row_slices(self.work_bytes // 2)]
        return torch.cat(parts).reshape(self.examples, self.columns)

    def gram(self, other: Store) -> Tensor:
        if isinstance(other, FactorStore) and self.shared == other.shared == 1:
            total = self.gradients.new_zeros(self.examples * self.columns, other.examples * other.columns)
            for a, g, a_other, g_other in zip(self.inputs, self.gradients, other.inputs, other.gradients):
                inner = a[:, 0] @ a_other[:, 0].mT
                outer = (g[:, :, 0].flatten(0, 1) @ g_other[:, :, 0].flatten(0, 1).mT).reshape(
                    self.examples, self.columns, other.examples, other.columns
                )
                total += (outer * inner[:, None, :, None]).reshape(total.shape)
            return total
        half = self.work_bytes // 4
        return torch.cat(
            [torch.cat([mine @ theirs.mT for theirs in other.row_slices(half)], 1) for mine in self.row_slices(half)]
        )

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in (self.inputs, self.gradients))
