"""Lanczos recurrences for symmetric operators: quadrature of the spectral density.

The recurrences are driven from outside: they say on which vectors they need the operator (``vectors``) and are
given the product (``absorb``). One product of a block-diagonal operator can so serve one recurrence per block.
Full re-orthogonalisation, twice: without it the largest eigenvalues come back as copies (Golub & Van Loan, §10.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SNAP_FLOOR = 1e-4
"""Ritz values below this share of the largest are never snapped: near zero they are no single eigenvalues."""
SNAP_RESIDUAL = 1e-6
"""Residual, relative to the largest Ritz value, below which a Ritz value counts as an eigenvalue."""
CHANCE = math.log(1e9)
"""A quadrature weight that a simple eigenvalue has with probability below 1e-9 belongs to a multiple one."""


@dataclass(frozen=True)
class Quadrature:
    r"""Measure :math:`\sum_j w_j \delta(t - \theta_j)` that a recurrence stands for.

    Attributes:
        nodes: Ritz values ``[nodes]``, ascending.
        weights: ``[nodes]``, non-negative, sum to one.
        residuals: ``[nodes]``, norm of :math:`F y - \theta y` for the Ritz vector ``y``.
        num_vectors: starting vectors that the weights are the mean of.
    """

    nodes: Tensor
    weights: Tensor
    residuals: Tensor
    num_vectors: int

    def snapped(self, size: int, mean: float | None = None) -> Quadrature:
        r"""Gives every converged Ritz value its known weight ``1 / size`` and scales the other weights.

        A Ritz value with a small residual *is* an eigenvalue, and a simple eigenvalue of a ``size × size`` matrix
        has the weight ``1 / size``; the random weight that quadrature gives it is only right on average. Values
        whose weight is far too large for a simple eigenvalue (multiple ones) are left alone.

        With the exact ``mean`` eigenvalue (the trace is cheap to know) the values between the converged ones and
        zero are scaled to meet it, at the cost of those near zero.
        """
        top = float(self.nodes.max()) if self.nodes.numel() else 0.0
        converged = (self.nodes >= SNAP_FLOOR * top) & (self.residuals <= SNAP_RESIDUAL * top) & (self.weights > 0)
        # Upper tail of a chi-square with num_vectors degrees of freedom (Laurent & Massart 2000, Lemma 1).
        tail = 1.0 + 2.0 * math.sqrt(CHANCE / self.num_vectors) + 2.0 * CHANCE / self.num_vectors
        converged &= self.weights <= tail / size
        rest = 1.0 - float(converged.sum()) / size
        loose = float(self.weights[~converged].sum())
        if top <= 0.0 or rest < 0.0 or (loose <= 0.0) != (rest <= 1e-12):
            return self  # more converged values than eigenvalues, or nothing that could take the rest
        scaled = self.weights * (rest / loose if loose > 0.0 else 0.0)
        weights = torch.where(converged, torch.full_like(self.weights, 1.0 / size), scaled)
        weights = weights / weights.sum()
        if mean is not None:
            weights = _with_mean(self.nodes, weights, converged, mean)
        return Quadrature(self.nodes, weights, self.residuals, self.num_vectors)


def _with_mean(nodes: Tensor, weights: Tensor, fixed: Tensor, mean: float) -> Tensor:
    """Scales the weights of the values between ``fixed`` and zero so that the measure has this mean and mass one."""
    low = (nodes < SNAP_FLOOR * nodes.max()) & ~fixed
    free = ~fixed & ~low
    carried, carried_low = (float((weights * nodes)[part].sum()) for part in (free, low))
    mass, mass_low = (float(weights[part].sum()) for part in (free, low))
    determinant = carried * mass_low - carried_low * mass
    if not determinant > 0.0:
        return weights  # nothing between, or nothing near zero that could give way
    missing, missing_mass = mean - float((weights * nodes)[fixed].sum()), 1.0 - float(weights[fixed].sum())
    factor = (missing * mass_low - carried_low * missing_mass) / determinant
    factor_low = (carried * missing_mass - missing * mass) / determinant
    if not (0.5 < factor < 2.0 and factor_low >= 0.0):
        return weights  # too far off to be a correction
    return torch.where(free, weights * factor, torch.where(low, weights * factor_low, weights))


class ProbeLanczos:
    """Independent Lanczos recurrences, one per starting vector, advanced together.

    Args:
        start: ``[n, probes]``, not zero.
        num_steps: products per probe; fewer when ``n`` is smaller or all recurrences break down.
    """

    def __init__(self, start: Tensor, num_steps: int) -> None:
        n, probes = start.shape
        self.num_steps = min(num_steps, n)
        self.basis = start.new_zeros(probes, self.num_steps, n)
        self.current = (start / start.norm(dim=0)).mT.contiguous()  # [probes, n]
        self.diagonal = torch.zeros(probes, self.num_steps, dtype=torch.float64, device=start.device)
        self.off_diagonal = torch.zeros_like(self.diagonal)  # entry j joins steps j and j + 1; the last is the residual
        self.alive = torch.ones(probes, dtype=torch.bool, device=start.device)
        self.scale = torch.zeros(probes, dtype=torch.float64, device=start.device)
        self.step = 0

    @property
    def done(self) -> bool:
        """Whether no further product is needed."""
        return self.step >= self.num_steps or not bool(self.alive.any())

    @property
    def vectors(self) -> Tensor:
        """``[n, probes]``: what the operator has to be applied to; zero columns for finished probes."""
        return self.current.mT

    def absorb(self, product: Tensor) -> None:
        """Takes the operator's product with :attr:`vectors`."""
        self.basis[:, self.step] = self.current
        residual = product.mT.to(self.basis.dtype).clone()
        alpha = (residual * self.current).sum(-1)
        self.diagonal[:, self.step] = torch.where(self.alive, alpha.double(), 0.0)
        known = self.basis[:, : self.step + 1]
        for _ in range(2):
            coefficients = known @ residual.unsqueeze(-1)
            residual -= (known.mT @ coefficients).squeeze(-1)
        beta = residual.norm(dim=-1)
        self.scale = torch.maximum(self.scale, torch.maximum(alpha.abs(), beta).double())
        self.alive = self.alive & (beta.double() > 10.0 * torch.finfo(residual.dtype).eps * self.scale)
        self.off_diagonal[:, self.step] = torch.where(self.alive, beta.double(), 0.0)
        safe = torch.where(self.alive, beta, 1.0).unsqueeze(-1)
        self.current = torch.where(self.alive.unsqueeze(-1), residual / safe, 0.0)
        self.step += 1

    def quadratures(self) -> list[Quadrature]:
        """One measure per probe: nodes are Ritz values, weights the squared first components (Golub & Welsch)."""
        return [self._quadrature(probe) for probe in range(self.diagonal.shape[0])]

    def _quadrature(self, probe: int) -> Quadrature:
        diagonal, joins = self.diagonal[probe, : self.step], self.off_diagonal[probe, : self.step]
        ends = (joins == 0).nonzero()
        length = int(ends[0]) + 1 if len(ends) else self.step  # what lies behind a breakdown is not of this recurrence
        diagonal, joins = diagonal[:length], joins[:length]
        nodes, vectors = torch.linalg.eigh(torch.diag(diagonal) + _joined(joins[:-1]))
        return Quadrature(nodes, vectors[0].square(), (joins[-1] * vectors[-1]).abs(), 1)


class BlockLanczos:
    """One block Lanczos recurrence (Golub & Underwood 1977): sees eigenvalues of multiplicity up to the block size.

    Args:
        start: ``[n, block]``; orthonormalised here. Linearly dependent columns are dropped.
        num_steps: products with a block; fewer when the Krylov space is exhausted.
    """

    def __init__(self, start: Tensor, num_steps: int) -> None:
        first, _ = torch.linalg.qr(start)
        self.num_vectors = first.shape[1]
        self.num_steps = num_steps
        capacity = min(first.shape[0], num_steps * first.shape[1])
        self.basis = start.new_zeros(first.shape[0], capacity)  # [n, columns]
        self.projected = torch.zeros(capacity, capacity, dtype=torch.float64, device=start.device)
        self.current = first
        self.join = torch.zeros(0, first.shape[1], dtype=torch.float64, device=start.device)
        self.size = 0
        self.step = 0
        self.scale = 0.0

    @property
    def done(self) -> bool:
        """Whether no further product is needed."""
        return self.step >= self.num_steps or self.current.shape[1] == 0

    @property
    def vectors(self) -> Tensor:
        """``[n, block]``: what the operator has to be applied to."""
        return self.current

    def absorb(self, product: Tensor) -> None:
        """Takes the operator's product with :attr:`vectors`."""
        start, stop = self.size, self.size + self.current.shape[1]
        self.basis[:, start:stop] = self.current
        residual = product.to(self.basis.dtype).clone()
        square = (self.current.mT @ residual).double()
        self.projected[start:stop, start:stop] = 0.5 * (square + square.mT)
        known = self.basis[:, :stop]
        for _ in range(2):
            residual -= known @ (known.mT @ residual)
        self.scale = max(self.scale, float(square.abs().max()), float(residual.norm(dim=0).max()))
        next_block, join = self._orthonormal(residual, stop)
        if next_block.shape[1] and self.step + 1 < self.num_steps:
            end = stop + next_block.shape[1]
            self.projected[stop:end, start:stop] = join
            self.projected[start:stop, stop:end] = join.mT
        self.current, self.join, self.size, self.step = next_block, join, stop, self.step + 1

    def _orthonormal(self, residual: Tensor, used: int) -> tuple[Tensor, Tensor]:
        """``residual = block @ join`` with orthonormal columns; directions at rounding level are dropped."""
        left, values, right = torch.linalg.svd(residual, full_matrices=False)
        keep = int((values > 10.0 * torch.finfo(residual.dtype).eps * self.scale).sum())
        keep = min(keep, self.basis.shape[1] - used if self.step + 1 < self.num_steps else keep)
        return left[:, :keep].contiguous(), values[:keep, None].double() * right[:keep].double()

    def quadrature(self) -> Quadrature:
        """The mean of the measures of the starting vectors; for a random orthonormal block unbiased."""
        nodes, vectors = torch.linalg.eigh(self.projected[: self.size, : self.size])
        weights = vectors[: self.num_vectors].square().mean(0)
        last = vectors[self.size - self.join.shape[1] :]
        residuals = (self.join @ last).norm(dim=0)
        return Quadrature(nodes, weights / weights.sum(), residuals, self.num_vectors)


class Recurrence(Protocol):
    """What :func:`drive` advances."""

    @property
    def done(self) -> bool:
        """Whether no further product is needed."""
        ...

    @property
    def vectors(self) -> Tensor:
        """What the operator has to be applied to."""
        ...

    def absorb(self, product: Tensor) -> None:
        """Takes the operator's product with :attr:`vectors`."""
        ...


class Operator(Protocol):
    """A symmetric matrix that can only be multiplied with."""

    @property
    def shape(self) -> Sequence[int]:
        """``(n, n)``."""
        ...

    def __matmul__(self, vectors: Tensor) -> Tensor: ...


def drive(recurrences: Mapping[str, Recurrence], slices: Mapping[str, slice], operator: Operator) -> int:
    """Advances all recurrences to their end, each on its own block of a block-diagonal operator.

    One product serves one step of every recurrence.

    Args:
        recurrences: by block name.
        slices: where each block lies in a vector.
        operator: block diagonal with these blocks; one block may be the whole.

    Returns:
        Number of vectors that the operator was applied to.
    """
    count = 0
    while waiting := {name: part for name, part in recurrences.items() if not part.done}:
        pieces = {name: part.vectors for name, part in waiting.items()}
        width = max(piece.shape[1] for piece in pieces.values())
        first = next(iter(pieces.values()))
        joined = first.new_zeros(operator.shape[0], width)
        for name, piece in pieces.items():
            joined[slices[name], : piece.shape[1]] = piece
        product = operator @ joined
        count += width
        for name, part in waiting.items():
            part.absorb(product[slices[name], : pieces[name].shape[1]])
    return count


def _joined(joins: Tensor) -> Tensor:
    return torch.diag(joins, 1) + torch.diag(joins, -1)
