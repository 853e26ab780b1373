"""The one form that every curvature block can be brought to: eigenbases and eigenvalues of a Kronecker shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_opt._curvature.linalg import to_power
from kfac_opt._kernels.products import times_transposed


@dataclass(frozen=True)
class SpectralForm:
    r"""A Fisher block :math:`(Q_A \otimes Q_G)\, \mathrm{diag}(\mathrm{vec}\, \lambda)\, (Q_A \otimes Q_G)^\top`.

    It acts on matrices ``[groups, out_dim, in_dim]``, one independent block per group (column-stacking vec).

    Attributes:
        output_basis: ``Q_G [groups, out_dim, out_dim]``, eigenvectors in columns; None is the identity.
        input_basis: ``Q_A [groups, in_dim, in_dim]``; None is the identity.
        eigenvalues: ``λ [groups, out_dim, in_dim]``, non-negative; an outer product for Kronecker blocks, free
            for EKFAC, norm and diagonal blocks.
    """

    output_basis: Tensor | None
    input_basis: Tensor | None
    eigenvalues: Tensor

    def rotate(self, matrix: Tensor) -> Tensor:
        """``Q_Gᵀ M Q_A``: into the eigenbasis."""
        if matrix.dim() == 3 and matrix.shape[0] == 1:
            matrix = matrix[0] if self.input_basis is None else times_transposed(matrix[0], self.input_basis[0].mT)
            return (matrix if self.output_basis is None else self.output_basis[0].mT @ matrix).unsqueeze(0)
        if self.output_basis is not None:
            matrix = self.output_basis.mT @ matrix
        return matrix if self.input_basis is None else matrix @ self.input_basis

    def rotate_back(self, matrix: Tensor) -> Tensor:
        """``Q_G M Q_Aᵀ``: out of the eigenbasis."""
        if matrix.dim() == 3 and matrix.shape[0] == 1:
            return self._rotate_one_back(matrix[0]).unsqueeze(0)
        if self.output_basis is not None:
            matrix = self.output_basis @ matrix
        return matrix if self.input_basis is None else matrix @ self.input_basis.mT

    def _rotate_one_back(self, matrix: Tensor) -> Tensor:
        """The same for one matrix ``[out_dim, in_dim]``, where a faster product may exist."""
        if self.input_basis is not None:
            matrix = times_transposed(matrix, self.input_basis[0])
        return matrix if self.output_basis is None else times_transposed(self.output_basis[0], matrix.mT)

    def solve(self, matrix: Tensor, damping: Tensor | float, power: float = 1.0) -> Tensor:
        r"""``(F + γ I)^(-power) vec M`` as a matrix; ``damping`` γ is broadcast against ``[groups, out_dim, in_dim]``."""
        return self.rotate_back(divided(self.rotate(matrix), self.eigenvalues + damping, power))

    def diagonal(self) -> Tensor:
        """Diagonal of the block, ``[groups, out_dim, in_dim]``."""
        bases = [None if basis is None else basis.square() for basis in (self.output_basis, self.input_basis)]
        return SpectralForm(bases[0], bases[1], self.eigenvalues).rotate_back(self.eigenvalues)

    def dense(self) -> Tensor:
        """``[groups, in_dim · out_dim, in_dim · out_dim]``, column-stacking."""
        groups, out_dim, in_dim = self.eigenvalues.shape
        eye = torch.eye(out_dim * in_dim, dtype=self.eigenvalues.dtype, device=self.eigenvalues.device)
        # Columns of the identity are unit matrices; applying the block to each gives the dense columns.
        units = eye.reshape(-1, 1, in_dim, out_dim).mT.expand(-1, groups, -1, -1)
        columns = self.rotate_back(self.rotate(units) * self.eigenvalues)
        return columns.mT.reshape(out_dim * in_dim, groups, -1).permute(1, 2, 0)


def divided(matrix: Tensor, eigenvalues: Tensor, power: float) -> Tensor:
    """``M / λ^power``, elementwise; ``eigenvalues`` are damped."""
    return matrix / eigenvalues if power == 1.0 else matrix * to_power(eigenvalues, -power)


def dense_of_groups(blocks: Tensor, out_dim: int) -> Tensor:
    """Joins ``[groups, in·out, in·out]`` blocks to the matrix of the whole layer, column-stacking over ``[groups·out, in]``."""
    groups, size, _ = blocks.shape
    in_dim = size // out_dim
    whole = blocks.new_zeros(in_dim, groups, out_dim, in_dim, groups, out_dim)
    for group in range(groups):
        whole[:, group, :, :, group, :] = blocks[group].reshape(in_dim, out_dim, in_dim, out_dim)
    return whole.reshape(groups * size, groups * size)


def two_by_two(block: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[..., 2]`` and eigenvectors ``[..., 2, 2]`` (columns) of symmetric 2×2 matrices, in closed form."""
    a, b, d = block[..., 0, 0], block[..., 0, 1], block[..., 1, 1]
    angle = 0.5 * torch.atan2(2 * b, a - d)
    cos, sin = angle.cos(), angle.sin()
    basis = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    mean, radius = (a + d) / 2, torch.hypot((a - d) / 2, b)
    large = mean + radius
    # det / large instead of mean - radius: no cancellation for nearly singular blocks.
    divisor = torch.where(large > 0, large, 1.0)  # before the products, which vanish for small blocks
    small = (a / divisor) * d - (b / divisor) * b
    return torch.stack([large, small.clamp_min(0.0)], -1), basis


def damped_two_by_two_solve(block: Tensor, damping: Tensor, vectors: Tensor) -> Tensor:
    """``(B + γ I)⁻¹ v`` for positive semi-definite ``B [..., 2, 2]``, 0-dim ``γ > 0`` and ``v [..., 2]``.

    Everything is divided by the larger entry of the damped diagonal first: products of small entries vanish, those of
    large ones overflow. The determinant is at least what the damping makes it, whatever rounding does to that of ``B``.
    """
    a, b, d = block[..., 0, 0], block[..., 0, 1], block[..., 1, 1]
    size = torch.maximum(a, d) + damping
    a, b, d, gamma = a / size, b / size, d / size, damping / size
    determinant = (a * d - b * b).clamp_min(0.0) + gamma * (a + d + gamma)
    first, second = vectors[..., 0] / size, vectors[..., 1] / size
    solved = [((d + gamma) * first - b * second) / determinant, ((a + gamma) * second - b * first) / determinant]
    return torch.stack(solved, dim=-1)
