"""Symmetric matrices kept as row panels of one triangle: little more than half the memory, no copies row by row.

The rows are cut into ranges; of each the part left of the diagonal block and the diagonal block itself are kept, both
contiguous. Inverses are multiplied as they are, in few panels (9/16 of the matrix); factors, which are only averaged
and read, are cut finer (33/64). Moving 4608 × 4608 takes a few large copies instead of 4608 small ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kfac_opt._kernels.products import times_transposed

NUM_PANELS = 8  # of inverses
FACTOR_PANELS = 32
PANEL_DIM = 1100  # smaller inverses are kept whole: 128 × 1153 times 1153 × 1153 takes 2.6 ms in panels, 1.7 whole


def panel_ranges(n: int, number: int) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of each panel."""
    size = -(-n // number)
    for start in range(0, n, size):
        yield start, min(start + size, n)


def panel_size(n: int, number: int = NUM_PANELS) -> int:
    """Numbers kept of an ``n × n`` matrix."""
    return sum((end - start) * end for start, end in panel_ranges(n, number))


def panels(packed: Tensor, n: int, number: int = NUM_PANELS) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """``(start, end, left [end − start, start], diagonal [end − start, end − start])``: views of ``packed [size]``."""
    position = 0
    for start, end in panel_ranges(n, number):
        rows = end - start
        left = packed[position : position + rows * start].view(rows, start)
        position += rows * start
        diagonal = packed[position : position + rows * rows].view(rows, rows)
        position += rows * rows
        yield start, end, left, diagonal


def pack_panels_(packed: Tensor, matrix: Tensor, number: int = NUM_PANELS) -> None:
    """Writes symmetric ``[groups, n, n]`` matrices into ``packed [groups, panel_size(n)]``, cast to its dtype."""
    for one, whole in zip(packed, matrix):
        for start, end, left, diagonal in panels(one, whole.shape[-1], number):
            left.copy_(whole[start:end, :start])
            diagonal.copy_(whole[start:end, start:end])


def pack_lower_(packed: Tensor, matrix: Tensor, number: int = NUM_PANELS) -> None:
    """:func:`pack_panels_` of one ``[n, n]`` matrix of which only the lower triangle holds anything."""
    for start, end, left, diagonal in panels(packed, matrix.shape[-1], number):
        left.copy_(matrix[start:end, :start])
        lower = matrix[start:end, start:end].tril()
        diagonal.copy_(lower.add_(lower.tril(-1).mT))


def unpack_lower_(matrix: Tensor, packed: Tensor, number: int, divisor: float) -> None:
    """Writes the panels over ``divisor`` into ``matrix [n, n]``: lower triangle and diagonal blocks."""
    for start, end, left, diagonal in panels(packed, matrix.shape[-1], number):
        torch.div(left, divisor, out=matrix[start:end, :start])
        torch.div(diagonal, divisor, out=matrix[start:end, start:end])


def panel_diagonal(packed: Tensor, n: int) -> Tensor:
    """Diagonal ``[groups, n]`` of what is kept in ``FACTOR_PANELS`` panels."""
    parts = [[diagonal.diagonal() for *_, diagonal in panels(one, n, FACTOR_PANELS)] for one in packed]
    return torch.stack([torch.cat(part) for part in parts])


def unpack_panels(packed: Tensor, n: int, number: int = NUM_PANELS) -> Tensor:
    """The symmetric ``[groups, n, n]`` matrices."""
    whole = packed.new_empty(packed.shape[0], n, n)
    for one, target in zip(packed, whole):
        for start, end, left, diagonal in panels(one, n, number):
            target[start:end, :start] = left
            target[:start, start:end] = left.mT
            target[start:end, start:end] = diagonal
    return whole


def panels_times_vector(packed: Tensor, vector: Tensor) -> Tensor:
    """The symmetric matrix kept in ``FACTOR_PANELS`` panels ``packed [size]`` times ``vector [n]``."""
    result = torch.zeros_like(vector)
    for start, end, left, diagonal in panels(packed, vector.shape[0], FACTOR_PANELS):
        result[start:end] += left @ vector[:start] + diagonal @ vector[start:end]
        result[:start] += left.mT @ vector[start:end]
    return result


def times_panels(matrix: Tensor, packed: Tensor) -> Tensor:
    """``matrix [m, n]`` times the symmetric ``n × n`` matrix kept in ``packed [size]``."""
    result = torch.empty_like(matrix)
    for start, end, left, diagonal in panels(packed, matrix.shape[-1]):
        here = matrix[:, start:end].contiguous()
        result[:, start:end] = times_transposed(here, diagonal)
        if start:
            result[:, start:end].add_(times_transposed(matrix[:, :start].contiguous(), left))
            result[:, :start].add_(times_transposed(here, left.mT))
    return result
