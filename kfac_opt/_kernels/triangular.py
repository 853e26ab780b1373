"""Inverse of one large symmetric matrix within its own memory, nearly all of it products of large blocks.

Cholesky factor ``L``, its inverse ``V = L⁻¹`` and ``A⁻¹ = Vᵀ V``, each by recursive halving: LAPACK's own are limited by
the vectors of its library. Everything happens in the lower triangle of one matrix, which the caller can use again for the
next: fresh memory has to be mapped page by page, which took a third to a half of the time before (4608 × 4608). The work
space of the products, at most three eighths of the matrix, is small enough for the C library to keep.

All functions take views of the same matrix; ``lower`` is square with zeros above the diagonal within its smallest blocks
and anything above those.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kfac_opt._kernels.products import times_transposed

LEAF_DIM = 256  # smallest blocks, handled by LAPACK
STRIP_DIM = 64  # rows transposed at a time: 2304 × 2304 6 ms instead of 19


def invert_lower_(matrix: Tensor) -> Tensor:
    """Replaces a symmetric positive definite ``[n, n]`` by its inverse; reads and writes the lower triangle of blocks.

    Returns:
        0-dim bool: whether it failed; the matrix then holds nothing of use.
    """
    failed = _invert_root_(matrix)
    _gram_(matrix)
    return failed | ~torch.isfinite(matrix.diagonal().sum())


def mirror_lower_(matrix: Tensor) -> Tensor:
    """Copies the lower triangle of a square matrix onto the upper one, block by block."""
    n = matrix.shape[0]
    for start in range(0, n, LEAF_DIM):
        end = min(start + LEAF_DIM, n)
        matrix[:start, start:end].copy_(matrix[start:end, :start].mT)
        diagonal = matrix[start:end, start:end]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).mT)
    return matrix


def _invert_root_(matrix: Tensor) -> Tensor:
    """``A`` becomes ``L⁻¹``, with ``A = L Lᵀ``; returns whether that failed."""
    n = matrix.shape[0]
    if n <= LEAF_DIM:
        triangle, info = torch.linalg.cholesky_ex(matrix)
        identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(triangle, identity, upper=False))
        return info != 0
    half = middle(n)
    first, below, second = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    failed = _invert_root_(first)
    _times_transposed_lower_(below, first)  # L21 = A21 L11⁻ᵀ
    _add_gram_(second, below.contiguous(), -1.0)
    failed = failed | _invert_root_(second)
    _lower_times_(second, below)
    _times_lower_(below, first)
    below.neg_()  # −L22⁻¹ L21 L11⁻¹
    return failed


def _gram_(lower: Tensor) -> None:
    """``V`` becomes ``Vᵀ V``."""
    n = lower.shape[0]
    if n <= LEAF_DIM:
        transposed = lower.mT.contiguous()
        lower.copy_(times_transposed(transposed, transposed))
        return
    half = middle(n)
    first, below, second = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _gram_(first)
    _add_gram_(first, _transposed(below), 1.0)
    _transposed_lower_times_(second, below)
    _gram_(second)


def _add_gram_(target: Tensor, rows: Tensor, sign: float) -> None:
    """Adds ``± R Rᵀ`` to the lower triangle of blocks."""
    for start in range(0, rows.shape[0], LEAF_DIM):
        end = min(start + LEAF_DIM, rows.shape[0])
        target[start:end, :end].add_(times_transposed(rows[start:end], rows[:end]), alpha=sign)


def _times_transposed_lower_(x: Tensor, lower: Tensor) -> None:
    """``X ← X Lᵀ``."""
    n = lower.shape[0]
    if n <= LEAF_DIM:
        x.copy_(_product(x, lower))
        return
    half = middle(n)
    _times_transposed_lower_(x[:, half:], lower[half:, half:])
    x[:, half:].add_(_product(x[:, :half], lower[half:, :half]))
    _times_transposed_lower_(x[:, :half], lower[:half, :half])


def _times_lower_(x: Tensor, lower: Tensor) -> None:
    """``X ← X L``."""
    n = lower.shape[0]
    if n <= LEAF_DIM:
        x.copy_(_product(x, lower.mT))
        return
    half = middle(n)
    _times_lower_(x[:, :half], lower[:half, :half])
    x[:, :half].add_(_product(x[:, half:], lower[half:, :half].mT))
    _times_lower_(x[:, half:], lower[half:, half:])


def _lower_times_(lower: Tensor, x: Tensor) -> None:
    """``X ← L X``."""
    n = lower.shape[0]
    if n <= LEAF_DIM:
        x.copy_(_product(lower, x.mT))
        return
    half = middle(n)
    _lower_times_(lower[half:, half:], x[half:])
    x[half:].add_(_product(lower[half:, :half], x[:half].mT))
    _lower_times_(lower[:half, :half], x[:half])


def _transposed_lower_times_(lower: Tensor, x: Tensor) -> None:
    """``X ← Lᵀ X``."""
    n = lower.shape[0]
    if n <= LEAF_DIM:
        x.copy_(_product(lower.mT, x.mT))
        return
    half = middle(n)
    _transposed_lower_times_(lower[:half, :half], x[:half])
    x[:half].add_(_product(lower[half:, :half].mT, x[half:].mT))
    _transposed_lower_times_(lower[half:, half:], x[half:])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ rightᵀ`` of views of a larger matrix, which the fast product wants without gaps."""
    if left.stride(-1) != 1:
        left = _transposed(left.mT)
    right = right.contiguous() if right.stride(-1) == 1 else right.mT.contiguous().mT
    return times_transposed(left.contiguous(), right)


def _transposed(matrix: Tensor) -> Tensor:
    """A contiguous ``matrixᵀ``, copied in strips that stay in the cache."""
    result = matrix.new_empty(matrix.shape[1], matrix.shape[0])
    for start in range(0, matrix.shape[0], STRIP_DIM):
        end = start + STRIP_DIM
        result[:, start:end].copy_(matrix[start:end].mT)
    return result


def middle(n: int) -> int:
    """Where to cut: about the middle, at a multiple of 64 for large matrices."""
    return (n // 2 + 63) // 64 * 64 if n > 128 else n // 2
