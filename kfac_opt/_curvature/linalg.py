"""Dense linear algebra on Kronecker factors: damped inverses that do not fail, eigenbases, packed triangles.

Everything here takes tensors and returns tensors; batches of matrices are leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from kfac_opt._kernels.products import onednn_is_faster
from kfac_opt._kernels.triangular import invert_lower_, mirror_lower_

LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

# fp32 Cholesky returns garbage without an error on a rank-deficient factor at relative damping 1e-5;
# from 1e-4 of the mean eigenvalue upwards it is exact to rounding.
FP32_DAMPING_FLOOR = 1e-4
ROOT_ROUNDINGS = 4  # of the largest eigenvalue: what the others are known to

RECURSIVE_DIM = 1024  # from this size on inverses by products of blocks; one core: 2304 135 instead of 214 ms
INDEXED_DIM = 1100  # up to this size triangles are moved by one gather through a cached index


class FactorizationError(RuntimeError):
    """A damped factor could not be inverted by any rung of the ladder."""


def negligible(dtype: torch.dtype) -> float:
    """Mean eigenvalues up to this one count as zero: inverses of such factors leave the range of the dtype (1e-34 in float32)."""
    return 2.0**13 * torch.finfo(dtype).tiny


def mean_diagonal(factor: Tensor) -> Tensor:
    """Mean eigenvalue ``tr X / dim X`` of ``[..., n, n]`` matrices, shape ``[...]``."""
    return factor.diagonal(dim1=-2, dim2=-1).mean(-1)


def symmetrize_(matrix: Tensor) -> Tensor:
    """Replaces ``[..., n, n]`` by the mean of itself and its transpose, in place."""
    return matrix.copy_((matrix + matrix.mT).mul_(0.5))


def damped_inverse(factor: Tensor, damping: Tensor) -> Tensor:
    r"""Inverse :math:`(X + \gamma I)^{-1}` of symmetric positive semi-definite ``[groups, n, n]`` matrices.

    The ladder: in single precision the damping is at least ``FP32_DAMPING_FLOOR`` times the mean
    eigenvalue; Cholesky; for the matrices that failed ten times and a hundred times the damping; last a
    double precision eigendecomposition with the eigenvalues clamped at zero.

    Args:
        factor: ``[groups, n, n]``.
        damping: ``[groups]``, positive.

    Raises:
        FactorizationError: if the last rung failed too, or the factor is not finite.
    """
    if factor.dtype != torch.float64:
        damping = torch.maximum(damping, FP32_DAMPING_FLOOR * mean_diagonal(factor))
    inverse, failed = _cholesky_inverse(factor, damping)
    for multiple in (10.0, 100.0):
        if not bool(failed.any()):  # the one device read of a refresh
            return inverse
        retry, still = _cholesky_inverse(factor[failed], multiple * damping[failed])
        index = failed.nonzero().squeeze(-1)
        inverse[index] = retry
        failed = failed.clone()
        failed[index] = still
    if bool(failed.any()):
        inverse[failed] = _eigen_inverse(factor[failed], damping[failed])
    return inverse


def damped_root(factor: Tensor, damping: Tensor, power: float) -> Tensor:
    r"""Inverse root :math:`(X + \gamma I)^{-p}` of symmetric positive semi-definite matrices, by their eigenvalues.

    Eigenvalues are known to a few roundings of the largest one: in single precision that is the least damping.

    Args:
        factor: ``[groups, n, n]``.
        damping: ``[groups]``, positive.
        power: ``p > 0``; 1 is :func:`damped_inverse`.

    Raises:
        FactorizationError: if a factor is not finite.
    """
    if power == 1.0:
        return damped_inverse(factor, damping)
    values, vectors = eigenbasis(factor)
    if factor.dtype != torch.float64:
        damping = torch.maximum(damping, ROOT_ROUNDINGS * torch.finfo(factor.dtype).eps * values[..., -1])
    roots = to_power(values + damping.unsqueeze(-1), -power)
    return (vectors * roots.unsqueeze(-2)) @ vectors.mT


def to_power(values: Tensor, power: float) -> Tensor:
    """``values ** power``; a square root and its inverse are several times cheaper than a power."""
    if power == -0.5:
        return values.rsqrt()
    return values.reciprocal() if power == -1.0 else values.pow(power)


def damped_inverse_(matrix: Tensor, fill_: Callable[[Tensor], None], damping: Tensor) -> None:
    """:func:`damped_inverse` of one large ``[n, n]`` matrix within its own memory, the lower triangle alone.

    Args:
        matrix: takes the inverse; only its lower triangle is read and written, by blocks.
        fill_: writes the factor into it: once for each rung of the ladder.
        damping: 0-dim, positive.

    Raises:
        FactorizationError: as :func:`damped_inverse`.
    """
    fill_(matrix)
    diagonal = matrix.diagonal()
    if matrix.dtype != torch.float64:
        damping = torch.maximum(damping, FP32_DAMPING_FLOOR * diagonal.mean())
    for multiple in (1.0, 10.0, 100.0):
        if multiple > 1.0:
            fill_(matrix)
        diagonal.add_(multiple * damping)
        if not bool(invert_lower_(matrix)):
            return
    fill_(matrix)
    matrix.copy_(_eigen_inverse(matrix, damping))


def inverts_in_place(factor: Tensor) -> bool:
    """Whether :func:`damped_inverse_` is the way for large matrices like this one."""
    return factor.device.type == "cpu" and onednn_is_faster()


def _cholesky_inverse(factor: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    damped = factor.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    if factor.shape[-1] >= RECURSIVE_DIM and factor.device.type == "cpu" and onednn_is_faster():
        failed = torch.stack([invert_lower_(matrix) for matrix in damped])
        return stacked([mirror_lower_(matrix) for matrix in damped]), failed
    triangle, info = torch.linalg.cholesky_ex(damped)
    diagonal = triangle.diagonal(dim1=-2, dim2=-1)
    failed = (info != 0) | ~torch.isfinite(diagonal.sum(-1))
    diagonal.masked_fill_(diagonal == 0, 1.0)  # of a matrix that failed: cholesky_inverse raises for it, instead of the ladder
    if triangle.shape[0] == 1 or triangle.device.type == "cpu":
        # The batched kernel of cholesky_inverse solves against the identity; for one matrix LAPACK's potri
        # needs half of the operations.
        return stacked([torch.cholesky_inverse(one) for one in triangle]), failed
    return torch.cholesky_inverse(triangle), failed


def stacked(parts: list[Tensor]) -> Tensor:
    """``torch.stack`` without a copy when there is only one."""
    return torch.stack(parts) if len(parts) != 1 else parts[0].unsqueeze(0)


def _eigen_inverse(factor: Tensor, damping: Tensor) -> Tensor:
    values, vectors = eigenbasis(factor.double())
    inverse = (vectors / (values.clamp_min(0.0) + damping.double().unsqueeze(-1)).unsqueeze(-2)) @ vectors.mT
    return inverse.to(factor.dtype)


def eigenbasis(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[..., n]`` (ascending, clamped at zero) and eigenvectors ``[..., n, n]`` (columns).

    A failed decomposition is tried once more in double precision.

    Raises:
        FactorizationError: if the factor is not finite or both tries failed.
    """
    try:
        values, vectors = torch.linalg.eigh(factor)
        if factor.dtype != torch.float64 and not bool(torch.isfinite(values).all()):
            values, vectors = (part.to(factor.dtype) for part in torch.linalg.eigh(factor.double()))
    except LinAlgError:
        try:
            values, vectors = (part.to(factor.dtype) for part in torch.linalg.eigh(factor.double()))
        except LinAlgError as error:
            raise FactorizationError("the eigendecomposition failed in double precision as well") from error
    if not bool(torch.isfinite(values).all()):
        raise FactorizationError("the factor has entries that are not finite")
    return values.clamp_min(0.0), vectors


def pi_correction(input_mean: Tensor, output_mean: Tensor) -> Tensor:
    r"""Tikhonov split :math:`\pi = \sqrt{(\mathrm{tr} A/\dim A)/(\mathrm{tr} G/\dim G)}` (Martens & Grosse 2015, §6.3).

    Args:
        input_mean, output_mean: mean eigenvalues of the two factors, any common shape.

    Returns:
        The same shape; 1 where either trace is zero or too small to be inverted, since there is nothing to balance.
    """
    least = negligible(input_mean.dtype)
    usable = (input_mean > least) & (output_mean > least)
    # Roots before the quotient, which may leave the range that its root is in.
    return torch.where(usable, input_mean, 1.0).sqrt() / torch.where(usable, output_mean, 1.0).sqrt()


def split_damped(eigenvalues: Tensor, gamma: Tensor) -> Tensor:
    r"""Eigenvalues of a Kronecker block with the damping split over its factors, from those of the block alone.

    With :math:`s_{ij} = \lambda^G_i \lambda^A_j` the π-split :math:`(\lambda^G_i + \sqrt\gamma/\pi)(\lambda^A_j +
    \pi\sqrt\gamma)` is :math:`s_{ij} + \sqrt{\gamma/\bar s}\,(\bar s_{i\cdot} + \bar s_{\cdot j}) + \gamma`, where bars are
    means: in this form it holds for scales that are no product, those of EKFAC.

    Args:
        eigenvalues: ``[groups, out_dim, in_dim]``, not negative.
        gamma: broadcastable to them, not negative.
    """
    rows, columns = eigenvalues.mean(-1, keepdim=True), eigenvalues.mean(-2, keepdim=True)
    mean = rows.mean(-2, keepdim=True)
    share = torch.where(mean > 0, gamma / torch.where(mean > 0, mean, 1.0), 0.0).sqrt()
    share = torch.where(torch.isfinite(share), share, 0.0)  # curvature that is nothing beside the damping
    return eigenvalues + (share * rows + gamma) + share * columns


def triangle_size(n: int) -> int:
    """Number of entries of one triangle of an ``n × n`` matrix, diagonal included."""
    return n * (n + 1) // 2


def pack_triangle(matrix: Tensor) -> Tensor:
    """Upper triangle of symmetric ``[groups, n, n]`` matrices, row by row: ``[groups, n (n + 1) / 2]``."""
    n = matrix.shape[-1]
    if n <= INDEXED_DIM:
        return matrix.flatten(-2).index_select(-1, _pack_index(n, matrix.device))
    packed = matrix.new_empty(*matrix.shape[:-2], triangle_size(n))
    start = 0
    for row in range(n):  # contiguous copies: an index of n² / 2 entries would cost eight bytes each
        packed[..., start : start + n - row] = matrix[..., row, row:]
        start += n - row
    return packed


def unpack_triangle(packed: Tensor, n: int) -> Tensor:
    """Symmetric ``[groups, n, n]`` matrices from their packed upper triangles."""
    if n <= INDEXED_DIM:
        return packed.index_select(-1, _unpack_index(n, packed.device)).unflatten(-1, (n, n))
    matrix = packed.new_zeros(*packed.shape[:-1], n, n)
    start = 0
    for row in range(n):
        matrix[..., row, row:] = packed[..., start : start + n - row]
        start += n - row
    return matrix + matrix.triu(1).mT


# Cached: at most 4 n² bytes for each size and device. A gather moves 785 × 785 in 0.3-0.5 ms on one core, copying row
# by row takes 3-8 ms, 101 × 101 in 0.005 instead of 0.4 ms.
@lru_cache(maxsize=64)
def _pack_index(n: int, device: torch.device) -> Tensor:
    rows, columns = torch.triu_indices(n, n)
    return (rows * n + columns).int().to(device)


@lru_cache(maxsize=64)
def _unpack_index(n: int, device: torch.device) -> Tensor:
    rows, columns = torch.triu_indices(n, n)
    positions = torch.empty(n, n, dtype=torch.int32)
    positions[rows, columns] = positions[columns, rows] = torch.arange(triangle_size(n), dtype=torch.int32)
    return positions.flatten().to(device)
