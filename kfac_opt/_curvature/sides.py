"""One side of a Kronecker block: what is kept of its factor, how that is inverted, and how matrices are multiplied by it.

A side is dense, a row of dense diagonal blocks (``max_block_dim``), or a diagonal (``max_factor_dim``, embeddings).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache, partial
from itertools import pairwise

import torch
from torch import Tensor

from kfac_opt._curvature.linalg import (
    damped_inverse_,
    damped_root,
    eigenbasis,
    inverts_in_place,
    pack_triangle,
    stacked,
    to_power,
    triangle_size,
    unpack_triangle,
)
from kfac_opt._kernels.panels import (
    FACTOR_PANELS,
    PANEL_DIM,
    pack_lower_,
    pack_panels_,
    panel_diagonal,
    panel_ranges,
    panel_size,
    panels,
    panels_times_vector,
    times_panels,
    unpack_lower_,
    unpack_panels,
)
from kfac_opt._kernels.products import times_transposed
from kfac_opt._kernels.workspace import square_buffer
from kfac_opt.layers.adapter import MomentRows

PANELS_AT_ONCE = 4  # written together: 576 of 4608 rows, 10 MB


class Side:
    """Shapes and arithmetic of one side; all tensors are passed in.

    Args:
        dim: size of the factor.
        groups: of the layer.
        dense: False keeps the diagonal only.
        max_block_dim: largest diagonal block; None for one block.
        unit: features that stay together (the taps of a channel); what is left over goes with the last ones.

    Attributes:
        ranges: first and last feature (exclusive) of each diagonal block; none for a diagonal.
    """

    def __init__(self, dim: int, groups: int, *, dense: bool, max_block_dim: int | None = None, unit: int = 1) -> None:
        self.dim, self.groups, self.dense = dim, groups, dense
        self.ranges = block_ranges(dim, max_block_dim, unit) if dense else []
        self.sizes = [end - start for start, end in self.ranges]
        self.blocked = len(self.ranges) > 1
        self.packs_at_once = dense and (self.blocked or self.in_panels(dim))

    @staticmethod
    def in_panels(size: int) -> bool:
        """Whether factor and inverse of a block of this size are kept as panels of one triangle."""
        return size >= PANEL_DIM

    # -- shapes -------------------------------------------------------------------------------------------------

    @property
    def sum_shape(self) -> tuple[int, ...]:
        """Of the sums of a pass: large ones are packed at once, for those of all layers wait side by side for the step."""
        if not self.dense:
            return self.groups, self.dim
        return self.factor_shape if self.packs_at_once else (self.groups, self.dim, self.dim)

    @property
    def factor_shape(self) -> tuple[int, int]:
        """Of the average: one triangle of each block, one after the other."""
        return self.groups, sum(map(_factor_size, self.sizes)) if self.dense else self.dim

    @property
    def inverse_shape(self) -> tuple[int, ...]:
        if self.blocked:
            return self.groups, sum(map(_inverse_size, self.sizes))
        if self.dense and self.in_panels(self.dim):
            return self.groups, panel_size(self.dim)
        return (self.groups, self.dim, self.dim) if self.dense else (self.groups, self.dim)

    @property
    def basis_shape(self) -> tuple[int, ...]:
        """Of the eigenvectors of a dense side."""
        return (self.groups, sum(n * n for n in self.sizes)) if self.blocked else (self.groups, self.dim, self.dim)

    def cost(self) -> float:
        """Of a refresh, relative: cubes of the sizes."""
        return float(self.groups * sum(n**3 for n in self.sizes))

    def multiplications(self) -> int:
        """Of one row with the inverse."""
        return sum(n * n for n in self.sizes) if self.dense else self.dim

    # -- the factor ---------------------------------------------------------------------------------------------

    def packed(self, blocks: Iterable[Tensor]) -> Tensor:
        """``factor_shape`` from the diagonal blocks ``[groups, n, n]``."""
        parts = []
        for block in blocks:
            if self.in_panels(block.shape[-1]):
                part = block.new_empty(block.shape[0], panel_size(block.shape[-1], FACTOR_PANELS))
                pack_panels_(part, block, FACTOR_PANELS)
                parts.append(part)
            else:
                parts.append(pack_triangle(block))
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    def packed_rows(self, rows: MomentRows, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """``factor_shape`` of one block in panels, a few of them at a time; None where panels end between units."""
        ranges = list(panel_ranges(self.dim, FACTOR_PANELS))
        if self.blocked or not self.in_panels(self.dim) or any(end % rows.unit for _, end in ranges):
            return None
        packed = torch.empty(self.factor_shape, dtype=dtype, device=device)
        parts = [list(panels(one, self.dim, FACTOR_PANELS)) for one in packed]
        for first in range(0, len(ranges), PANELS_AT_ONCE):
            chosen = ranges[first : first + PANELS_AT_ONCE]
            top, bottom = chosen[0][0], chosen[-1][1]
            slice_ = torch.empty(self.groups, bottom - top, bottom, dtype=dtype, device=device)
            rows.write_(slice_, top, bottom)
            for number, (start, end) in enumerate(chosen, start=first):
                for group, one in enumerate(slice_[:, start - top : end - top]):
                    _, _, left, diagonal = parts[group][number]
                    left.copy_(one[:, :start])
                    diagonal.copy_(one[:, start:end])
        return packed

    def unpacked(self, factor: Tensor) -> list[Tensor]:
        """The diagonal blocks ``[groups, n, n]``, new tensors."""
        parts = factor.split(list(map(_factor_size, self.sizes)), dim=-1)
        return [_unpacked(part, n) for part, n in zip(parts, self.sizes)]

    def whole(self, blocks: list[Tensor]) -> Tensor:
        """``[groups, dim, dim]`` with these blocks on its diagonal."""
        if len(blocks) == 1:
            return blocks[0]
        matrix = blocks[0].new_zeros(self.groups, self.dim, self.dim)
        for (start, end), block in zip(self.ranges, blocks):
            matrix[:, start:end, start:end] = block
        return matrix

    def diagonal(self, factor: Tensor) -> Tensor:
        """``[groups, dim]`` of what is kept."""
        if not self.dense:
            return factor
        parts = factor.split(list(map(_factor_size, self.sizes)), dim=-1)
        found = [
            panel_diagonal(part, n) if self.in_panels(n) else part.index_select(-1, _row_starts(n, part.device))
            for part, n in zip(parts, self.sizes)
        ]
        return torch.cat(found, dim=-1) if len(found) > 1 else found[0]

    def times_vector(self, factor: Tensor, vector: Tensor) -> Tensor:
        """``X v`` for ``factor_shape`` and ``vector [dim]``: ``[groups, dim]``."""
        if not self.dense:
            return factor * vector
        found = []
        for part, n, (start, end) in zip(factor.split(list(map(_factor_size, self.sizes)), dim=-1), self.sizes, self.ranges):
            piece = vector[start:end]
            if self.in_panels(n):
                found.append(stacked([panels_times_vector(one, piece) for one in part]))
            else:
                found.append(unpack_triangle(part, n) @ piece)
        return torch.cat(found, dim=-1)

    # -- refresh ------------------------------------------------------------------------------------------------

    def inverses(
        self,
        factor: Tensor,
        weight: Tensor,
        damping: Tensor,
        dtype: torch.dtype,
        into: Tensor | None = None,
        *,
        power: float = 1.0,
    ) -> list[Tensor]:
        """``(X / w + γ)^(-power)`` of each block.

        Args:
            factor: ``factor_shape``.
            weight, damping: ``[groups]``; a weight of infinity takes the factor for zero.
            dtype: of results in panels.
            into: ``inverse_shape``; a side that is one matrix in panels is written there, once nothing can fail any more.

        Returns:
            Blocks ``[groups, n, n]``, those in panels as ``[groups, panel_size(n)]``, a diagonal as ``[groups, dim]``;
            nothing where it went into ``into``.
        """
        if not self.dense:
            return [to_power(factor / weight.unsqueeze(-1) + damping.unsqueeze(-1), -power)]
        found = []
        for part, n in zip(factor.split(list(map(_factor_size, self.sizes)), dim=-1), self.sizes):
            if power != 1.0 or not (self.in_panels(n) and inverts_in_place(factor)):
                found.append(damped_root(_unpacked(part, n).div_(weight.reshape(-1, 1, 1)), damping, power))
                continue
            at_once = into is not None and not self.blocked and self.groups == 1
            target = into if at_once else part.new_empty(self.groups, panel_size(n), dtype=dtype)
            assert target is not None
            matrix = square_buffer(n, part.dtype)
            for group, one in enumerate(part):
                fill_ = partial(unpack_lower_, packed=one, number=FACTOR_PANELS, divisor=float(weight[group]))
                damped_inverse_(matrix, fill_, damping[group])
                pack_lower_(target[group], matrix)
            if not at_once:
                found.append(target)
        return found

    def put_inverses_(self, inverse: Tensor, found: list[Tensor]) -> None:
        """Writes what :meth:`inverses` found into ``inverse_shape``, cast to its dtype."""
        if not self.blocked:
            parts = [inverse]
        else:
            parts = list(inverse.split(list(map(_inverse_size, self.sizes)), dim=-1))
        for part, block in zip(parts, found):
            if self.dense and block.dim() == 3 and self.in_panels(block.shape[-1]):
                pack_panels_(part, block)
            else:
                part.copy_(block.reshape(part.shape))

    def eigen(self, blocks: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``[groups, dim]`` and eigenvectors in ``basis_shape`` of a dense side."""
        values, vectors = zip(*map(eigenbasis, blocks))
        if not self.blocked:
            return values[0], vectors[0]
        return torch.cat(values, dim=-1), torch.cat([part.flatten(-2) for part in vectors], dim=-1)

    def basis_blocks(self, basis: Tensor) -> list[Tensor]:
        """Views ``[groups, n, n]`` of the eigenvectors of each block."""
        if not self.blocked:
            return [basis]
        parts = basis.split([n * n for n in self.sizes], dim=-1)
        return [part.unflatten(-1, (n, n)) for part, n in zip(parts, self.sizes)]

    # -- products -----------------------------------------------------------------------------------------------

    def times_inverse(self, matrix: Tensor, inverse: Tensor) -> Tensor:
        """``M X⁻¹`` of ``[groups, m, dim]``, in the dtype of the inverse."""
        if not self.dense:
            return matrix.to(inverse.dtype) * inverse.unsqueeze(-2)
        if not self.blocked:
            return _times_block(matrix.to(inverse.dtype), inverse)
        result = torch.empty_like(matrix, dtype=inverse.dtype)
        parts = inverse.split(list(map(_inverse_size, self.sizes)), dim=-1)
        for (start, end), part in zip(self.ranges, parts):
            here = torch.empty(*matrix.shape[:-1], end - start, dtype=inverse.dtype, device=inverse.device)
            here.copy_(matrix[..., start:end])
            result[..., start:end] = _times_block(here, part if self.in_panels(end - start) else _square(part))
        return result

    def inverse_times(self, inverse: Tensor, matrix: Tensor) -> Tensor:
        """``X⁻¹ M`` of ``[groups, dim, m]``."""
        if not self.dense:
            return matrix * inverse.unsqueeze(-1)
        if not self.blocked:
            return _block_times(inverse, matrix)
        parts = inverse.split(list(map(_inverse_size, self.sizes)), dim=-1)
        rows = [
            _block_times(part if self.in_panels(end - start) else _square(part), matrix[:, start:end])
            for (start, end), part in zip(self.ranges, parts)
        ]
        return torch.cat(rows, dim=1)

    def times_basis(self, matrix: Tensor, basis: Tensor, *, back: bool = False) -> Tensor:
        """``M Q`` of ``[groups, ..., m, dim]``, ``M Qᵀ`` with ``back``."""
        blocks = [block.mT if back else block for block in self.basis_blocks(basis)]
        extra = matrix.dim() - 3
        found = []
        for (start, end), block in zip(self.ranges, blocks):
            block = block.reshape(block.shape[0], *[1] * extra, *block.shape[1:])
            found.append(matrix[..., start:end] @ block)
        return torch.cat(found, dim=-1) if len(found) > 1 else found[0]


def block_ranges(dim: int, limit: int | None, unit: int = 1) -> list[tuple[int, int]]:
    """Even cuts of ``dim`` features into blocks of at most ``limit``, between units of ``unit`` features.

    >>> block_ranges(10, 4)
    [(0, 3), (3, 6), (6, 10)]
    >>> block_ranges(19, 6, unit=3)
    [(0, 6), (6, 12), (12, 19)]
    """
    if limit is None or dim <= limit:
        return [(0, dim)]
    units = dim // unit
    number = -(-units // max(1, limit // unit))
    cuts = [unit * (units * index // number) for index in range(number)] + [dim]
    return list(pairwise(cuts))


def _unpacked(part: Tensor, n: int) -> Tensor:
    return unpack_panels(part, n, FACTOR_PANELS) if Side.in_panels(n) else unpack_triangle(part, n)


def _factor_size(n: int) -> int:
    return panel_size(n, FACTOR_PANELS) if Side.in_panels(n) else triangle_size(n)


def _inverse_size(n: int) -> int:
    return panel_size(n) if Side.in_panels(n) else n * n


def _square(flat: Tensor) -> Tensor:
    n = round(flat.shape[-1] ** 0.5)
    return flat.unflatten(-1, (n, n))


def _times_block(matrix: Tensor, inverse: Tensor) -> Tensor:
    """``M X⁻¹`` with a whole inverse ``[groups, n, n]`` or its panels ``[groups, size]``."""
    if inverse.dim() == 2:
        return stacked([times_panels(one, packed) for one, packed in zip(matrix, inverse)])
    if matrix.shape[0] > 1:
        return matrix @ inverse
    return times_transposed(matrix[0], inverse[0]).unsqueeze(0)


def _block_times(inverse: Tensor, matrix: Tensor) -> Tensor:
    """``X⁻¹ M``: for panels from the right on the transpose, for inverses are symmetric."""
    if inverse.dim() == 2:
        return _times_block(matrix.mT, inverse).mT
    if matrix.shape[0] > 1:
        return inverse @ matrix
    return times_transposed(inverse[0], matrix[0].mT).unsqueeze(0)


@lru_cache(maxsize=64)
def _row_starts(n: int, device: torch.device) -> Tensor:
    """Where each row of a packed triangle starts: its diagonal."""
    rows = torch.arange(n, device=device)
    return rows * n - rows * (rows - 1) // 2
