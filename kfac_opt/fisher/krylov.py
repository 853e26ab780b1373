"""Largest eigenpairs of an operator that can only be multiplied with; driven from outside as the recurrences are."""

from __future__ import annotations

import torch
from torch import Tensor


class TopEigenpairs:
    r"""Largest eigenpairs of a symmetric positive semi-definite operator by block Krylov iteration with restarts.

    Rayleigh-Ritz on a growing space that always takes in the residuals of the wanted pairs; when the space has
    ``max_columns`` columns it is replaced by its best part (thick restart, Wu & Simon 2000).

    Args:
        start: ``[n, block]``, random.
        count: number of pairs.
        tolerance: residual norm relative to the largest eigenvalue at which a pair counts as converged.
        max_columns: bound of the space; memory is ``2 · n · max_columns`` numbers.
        max_products: bound of the number of columns that the operator is applied to.

    Attributes:
        values, pairs: the current eigenvalues ``[count]``, descending, and eigenvectors ``[n, count]``.
    """

    def __init__(self, start: Tensor, count: int, *, tolerance: float, max_columns: int, max_products: int = 2000) -> None:
        n = start.shape[0]
        self.count, self.tolerance, self.max_products = min(count, n), tolerance, max_products
        self.max_columns = min(n, max(max_columns, 2 * self.count + 2))
        self.basis = start.new_zeros(n, self.max_columns)
        self.image = torch.zeros_like(self.basis)
        self.vectors, _ = torch.linalg.qr(start[:, : self.max_columns])
        self.values, self.pairs = start.new_zeros(0), start.new_zeros(n, 0)
        self.used, self.products = 0, 0
        self.done = False

    def absorb(self, product: Tensor) -> None:
        """Takes the operator's product with :attr:`vectors`.

        Raises:
            RuntimeError: not converged after ``max_products``.
        """
        n, width = self.vectors.shape
        self.basis[:, self.used : self.used + width] = self.vectors
        self.image[:, self.used : self.used + width] = product
        self.used, self.products = self.used + width, self.products + width
        space, mapped = self.basis[:, : self.used], self.image[:, : self.used]
        projected = space.mT @ mapped
        values, vectors = torch.linalg.eigh(0.5 * (projected + projected.mT))
        values, vectors = values.flip(0), vectors.flip(1)
        wanted = min(self.count, self.used)
        self.values, self.pairs = values[:wanted].clamp_min(0.0), space @ vectors[:, :wanted]
        residual = mapped @ vectors[:, :wanted] - self.pairs * values[:wanted]
        is_open = residual.norm(dim=0) > self.tolerance * max(float(values[0]), 0.0)
        self.done = self.used >= n or (wanted == self.count and not bool(is_open.any()))
        if self.done:
            return
        if self.products >= self.max_products:
            raise RuntimeError(
                f"top_eigenpairs: {int(is_open.sum())} of {self.count} pairs have a residual above {self.tolerance:g} "
                f"of the largest eigenvalue after {self.products} products. Raise tolerance, or ask for fewer pairs."
            )
        fresh = residual[:, is_open] if bool(is_open.any()) else _random_like(residual[:, :1], self.products)
        if self.used + fresh.shape[1] > self.max_columns:
            kept = min(self.used, max(self.count + 1, self.max_columns // 2))
            self.basis[:, :kept], self.image[:, :kept] = space @ vectors[:, :kept], mapped @ vectors[:, :kept]
            self.used = kept
        fresh = fresh[:, : self.max_columns - self.used]
        self.vectors = _orthogonal_to(fresh, self.basis[:, : self.used], self.products)


def _orthogonal_to(fresh: Tensor, space: Tensor, seed: int) -> Tensor:
    """Orthonormal columns in the complement of ``space``; a random direction when ``fresh`` adds nothing."""
    fresh = fresh / fresh.norm(dim=0).clamp_min(torch.finfo(fresh.dtype).tiny)
    for attempt in range(2):
        for _ in range(2):
            fresh = fresh - space @ (space.mT @ fresh)
        left, values, _ = torch.linalg.svd(fresh, full_matrices=False)
        keep = int((values > 100.0 * torch.finfo(fresh.dtype).eps).sum())
        if keep or attempt:
            break
        fresh = _random_like(fresh[:, :1], seed)
    block = left[:, : max(keep, 1)]
    block = block - space @ (space.mT @ block)
    return torch.linalg.qr(block)[0]


def _random_like(column: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(column.shape, generator=generator, dtype=torch.float64).to(column)
